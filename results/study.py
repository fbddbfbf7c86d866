"""
Studies on the embedded default. Each writes results/NAME.json and prints what it says.

    python -m results.study fidelity     # does the tiny VLM lose what real ones lose? (minutes)
    python -m results.study ranking      # the factor c of throttler.distinct, on validation (an hour)
    python -m results.study ablations    # the method, and the papers' ablations of it (hours)
    python -m results.study objects      # what the kept tokens lie on (a minute)
    python -m results.study positions    # what closing up the kept tokens' positions costs (minutes)
    python -m results.study ceiling      # how far choosing goes, and where it falls short (half an hour)
    python -m results.study gpu          # all that needs a GPU
    python -m results.study report       # RESULTS.md, from all JSON files that are there

A study returns tables {title: {row: {column: cell}}} and sentences, "notes". A cell is text, a
number, or a list with one number for each seed.
"""
import argparse
import copy
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

if not __package__:
    print("error: start it in the folder above, as python -m results.study", file=sys.stderr)
    sys.exit(2)

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.budget import Budget
from common.files import ROOT, InputError, cli, portable, write
from common.pruner import chooser, fingerprint, load_pruner
from data.pictures import read_image
from data.questions import read_questions
from data.shapes.prepare import SPLITS, caption, draw_scene, prepare
from data.shapes.pretrain import scenes_to_learn
from denoiser import Denoiser
from eval.accuracy import accuracies, free_choices, retention, right_or_wrong
from eval.tables import budgets, check, mean, save
from model import add_device_arguments, load
from results.report import report, section
from throttler import Scorer, distinct, select, soft_top_k, whitening
from train import PROMPT, Parts, forward, parse_arguments, temperature, train

TINY, SHIPPED = "data/shapes/llava", ROOT / "data/shapes/pruner"
RECIPE = ("keep", "choose", "steps", "batch", "lr", "seed", "eval_every", "dtype")
WHOLE = {"all": [lambda X, inputs: None]}  # all tokens, as right_or_wrong takes a choice


def embedded(split):
    """The questions of the embedded test or validation scenes."""
    return read_questions(prepare() / f"{split}.jsonl")


def retained(vlm, rows, ways):
    """({way: retention in per cent}, {way: tokens kept for each question}) of ways {way: choose}."""
    choices = WHOLE | {way: [choose] for way, choose in ways.items()}
    right, kept = right_or_wrong(vlm, rows, choices)
    table = accuracies(right, rows)
    return {way: retention(table[way], table["all"]) for way in ways}, kept


def by_kind(table, full):
    """Rows of per cent by kind of question from {way: {kind: accuracy}}, and the retention."""
    rows = {}
    for way, by_category in table.items():
        rows[way] = {category: 100 * share for category, share in by_category.items()}
        rows[way]["retention"] = retention(by_category, full)
    return rows


def supports(claim):
    return "this supports them" if claim else "this does **not** support them"


# --- what the papers compare with -----------------------------------------------------------------

def scale_gate(X, alpha, mean, L, noise=None):
    """alpha·X in place of the noise gate: a denoiser can scale it back, so nothing is lost."""
    return alpha.unsqueeze(-1).to(X.dtype) * X


def gumbel_top_k(scores, K, tau=1.0):
    """A sampled hard top-K of 0 and 1 with the soft one's gradient (straight-through)."""
    uniform = torch.rand_like(scores).clamp_min(1e-20)
    noisy = scores - (-uniform.log()).log()  # s + Gumbel noise
    alpha = soft_top_k(noisy, K, tau)
    hard = torch.zeros_like(alpha).scatter(-1, select(noisy, K), 1.0)
    return hard + alpha - alpha.detach()


def global_denoiser(d_v):
    return Denoiser(d_v, diagonal=False)


def distinct_by(c):
    """throttler.distinct with another factor c."""
    def rank(scores, X):
        return distinct(scores, X, c)
    rank.__name__ = f"distinct, c = {c}"
    return rank


VARIANTS = {  # (--choose, what replaces the parts of the method)
    "ours": ("distinct", Parts()),
    "papers": ("top", Parts()),
    "Gumbel": ("distinct", Parts(top_k=gumbel_top_k, gate=scale_gate)),
    "scale gate": ("distinct", Parts(gate=scale_gate)),
    "global denoiser": ("distinct", Parts(denoiser=global_denoiser)),
}
# DiffPrune's figures (arXiv 2605.28051): retention of LLaVA-1.5-7B at 11 %, less that of the method
PAPERS = {"Gumbel": 87.4 - 95.5, "scale gate": 93.2 - 95.5, "global denoiser": 92.7 - 95.5}


# --- studies that train ---------------------------------------------------------------------------

def trained(args, vlm, variants):
    """Train these variants, each with seeds 0 … n-1: {(variant, seed): folder}.

    What lies in the folder and was made the same way is not trained again.
    """
    folders, weights = {}, fingerprint(vlm.model)
    for name, (choose, parts) in variants.items():
        seeds = args.ablated if name in PAPERS and args.ablated else args.seeds
        for seed in range(seeds):
            folder = args.runs / f"{re.sub('[^A-Za-z0-9]+', '-', name)}-{seed}"
            options = parse_arguments(["--keep", "16", "--seed", str(seed), "--out", str(folder),
                                       "--overwrite", "--questions", "none", "--choose", choose,
                                       "--device", args.device])
            options.steps = args.steps or options.steps
            options.eval_every = max(1, options.steps // 20)
            options.dtype = args.dtype or options.dtype
            recipe = {field: str(getattr(options, field)) for field in RECIPE}
            recipe |= {field: part.__name__ for field, part in vars(parts).items()}
            recipe["weights"] = weights
            note = folder / "variant.json"
            if not note.exists() or json.loads(note.read_text()) != recipe:
                print(f"training {name}, seed {seed}", file=sys.stderr)
                note.unlink(missing_ok=True)
                train(options, parts)
                write(note, recipe)
            folders[name, seed] = folder
    return folders


def ranking(args):
    """Which factor c: trained through the ranking and as the papers do, deployed by several c.

    On validation questions, since it decides.
    """
    vlm, rows = load(TINY, args.device), embedded("validation")
    names = {"ours": "trained through d, c = 4", "papers": "trained as the papers do"}
    folders = trained(args, vlm, {name: VARIANTS[name] for name in names})
    factors, counts, seeds = (0, 2, 3, 4, 5), (32, 16, 8, 4), range(args.seeds)
    X, lies_on = scenes_and_labels(vlm, "validation")
    ways, on_objects = {}, {}
    for (name, seed), folder in folders.items():
        scorer = load_pruner(folder)[0].to(args.device)
        for c in factors:
            for K in counts:
                ways[name, seed, c, K] = choose_by(scorer, c, K)
            keep = ways[name, seed, c, 16](X, None).cpu()
            on_objects[name, seed, c] = 100 * (lies_on.gather(1, keep) == 2).float().mean().item()
    kept, _ = retained(vlm, rows, ways)
    table = {}
    for name, training in names.items():
        for c in factors:
            deployed = f"deployed with c = {c}" if c else "deployed by the scores alone"
            row = {str(K): [kept[name, seed, c, K] for seed in seeds] for K in counts}
            row["on objects at 16"] = [on_objects[name, seed, c] for seed in seeds]
            table[f"{training}; {deployed}"] = row
    return {"tables": {"retention, %, validation questions": table}}


def choose_by(scorer, c, K):
    @torch.no_grad()
    def choose(X, inputs):
        return select(distinct(scorer(X), X, c), K)
    return choose


def ablations(args):
    """The method, the papers' training and the papers' ablations: what each keeps, by budget."""
    vlm, rows = load(TINY, args.device), embedded("test")
    folders = trained(args, vlm, VARIANTS)
    levels = budgets(args.keep or ["48", "32", "16", "8", "4", "~16", "~8"], vlm)
    ways = {}
    for (name, seed), folder in folders.items():
        scorer, settings = load_pruner(folder)
        scorer = scorer.to(args.device)
        for choose in ("distinct", "top"):
            for budget in levels:
                if choose == settings["choose"] or not budget.average:
                    choice, _ = chooser(vlm, scorer, settings, budget, choose=choose)
                    ways[name, seed, choose, str(budget)] = choice
    kept, counts = retained(vlm, rows, ways)
    table, ends, notes = {}, {}, []
    for name in VARIANTS:
        seeds = [seed for variant, seed in folders if variant == name]
        for choose in ("distinct", "top"):
            table[f"{name}, by {choose}"] = {
                str(budget): [kept[name, seed, choose, str(budget)] for seed in seeds]
                if (name, 0, choose, str(budget)) in kept else "–" for budget in levels}
        last = [json.loads((folders[name, seed] / "log.jsonl").read_text().splitlines()[-1])
                for seed in seeds]
        gaps = [run["soft_loss"] - run["deployed_loss"] for run in last]
        ends[name] = {"hardness": [run["hardness"] for run in last],
                      "soft loss": [run["soft_loss"] for run in last],
                      "deployed loss": [run["deployed_loss"] for run in last],
                      "soft - deployed": gaps}
        if name in PAPERS:
            notes.append(against_papers(name, table, PAPERS[name]))
    shapes = {row["image"]: row["label"] for row in rows if row["category"] == "count"}
    way = ("ours", 0, "distinct", "~16")
    if way in counts:
        by_shapes = {}
        for row, K in zip(rows, counts[way]):
            by_shapes.setdefault(shapes[row["image"]], []).append(K)
        listed = ", ".join(f"{mean(by_shapes[n]):.1f} ({n})" for n in sorted(by_shapes))
        notes.append(f"By the number of shapes, the threshold ~16 keeps {listed} tokens (seed 0).")
    return {"tables": {"retention, %, test questions": table, "at the last step": ends},
            "digits": {"at the last step": 4}, "notes": notes}


def against_papers(name, table, theirs):
    """How an ablation differs from the method at 16 tokens, beside the papers' difference."""
    sentences = []
    for choose in ("distinct", "top"):
        this, base = table[f"{name}, by {choose}"]["16"], table[f"ours, by {choose}"]["16"]
        change = mean(this) - mean(base)
        clear = max(this) < min(base) or min(this) > max(base)
        verdict = "one seed"
        if len(this) > 1:
            beyond = "beyond" if clear else "within"
            verdict = f"{beyond} the spread of the seeds: {supports(clear and change * theirs > 0)}"
        sentences.append(f"by {choose} {change:+.1f} points at 16, {verdict}")
    return f"{name}: {'; '.join(sentences)}. The papers have {theirs:+.1f}."


# --- studies that look ----------------------------------------------------------------------------

REAL = {"random": {48: 97.3, 32: 93.6, 16: 86.9}, "diversity": {48: 99.6, 32: 99.2, 16: 97.3}}


def fidelity(args):
    """Choices that learn nothing beside LLaVA-1.5-7B's, and the rule by which the bed was made.

    UniPruneBench, arXiv 2511.02650; on validation questions. No scorer is looked at.
    """
    vlm, rows, ways = load(TINY, args.device), embedded("validation"), dict(WHOLE)
    for budget in budgets(["48", "32", "16", "8", "4"], vlm):
        ways |= free_choices(vlm, budget, args.seeds)
    answered = accuracies(right_or_wrong(vlm, rows, ways)[0], rows)
    full, kept, table = answered.pop("all"), {}, {}
    for name, by_category in answered.items():
        way, K = name.split()
        kept[way, int(K)] = retention(by_category, full)
        real = REAL.get(way, {}).get(int(K))
        theirs = f" (LLaVA {real})" if real else ""
        table.setdefault(way, {})[K] = f"{kept[way, int(K)]:.1f}{theirs}"
    rule = {"diversity at 16 below 98.5": (kept["diversity", 16], kept["diversity", 16] < 98.5)}
    for way, at in REAL.items():
        for K, real in at.items():
            near = abs(kept[way, K] - real) <= 3
            rule[f"{way} at {K} within 3 points of {real}"] = (kept[way, K], near)
    for way in ("CLS", "pooling"):
        above = kept[way, 16] > kept["random", 16]
        rule[f"{way} above random at 16"] = (kept[way, 16], above)
    for category, share in full.items():
        rule[f"{category} with all tokens at least 99"] = (100 * share, share >= 0.99)
    held = {text: {"measured": value, "holds": "yes" if holds else "**no**"}
            for text, (value, holds) in rule.items()}
    count = sum(holds for _, holds in rule.values())
    return {"tables": {"retention, %, validation questions": table, "rule": held},
            "notes": [f"{count} of the {len(rule)} parts of the rule hold."]}


def positions(args):
    """16 tokens at their original positions, and closed up, as servers of embeddings place them."""
    vlm, rows = load(TINY, args.device), embedded("test")
    scorer, settings = load_pruner(SHIPPED)
    closed, budget = copy.copy(vlm), Budget(16)

    def close_up(inputs, X, keep=None):
        sequence = vlm.embed(inputs, X, keep)
        close = (sequence["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        return {**sequence, "position_ids": close}

    closed.embed = close_up
    free = free_choices(vlm, budget, 1)
    ways = {"scorer": [chooser(vlm, scorer.to(args.device), settings, budget)[0]],
            "diversity": free["diversity 16"], "uniform": free["uniform 16"]}
    table = {}
    for place, model in (("original", vlm), ("closed up", closed)):
        answered = accuracies(right_or_wrong(model, rows, ways)[0], rows)
        table |= {f"{way}, {place}": by_category for way, by_category in answered.items()}
    far, near = table["scorer, original"], table["scorer, closed up"]
    most = max(far, key=lambda category: far[category] - near[category])
    cost = 100 * (far[most] - near[most])
    return {"tables": {"accuracy by kind, %, and retention of the first row": by_kind(table, far)},
            "notes": [f"Closing up costs most in '{most}': {cost:.1f} points."]}


def scenes_and_labels(vlm, split):
    """(X (scenes, N, d), what each token lies on (scenes, N)): 0 background, 1 a stranger, 2 an object.

    A stranger is a thing that no text speaks of.
    """
    pixels, _, labels = scenes_to_learn(SPLITS[split], vlm.processor.image_processor, split)
    X = vlm.encode({"pixel_values": pixels.float().to(vlm.model.device)}).float()
    thing, of_object = labels[:, 0] > 0, labels[:, 2] > 0
    return X, thing.int() + of_object.int()


@torch.no_grad()
def objects(args):
    """What the kept tokens of the test scenes lie on."""
    vlm = load(TINY, args.device)
    scorer, settings = load_pruner(SHIPPED)
    scorer = scorer.to(args.device)
    X, lies_on = scenes_and_labels(vlm, "test")
    kept = {"all": lies_on}
    for K in (16, 4):
        free = free_choices(vlm, Budget(K), 1)
        ways = {f"scorer {K}": chooser(vlm, scorer, settings, Budget(K))[0],
                f"scorer, top {K}": chooser(vlm, scorer, settings, Budget(K), choose="top")[0]}
        for name in ("random", "uniform", "norm", "diversity", "coverage"):
            ways[f"{name} {K}"] = free[f"{name} {K}"][0]
        for way, choose in ways.items():
            keep = choose(X, {}).cpu().expand(len(X), -1)
            kept[way] = lies_on.gather(1, keep)
    table = {}
    for way, on in kept.items():
        shares = [100 * (on == thing).float().mean().item() for thing in (2, 1, 0)]
        table[way] = dict(zip(("on objects", "on strangers", "on background"), shares))
    return {"tables": {"kept tokens, %": table}}


def loss_of(graph, inputs, K, tau, parts=Parts()):
    """The training graph's loss, noise drawn afresh. graph: (vlm, scorer, denoiser, statistics)."""
    vlm, B = graph[0], len(inputs["input_ids"])
    noise = torch.randn(B, vlm.tokens, vlm.width, device=vlm.model.device)
    return forward(*graph, inputs, noise, Budget(K), tau, parts)[0]


def descend(graph, batches, K, parameters, lr, steps, end=1.0, parts=Parts()):
    """`steps` of AdamW on these batches in turn, up to the share `end` of the schedule."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0)
    losses = []
    for step in tqdm(range(steps), dynamic_ncols=True, leave=False):
        tau = temperature(end * step / steps)
        loss = loss_of(graph, batches[step % len(batches)], K, tau, parts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def ceiling(args):
    """16 tokens of each of 50 test images: how far choosing goes, and where the scorer falls short.

    captions, answers: each image's scores optimised for themselves, without a scorer, on five
    captions of it, or on its questions and answers. these 50: a scorer trained on those captions
    alone. scorer: the pruner that ships.
    """
    vlm, rows, steps = load(TINY, args.device), embedded("test")[:250], args.steps or 60
    device = vlm.model.device
    pictures = [read_image(row["image"]) for row in rows]
    captions = [caption(draw_scene(f"test-{i // 5}")[1], random.Random(f"ceiling-{i}"))
                for i in range(len(rows))]  # five a picture, as there are five questions
    texts = {"captions": ([PROMPT] * len(rows), captions),
             "answers": ([row["text"] for row in rows], [row["label"] for row in rows])}
    once = vlm.inputs(pictures[::5], ["?"] * 50)
    statistics = whitening(vlm.encode(once).float())
    ways, no_denoiser = dict(WHOLE), torch.nn.Identity()
    torch.manual_seed(0)
    for name, (prompts, answers) in texts.items():
        batches = [vlm.inputs(pictures[i:i + 50], prompts[i:i + 50], answers[i:i + 50])
                   for i in range(0, len(rows), 50)]
        keeps = []
        for inputs in batches:  # ten pictures, as right_or_wrong asks all questions of a picture
            scores = (0.1 * torch.randn(10, vlm.tokens, device=device)).requires_grad_()
            graph = vlm, lambda X, valid: scores.repeat_interleave(5, 0), no_denoiser, statistics
            descend(graph, [inputs], 16, [scores], 0.05, steps)
            X = vlm.encode(inputs)[::5].float()
            keeps.append(select(distinct(scores.detach(), X), 16))
        rest = iter(torch.cat(keeps))
        ways[name] = [lambda X, inputs, rest=rest: torch.stack([next(rest) for _ in X])]
        if name == "captions":
            alone, repairs = Scorer(vlm.width).to(device), Denoiser(vlm.width).to(device)
            learned = [*alone.parameters(), *repairs.parameters()]
            descend((vlm, alone, repairs, statistics), batches, 16, learned, 1e-3, 5 * steps)
    scorer, settings = load_pruner(SHIPPED)
    ways["these 50"] = [lambda X, inputs: select(distinct(alone(X), X), 16)]
    ways["scorer"] = [chooser(vlm, scorer.to(device), settings, Budget(16))[0]]
    answered = accuracies(right_or_wrong(vlm, rows, ways)[0], rows)
    return {"tables": {"accuracy by kind, %, and retention": by_kind(answered, answered["all"])}}


GPU = {  # the parts of the study, beside the training of a 7B
    "speed": "bench.py --model random:llava-1.5-7b --dtype bfloat16 --batch 1 4 16 --keep 11.1% "
             "--training --json {to}/speed_gpu.json",
    "default": "train.py --overwrite --json --out {runs}/gpu",
    "tests": "-m pytest -q",
    "two": "-m torch.distributed.run --nproc_per_node 2 train.py --steps 20 --overwrite "
           "--out {runs}/gpu-2",
}


def train_7b():
    """Twenty steps of a random 7B: the memory that was planned, and what was used."""
    vlm, B = load("random:llava-1.5-7b", "cuda", torch.bfloat16), 4
    inputs = vlm.dummy_inputs(B, 40)
    captions = inputs["input_ids"][:, -20:]
    inputs["labels"] = F.pad(captions, (vlm.tokens + 20, 0), value=-100)
    statistics = torch.zeros(vlm.width, device="cuda"), torch.eye(vlm.width, device="cuda")
    scorer, denoiser = Scorer(vlm.width).cuda(), Denoiser(vlm.width).cuda()
    learned = [*scorer.parameters(), *denoiser.parameters()]
    start = time.time()
    losses = descend((vlm, scorer, denoiser, statistics), [inputs], 64, learned, 2e-4, 20)
    planned = vlm.memory(sum(p.numel() for p in learned), B)
    return {
        "images at once": B,
        "planned GB": {part: size / 1e9 for part, size in planned.items()},
        "used GB": torch.cuda.max_memory_allocated() / 1e9,
        "seconds a step": (time.time() - start) / 20,
        "losses": losses,
    }


def gpu(args):
    """What needs a GPU, or only the parts that --variants names.

    A part that is not run keeps its last numbers.
    """
    if not torch.cuda.is_available():
        raise InputError("gpu: torch sees no GPU on this machine; run it where there is one")
    result = {}
    if args.json.exists():
        result = json.loads(args.json.read_text())["gpu"]
    for name in args.variants or ["training", *GPU]:
        if name == "training":
            result[name] = train_7b()
        elif name != "two" or torch.cuda.device_count() > 1:
            command = GPU[name].format(to=portable(args.to), runs=portable(args.runs))
            done = subprocess.run([sys.executable, *command.split()], cwd=ROOT,
                                  stdout=subprocess.PIPE, text=True)
            last = done.stdout.strip().split("\n")[-1]
            result[name] = {"command": command, "exit": done.returncode, "said": last}
    return result


STUDIES = {
    "fidelity": fidelity,
    "ranking": ranking,
    "ablations": ablations,
    "objects": objects,
    "positions": positions,
    "ceiling": ceiling,
    "gpu": gpu,
}


def main():
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = ap.add_argument
    add("study", choices=[*STUDIES, "report"])
    add("--seeds", type=int, default=3,
        help="how many seeds, 0 … n-1, of what is trained or drawn (default: %(default)s)")
    add("--steps", type=int,
        help="training steps (default: train.py's own; ceiling: 60)")
    add("--ablated", type=int, metavar="N",
        help="ablations: seeds of Gumbel, scale gate and global denoiser (default: as --seeds)")
    add("--keep", nargs="+", metavar="K",
        help="ablations: the budgets (default: 48 32 16 8 4 ~16 ~8)")
    add("--variants", nargs="+", choices=["training", *GPU], help="gpu: only these parts")
    add("--runs", type=Path, default=ROOT / "out/study", metavar="DIR", help="folder of the trained "
        "runs; what is in it is not trained again (default: out/study)")
    add("--to", type=Path, default=ROOT / "results", metavar="DIR",
        help="folder that the JSON file is written to (default: results)")
    add_device_arguments(ap)
    args = ap.parse_args()
    if not args.to.is_dir():
        raise InputError(f"--to {args.to}: there is no such folder; make it first")
    args.json = args.to / f"{args.study}.json"
    check(args, "seeds", "steps")
    if args.study == "report":
        return report(args.to, ROOT / "results/template.md")
    save(args.json, "python -m results.study", {args.study: STUDIES[args.study](args)})
    print(section(args.to, args.study))


if __name__ == "__main__":
    cli(main)
