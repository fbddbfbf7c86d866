"""
What a pruner keeps: accuracy by category, beside choices that learn nothing.

    python -m eval.accuracy                            # the pruner, on the embedded test questions
    python -m eval.accuracy --keep 16 '~16' --others   # what other papers choose by, too
    python -m eval.accuracy --questions pope.jsonl --images val2014/ --pruner out-7b
    python -m eval.accuracy --questions pope.jsonl --model llava-hf/llava-1.5-7b-hf --choose DPP

The last needs no pruner. An answer is right if it equals a label, without case and full stop; "(B)"
and "B. red" answer B. Where all labels are yes or no it is a no if its first sentence has No, no or
not, else a yes, as LLaVA counts POPE. Retention is the papers': the mean over categories of
pruned / unpruned accuracy, in per cent. Its interval is a bootstrap over images, each with all its
questions.
"""
import argparse
import sys
from functools import partial
from itertools import groupby
from pathlib import Path

if not __package__:
    print("error: start it in the folder above, as python -m eval.accuracy", file=sys.stderr)
    sys.exit(2)

import torch
from tqdm import tqdm

from common.budget import real_tokens
from common.criteria import criteria, each_image, pooled_grid, random_tokens
from common.files import cli
from common.pruner import by_budget, chooser
from data.pictures import read_image
from data.questions import is_right, read_questions, yes_no
from data.shapes.prepare import prepare
from eval.tables import budgets, check, mean, save, show
from infer import add_pruner_arguments, load_pruned

WORDS = 128  # new tokens of an answer at most, as in infer.py


# --- answers --------------------------------------------------------------------------------------

def answers_by(choose, vlm, X, views, prompts, number):
    """(answers to the prompts, visual tokens of each); number: which picture each is about."""
    keep = choose(X, views)
    if isinstance(keep, tuple):  # pooling changes the tokens, too
        X, keep = keep
    K = real_tokens(X, views.get("valid"))
    if keep is not None:
        K = (keep >= 0).sum(1)
        keep = keep[number]
    answers = vlm.generate(prompts, X[number], keep, max_new_tokens=WORDS)
    return answers, torch.as_tensor(K).expand(len(X))[number].tolist()


def whole_pictures(rows, most):
    """The rows in parts of about `most`, with all questions in a row about a picture together."""
    parts = [[]]
    for _, questions in groupby(rows, key=lambda row: row["image"]):
        if len(parts[-1]) >= most:
            parts.append([])
        parts[-1] += questions
    return parts


@torch.no_grad()
def right_or_wrong(vlm, rows, ways):
    """({way: [is each answer right]}, {way: [tokens kept for it]}) for the ways {way: [choose, …]}.

    choose(X, inputs) gives keep (B, K), None for all tokens, or (other tokens, keep). A way counts
    as the mean of its choices. Each picture of a batch is encoded once, and each choice made once
    for all questions about it.
    """
    most = 50 * 576 // (vlm.tokens or 3600)  # as many tokens as of 50 pictures of LLaVA-1.5
    polar = yes_no(rows)
    right = {name: [] for name in ways}
    kept = {name: [] for name in ways}
    parts = whole_pictures(rows, most)
    for part in tqdm(parts, desc="questions", dynamic_ncols=True, leave=False):
        images = list(dict.fromkeys(row["image"] for row in part))
        number = [images.index(row["image"]) for row in part]
        pictures = [read_image(image, vlm.processor.image_processor) for image in images]
        views = vlm.inputs(pictures, ["?"] * len(pictures))
        X = vlm.encode(views)  # (pictures, N, d)
        texts = [row["text"] for row in part]
        prompts = vlm.inputs([pictures[i] for i in number], texts)
        for name, choices in ways.items():
            marks, counts = [], []  # a list for each choice
            for choose in choices:
                answers, K = answers_by(choose, vlm, X, views, prompts, number)
                pairs = zip(answers, part)
                marks.append([is_right(answer, row["label"], polar) for answer, row in pairs])
                counts.append(K)
            right[name] += map(mean, zip(*marks))
            kept[name] += map(mean, zip(*counts))
    return right, kept


# --- figures --------------------------------------------------------------------------------------

def accuracies(right, rows):
    """{way: {category: share of right answers}} of what right_or_wrong gives."""
    table = {}
    for name, marks in right.items():
        by_category = {category: [] for category in sorted({row["category"] for row in rows})}
        for mark, row in zip(marks, rows):
            by_category[row["category"]].append(mark)
        table[name] = {category: mean(marks) for category, marks in by_category.items()}
    return table


def retention(pruned, full):
    """Mean over categories of pruned / unpruned accuracy, in per cent.

    Where all tokens get 0, there is no ratio.
    """
    ratios = [pruned[category] / share for category, share in full.items() if share > 0]
    return 100 * mean(ratios) if ratios else float("nan")


def bootstrap(pruned, full, rows, draws=1000):
    """95 % interval of the retention, if images are drawn again, each with all of its questions."""
    images = list(dict.fromkeys(row["image"] for row in rows))
    categories = list(dict.fromkeys(row["category"] for row in rows))
    image = {name: i for i, name in enumerate(images)}
    right = torch.zeros(2, len(images), len(categories))  # right answers, pruned and full
    for row, *marks in zip(rows, pruned, full):
        category = categories.index(row["category"])
        right[:, image[row["image"]], category] += torch.tensor(marks)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(images), (draws, len(images)), generator=generator)
    ones = torch.ones(drawn.shape)
    times = torch.zeros(drawn.shape).scatter_add(1, drawn, ones)  # how often each is drawn
    pruned, full = times @ right  # (draws, categories)
    values = 100 * (pruned / full).masked_fill(full == 0, torch.nan).nanmean(1)
    return values.nanquantile(0.025).item(), values.nanquantile(0.975).item()


# --- the table ------------------------------------------------------------------------------------

def all_tokens(X, inputs):
    return None


def no_token(X, inputs):
    return torch.full((len(X), 1), -1, device=X.device)


def free_choices(vlm, budget, seeds, others=True):
    """{row: [choose, …]} of what learns nothing. Random has one choice for each seed."""
    draws = []
    for seed in range(seeds):
        generator = torch.Generator(vlm.model.device).manual_seed(seed)
        draws.append(partial(each_image, partial(random_tokens, generator=generator)))
    ways = {f"random {budget}": [by_budget(choose, budget) for choose in draws]}
    for name, choose in criteria(vlm).items():
        fits = name != "pooling" or pooled_grid(vlm.tokens, budget.of(vlm.tokens))
        if name != "random" and fits and (others or name == "uniform"):
            ways[f"{name} {budget}"] = [by_budget(choose, budget)]
    return ways


def accuracy_table(vlm, scorer, settings, rows, budgets, seeds=3, others=False, choose=None):
    """Print accuracy by category and retention; return {row: {category: accuracy}}.

    The first row of each budget is chosen as infer.py chooses: by the scorer, or by the criterion
    of the settings. Random is the mean of `seeds` draws, blind sees no token. `others` adds what
    other papers choose by, and the other choice from the scorer's scores.
    """
    choose = choose or settings["choose"]
    whole = f"all {vlm.tokens or ''}".strip()
    ways = {whole: [all_tokens]}
    for budget in budgets:
        rows_by = {"scorer" if scorer else choose: choose}
        if others and scorer and not budget.average:
            other = "distinct" if choose == "top" else "top"
            rows_by[f"scorer, {other}"] = other
        for name, how in rows_by.items():
            ways[f"{name} {budget}"] = [chooser(vlm, scorer, settings, budget, choose=how)[0]]
        ways |= free_choices(vlm, budget.exact, seeds, others)
    ways["blind"] = [no_token]

    right, kept = right_or_wrong(vlm, rows, ways)
    table = accuracies(right, rows)
    full = table[whole]
    lines = []
    for name, by_category in table.items():
        shares = list(by_category.values())
        per_cent = [100 * share for share in [*shares, mean(shares)]]
        values = [mean(kept[name]), *per_cent, retention(by_category, full)]
        low, high = bootstrap(right[name], right[whole], rows)
        lines.append([name, *(f"{value:.1f}" for value in values), f"{low:.1f}–{high:.1f}"])
    show(f"{vlm.name}, {len(rows)} questions: accuracy by category, retention and its 95 % "
         "interval, in per cent", ["choice", "kept", *full, "mean", "retention", "95 %"], lines)
    unknown = [category for category, share in full.items() if share == 0]
    if unknown:
        print("left out of the retention, since all tokens answer none of it right: "
              + ", ".join(unknown))
    return table


def main():
    parser = argparse.ArgumentParser(prog="python -m eval.accuracy", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--keep", nargs="+", default=["33.3%", "22.2%", "11.1%"], metavar="K",
        help="budgets, as of infer.py (default: the papers', 33.3%% 22.2%% 11.1%%)")
    add("--questions", metavar="JSONL",
        help="a question file with labels (default: the embedded test)")
    add("--images", metavar="DIR", help="folder of its images (default: the question file's own)")
    add("--others", action="store_true", help="also what other papers choose by")
    add("--seeds", type=int, default=3,
        help="how many draws random is the mean of (default: %(default)s)")
    add("--json", type=Path, metavar="FILE",
        help="save the table, and under which conditions it was made")
    add_pruner_arguments(parser)
    args = parser.parse_args()
    check(args, "seeds")
    if not args.questions:
        print("no --questions: these are about the embedded drawn scenes", file=sys.stderr)
    rows = read_questions(args.questions or prepare() / "test.jsonl", args.images)
    vlm, scorer, settings = load_pruned(args, budgets(args.keep))
    for row in rows:
        vlm.check_text(row["text"], row["where"])
    table = accuracy_table(vlm, scorer, settings, rows, budgets(args.keep, vlm), args.seeds,
                           args.others, args.choose)
    if args.json:
        save(args.json, "python -m eval.accuracy", {"seeds": args.seeds, "accuracy": table})


if __name__ == "__main__":
    cli(main)
