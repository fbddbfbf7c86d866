"""
What a pruner keeps: accuracy on a question file with all tokens, with the pruner's, and with choices that learn nothing.

    python bench.py accuracy                       # the embedded default, K = 48, 32, 16 of 144
    python bench.py accuracy --questions pope.jsonl --images val2014/ --pruner out --keep 192 128 64

A question file has one JSON object a line: question_id, image, text (LLaVA's evaluation format), label, and optionally
category. An answer counts when it equals the label, letter case and a final full stop aside. Retention is the papers':
the mean over categories of (pruned accuracy / accuracy with all tokens), in per cent.
"""
import argparse
import json
import math
import sys

import torch

from data.shapes.prepare import prepare
from infer import add_pruner_arguments, ask, load_pruned, normal, read_questions
from model import cli
from throttler import select


def random_tokens(X, K):
    """K tokens of each image, drawn at random (torch's seed)."""
    return select(torch.rand(X.shape[:2], device=X.device), K)


def uniform_grid(X, K):
    """The same K tokens of every image, spread evenly: about √K rows with about √K tokens each."""
    B, N, _ = X.shape  # images, visual tokens
    side, rows = math.isqrt(N), max(1, round(math.sqrt(K)))
    keep = []
    for i in range(rows):
        y, n = int((i + 0.5) * side / rows), K * (i + 1) // rows - K * i // rows  # n tokens in this row
        keep += [y * side + int((j + 0.5) * side / n) for j in range(n)]
    return torch.tensor(sorted(keep), device=X.device).expand(B, -1)


def accuracy(vlm, rows, choose, batch=50, desc="questions"):
    """Share of right answers per category. choose(X) gives the tokens to keep, (B, K), or None for all."""
    right = {}
    for part in ask(vlm, rows, choose, batch, max_new_tokens=8, desc=desc):
        for i, answer in part:
            right.setdefault(rows[i]["category"], []).append(normal(answer) == normal(rows[i]["label"]))
    return {category: sum(r) / len(r) for category, r in sorted(right.items())}


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def retention(pruned, full):
    """Mean over categories of pruned / unpruned accuracy, in per cent, as the papers define it."""
    return 100 * mean(pruned[c] / full[c] if full[c] else 1.0 for c in full)


def accuracy_table(vlm, scorer, rows, budgets, seeds=1):
    """Print accuracy by category and return what was printed, as {row name: (budget, {category: accuracy})}."""
    full = accuracy(vlm, rows, lambda X: None, desc="all tokens")
    table = {f"all {vlm.tokens}": full}
    for K in budgets:
        table[f"scorer {K}"] = accuracy(vlm, rows, lambda X: select(scorer(X), K), desc=f"scorer, {K}")
        draws = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            draws.append(accuracy(vlm, rows, lambda X: random_tokens(X, K), desc=f"random, {K}"))
        table[f"random {K}"] = {c: mean(draw[c] for draw in draws) for c in full}
        table[f"uniform {K}"] = accuracy(vlm, rows, lambda X: uniform_grid(X, K), desc=f"uniform, {K}")
    print(f"{'tokens':12}" + "".join(f"{c:>9}" for c in full) + f"{'mean':>9}{'retention':>11}")
    for name, by_category in table.items():
        cells = "".join(f"{100 * a:9.1f}" for a in [*by_category.values(), mean(by_category.values())])
        print(f"{name:12}{cells}{retention(by_category, full):11.1f}", flush=True)
    return table


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("table", choices=["accuracy"])
    ap.add_argument("--questions", help="question file (default: the embedded one, drawn if missing)")
    ap.add_argument("--images", help="folder of its images (default: the question file's own)")
    ap.add_argument("--keep", type=int, nargs="+", default=[48, 32, 16], help="budgets (%(default)s)")
    ap.add_argument("--seeds", type=int, default=3, help="random choices are averaged over this many (%(default)s)")
    add_pruner_arguments(ap)
    args = ap.parse_args()
    rows = read_questions(args.questions or prepare() / "questions.jsonl", args.images)
    vlm, scorer, _ = load_pruned(args)
    table = accuracy_table(vlm, scorer, rows, [vlm.budget(K) for K in args.keep], args.seeds)
    print(json.dumps({"questions": len(rows), "tokens": vlm.tokens, "accuracy": table}))


if __name__ == "__main__":
    cli(main)
