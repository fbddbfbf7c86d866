"""
What pruning saves and what it costs: the time of every stage of an answer, with all visual tokens and with few.

    python bench.py --model random:llava-1.5-7b --dtype bfloat16                        # true size, random weights
    python bench.py --model random:llava-1.5-7b --dtype bfloat16 --batch 1 4 16 --compile --json speed.json
    python bench.py --model random:qwen2.5-vl-7b --device meta                          # FLOPs alone: needs no memory

All rows of all tables are timed in turn within one run, so that a drift of the machine hits all of them alike. Each
number is the median; ratios are within one batch size. What pruning keeps is measured by python -m eval.accuracy.
"""
import argparse
import copy
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoModelForImageTextToText

from common.files import InputError, cli
from common.pruner import RANKINGS, default_pruner, load_pruner
from common.criteria import average_pooling, cls_attention, criteria, pooled_grid
from eval.tables import budgets, check, percentile, save, show
from infer import CACHE
from model import DTYPES, add_device_arguments, load, number_type
from throttler import Scorer, distinct, select

STAGES = ["encode", "select", "project", "prefill", "decode"]
# DiffPrune's figures (arXiv 2605.28051), LLaVA-1.5-7B on one A6000, batch 1, fp16, in ms
PUBLISHED = {"all 576, published": dict(tflops=8.89, encode=29.71, prefill=118.66, first=149.51),
             "keep 64, published": dict(tflops=2.13, encode=30.41, select=0.69, prefill=41.61, first=73.73)}


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
        if not self.cuda:
            return [1000 * (b - a) for a, b in zip(self.marks, self.marks[1:])]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(self.marks, self.marks[1:])]


@torch.no_grad()
def answer_once(vlm, scorer, inputs, K, how, prefill, words):
    """One answer of so many tokens, from pixels on: {stage: ms}, decode per token, and the bytes of the KV cache."""
    clock = Clock(vlm.model.device)
    X = vlm.encode(inputs)  # (B, N, d)
    clock.mark()
    keep = select(RANKINGS[how](scorer(X), X), K) if K else None  # (B, K)
    clock.mark()
    sequence = vlm.embed(inputs, X, keep)  # L' = L - N + K
    clock.mark()
    with vlm.telling(sequence) as given:
        out = prefill(**given, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)  # (B, 1)
    clock.mark()
    cache = out.get("cache") or out["past_key_values"]  # the key's name as CACHE
    size = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    mask, position = sequence["attention_mask"], sequence["position_ids"][..., -1:]
    for _ in range(words - 1):
        mask, position = F.pad(mask, (0, 1), value=1), position + 1
        out = vlm.model(input_ids=token, **{CACHE: cache}, attention_mask=mask, position_ids=position, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    clock.mark()
    times = dict(zip(STAGES, clock.milliseconds()))
    times["answer"] = sum(times.values())
    times["first"] = times["answer"] - times["decode"]
    times["decode"] /= max(1, words - 1)
    return times, size


def prefill_flops(vlm, lengths):
    """{L: FLOPs of the prefill of one sequence of L tokens}, 2 a multiply-add, counted on the meta device."""
    flops = {}
    with torch.device("meta"), torch.no_grad():
        model = AutoModelForImageTextToText.from_config(copy.deepcopy(vlm.model.config)).eval()
        for L in lengths:
            with FlopCounterMode(display=False) as counter:
                embeds = torch.empty(1, L, model.get_input_embeddings().embedding_dim)
                model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
            flops[L] = counter.get_total_flops()
    return flops


@torch.no_grad()
def ways_to_choose(vlm, scorer, inputs, X, K):
    """{name: a function without arguments} that chooses K tokens: the scorer, and every criterion of other papers."""
    ways = {"scorer, top": lambda: select(scorer(X), K), "scorer, distinct": lambda: select(distinct(scorer(X), X), K)}
    for name, choose in criteria(vlm).items():
        if name == "CLS":  # the encoder has this at hand; it is not to run twice
            tower = vlm.model.model.vision_tower
            hidden = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[vlm.layers[-1] - 1]
            ways["CLS"] = lambda: select(cls_attention(vlm, inputs, hidden), K)
        elif name != "pooling":
            ways[name] = partial(choose, X, inputs, K)
        elif pooled_grid(vlm.tokens, K):
            ways["pooling"] = lambda: average_pooling(X, K)
    return ways


def summary(values):
    return {"median": statistics.median(values), "p10": percentile(values, 10), "p90": percentile(values, 90)}


def rows_of(vlm, args):
    """{row: (inputs, K or None for all tokens, TFLOPs of the prefill)} for every batch size and budget."""
    inputs = vlm.dummy_inputs(1, args.text)
    L = inputs["input_ids"].shape[1]
    N = L - args.text
    counts = {f"all {N}": None, **{f"keep {budget.of(N)}": budget.of(N) for budget in budgets(args.keep, vlm)}}
    flops = prefill_flops(vlm, {L - N + (K or N) for K in counts.values()})
    rows = {}
    for batch in args.batch:
        inputs, more = vlm.dummy_inputs(batch, args.text), "" if args.batch == [1] else f", batch {batch}"
        for name, K in counts.items():
            rows[name + more] = inputs, K, batch * flops[L - N + (K or N)] / 1e12
    return rows


def speed(vlm, args):
    """Time every row of the tables in turn. Returns what --json saves."""
    device, cuda = vlm.model.device, vlm.model.device.type == "cuda"
    scorer = Scorer(vlm.width).to(device).eval()  # its weights do not matter here
    prefills = {"": vlm.model}
    if args.compile:
        torch._dynamo.config.recompile_limit = 1000  # a shape for each row; beyond the limit it would not be compiled
        compiled = torch.compile(vlm.model, mode="reduce-overhead" if cuda else "default", dynamic=False)
        prefills[", compiled"] = compiled  # on a GPU with CUDA graphs
    rows, result, runs = rows_of(vlm, args), {}, {}
    choosing = {name: ways_to_choose(vlm, scorer, inputs, vlm.encode(inputs), K)
                for name, (inputs, K, _) in rows.items() if K}
    for repeat in tqdm(range(-2, args.repeats), desc="timing", dynamic_ncols=True):  # the first two are the warm-up
        for mode, prefill in prefills.items():
            for name, (inputs, K, tflops) in rows.items():
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                times, size = answer_once(vlm, scorer, inputs, K, args.choose, prefill, args.words)
                peak = torch.cuda.max_memory_allocated() if cuda else None
                result[name + mode] = {"tflops": tflops, "cache_bytes": size, "peak_bytes": peak}
                runs.setdefault(name + mode, []).append(times)
        for name, ways in choosing.items():
            for way, choose in ways.items():
                clock = Clock(device)
                with torch.no_grad():
                    choose()
                clock.mark()
                runs.setdefault((name, way), []).extend(clock.milliseconds())
    for name, row in result.items():
        for stage in (*STAGES, "first", "answer"):
            row[stage] = summary([times[stage] for times in runs[name][2:]])
    whole = next(iter(rows)).partition(",")[0]  # "all 576"
    for name, row in result.items():
        base = result[whole + name.removeprefix(name.partition(",")[0])]  # of the same batch and mode
        row["ratio"] = {s: base[s]["median"] / row[s]["median"] for s in ("prefill", "first", "decode", "answer")}
        row["overhead"] = row["select"]["median"] / base["prefill"]["median"]  # of choosing, as a share of the prefill
        batch = len(rows[name.removesuffix(", compiled")][0]["input_ids"])
        row["images_per_second"] = {s: 1000 * batch / row[s]["median"] for s in ("prefill", "answer")}
    choosing = {name: {way: summary(runs[name, way][2:]) for way in ways} for name, ways in choosing.items()}
    return {"model": vlm.name, "batch": args.batch, "text": args.text, "words": args.words, "dtype": args.dtype,
            "repeats": args.repeats, "choose": args.choose, "rows": result, "choosing": choosing}


def print_tables(vlm, args, made):
    """The stages, the throughput, and the ways to choose; with the papers' figures where they are of this model."""
    columns = (*STAGES[:-1], "first", "decode")
    lines, through = [], []
    for name, row in made["rows"].items():
        spread = ["{median:.2f} [{p10:.1f}–{p90:.1f}]".format(**row[stage]) for stage in columns]
        peak = f"{row['peak_bytes'] / 1e9:.2f}" if row["peak_bytes"] else "–"
        lines.append([name, f"{row['tflops']:.4g}", *spread, f"{row['cache_bytes'] / 1e6:.1f}", peak,
                      f"{row['ratio']['prefill']:.2f}×", f"{row['ratio']['first']:.2f}×", f"{row['overhead']:.2%}"])
        rate, ratio = row["images_per_second"], row["ratio"]
        through.append([name, f"{rate['prefill']:.3g}", f"{ratio['prefill']:.2f}×", f"{rate['answer']:.3g}",
                        f"{ratio['answer']:.2f}×"])
    if "llava-1.5-7b" in vlm.name:
        for name, row in PUBLISHED.items():
            stages = [str(row.get(stage, "–")) for stage in columns]
            lines.append([name, f"{row['tflops']}", *stages, "–", "–", *3 * ["A6000"]])
    show(f"{vlm.name}: {args.text} text tokens, {args.dtype}, attention {vlm.model.config._attn_implementation}; ms, "
         f"median [10th–90th percentile] of {args.repeats} passes after 2 to warm up; decode is for one token",
         ["tokens", "TFLOPs", *columns, "KV MB", "peak GB", "prefill", "first", "overhead"], lines)
    show(f"\nimages a second: the LLM's prefill, and whole answers of {args.words} tokens",
         ["tokens", "prefill", "ratio", "answers", "ratio"], through)
    names = list(dict.fromkeys(way for ways in made["choosing"].values() for way in ways))
    show("\nms to choose, median", ["tokens", *names],
         [[name, *(f"{ways[way]['median']:.3f}" if way in ways else "–" for way in names)]
          for name, ways in made["choosing"].items()])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("table", nargs="?", choices=["speed"], default="speed", help="may be left out: there is no other")
    ap.add_argument("--model", help="folder or hub name of the VLM, or random:NAME, the true size with random weights "
                    "(default: the model of your pruner, or of the one that ships)")
    ap.add_argument("--keep", nargs="+", default=["33.3%", "22.2%", "11.1%"], metavar="K",
                    help="tokens to keep (default: the papers' budgets, 33.3%% 22.2%% 11.1%%)")
    ap.add_argument("--choose", choices=RANKINGS, default="distinct", help="how the scorer's tokens are chosen "
                    "(default: %(default)s)")
    ap.add_argument("--batch", type=int, nargs="+", default=[1], help="images at once, one or more sizes (default: 1)")
    ap.add_argument("--text", type=int, default=95, metavar="T", help="text tokens (default: %(default)s)")
    ap.add_argument("--words", type=int, default=32, metavar="T", help="tokens of an answer (default: %(default)s)")
    ap.add_argument("--repeats", type=int, metavar="N", help="timed passes (default: 50 on a GPU, 5 on a CPU)")
    ap.add_argument("--compile", action="store_true", help="also with torch.compile, on a GPU with CUDA graphs")
    ap.add_argument("--json", type=Path, metavar="FILE", help="save what was measured, and under which conditions")
    add_device_arguments(ap)
    args = ap.parse_args()
    check(args, "text", "words", "repeats")
    if min(args.batch) < 1:
        raise InputError(f"--batch {min(args.batch)}: must be 1 or more")
    args.repeats = args.repeats or (50 if args.device.startswith("cuda") else 5)
    vlm = load(args.model or load_pruner(default_pruner()[0])[1]["model"], args.device, DTYPES[number_type(args)])
    if args.device == "meta":  # nothing runs, so there is nothing to time
        counted = {name: {"tflops": tflops} for name, (_, _, tflops) in rows_of(vlm, args).items()}
        made = {"model": vlm.name, "text": args.text, "rows": counted}
        show(f"{vlm.name}, {args.text} text tokens: FLOPs of the prefill", ["tokens", "TFLOPs"],
             [[name, f"{row['tflops']:.4g}"] for name, row in counted.items()])
    else:
        made = speed(vlm, args)
        print_tables(vlm, args, made)
    if args.json:
        save(args.json, "python bench.py", {"speed": made})


if __name__ == "__main__":
    cli(main)
