"""
What a pruner keeps: accuracy by category, beside choices that learn nothing.

    python -m eval.accuracy                               # your pruner, or the one that ships, on the embedded test
    python -m eval.accuracy --keep 16 '~16' --others      # 16, and 16 on average; and what other papers choose by
    python -m eval.accuracy --questions pope.jsonl --images val2014/ --pruner out-7b --json pope.json

An answer counts as infer.py --questions counts it. Retention is the papers': the mean over categories of
pruned / unpruned accuracy, in per cent. Its interval is a bootstrap over images, all questions of one together.
"""
import argparse
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from common.budget import real_tokens
from common.files import cli
from data.pictures import read_image
from common.pruner import chooser
from data.questions import is_right, read_questions, yes_no
from data.shapes.prepare import prepare
from common.criteria import criteria, each_image, pooled_grid, random_tokens
from eval.tables import budgets, check, mean, save, show
from infer import add_pruner_arguments, load_pruned

WORDS = 128  # new tokens of an answer at most, as in infer.py


@torch.no_grad()
def right_or_wrong(vlm, rows, ways):
    """({way: [was each question answered right]}, {way: [tokens kept for it]}) for the ways {way: [choose, …]}.

    choose(X, inputs) gives keep (B, K), None for all tokens, or (other tokens, keep). A way counts as the mean of its
    choices. Each picture of a batch is encoded once, and each choice made once for all questions about it.
    """
    batch, polar = 50 * 576 // (vlm.tokens or 3600), yes_no(rows)  # as many tokens as of 50 pictures of LLaVA-1.5
    right, kept = ({name: [] for name in ways} for _ in range(2))
    for at in tqdm(range(0, len(rows), batch), desc="questions", dynamic_ncols=True, leave=False):
        part = rows[at:at + batch]
        pictures = {row["image"]: read_image(row["image"], vlm.processor.image_processor) for row in part}
        which = torch.tensor([list(pictures).index(row["image"]) for row in part], device=vlm.model.device)
        seen = vlm.inputs(list(pictures.values()), ["?"] * len(pictures))
        X = vlm.encode(seen)  # (pictures, N, d)
        asked = vlm.inputs([pictures[row["image"]] for row in part], [row["text"] for row in part])

        def answered(choose):
            keep = choose(X, seen)
            tokens, keep = keep if isinstance(keep, tuple) else (X, keep)
            K = real_tokens(X, seen.get("valid")) if keep is None else (keep >= 0).sum(1)
            answers = vlm.generate(asked, tokens[which], None if keep is None else keep[which], max_new_tokens=WORDS)
            return ([is_right(answer, row["label"], polar) for answer, row in zip(answers, part)],
                    torch.as_tensor(K, device=X.device).expand(len(X))[which].tolist())

        for name, choices in ways.items():
            draws = [answered(choose) for choose in choices]
            right[name] += [mean(values) for values in zip(*(draw[0] for draw in draws))]
            kept[name] += [mean(values) for values in zip(*(draw[1] for draw in draws))]
    return right, kept


def accuracies(right, rows):
    """{way: {category: share of right answers}} of what right_or_wrong gives."""
    categories = sorted({row["category"] for row in rows})
    return {name: {c: mean(r for r, row in zip(answers, rows) if row["category"] == c) for c in categories}
            for name, answers in right.items()}


def retention(pruned, full):
    """Mean over categories of pruned / unpruned accuracy, in per cent. Where all tokens get 0, there is no ratio."""
    ratios = [pruned[c] / full[c] for c in full if full[c] > 0]
    return 100 * mean(ratios) if ratios else float("nan")


def bootstrap(pruned, full, rows, draws=1000):
    """95 % interval of the retention when the images are drawn again, each with all of its questions."""
    image = {name: i for i, name in enumerate(dict.fromkeys(row["image"] for row in rows))}
    category = {name: i for i, name in enumerate(dict.fromkeys(row["category"] for row in rows))}
    right = torch.zeros(2, len(image), len(category))  # right answers, pruned and full
    for row, answers in zip(rows, zip(pruned, full)):
        right[:, image[row["image"]], category[row["category"]]] += torch.tensor(answers, dtype=torch.float)
    drawn = torch.randint(len(image), (draws, len(image)), generator=torch.Generator().manual_seed(0))
    times = torch.zeros(draws, len(image)).scatter_add(1, drawn, torch.ones(drawn.shape))  # how often each is drawn
    pruned, full = times @ right  # (draws, categories)
    values = 100 * (pruned / full).masked_fill(full == 0, torch.nan).nanmean(1)
    return values.nanquantile(0.025).item(), values.nanquantile(0.975).item()


def by_budget(choose, budget):
    """choose(X, inputs) from a choose(X, inputs, K)."""
    return lambda X, inputs: choose(X, inputs, budget.of(real_tokens(X, inputs.get("valid"))))


def free_choices(vlm, budget, seeds, others=True):
    """{row: [choose, …]} of what learns nothing. Random has one choice for each seed."""
    generators = [torch.Generator(vlm.model.device).manual_seed(seed) for seed in range(seeds)]
    random = [partial(each_image, partial(random_tokens, generator=generator)) for generator in generators]
    ways = {f"random {budget}": [by_budget(choose, budget) for choose in random]}
    for name, choose in criteria(vlm).items():
        fits = name != "pooling" or pooled_grid(vlm.tokens, budget.of(vlm.tokens))
        if name != "random" and fits and (others or name == "uniform"):
            ways[f"{name} {budget}"] = [by_budget(choose, budget)]
    return ways


def accuracy_table(vlm, scorer, settings, rows, budgets, seeds=3, others=False):
    """Print accuracy by category and retention; return {row: {category: accuracy}}.

    The scorer's tokens are chosen as infer.py chooses them. Random is the mean of `seeds` draws, blind sees no token.
    `others` adds what other papers choose by, and the other choice from the scorer's scores.
    """
    whole = f"all {vlm.tokens or ''}".strip()
    ways = {whole: [lambda X, inputs: None]}
    for budget in budgets:
        ways[f"scorer {budget}"] = [chooser(vlm, scorer, settings, budget)[0]]
        if others and not budget.average:
            other = "distinct" if settings["choose"] == "top" else "top"
            ways[f"scorer, {other} {budget}"] = [chooser(vlm, scorer, settings, budget, choose=other)[0]]
        ways |= free_choices(vlm, budget.exact, seeds, others)
    ways["blind"] = [lambda X, inputs: torch.full((len(X), 1), -1, device=X.device)]

    right, kept = right_or_wrong(vlm, rows, ways)
    table, lines = accuracies(right, rows), []
    for name, by in table.items():
        per_cent = [*(100 * a for a in by.values()), 100 * mean(by.values()), retention(by, table[whole])]
        interval = "{:.1f}–{:.1f}".format(*bootstrap(right[name], right[whole], rows))
        lines.append([name, f"{mean(kept[name]):.1f}", *(f"{value:.1f}" for value in per_cent), interval])
    show(f"{vlm.name}, {len(rows)} questions: accuracy by category, retention and its 95 % interval, in per cent",
         ["tokens", "kept", *table[whole], "mean", "retention", "95 %"], lines)
    unknown = [c for c, share in table[whole].items() if share == 0]
    if unknown:
        print(f"left out of the retention, since all tokens answer none of it right: {', '.join(unknown)}")
    return table


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--keep", nargs="+", default=["33.3%", "22.2%", "11.1%"], metavar="K",
                    help="budgets, as of infer.py (default: the papers', 33.3%% 22.2%% 11.1%%)")
    ap.add_argument("--questions", metavar="JSONL", help="a question file with labels (default: the embedded test)")
    ap.add_argument("--images", metavar="DIR", help="folder of its images (default: the question file's own)")
    ap.add_argument("--others", action="store_true", help="also what other papers choose by")
    ap.add_argument("--seeds", type=int, default=3, help="of random choices (default: %(default)s)")
    ap.add_argument("--json", type=Path, metavar="FILE", help="save the table, and under which conditions it was made")
    add_pruner_arguments(ap)
    args = ap.parse_args()
    check(args, "seeds")
    rows = read_questions(args.questions or prepare() / "test.jsonl", args.images)
    vlm, scorer, settings = load_pruned(args)
    table = accuracy_table(vlm, scorer, settings, rows, budgets(args.keep, vlm), args.seeds, args.others)
    if args.json:
        save(args.json, "python -m eval.accuracy", {"seeds": args.seeds, "accuracy": table})


if __name__ == "__main__":
    cli(main)
