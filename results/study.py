"""
Studies on the embedded default. Each writes results/NAME.json and prints what it says.

    python -m results.study fidelity     # does the tiny VLM lose what real ones lose? (minutes)
    python -m results.study ranking      # the ranking's factor c, on validation (an hour)
    python -m results.study ablations    # the method, and the papers' ablations of it (hours)
    python -m results.study objects      # what the kept tokens lie on (a minute)
    python -m results.study positions    # what closing up the tokens' positions costs (minutes)
    python -m results.study report       # RESULTS.md, from all JSON files that are there

A study returns tables {title: {row: {column: cell}}}. A cell is text, a number, or a list with one
number for each seed.
"""
import argparse
import copy
import json
import re
import sys
from pathlib import Path

if not __package__:
    print("error: start it in the folder above, as python -m results.study", file=sys.stderr)
    sys.exit(2)

import torch

from common.budget import Budget
from common.files import ROOT, InputError, cli, write
from common.pruner import chooser, fingerprint, load_pruner
from data.questions import read_questions
from data.shapes.prepare import SPLITS, prepare
from data.shapes.pretrain import scenes_to_learn
from denoiser import Denoiser
from eval.accuracy import accuracies, all_tokens, free_choices, retention, right_or_wrong
from eval.tables import budgets, check, save
from model import add_device_arguments, load
from results.report import report, section
from throttler import distinct, select, soft_top_k
from train import Parts, parse_arguments, train

TINY, SHIPPED = "data/shapes/llava", ROOT / "data/shapes/pruner"
RECIPE = ("keep", "choose", "steps", "batch", "lr", "seed", "eval_every", "dtype")
WHOLE = {"all": [all_tokens]}


def embedded(split):
    """The questions of the embedded test or validation scenes."""
    return read_questions(prepare() / f"{split}.jsonl")


def retained(vlm, rows, ways):
    """{way: retention in per cent} of ways {way: choose}."""
    choices = WHOLE | {way: [choose] for way, choose in ways.items()}
    right, _ = right_or_wrong(vlm, rows, choices)
    table = accuracies(right, rows)
    return {way: retention(table[way], table["all"]) for way in ways}


def by_kind(table, full):
    """Rows of per cent by kind of question from {way: {kind: accuracy}}, and the retention."""
    rows = {}
    for way, by_category in table.items():
        rows[way] = {category: 100 * share for category, share in by_category.items()}
        rows[way]["retention"] = retention(by_category, full)
    return rows


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


VARIANTS = {  # (--choose, what replaces the parts of the method)
    "ours": ("distinct", Parts()),
    "papers": ("top", Parts()),
    "Gumbel": ("distinct", Parts(top_k=gumbel_top_k, gate=scale_gate)),
    "scale gate": ("distinct", Parts(gate=scale_gate)),
    "global denoiser": ("distinct", Parts(denoiser=global_denoiser)),
}
ABLATIONS = ("Gumbel", "scale gate", "global denoiser")


# --- studies that train ---------------------------------------------------------------------------

def trained(args, vlm, variants):
    """Train these variants, each with seeds 0 … n-1: {(variant, seed): folder}.

    What lies in the folder and was made the same way is not trained again.
    """
    folders, weights = {}, fingerprint(vlm.model)
    for name, (choose, parts) in variants.items():
        seeds = args.ablated if name in ABLATIONS and args.ablated else args.seeds
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
            on_object = lies_on.gather(1, keep) == 2
            on_objects[name, seed, c] = 100 * on_object.float().mean().item()
    kept = retained(vlm, rows, ways)
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
    kept = retained(vlm, rows, ways)
    table, ends = {}, {}
    for name in VARIANTS:
        seeds = [seed for variant, seed in folders if variant == name]
        for choose in ("distinct", "top"):
            row = {}
            for budget in map(str, levels):
                row[budget] = "–"
                if (name, 0, choose, budget) in kept:
                    row[budget] = [kept[name, seed, choose, budget] for seed in seeds]
            table[f"{name}, by {choose}"] = row
        ends[name] = last_steps([folders[name, seed] for seed in seeds])
    return {"tables": {"retention, %, test questions": table, "at the last step": ends},
            "digits": {"at the last step": 4}}


def last_steps(folders):
    """{what: [its value at the last step of each of these trainings]}."""
    row = {"hardness": [], "soft loss": [], "deployed loss": [], "soft - deployed": []}
    for folder in folders:
        last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
        soft, deployed = last["soft_loss"], last["deployed_loss"]
        for column, value in zip(row, (last["hardness"], soft, deployed, soft - deployed)):
            row[column].append(value)
    return row


# --- studies that look ----------------------------------------------------------------------------

REAL = {
    "random": {48: 97.3, 32: 93.6, 16: 86.9},
    "diversity": {48: 99.6, 32: 99.2, 16: 97.3},
}


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
    return {"tables": {"retention, %, validation questions": table, "rule": held}}


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
    full = table["scorer, original"]
    return {"tables": {"accuracy by kind, %, and retention of the first row": by_kind(table, full)}}


def scenes_and_labels(vlm, split):
    """(X (scenes, N, d), what each token lies on (scenes, N)).

    0: background; 1: a stranger, a thing that no text speaks of; 2: an object.
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


STUDIES = {
    "fidelity": fidelity,
    "ranking": ranking,
    "ablations": ablations,
    "objects": objects,
    "positions": positions,
}


def main():
    style = argparse.RawDescriptionHelpFormatter
    ap = argparse.ArgumentParser(
        prog="python -m results.study", description=__doc__, formatter_class=style)
    add = ap.add_argument
    add("study", choices=[*STUDIES, "report"])
    add("--seeds", type=int, default=3,
        help="how many seeds, 0 … n-1, of what is trained or drawn (default: %(default)s)")
    add("--steps", type=int,
        help="training steps (default: train.py's own)")
    add("--ablated", type=int, metavar="N",
        help="ablations: seeds of Gumbel, scale gate and global denoiser (default: as --seeds)")
    add("--keep", nargs="+", metavar="K",
        help="ablations: the budgets (default: 48 32 16 8 4 ~16 ~8)")
    add("--runs", type=Path, default=ROOT / "out/study", metavar="DIR",
        help="folder of the trained runs; what is in it is not trained again (default: out/study)")
    add("--to", type=Path, default=ROOT / "results", metavar="DIR",
        help="folder that the JSON file is written to (default: results)")
    add_device_arguments(ap)
    args = ap.parse_args()
    if not args.to.is_dir():
        raise InputError(f"--to {args.to}: there is no such folder; make it first")
    if args.study == "report":
        return report(args.to, ROOT / "results/template.md")
    args.json = args.to / f"{args.study}.json"
    check(args, "seeds", "steps", flag="--to")
    save(args.json, "python -m results.study", {args.study: STUDIES[args.study](args)})
    print(section(args.to, args.study))


if __name__ == "__main__":
    cli(main)
