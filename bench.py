"""
What pruning saves, what it costs and what it keeps. Six tables, each with its conditions:

    python bench.py speed --model random:llava-1.5-7b --dtype bfloat16   # every stage's time, with all tokens and few
    python bench.py speed --model random:qwen2.5-vl-7b --device meta     # only its FLOPs: needs no memory
    python bench.py accuracy           # beside random tokens, a grid, and what other papers choose by
    python bench.py ablations          # train every variant, three seeds each (hours on two cores)
    python bench.py budgets            # pooled budgets, thresholds and ranges, three seeds each (hours on two cores)
    python bench.py probes             # the papers' measured claims about gradients and noise (minutes)
    python bench.py ceiling            # how far choosing goes without a scorer (minutes)
    python bench.py                    # speed, accuracy and ablations; --json FILE saves what was measured

accuracy takes any question file: one JSON object a line with question_id, image, text (LLaVA's evaluation format),
label and optionally category. An answer counts when it equals the label, letter case and a final full stop aside.
Retention is the papers': the mean over categories of pruned / unpruned accuracy, in per cent.
"""
import argparse
import copy
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoModelForImageTextToText

from data.files import rounded, write
from data.questions import normal, read_questions
from data.shapes.prepare import caption, draw_scene, prepare, questions
from infer import CACHE, DTYPES, add_pruner_arguments, load_pruned, load_pruner
from model import HERE, InputError, cli, load, read_image
from throttler import Scorer, count_above, select, soft_top_k, standardised, vp_gate, whitening

SHARES = ("33.3%", "22.2%", "11.1%")  # the papers' budgets: 192, 128 and 64 of LLaVA-1.5's 576 tokens
# The papers' figures, printed beside ours: LLaVA-1.5-7B, one A6000, batch 1, fp16, in ms (DiffPrune, arXiv 2605.28051)
PUBLISHED_SPEED = {"all 576, published": dict(tflops=8.89, encode=29.71, prefill=118.66, first=149.51),
                   "keep 64, published": dict(tflops=2.13, encode=30.41, select=0.69, prefill=41.61, first=73.73)}


def show(title, header, rows):
    """Print rows of cells under a header, every column as wide as its widest cell."""
    rows = [header, *map(list, rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    print(title)
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]), flush=True)


# --- ways to choose without learning: X (B, N, d) and K -> keep (B, K), ascending -------------------------------------

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


def feature_norm(X, K):
    """The K tokens with the longest features."""
    return select(X.float().norm(dim=-1), K)


def max_min_diversity(X, K):
    """DivPrune (arXiv 2503.02175): greedily the token that is least like those already kept, by cosine."""
    x = F.normalize(X.float(), dim=-1)
    far = 1 - x @ x.mT  # (B, N, N)
    alone = (far + 9 * torch.eye(X.shape[1], device=X.device)).amin(-1)  # distance to the nearest other token
    keep = [alone.argmax(-1)]
    nearest = torch.full(X.shape[:2], torch.inf, device=X.device)  # to any kept token
    for _ in range(K - 1):
        nearest = nearest.minimum(far[torch.arange(len(X)), keep[-1]]).scatter(1, torch.stack(keep, 1), -1)
        keep.append(nearest.argmax(-1))
    return torch.stack(keep, 1).sort(-1).values


def average_pooling(X, K):
    """No choice at all: the grid averaged to K cells. (X with each cell's mean at its centre, those centres)."""
    B, N, d = X.shape
    side = math.isqrt(N)
    rows = max((r for r in range(1, math.isqrt(K) + 1) if K % r == 0 and K // r <= side), default=0)
    if not rows:
        raise InputError(f"--keep {K}: the {side} x {side} grid cannot be pooled to so many cells; try a neighbour")
    cols = K // rows
    cells = F.adaptive_avg_pool2d(X.float().mT.reshape(B, d, side, side), (rows, cols)).flatten(2).mT  # (B, K, d)
    y, x = [((torch.arange(n, device=X.device) + 0.5) * side / n).long() for n in (rows, cols)]
    keep = (y[:, None] * side + x).flatten().expand(B, -1)  # (B, K)
    return X.scatter(1, keep[..., None].expand(-1, -1, d), cells.to(X.dtype)), keep


def cls_attention(vlm, inputs):
    """How much the encoder's class token looks at each token, (B, N), in the layer that gives X: what FasterVLM
    (arXiv 2412.01818) and VisionZip (arXiv 2412.04467) keep the highest of. Mean over heads."""
    tower, layer = vlm.model.model.vision_tower, vlm.model.config.vision_feature_layer
    block = tower.encoder.layers[layer]
    hidden = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[layer - 1]  # what enters that layer
    x = block.layer_norm1(hidden)  # (B, 1 + N, d)
    q, k = [f(x).unflatten(-1, (block.self_attn.num_heads, -1)).transpose(1, 2)
            for f in (block.self_attn.q_proj, block.self_attn.k_proj)]  # (B, heads, 1 + N, d / heads)
    attention = (q[:, :, :1] @ k.mT / q.shape[-1] ** 0.5).float().softmax(-1)  # (B, heads, 1, 1 + N)
    return attention.mean(1)[:, 0, 1:]


# --- accuracy ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def right_or_wrong(vlm, rows, choices):
    """{name: {category: [was each question answered right]}} for each of the choices {name: choose}.

    choose(X, inputs) gives the tokens to keep, (B, K), None for all, or (other tokens, keep). A batch is read and encoded
    once for all of them.
    """
    batch = 50 if vlm.tokens and vlm.tokens < 600 else 8
    right = {name: {category: [] for category in sorted({row["category"] for row in rows})} for name in choices}
    for at in tqdm(range(0, len(rows), batch), desc="questions", dynamic_ncols=True, leave=False):
        part = rows[at:at + batch]
        inputs = vlm.inputs([read_image(row["image"]) for row in part], [row["text"] for row in part])
        X = vlm.encode(inputs)
        for name, choose in choices.items():
            keep = choose(X, inputs)
            tokens, keep = keep if isinstance(keep, tuple) else (X, keep)
            for row, answer in zip(part, vlm.generate(inputs, tokens, keep, max_new_tokens=8)):
                right[name][row["category"]].append(normal(answer) == normal(row["label"]))
    return right


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def percentile(values, p):
    return sorted(values)[round(p / 100 * (len(values) - 1))]


def spread_of(counts):
    """How many tokens are kept, over images."""
    return {"mean": mean(counts), "p10": percentile(counts, 10), "p90": percentile(counts, 90)}


def accuracies(right):
    """{name: {category: accuracy}} of what right_or_wrong gives."""
    return {name: {c: mean(r) for c, r in by.items()} for name, by in right.items()}


def retention(pruned, full):
    """Mean over categories of pruned / unpruned accuracy, in per cent, as the papers define it."""
    return 100 * mean(pruned[c] / full[c] if full[c] else 1.0 for c in full)


def bootstrap(pruned, full, draws=1000):
    """95 % interval of the retention when the questions are drawn again, within each category, the same for both."""
    generator, values = torch.Generator().manual_seed(0), []
    for _ in range(draws):
        pick = {c: torch.randint(len(full[c]), (len(full[c]),), generator=generator).tolist() for c in full}
        values.append(retention(*({c: mean(side[c][i] for i in pick[c]) for c in full} for side in (pruned, full))))
    values.sort()
    return values[draws // 40], values[-draws // 40 - 1]


def accuracy_table(vlm, scorer, rows, budgets, seeds=1, others=False, T=None):
    """Print accuracy by category and return what was printed, {row name: {category: accuracy}}.

    With T the scorer's tokens are those above that threshold. Random is the mean of `seeds` draws; `others` adds what
    other papers choose by, on models with a square grid.
    """
    def drawn(K, seed):
        generator = torch.Generator().manual_seed(seed)
        return lambda X, inputs: chosen(torch.rand(X.shape[:2], generator=generator).to(X.device), K, inputs)

    def chosen(scores, K, inputs, T=None):
        valid = inputs.get("valid")
        if T is not None:
            return select(scores, count_above(standardised(scores, valid), T))
        return select(scores if valid is None else scores.masked_fill(~valid, -torch.inf), vlm.budget(K, scores, valid))

    ways = {f"all {vlm.tokens or ''}".strip(): [lambda X, inputs: None]}  # row name: [choose, …], averaged
    whole, = ways
    layer, tower = getattr(vlm.model.config, "vision_feature_layer", 0), vlm.model.config.vision_config.model_type
    square = vlm.tokens and math.isqrt(vlm.tokens) ** 2 == vlm.tokens
    grid = square and tower == "clip_vision_model" and layer in (-2, -1)
    for K in budgets:
        ways[f"scorer {K}"] = [lambda X, inputs, K=K: chosen(scorer(X, inputs.get("valid")), K, inputs, T)]
        ways[f"random {K}"] = [drawn(K, seed) for seed in range(seeds)]
        if vlm.tokens:
            ways[f"uniform {K}"] = [lambda X, inputs, K=K: uniform_grid(X, K)]
        if others and grid:
            ways |= {f"{name} {K}": [lambda X, inputs, f=f, K=K: f(X, K)] for name, f in
                     (("norm", feature_norm), ("diversity", max_min_diversity), ("pooling", average_pooling))}
            ways[f"CLS {K}"] = [lambda X, inputs, K=K: select(cls_attention(vlm, inputs), K)]
    answers = right_or_wrong(vlm, rows, {(name, i): f for name, fs in ways.items() for i, f in enumerate(fs)})
    right = {}
    for name, chooses in ways.items():
        draws = [answers[name, i] for i in range(len(chooses))]
        right[name] = {c: [mean(r) for r in zip(*(draw[c] for draw in draws))] for c in draws[0]}  # mean of the draws
    full, table = right[whole], accuracies(right)
    cells = lambda by: [*(f"{100 * a:.1f}" for a in (*by.values(), mean(by.values()))), f"{retention(by, table[whole]):.1f}"]
    show(f"{vlm.name}, {len(rows)} questions: accuracy by category, retention and its 95 % interval, in per cent",
         ["tokens", *full, "mean", "retention", "95 %"],
         ([name, *cells(by), "{:.1f}–{:.1f}".format(*bootstrap(right[name], full))] for name, by in table.items()))
    return table


def accuracy(args):
    """accuracy_table for the command line: any question file, model and pruner."""
    rows = read_questions(args.questions or prepare() / "questions.jsonl", args.images)
    vlm, scorer, _ = load_pruned(args)
    budgets = [vlm.budget(K) for K in args.keep or SHARES]
    return accuracy_table(vlm, scorer, rows, budgets, args.seeds, others=True)


# --- speed ------------------------------------------------------------------------------------------------------------

STAGES = ["encode", "select", "project", "prefill", "decode"]


class Clock:
    """Marks the ends of stages: CUDA events, so that nothing waits between stages; the wall clock elsewhere."""

    def __init__(self, device):
        self.cuda, self.marks = torch.device(device).type == "cuda", []
        self.mark()

    def mark(self):
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self):
        """Between each mark and the next."""
        if self.cuda:
            torch.cuda.synchronize()
        pairs = zip(self.marks, self.marks[1:])
        return [a.elapsed_time(b) if self.cuda else 1000 * (b - a) for a, b in pairs]


@torch.no_grad()
def answer_once(vlm, scorer, inputs, K, prefill):
    """From pixels to the second new token: the time of each stage in ms, and the bytes of the KV cache."""
    clock = Clock(vlm.model.device)
    X = vlm.encode(inputs)  # (B, N, d_v)
    clock.mark()
    keep = select(scorer(X), K) if K else None  # (B, K)
    clock.mark()
    sequence = vlm.embed(inputs, X, keep)  # L' = L - N + K
    clock.mark()
    out = prefill(**sequence, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)  # (B, 1)
    clock.mark()
    mask = F.pad(sequence["attention_mask"], (0, 1), value=1)
    cache = out.get("cache") or out["past_key_values"]  # the key's name as CACHE
    vlm.model(input_ids=token, **{CACHE: cache}, attention_mask=mask,
              position_ids=sequence["position_ids"][..., -1:] + 1, use_cache=True)
    clock.mark()
    size = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    return dict(zip(STAGES, clock.milliseconds())), size


def prefill_flops(vlm, length):
    """FLOPs of one prefill of `length` tokens, 2 a multiply-add, counted by torch on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = AutoModelForImageTextToText.from_config(copy.deepcopy(vlm.model.config)).eval()
        embeds = torch.empty(1, length, model.get_input_embeddings().embedding_dim)
        model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
    return counter.get_total_flops()


def speed(args):
    """Every stage of an answer with all tokens and with K of them, the rows in turn, so that a drift hits all alike."""
    model = args.model or load_pruner(args.pruner)[1]["model"]
    vlm = load(model, args.device, DTYPES[args.dtype])
    scorer = Scorer(vlm.width).to(vlm.model.device).deploy(vlm.model.dtype)  # its weights do not matter here
    inputs = vlm.dummy_inputs(args.batch, args.text)
    X, L = vlm.encode(inputs), inputs["input_ids"].shape[1]
    N, cuda = X.shape[1], vlm.model.device.type == "cuda"
    rows = {f"all {N}": None} | {f"keep {K}": K for K in (vlm.budget(K, X) for K in args.keep or SHARES)}
    if args.device == "meta":  # nothing runs, so there is nothing to time
        counted = {name: prefill_flops(vlm, L - N + (K or N)) / 1e12 for name, K in rows.items()}
        print(f"{vlm.name}, {N} visual and {args.text} text tokens, prefill: "
              + ", ".join(f"{name} {t:.3f} TFLOPs" for name, t in counted.items()))
        return {"model": vlm.name, "text": args.text, "rows": {name: {"tflops": t} for name, t in counted.items()}}
    modes = {"": vlm.model}
    if args.compile:
        modes[", compiled"] = torch.compile(vlm.model, mode="reduce-overhead" if cuda else "default")  # CUDA graphs
    result = {name + mode: {"tflops": prefill_flops(vlm, L - N + (K or N)) / 1e12, "runs": []}
              for mode in modes for name, K in rows.items()}
    for repeat in tqdm(range(-2, args.repeats), desc="timing", dynamic_ncols=True):  # the first two are the warm-up
        for mode, prefill in modes.items():
            for name, K in rows.items():
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                times, size = answer_once(vlm, scorer, inputs, K, prefill)
                row = result[name + mode]
                row |= {"cache_bytes": size, "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None}
                row["runs"] += [times | {"first": sum(times.values()) - times["decode"]}] * (repeat >= 0)
    columns = (*STAGES[:-1], "first", "decode")
    for row in result.values():
        runs = row.pop("runs")
        for stage in columns:
            t = [run[stage] for run in runs]
            row[stage] = {"median": statistics.median(t), "p10": percentile(t, 10), "p90": percentile(t, 90)}
    for name, row in result.items():
        base = result[f"all {N}" + "".join(name.partition(",")[1:])]
        row["ratio"] = {stage: base[stage]["median"] / row[stage]["median"] for stage in ("prefill", "first", "decode")}
        row["overhead"] = row["select"]["median"] / base["prefill"]["median"]  # of choosing, as a share of the prefill

    lines = [[name, f"{row['tflops']:.3g}", *("{median:.2f} [{p10:.1f}–{p90:.1f}]".format(**row[s]) for s in columns),
              f"{row['cache_bytes'] / 1e6:.1f}", f"{row['peak_bytes'] / 1e9:.2f}" if cuda else "–",
              *(f"{row['ratio'][s]:.2f}×" for s in ("prefill", "first")), f"{row['overhead']:.2%}"]
             for name, row in result.items()]
    if "llava-1.5-7b" in vlm.name:
        lines += [[name, f"{row['tflops']}", *(str(row.get(s, "–")) for s in columns), "–", "–", *3 * ["A6000"]]
                  for name, row in PUBLISHED_SPEED.items()]
    show(f"{vlm.name}: batch {args.batch}, {N} visual and {args.text} text tokens, {args.dtype}, attention "
         f"{vlm.model.config._attn_implementation}; ms, median [p10–p90] of {args.repeats} passes after 2 to warm up",
         ["tokens", "TFLOPs", *columns, "KV MB", "peak GB", "prefill", "first", "overhead"], lines)
    return {"model": vlm.name, "batch": args.batch, "text": args.text, "dtype": args.dtype, "repeats": args.repeats,
            "rows": result}


# --- ablations --------------------------------------------------------------------------------------------------------

VARIANTS = {  # train.py's flags: each differs in one thing from the first row of its group (raw scores: from the second)
    "ours": [],
    "ours, per image": ["--budget", "image"],
    "ours, K = 16 only": ["--keep", "16"],
    "ours, raw tokens": ["--no-whiten"],
    "ours, per image, raw scores": ["--budget", "image", "--no-standardise"],
    "ours, no presence": ["--no-presence"],
    "ours, with denoiser": ["--denoiser", "diagonal"],
    "ours, tau 2 to 0.1": ["--tau-start", "2", "--tau-end", "0.1", "--anneal", "0.5"],
    "ours, scale gate": ["--gate", "scale"],
    "ours, Gumbel": ["--gate", "gumbel"],
    "papers": ["--recipe", "papers"],
    "papers, channel noise": ["--recipe", "papers", "--noise", "channel"],
    "papers, isotropic noise": ["--recipe", "papers", "--noise", "isotropic"],
    "papers, scale gate": ["--recipe", "papers", "--gate", "scale"],
    "papers, Gumbel": ["--recipe", "papers", "--gate", "gumbel"],
    "papers, global denoiser": ["--recipe", "papers", "--denoiser", "global"],
}
LOSSES = ("soft_loss", "hard_loss", "deployed_loss")  # on held-out captions: train.held_out_losses


def train_variants(args, variants):
    """Train these by train.py on the embedded default, seeds 0 … n-1, equal steps: {(variant, seed): folder}.

    A finished run that is in its folder, with the same flags and defaults, is not trained again. --dtype is for the
    training only.
    """
    from train import RECIPES, SHAPES  # here, since train.py imports this file
    steps = args.steps or SHAPES["steps"]
    folders = {(variant, seed): args.runs / f"{re.sub('[^A-Za-z0-9]+', '-', variant)}-{seed}"
               for variant in variants for seed in range(args.seeds)}

    def train(job):
        (variant, seed), folder = job
        made, wanted = folder / "variant.json", [variants[variant], steps, args.dtype, SHAPES, RECIPES]
        if not made.exists() or json.loads(made.read_text()) != wanted:
            folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, HERE / "train.py", "--seed", str(seed), "--out", folder, "--overwrite",
                       "--questions", "none", "--device", args.device, "--dtype", args.dtype, "--steps", str(steps),
                       "--eval-every", str(steps), *variants[variant]]
            with open(folder / "log.txt", "w") as log:
                threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
                done = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, **threads})
            if done.returncode:
                raise InputError(f"{folder / 'log.txt'}: training {variant!r} failed; its last lines say why")
            write(made, wanted)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(tqdm(pool.map(train, folders.items()), total=len(folders), desc="training runs", dynamic_ncols=True))
    return folders


def spread(values):
    return f"{mean(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def ablations(args):
    """Train every variant; the accuracy at each budget, cut at the top K, however a variant is deployed."""
    rows, vlm = read_questions(prepare() / "questions.jsonl"), load("data/shapes/llava", args.device)
    budgets, seeds = [vlm.budget(K) for K in args.keep or (16, 32, 48)], range(args.seeds)
    folders = train_variants(args, {name: VARIANTS[name] for name in args.variants or VARIANTS})
    choices = {"all": lambda X, inputs: None}
    for (variant, seed), folder in folders.items():
        scorer = load_pruner(folder)[0].to(args.device)
        choices |= {(variant, seed, K): lambda X, inputs, scorer=scorer, K=K: select(scorer(X), K) for K in budgets}
    answered = accuracies(right_or_wrong(vlm, rows, choices))
    full, table = answered["all"], {}
    for variant in dict.fromkeys(variant for variant, _ in folders):
        ends = [load_pruner(folders[variant, seed])[1]["curve"][-1] for seed in seeds]
        at = {K: [answered[variant, seed, K] for seed in seeds] for K in budgets}
        table[variant] = {**{k: mean(end[k] for end in ends) for k in ("hardness", *LOSSES)},
                          "steps": ends[0]["step"] + 1,
                          "retention": {K: [retention(by, full) for by in runs] for K, runs in at.items()},
                          "by_category": {K: {c: mean(by[c] for by in runs) for c in full} for K, runs in at.items()}}
    show(f"after training, mean of the seeds (lowest to highest); loss with all tokens {ends[0]['full_loss']:.3f}",
         ["variant", "hardness", *LOSSES, *(f"K = {K}" for K in budgets)],
         ([name, f"{row['hardness']:.2f}", *(f"{row[k]:.3f}" for k in LOSSES), *map(spread, row["retention"].values())]
          for name, row in table.items()))
    return table


# --- budgets: per image or pooled, top-K or a threshold, a range or one K ---------------------------------------------

def budgets(args):
    """What do one pruner for every budget, and counts that differ from picture to picture, gain at equal mean counts?"""
    rows, vlm = read_questions(prepare() / "questions.jsonl"), load("data/shapes/llava", args.device)
    ladder, seeds = ("8", "12", "16", "24", "32", "48"), range(args.seeds)  # train.calibrate's, for K = 16
    variants = {"image": (ladder, ["--keep", "8:32", "--budget", "image"]), "batch": (ladder, ["--keep", "8:32", "--budget", "batch"]),
                **{f"only {K}": ([K], ["--keep", K, "--budget", "image"]) for K in ("8", "16", "32", "48")}}
    folders = train_variants(args, {name: flags for name, (_, flags) in variants.items()})
    choices, counts = {"all": lambda X, inputs: None}, {}

    def add(name, scorer, count):  # count(z) -> how many tokens of each image: a number, or (B,)
        def choose(X, inputs):
            scores = scorer(X)
            K = count(standardised(scores))
            counts.setdefault(name, []).extend(K.tolist() if torch.is_tensor(K) else [K] * len(X))
            return select(scores, K)
        choices[name] = choose

    for (variant, seed), folder in folders.items():
        scorer, settings = load_pruner(folder)
        scorer, tau = scorer.to(args.device), settings["curve"][-1]["tau"]
        for K in variants[variant][0]:
            add((variant, "top-K", seed, K), scorer, lambda z, K=K: int(K))
            if variant in ("image", "batch"):
                T = settings["thresholds"][K]["threshold"]
                add((variant, "threshold", seed, K), scorer, lambda z, T=T: count_above(z, T))
            if variant == "image":
                add((variant, "alpha > ½", seed, K), scorer,
                    lambda z, K=K, tau=tau: (soft_top_k(z, int(K), tau) > 0.5).sum(-1).clamp_min(1))
    answered = accuracies(right_or_wrong(vlm, rows, choices))
    table, ways = {}, dict.fromkeys(name[:2] for name in counts)
    for way in ways:
        at = {K: [(*way, seed, K) for seed in seeds] for K in ladder if (*way, 0, K) in counts}
        table[", ".join(way)] = {K: {"retention": [retention(answered[name], answered["all"]) for name in names],
                                     "kept": [mean(counts[name]) for name in names]} for K, names in at.items()}
    cell = lambda at: f"{spread(at['retention'])} @ {mean(at['kept']):.1f}"
    show("retention, mean of the seeds (lowest to highest) @ tokens kept, mean", ["trained, cut", *ladder],
         ([name, *(cell(at[K]) if K in at else "–" for K in ladder)] for name, at in table.items()))
    shapes = {row["image"]: row["label"] for row in rows if row["category"] == "count"}
    by_shapes = {}
    for variant in ("image", "batch"):
        kept = [(shapes[row["image"]], k) for seed in seeds
                for row, k in zip(rows, counts[variant, "threshold", seed, "16"])]
        by_shapes[variant] = {n: spread_of([k for m, k in kept if m == n]) for n in ("one", "two", "three")}
    show("tokens kept by the threshold ~16, by number of shapes: mean [p10–p90]", ["trained", *by_shapes["image"]],
         ([name, *("{mean:.1f} [{p10}–{p90}]".format(**k) for k in by.values())] for name, by in by_shapes.items()))
    return {"retention": table, "by_shapes": by_shapes, "steps": args.steps}


# --- probes -----------------------------------------------------------------------------------------------------------

def probes(args):
    """The papers' measured claims, on the embedded default, for the noise gate and for Gumbel with straight-through.

    coherence: mean cosine between the scorer's gradients on independent batches, at the start and midway;
    roughness: mean change of the loss from step to step along a random direction in the scorer's weights, noise fixed;
    noise like dropping: accuracy with random scores, all tokens gated to a mean weight of K/N against K tokens kept.
    """
    from train import PROMPT, SHAPES, read_coco, tau_at, training_loss  # here, since train.py imports this file
    from denoiser import Denoiser
    vlm, folder = load("data/shapes/llava", args.device), prepare()
    pairs = list(read_coco(folder / "train.json").items())
    batch, K, result = 24, 16, {}

    def inputs_of(i):
        part = [pairs[(i * batch + j) % len(pairs)] for j in range(batch)]
        return vlm.inputs([read_image(p) for p, _ in part], [PROMPT] * batch, [captions[0] for _, captions in part])

    statistics_ = whitening(torch.cat([vlm.encode(inputs_of(i)) for i in range(8)]))
    for gate, seed in [(gate, seed) for gate in ("vp", "gumbel") for seed in range(args.seeds)]:
        torch.manual_seed(seed)
        scorer, denoiser = (m.to(vlm.model.device) for m in (Scorer(vlm.width), Denoiser(vlm.width)))
        optimizer = torch.optim.AdamW([*scorer.parameters(), *denoiser.parameters()], lr=SHAPES["lr"])
        flat = lambda ts: torch.cat([t.flatten() for t in ts])

        def loss_at(i, tau):
            return training_loss(vlm, scorer, denoiser, statistics_, inputs_of(i), K, tau, gate)[0]

        def coherence(tau, n=8):
            g = torch.stack([flat(torch.autograd.grad(loss_at(-1 - i, tau), scorer.parameters())) for i in range(n)])
            g = F.normalize(g, dim=1)
            return (((g @ g.T).sum() - n) / (n * (n - 1))).item()

        row = {"coherence_start": coherence(2.0)}
        for step in tqdm(range(args.steps or 60), desc=f"{gate}, seed {seed}", dynamic_ncols=True, leave=False):
            tau = tau_at("papers", step / (args.steps or 60) / 2, 2.0, 0.1)
            optimizer.zero_grad()
            loss_at(step, tau).backward()
            optimizer.step()
        row["coherence_midway"] = coherence(tau)
        weights = list(scorer.parameters())
        direction = [torch.randn_like(w) * w.norm() / w.numel() ** 0.5 for w in weights]
        losses = []
        with torch.no_grad():
            for _ in range(21):  # twenty steps of 1 % of the weights' norm
                torch.manual_seed(seed)
                losses.append(loss_at(-1, tau).item())
                for w, d in zip(weights, direction):
                    w += 0.01 * d
        row["roughness"] = mean(abs(a - b) for a, b in zip(losses, losses[1:]))
        for name, value in row.items():
            result.setdefault(gate, {}).setdefault(name, []).append(value)
    fine = lambda v: f"{mean(v):.4f} ({min(v):.4f}–{max(v):.4f})"
    show(f"mean of {args.seeds} seeds (lowest to highest)", ["", "noise gate", "Gumbel, straight-through", "ratio"],
         ([name, fine(result["vp"][name]), fine(result["gumbel"][name]),
           f"{mean(result['vp'][name]) / mean(result['gumbel'][name]):.2f}"] for name in result["vp"]))

    rows = read_questions(folder / "questions.jsonl")
    shares, choices = [1.0, 0.75, 0.5, 0.33, 0.22, 0.11, 0.06], {}
    mean_X, L = statistics_
    for share in shares:
        K = max(1, round(share * vlm.tokens))
        choices[f"noise {share}"] = lambda X, inputs, K=K: (
            vp_gate(X, soft_top_k(torch.randn(X.shape[:2], device=X.device), K), mean_X, L), None)
        choices[f"dropped {share}"] = lambda X, inputs, K=K: random_tokens(X, K)
    torch.manual_seed(0)
    answers = right_or_wrong(vlm, rows, choices)
    right = {name: 100 * mean(mean(r) for r in by.values()) for name, by in answers.items()}
    result["noise_like_dropping"] = [
        {"share": share, "noise": right[f"noise {share}"], "dropped": right[f"dropped {share}"]} for share in shares]
    show("random scores: accuracy with all tokens gated to a mean weight, and with that share of the tokens kept",
         ["share", "gated", "dropped"],
         ([f"{at['share']:.0%}", f"{at['noise']:.1f}", f"{at['dropped']:.1f}"] for at in result["noise_like_dropping"]))
    return result


# --- ceiling ----------------------------------------------------------------------------------------------------------

def ceiling(args):
    """How far choosing goes without a scorer: the scores of each of 50 images are optimised for themselves, by the
    training graph (gate, presence, falling tau), on the image's captions, or, as no scorer may, on the answers. Beside
    it the pruner that ships on the same images, and on 300 that it was trained on: does it fail to fit or to generalise?"""
    from train import PROMPT, RECIPES, tau_at, training_loss  # here, since train.py imports this file
    folder, vlm = prepare(), load("data/shapes/llava", args.device)
    rows = read_questions(folder / "questions.jsonl")[:250]
    scorer = load_pruner(HERE / "data/shapes/pruner")[0].to(args.device)
    K, steps, recipe = vlm.budget((args.keep or [16])[0]), args.steps or 60, RECIPES["ours"]
    captions = [caption(draw_scene(f"test-{i // 5}")[1], random.Random(f"ceiling-{i}")) for i in range(len(rows))]
    texts = {"captions": ([PROMPT] * len(rows), captions),  # five a picture, as there are five questions
             "answers": ([row["text"] for row in rows], [row["label"] for row in rows])}
    torch.manual_seed(0)
    pictures = [read_image(row["image"]) for row in rows]
    mean_X, L = whitening(vlm.encode(vlm.inputs(pictures[::5], ["?"] * len(pictures[::5]))))
    choices = {"all": lambda X, inputs: None}
    for name, (asked, said) in texts.items():
        keeps = []
        for part in tqdm([slice(i, i + 50) for i in range(0, len(rows), 50)], desc=name, dynamic_ncols=True, leave=False):
            inputs = vlm.inputs(pictures[part], asked[part], said[part])
            scores = (0.1 * torch.randn(10, vlm.tokens, device=vlm.model.device)).requires_grad_()  # ten pictures
            optimizer = torch.optim.Adam([scores], lr=0.05)
            for step in range(steps):
                tau = tau_at("ours", step / (recipe["anneal"] * steps), recipe["tau_start"], recipe["tau_end"])
                loss, _ = training_loss(vlm, lambda X, valid: scores.repeat_interleave(5, 0), torch.nn.Identity(),
                                        (mean_X, L), inputs, K, tau, standardise=True, presence=True)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            keeps.append(select(scores.detach(), K).repeat_interleave(5, 0))
        choices[name] = lambda X, inputs, turn=iter(keeps): next(turn)  # right_or_wrong's batch is 50, too
    choices["scorer"] = lambda X, inputs: select(scorer(X), K)
    answered = accuracies(right_or_wrong(vlm, rows, choices))
    trained = [dict(image=folder / f"train/{i:05d}.jpg", category=category, text=text, label=label) for i in range(300)
               for category, text, label in questions(draw_scene(f"train-{i}")[1], random.Random(f"ceiling-{i}"))]
    pair = {"all, trained on": choices["all"], "scorer, trained on": choices["scorer"]}
    answered |= accuracies(right_or_wrong(vlm, trained, pair))
    whole = lambda name: answered["all" + name.removeprefix(name.split(",")[0])]
    show(f"{K} tokens of 50 images, by optimisation on captions or answers, and by the scorer; then of 300 it was trained on",
         ["", *answered["all"], "retention"],
         ([name, *(f"{100 * a:.1f}" for a in by.values()), f"{retention(by, whole(name)):.1f}"]
          for name, by in answered.items()))
    return answered


# --- the command ------------------------------------------------------------------------------------------------------

def conditions():
    """What a number depends on, beside the code."""
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "") \
        if Path("/proc/cpuinfo").exists() else platform.processor()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"date": time.strftime("%Y-%m-%d"), "cpu": cpu, "threads": torch.get_num_threads(), "gpu": gpu,
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


TABLES = {"speed": speed, "accuracy": accuracy, "ablations": ablations, "budgets": budgets, "probes": probes,
          "ceiling": ceiling}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = lambda flag, text, **kw: ap.add_argument(flag, help=text, **kw)
    add("table", "(default: speed, accuracy and ablations)", nargs="?", choices=TABLES)
    add("--keep", "how many tokens, whole numbers or shares (33.3%% 22.2%% 11.1%%; ablations 16 32 48, ceiling 16)",
        metavar="K", nargs="+")
    add("--json", "save what was measured, and under which conditions", type=Path, metavar="FILE")
    add("--seeds", "of random choices and of what is trained (%(default)s)", type=int, default=3)
    add_pruner_arguments(ap)
    add("--questions", "accuracy: question file (default: the embedded one)", metavar="JSONL")
    add("--images", "accuracy: folder of its images (default: the question file's own)", metavar="DIR")
    add("--batch", "speed: images at once (%(default)s)", type=int, default=1)
    add("--text", "speed: text tokens (%(default)s)", type=int, default=95, metavar="T")
    add("--repeats", "speed: timed passes (default: 50 on a GPU, 5 on a CPU)", type=int)
    add("--compile", "speed: also with torch.compile, on a GPU with CUDA graphs", action="store_true")
    add("--steps", "of training (default: train.py's own; probes, ceiling: 60)", type=int)
    add("--variants", "ablations: only these", nargs="+", choices=VARIANTS)
    add("--runs", "ablations, budgets: folder of the trained runs, which are not trained again (%(default)s)", type=Path,
        default=HERE / "out/bench")
    add("--jobs", "ablations, budgets: runs at once (%(default)s)", type=int, default=1)
    args = ap.parse_args()
    for name in ("seeds", "batch", "text", "jobs", "steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be 1 or more")
    args.repeats = args.repeats or (50 if args.device.startswith("cuda") else 5)
    measured = {"conditions": conditions(), "command": " ".join(["python bench.py", *sys.argv[1:]])}
    print(json.dumps(measured["conditions"]), file=sys.stderr)
    if args.json:
        write(args.json, measured)  # a path that cannot be written is found out now
    for table in [args.table] if args.table else ["speed", "accuracy", "ablations"]:
        measured[table] = TABLES[table](args)
        print()
        if args.json:  # after each table, so that a later one cannot lose it
            write(args.json, rounded(measured))
    print(json.dumps(rounded(measured)))


if __name__ == "__main__":
    cli(main)
