"""
What pruning saves, what it costs and what it keeps: tables with their conditions.

    python bench.py speed --model random:llava-1.5-7b --dtype bfloat16   # every stage's time, with all tokens and few
    python bench.py speed --model random:qwen2.5-vl-7b --device meta     # only its FLOPs: needs no memory
    python bench.py accuracy           # beside random tokens, a grid, and what other papers choose by
    python bench.py accuracy --keep '~16' 32                             # by the pruner's threshold; its top 32
    python bench.py ablations          # or budgets, probes, ceiling: studies, see data/shapes/study.py
    python bench.py                    # speed, accuracy and ablations; --json FILE saves what was measured

accuracy takes any question file: one JSON object a line with question_id, image, text (LLaVA's evaluation format),
label and optionally category. An answer counts when it equals the label, letter case and a final full stop aside.
Retention is the papers': the mean over categories of pruned / unpruned accuracy, in per cent.
"""
import argparse
import copy
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoModelForImageTextToText

from data.files import rounded, write
from data.questions import normal, read_questions
from data.shapes.prepare import prepare
from infer import CACHE, DTYPES, add_pruner_arguments, chooser, load_pruned, load_pruner
from model import HERE, InputError, cli, load, read_image
from throttler import Scorer, select

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

    choose(X, inputs) gives the tokens to keep, (B, K), None for all, or (other tokens, keep). A batch is read and
    encoded once for all of them.
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


def accuracy_table(vlm, scorer, settings, rows, budgets, seeds=1, others=False):
    """Print accuracy by category and return what was printed, {row name: {category: accuracy}}.

    The scorer's tokens are chosen as infer.py chooses: for a budget '~K' by the threshold in the pruner's settings,
    beside exactly K by all else. Random is the mean of `seeds` draws; `others` adds what other papers choose by, on
    models with a square grid.
    """
    def random_scorer(seed):
        generator = torch.Generator().manual_seed(seed)

        def scores(X, valid):
            s = torch.rand(X.shape[:2], generator=generator).to(X.device)
            return s if valid is None else s.masked_fill(~valid, -torch.inf)
        return scores

    ways = {f"all {vlm.tokens or ''}".strip(): [lambda X, inputs: None]}  # row name: [choose, …], averaged
    whole, = ways
    layer, tower = getattr(vlm.model.config, "vision_feature_layer", 0), vlm.model.config.vision_config.model_type
    square = vlm.tokens and math.isqrt(vlm.tokens) ** 2 == vlm.tokens
    grid = square and tower == "clip_vision_model" and layer in (-2, -1)
    for budget in budgets:
        ways[f"scorer {budget}"] = [chooser(vlm, scorer, settings, budget)[0]]
        K = vlm.budget(str(budget).removeprefix("~"))
        ways[f"random {K}"] = [chooser(vlm, random_scorer(seed), settings, K)[0] for seed in range(seeds)]
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
    cells = lambda by: [f"{a:.1f}" for a in (*(100 * a for a in (*by.values(), mean(by.values()))),
                                             retention(by, table[whole]))]
    show(f"{vlm.name}, {len(rows)} questions: accuracy by category, retention and its 95 % interval, in per cent",
         ["tokens", *full, "mean", "retention", "95 %"],
         ([name, *cells(by), "{:.1f}–{:.1f}".format(*bootstrap(right[name], full))] for name, by in table.items()))
    return table


def accuracy(args):
    """accuracy_table for the command line: any question file, model and pruner."""
    rows = read_questions(args.questions or prepare() / "questions.jsonl", args.images)
    vlm, scorer, settings = load_pruned(args)
    budgets = [K if K.startswith("~") else vlm.budget(K) for K in args.keep or SHARES]
    return accuracy_table(vlm, scorer, settings, rows, budgets, args.seeds, others=True)


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


# --- the command ------------------------------------------------------------------------------------------------------

def conditions():
    """What a number depends on, beside the code."""
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "") \
        if Path("/proc/cpuinfo").exists() else platform.processor()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"date": time.strftime("%Y-%m-%d"), "cpu": cpu, "threads": torch.get_num_threads(), "gpu": gpu,
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def main():
    from data.shapes.study import STUDIES, VARIANTS  # here, since it imports this file

    tables = {"speed": speed, "accuracy": accuracy, **STUDIES}
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = lambda flag, text, **kw: ap.add_argument(flag, help=text, **kw)
    add("table", "(default: speed, accuracy and ablations)", nargs="?", choices=tables)
    add("--keep", "how many tokens: whole numbers or shares (33.3%% 22.2%% 11.1%%), for accuracy also '~16', as of "
        "infer.py; ablations: 16 32 48; ceiling: one, 16; not for budgets and probes",
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
    add("--runs", "ablations, budgets: folder of the trained runs, which are not trained again (%(default)s)",
        type=Path, default=HERE / "out/bench")
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
        measured[table] = tables[table](args)
        print()
        if args.json:  # after each table, so that a later one cannot lose it
            write(args.json, rounded(measured))
    print(json.dumps(rounded(measured)))


if __name__ == "__main__":
    cli(main)
