"""
Studies on the embedded default. Each writes results/NAME.json and prints what it says.

    python -m results.study fidelity     # does the tiny VLM lose what real ones lose when tokens are missing? (minutes)
    python -m results.study ablations    # the method, and the papers' ablations of it (hours)
    python -m results.study probes       # the papers' claims about gradients and noise (minutes)
    python -m results.study ceiling      # how far choosing goes, and where the scorer falls short (half an hour)
    python -m results.study positions    # what closing up the kept tokens' positions costs (minutes)
    python -m results.study objects      # what the kept tokens lie on (a minute)
    python -m results.study gpu          # all that needs a GPU
    python -m results.study report       # RESULTS.md, from all JSON files that are there
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

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.budget import Budget
from data.coco import read_coco
from common.files import ROOT, InputError, cli, portable, write
from data.pictures import read_image
from common.pruner import chooser, fingerprint, load_pruner
from data.questions import read_questions
from data.shapes.prepare import SPLITS, caption, draw_scene, prepare
from data.shapes.pretrain import scenes_to_learn
from denoiser import Denoiser
from eval.accuracy import accuracies, by_budget, free_choices, retention, right_or_wrong
from results.report import report, section
from eval.tables import budgets, check, mean, save
from model import add_device_arguments, load
from throttler import Scorer, distinct, select, soft_top_k, vp_gate, whitening
from train import PROMPT, Parts, forward, parse_arguments, temperature, train

TINY, SHIPPED = "data/shapes/llava", ROOT / "data/shapes/pruner"
RECIPE = ("keep", "choose", "steps", "batch", "lr", "seed", "dtype")
LOGGED = ("hardness", "full_loss", "soft_loss", "hard_loss", "deployed_loss", "seconds")
ALL = {"all": [lambda X, inputs: None]}


# --- what the papers compare with -------------------------------------------------------------------------------------

def scale_gate(X, alpha, mean, L, noise=None):
    """alpha·X in place of the noise gate. A small alpha loses nothing that a denoiser cannot scale back."""
    return alpha.unsqueeze(-1).to(X.dtype) * X


def gumbel_top_k(scores, K, tau=1.0):
    """A sampled hard top-K of 0 and 1 with the soft one's gradient (straight-through), for scale_gate."""
    noisy = scores - (-torch.rand_like(scores).clamp_min(1e-20).log()).log()  # s + Gumbel noise
    alpha = soft_top_k(noisy, K, tau)
    hard = F.pad(torch.zeros_like(alpha), (1, 0)).scatter(-1, select(noisy, K) + 1, 1.0)[..., 1:]
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


# --- studies that train ---------------------------------------------------------------------------

def trained(args, vlm, variants):
    """Train these variants, seeds 0 … n-1: {(variant, seed): folder}.

    What lies in the folder and was made the same way is not trained again.
    """
    folders, weights = {}, fingerprint(vlm.model)
    for name, (choose, parts) in variants.items():
        for seed in range(args.seeds):
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


def ablations(args):
    """Train the variants and ask the questions: what each seed keeps, by variant, choice and budget."""
    ways, texts = ("top", "distinct"), args.keep or ["48", "32", "16", "8", "~16"]
    vlm, path = load(TINY, args.device), Path(args.questions or prepare() / "test.jsonl")
    rows, asked, levels = read_questions(path), dict(ALL), budgets(texts, vlm)
    folders = trained(args, vlm)
    for run, folder in folders.items():
        scorer, settings = load_pruner(folder)
        scorer = scorer.to(args.device)
        for way in ways:
            for budget in levels:
                asked[*run, way, str(budget)] = [chooser(vlm, scorer, settings, budget, choose=way)[0]]
    right, kept = right_or_wrong(vlm, rows, asked)
    answered = accuracies(right, rows)
    shapes = {row["image"]: row["label"] for row in rows if row["category"] == "count"}
    result = {}
    for name in dict.fromkeys(name for name, _ in folders):
        ends = [json.loads((folders[name, seed] / "log.jsonl").read_text().splitlines()[-1])
                for seed in range(args.seeds)]
        result[name] = {key: mean(run[key] for run in ends) for key in LOGGED}
        for way in ways:
            result[name][way] = {}
            for budget in map(str, levels):
                runs = [(name, seed, way, budget) for seed in range(args.seeds)]
                counts = [(shapes[row["image"]], k) for run in runs for row, k in zip(rows, kept[run])]
                result[name][way][budget] = {
                    "retention": [retention(answered[run], answered["all"]) for run in runs],
                    "by_category": {c: mean(answered[run][c] for run in runs) for c in answered["all"]},
                    "kept": mean(k for _, k in counts),
                    "by_shapes": {n: mean(k for m, k in counts if m == n) for n in dict.fromkeys(shapes.values())}}
    return {"questions": path.stem, "steps": ends[-1]["step"] + 1, "rows": result}


# --- studies that look ------------------------------------------------------------------------------------------------

REAL = {"random": {"48": 97.3, "32": 93.6, "16": 86.9}, "diversity": {"48": 99.6, "32": 99.2, "16": 97.3}}


def fidelity(args):
    """Training-free choices beside LLaVA-1.5-7B's (UniPruneBench, arXiv 2511.02650), and the rule for the test bed."""
    vlm, path = load(TINY, args.device), Path(args.questions or prepare() / "validation.jsonl")
    rows, ways = read_questions(path), dict(ALL)
    for budget in budgets(["48", "32", "16", "8"], vlm):
        ways |= free_choices(vlm, budget, args.seeds)
    answered, kept = accuracies(right_or_wrong(vlm, rows, ways)[0], rows), {}
    full = answered.pop("all")
    for name, by_category in answered.items():
        way, K = name.split()
        kept.setdefault(way, {})[K] = retention(by_category, full)
    rule = [["diversity at 16 below 98.5", kept["diversity"]["16"], kept["diversity"]["16"] < 98.5]]
    for way, at in REAL.items():
        for K, theirs in at.items():
            rule.append([f"{way} at {K} within 3 points of {theirs}", kept[way][K], abs(kept[way][K] - theirs) <= 3])
    for way in ("CLS", "pooling"):
        rule.append([f"{way} above random at 16", kept[way]["16"], kept[way]["16"] > kept["random"]["16"]])
    least = 98.5 if path.stem == "test" else 99.0
    for category, share in full.items():
        rule.append([f"{category} with all tokens at least {least}", 100 * share, 100 * share >= least])
    return {"questions": path.stem, "retention": kept, "real": REAL, "full": full, "rule": rule}


def positions(args):
    """16 tokens at their original positions, and closed up, as servers that take embeddings place them."""
    vlm, rows = load(TINY, args.device), read_questions(prepare() / "test.jsonl")
    closed, (scorer, settings), budget = copy.copy(vlm), load_pruner(SHIPPED), Budget(16)

    def close_up(inputs, X, keep=None):
        sequence = vlm.embed(inputs, X, keep)
        return {**sequence, "position_ids": (sequence["attention_mask"].cumsum(-1) - 1).clamp_min(0)}

    closed.embed = close_up
    free = free_choices(vlm, budget, 1)
    ways = {"scorer": [chooser(vlm, scorer.to(args.device), settings, budget)[0]],
            "diversity": free["diversity 16"], "uniform": free["uniform 16"]}
    return {place: accuracies(right_or_wrong(model, rows, ways)[0], rows)
            for place, model in (("original", vlm), ("closed up", closed))}


@torch.no_grad()
def objects(args):
    """What 16 kept tokens of the test scenes lie on: {way: {"objects", "strangers", "background": share}}."""
    vlm, (scorer, settings), budget = load(TINY, args.device), load_pruner(SHIPPED), Budget(16)
    pixels, _, labels = scenes_to_learn(SPLITS["test"], vlm.processor.image_processor, "test")
    inputs = {"pixel_values": pixels.float().to(args.device)}
    X, free = vlm.encode(inputs).float(), free_choices(vlm, budget, 1)
    ways = {f"scorer, {choose}": chooser(vlm, scorer.to(args.device), settings, budget, choose=choose)[0]
            for choose in ("distinct", "top")}
    ways |= {name: free[f"{name} 16"][0] for name in ("random", "uniform", "CLS", "norm", "diversity", "coverage")}
    there = (labels[:, 0] > 0).int() + (labels[:, 2] > 0)  # (scenes, 144): 0 background, 1 a stranger, 2 an object
    kept = {"all": there} | {name: there.gather(1, choose(X, inputs).cpu().expand(len(X), -1))
                             for name, choose in ways.items()}
    return {name: {kind: mean((on == i).flatten().tolist())
                   for i, kind in ((2, "objects"), (1, "strangers"), (0, "background"))} for name, on in kept.items()}


def loss_of(graph, inputs, K, tau, parts=Parts()):
    """The training graph's loss, with noise drawn afresh. graph: (vlm, scorer, denoiser, statistics)."""
    vlm = graph[0]
    noise = torch.randn(len(inputs["input_ids"]), vlm.tokens, vlm.width, device=vlm.model.device)
    return forward(*graph, inputs, noise=noise, budget=Budget(K), tau=tau, parts=parts)[0]


def descend(graph, batches, K, parameters, lr, steps, end=1.0, parts=Parts()):
    """So many steps of AdamW on these batches in turn, up to the share `end` of the schedule. Returns the losses."""
    optimizer, losses = torch.optim.AdamW(parameters, lr=lr, weight_decay=0), []
    for step in tqdm(range(steps), dynamic_ncols=True, leave=False):
        loss = loss_of(graph, batches[step % len(batches)], K, temperature(end * step / steps), parts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def coherence(gradients):
    """Mean cosine between different ones of these vectors."""
    g = F.normalize(torch.stack(list(gradients)), dim=1)  # (n, weights)
    n = len(g)
    return (((g @ g.T).sum() - n) / (n * (n - 1))).item()


def probes(args):
    """The papers' measured claims, for the noise gate and for Gumbel with straight-through.

    coherence: mean cosine between the scorer's gradients on independent batches, at the start and midway;
    roughness: mean change of the loss from step to step along a random direction in the scorer's weights, noise fixed;
    random scores: accuracy with all tokens gated to a mean weight of K/N, against K tokens kept.
    """
    vlm, folder, result, batches = load(TINY, args.device), prepare(), {}, []
    pairs = list(read_coco(folder / "train.json").items())
    for i in range(32):
        paths, captions = zip(*pairs[24 * i:24 * i + 24])
        batches.append(vlm.inputs([read_image(path) for path in paths], [PROMPT] * 24, [said[0] for said in captions]))
    statistics = whitening(torch.cat([vlm.encode(inputs).float() for inputs in batches[:8]]))
    for variant in ("papers", "papers, Gumbel"):
        parts, result[variant] = VARIANTS[variant], []
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            graph = vlm, Scorer(vlm.width).to(args.device), Denoiser(vlm.width).to(args.device), statistics
            weights = list(graph[1].parameters())

            def gradients(tau):
                for inputs in batches[:8]:
                    gradient = torch.autograd.grad(loss_of(graph, inputs, 16, tau, parts), weights)
                    yield torch.cat([t.flatten() for t in gradient])

            row = {"coherence at the start": coherence(gradients(temperature(0)))}
            learned = [*weights, *graph[2].parameters()]
            descend(graph, batches[8:], 16, learned, 2e-3, args.steps or 60, 0.25, parts)
            row["coherence midway"] = coherence(gradients(temperature(0.25)))
            direction, losses = [torch.randn_like(w) * w.norm() / w.numel() ** 0.5 for w in weights], []
            with torch.no_grad():
                for _ in range(21):  # twenty steps of 1 % of the weights' norm
                    torch.manual_seed(seed)
                    losses.append(loss_of(graph, batches[0], 16, temperature(0.25), parts).item())
                    for w, d in zip(weights, direction):
                        w += 0.01 * d
            row["roughness"] = mean(abs(a - b) for a, b in zip(losses, losses[1:]))
            result[variant].append(row)

    def gated(X, inputs, K):
        return vp_gate(X, soft_top_k(torch.randn(X.shape[:2], device=X.device), K), *statistics), None

    rows, ways = read_questions(folder / "test.jsonl"), {}
    for share in (1.0, 0.75, 0.5, 0.33, 0.22, 0.11, 0.06):
        budget = Budget(share=share)
        ways[f"gated {share}"] = [by_budget(gated, budget)]
        ways[f"kept {share}"] = free_choices(vlm, budget, 1)[f"random {budget}"]
    answered = accuracies(right_or_wrong(vlm, rows, ways)[0], rows)
    return {**result, "random scores": {name: 100 * mean(by.values()) for name, by in answered.items()}}


def ceiling(args):
    """16 tokens of each of 50 test images: how far choosing goes, and where the scorer falls short.

    captions, answers: each image's scores optimised for themselves, without a scorer, on five captions of it, or on its
    questions and answers. these 50: a scorer trained on those captions alone. scorer: the pruner that ships.
    """
    vlm, rows, steps = load(TINY, args.device), read_questions(prepare() / "test.jsonl")[:250], args.steps or 60
    pictures, device = [read_image(row["image"]) for row in rows], vlm.model.device
    told = [caption(draw_scene(f"test-{i // 5}")[1], random.Random(f"ceiling-{i}")) for i in range(len(rows))]
    texts = {"captions": ([PROMPT] * len(rows), told),  # five a picture, as there are five questions
             "answers": ([row["text"] for row in rows], [row["label"] for row in rows])}
    statistics = whitening(vlm.encode(vlm.inputs(pictures[::5], ["?"] * len(pictures[::5]))).float())
    ways, no_denoiser = dict(ALL), torch.nn.Identity()
    torch.manual_seed(0)
    for name, (asked, said) in texts.items():
        batches = [vlm.inputs(pictures[i:i + 50], asked[i:i + 50], said[i:i + 50]) for i in range(0, len(rows), 50)]
        keeps = []
        for inputs in batches:  # ten pictures each, as right_or_wrong asks about them: all questions of a picture
            scores = (0.1 * torch.randn(10, vlm.tokens, device=device)).requires_grad_()
            graph = vlm, lambda X, valid: scores.repeat_interleave(5, 0), no_denoiser, statistics
            descend(graph, [inputs], 16, [scores], 0.05, steps)
            keeps.append(select(scores.detach(), 16))
        ways[name] = [lambda X, inputs, rest=iter(torch.cat(keeps)): torch.stack([next(rest) for _ in X])]
        if name == "captions":
            alone = Scorer(vlm.width).to(device)
            repairs = Denoiser(vlm.width).to(device)
            learned = [*alone.parameters(), *repairs.parameters()]
            descend((vlm, alone, repairs, statistics), batches, 16, learned, 1e-3, 5 * steps)
    scorer, settings = load_pruner(SHIPPED)
    ways |= {"these 50": [lambda X, inputs: select(distinct(alone(X), X), 16)],
             "scorer": [chooser(vlm, scorer.to(args.device), settings, Budget(16))[0]]}
    return accuracies(right_or_wrong(vlm, rows, ways)[0], rows)


SEVEN = "bench.py --model random:llava-1.5-7b --dtype bfloat16 --batch 1 4 16"
GPU = {  # the parts of the study, beside the training of a 7B
    "speed": SEVEN + " --repeats 10 --json {to}/speed_gpu.json",
    "compiled": SEVEN + " --keep 11.1% --words 2 --repeats 20 --compile --json {to}/speed_gpu_compiled.json",
    "default": "train.py --overwrite --json --out {runs}/gpu",
    "tests": "-m pytest -q",
    "two": "-m torch.distributed.run --nproc_per_node 2 train.py --steps 20 --overwrite --out {runs}/gpu-2"}


def train_7b():
    """Twenty steps of a random 7B: the memory that was planned, and what was used."""
    vlm, B = load("random:llava-1.5-7b", "cuda", torch.bfloat16), 4
    inputs = vlm.dummy_inputs(B, 40)
    inputs["labels"] = F.pad(inputs["input_ids"][:, -20:], (vlm.tokens + 20, 0), value=-100)  # captions of 20 tokens
    statistics = torch.zeros(vlm.width, device="cuda"), torch.eye(vlm.width, device="cuda")
    graph = vlm, Scorer(vlm.width).cuda(), Denoiser(vlm.width).cuda(), statistics
    learned = [*graph[1].parameters(), *graph[2].parameters()]
    start = time.time()
    losses = descend(graph, [inputs], 64, learned, 2e-4, 20)
    planned = vlm.memory(sum(p.numel() for p in learned), B)
    return {"images at once": B, "planned GB": {k: v / 1e9 for k, v in planned.items()}, "losses": losses,
            "used GB": torch.cuda.max_memory_allocated() / 1e9, "seconds a step": (time.time() - start) / 20}


def gpu(args):
    """What needs a GPU, or only the parts that --variants names: a part that was not run keeps its last numbers."""
    if not torch.cuda.is_available():
        raise InputError("gpu: torch sees no GPU on this machine; run it where there is one")
    result = json.loads(args.json.read_text())["gpu"] if args.json.exists() else {}
    for name in args.variants or ["training", *GPU]:
        if name == "training":
            result[name] = train_7b()
        elif name != "two" or torch.cuda.device_count() > 1:
            command = [word.format(to=portable(args.to), runs=portable(args.runs)) for word in GPU[name].split()]
            done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            result[name] = {"command": GPU[name], "exit": done.returncode, "said": done.stdout.strip().split("\n")[-1]}
    return result


STUDIES = {"fidelity": fidelity, "ablations": ablations, "probes": probes, "ceiling": ceiling, "positions": positions,
           "objects": objects, "gpu": gpu}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = ap.add_argument
    add("study", choices=[*STUDIES, "report"])
    add("--seeds", type=int, help="of what is trained or drawn: 0 … n-1 (default: 3, fidelity: 5)")
    add("--steps", type=int, help="of training (default: train.py's own; probes and ceiling: 60)")
    add("--keep", nargs="+", metavar="K", help="of what is trained: measure at these (default: 48 32 16 8 ~16)")
    add("--variants", nargs="+", metavar="NAME", help="of what is trained, or of gpu: only these")
    add("--choose", choices=["distinct", "top"], default="distinct", help="of what is trained: train.py's, which decides "
        "what scorer is kept; top writes ablations_top.json (default: distinct)")
    add("--runs", type=Path, default=ROOT / "out/study", metavar="DIR", help="folder of the trained runs; what is in "
        "it is not trained again (default: out/study)")
    add("--questions", metavar="JSONL", help="of fidelity, ablations (default: the embedded validation; test)")
    add("--to", type=Path, default=ROOT / "results", metavar="DIR", help="where it is written (default: results)")
    add_device_arguments(ap)
    args = ap.parse_args()
    if not args.to.is_dir():
        raise InputError(f"--to {args.to}: there is no such folder; make it first")
    args.json = args.to / f"{args.study}{'_top' * (args.study == 'ablations' and args.choose == 'top')}.json"
    check(args, "seeds", "steps")
    if args.study == "report":
        return report(args.to, ROOT / "results/template.md")
    args.seeds = args.seeds or (5 if args.study == "fidelity" else 3)
    seeds = {} if args.study in ("ceiling", "positions", "objects", "gpu") else {"seeds": args.seeds}
    save(args.json, "python -m results.study", {**seeds, args.study: STUDIES[args.study](args)})
    print(section(args.to, args.json.stem))


if __name__ == "__main__":
    cli(main)
