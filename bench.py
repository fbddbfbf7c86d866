"""
GPU prefill timing: what each stage of an answer costs, with all visual tokens and with few.

    python bench.py --model random:llava-1.5-7b --dtype bfloat16 --batch 1 4 16 --training   # a GPU
    python bench.py --model random:qwen2.5-vl-7b --device meta     # FLOPs alone: needs no memory
    python bench.py --count                                        # launches, on any machine

random: is a true architecture with random weights. On a GPU every answer is timed twice: eager,
where Python launches each kernel, and by CUDA graphs (common/graphs.py). All is timed in turn in
one run, so that a drift of the machine hits every row alike. Each number is a median, in ms. What
pruning keeps is measured by python -m eval.accuracy.
"""
import argparse
import copy
import itertools
import math
import statistics
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoModelForImageTextToText

from common import memory
from common.criteria import average_pooling, cls_attention, criteria, pooled_grid
from common.files import InputError, cli
from common.graphs import CACHE, Graphed, Graphs
from common.pruner import RANKINGS, default_pruner, load_pruner
from denoiser import Denoiser
from eval.tables import budgets, check, percentile, save, show
from model import DTYPES, add_device_arguments, load, number_type
from throttler import Scorer, distinct, select, soft_top_k, vp_gate

STAGES = ("encode", "choose", "project", "prefill")  # by graphs, project is a part of prefill
# DiffPrune's figures (arXiv 2605.28051), LLaVA-1.5-7B on one A6000, batch 1, fp16
PUBLISHED = [dict(tokens=576, batch=1, way="published", TFLOPs=8.89, encode=29.71, prefill=118.66,
                  first=149.51),
             dict(tokens=64, batch=1, way="published", TFLOPs=2.13, encode=30.41, choose=0.69,
                  prefill=41.61, first=73.73)]
TITLES = {"choosing": "choosing alone", "prefill": "the prefill", "training": "a training step"}


class Row(NamedTuple):
    """What is timed."""
    tokens: int  # visual tokens that are kept; N is all
    batch: int
    way: str  # of an answer: eager or graphs; or choosing; or training


# --- clocks -------------------------------------------------------------------------------------

class Clock:
    """Marks the ends of stages: CUDA events, so that nothing waits between, or the wall clock."""

    def __init__(self, device):
        self.cuda, self.marks = torch.device(device).type == "cuda", {}
        self.mark("start")

    def mark(self, name):
        self.marks[name] = time.perf_counter()
        if self.cuda:
            self.marks[name] = torch.cuda.Event(enable_timing=True)
            self.marks[name].record()

    def read(self):
        """{mark: ms from the start to there}."""
        start = self.marks["start"]
        if self.cuda:
            torch.cuda.synchronize()
            return {name: start.elapsed_time(mark) for name, mark in self.marks.items()}
        return {name: 1000 * (mark - start) for name, mark in self.marks.items()}


class Calls(TorchDispatchMode):
    """A clock of launches: torch's calls without its views. On a GPU each is about one launch."""

    def __init__(self):
        super().__init__()
        self.calls, self.marks = 0, {"start": 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += not function.is_view
        return function(*args, **(kwargs or {}))

    def mark(self, name):
        self.marks[name] = self.calls

    def read(self):
        return self.marks


class Counted(Graphed):
    """As if recorded, on a CPU: a replay is one call. What it computes is no matter to a count."""
    device = "cpu"

    def record(self, static):
        return partial(torch.zeros, 1), self.fn(*static)


def between(at):
    """{mark: ms from the mark before} from {mark: ms from the start}."""
    times = {}
    for (_, before), (name, ms) in itertools.pairwise(at.items()):
        times[name] = ms - before
    return times


def answer_times(at, words):
    """{stage: ms} from {mark: ms from the start}; marks: STAGES, and further tokens, 2, 3, …"""
    times = {stage: ms for stage, ms in between(at).items() if stage in STAGES}
    first = at["prefill"]  # the first token is there; encoder and choice are in it
    times["first"] = first
    if max(words) > 1:
        times["decode"] = (at[max(words)] - first) / (max(words) - 1)  # one further token
    for n in words:
        times[f"answer {n}"] = at.get(n, first)
    return times


# --- what is timed ------------------------------------------------------------------------------

def eager_stream(vlm, inputs, X, keep, clock):
    """As Graphs.stream(), launch by launch."""
    sequence = vlm.embed(inputs, X, keep)  # L' = L - N + K
    clock.mark("project")
    mask, position = sequence["attention_mask"], sequence["position_ids"][..., -1:]
    with vlm.prepared(sequence) as given:
        out = vlm.model(**given, use_cache=True, logits_to_keep=1)
    while True:
        token = out.logits[:, -1:].argmax(-1)  # (B, 1)
        yield token
        mask, position = F.pad(mask, (0, 1), value=1), position + 1
        given = {"input_ids": token, "attention_mask": mask, "position_ids": position}
        out = vlm.model(**given, use_cache=True, **{CACHE: out[CACHE]})


@torch.no_grad()
def answer_once(vlm, choose, inputs, words, clock):
    """{stage: ms} of an answer from its pixels on. vlm may be Graphs; words: lengths of answers."""
    X = vlm.encode(inputs)  # (B, N, d)
    clock.mark("encode")
    keep = choose(X)  # (B, K), or None
    clock.mark("choose")
    if isinstance(vlm, Graphs):
        stream = vlm.stream(inputs, X, keep)
    else:
        stream = eager_stream(vlm, inputs, X, keep, clock)
    next(stream)
    clock.mark("prefill")
    for n in range(2, max(words) + 1):
        next(stream)
        clock.mark(n)
    return answer_times(clock.read(), words)


@torch.no_grad()
def choose_once(vlm, scorer, inputs, K, clock):
    """{name: ms} of every way to choose K tokens: the scorer's, and other papers' criteria."""
    X, ways = vlm.encode(inputs), {}
    for how, rank in RANKINGS.items():
        ways[f"scorer, {how}"] = lambda rank=rank: select(rank(scorer(X), X), K)
    for name, choose in criteria(vlm).items():
        ways[name] = partial(choose, X, inputs, K)
    ways.pop("pooling", None)
    if vlm.tokens and pooled_grid(vlm.tokens, K):
        ways["pooling"] = partial(average_pooling, X, K)
    if "CLS" in ways:  # the encoder has this at hand; it is not to run twice
        tower = vlm.model.model.vision_tower
        states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        hidden = states[vlm.layers[-1] - 1]  # what enters the layer that gives X
        ways["CLS"] = lambda: select(cls_attention(vlm, inputs, hidden), K)
    clock.mark("prepared")
    for name, choose in ways.items():
        choose()
        clock.mark(name)
    times = between(clock.read())
    del times["prepared"]
    return times


def train_once(vlm, scorer, denoiser, mean, L, inputs, K, clock):
    """{part: ms} of a training step, forward and backward as train.forward() has it; and our share.

    That is what the method adds, as a share of the frozen model's part.
    """
    X = vlm.encode(inputs).float()  # (B, N, d)
    clock.mark("encoder")
    s = scorer(X)  # (B, N)
    clock.mark("scorer")
    alpha = soft_top_k(distinct(s, X), K, 0.5)
    clock.mark("soft top-K")
    X_tilde = vp_gate(X, alpha, mean, L)  # (B, N, d)
    clock.mark("gate")
    X_bar = denoiser(X_tilde)
    clock.mark("denoiser")
    at_llm = X_bar.detach().requires_grad_()
    vlm.loss(inputs, at_llm).backward()
    clock.mark("LLM")
    X_bar.backward(at_llm.grad)
    clock.mark("our backward")
    times = between(clock.read())
    frozen = times["encoder"] + times["LLM"]
    return {**times, "our share": sum(times.values()) / frozen - 1}


def in_turn(work, repeats, device):
    """{row: {stage: median, 10th and 90th percentile}} of `work`, {row: clock -> {stage: ms}}."""
    runs = {row: [] for row in work}
    for repeat in tqdm(range(-2, repeats), desc="timing", dynamic_ncols=True):
        for row, once in work.items():
            times = once(Clock(device))
            if repeat >= 0:  # the first two are the warm-up
                runs[row].append(times)
    return {row: summaries(times) for row, times in runs.items()}


def summaries(runs):
    """{stage: {median, p10, p90}} from [{stage: ms}]."""
    result = {}
    for stage in runs[0]:
        values = [run[stage] for run in runs]
        low, high = percentile(values, 10), percentile(values, 90)
        result[stage] = {"median": statistics.median(values), "p10": low, "p90": high}
    return result


# --- what is counted ----------------------------------------------------------------------------

def prefill_flops(vlm, lengths):
    """{L: FLOPs of the prefill of a sequence of L tokens}, 2 a multiply-add, on the meta device."""
    flops = {}
    with torch.device("meta"), torch.no_grad():
        model = AutoModelForImageTextToText.from_config(copy.deepcopy(vlm.model.config)).eval()
        for L in lengths:
            with FlopCounterMode(display=False) as counter:
                embeds = torch.empty(1, L, model.get_input_embeddings().embedding_dim)
                model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
            flops[L] = counter.get_total_flops()
    return flops


def narrow(vlm):
    """A LLaVA-1.5 with as many layers and tokens, but thin: it makes as many launches."""
    config = copy.deepcopy(vlm.model.config)
    for part in (config.text_config, config.vision_config):
        part.hidden_size, part.intermediate_size, part.num_attention_heads = 64, 64, 4
    config.text_config.num_key_value_heads, config.text_config.head_dim = 4, 16
    return type(vlm)(AutoModelForImageTextToText.from_config(config), None, vlm.name)


# --- a run --------------------------------------------------------------------------------------

def answers(vlm, scorer, args, counts, kind=None):
    """{row: clock -> {stage: ms}} of answers with each of the counts; also by graphs of a kind."""
    def rank(X):
        return RANKINGS[args.choose](scorer(X), X)  # (B, N)

    def choose(rank, K, X):
        return None if K == N else select(rank(X), K)

    N, ways, work = counts[0], {"eager": (vlm, rank)}, {}
    if kind:
        longest = N + args.text + 32 + max(args.words)
        slots = 1024 * math.ceil(longest / 1024)
        graphs = Graphs(vlm, slots, kind)
        ways["graphs"] = graphs, graphs.recorded(rank)
    for batch, K, way in itertools.product(args.batch, counts, ways):
        model, ranked = ways[way]
        inputs, chosen = vlm.dummy_inputs(batch, args.text), partial(choose, ranked, K)
        work[Row(K, batch, way)] = partial(answer_once, model, chosen, inputs, args.words)
    return work


def training(vlm, batch, K):
    """clock -> {part: ms} of a training step: so many pictures, captions of 20 tokens."""
    inputs = vlm.dummy_inputs(batch, 40)
    labels = inputs["input_ids"].clone()
    labels[:, :-20] = -100
    inputs["labels"] = labels
    d = vlm.width
    with vlm.model.device:
        modules = Scorer(d), Denoiser(d), torch.zeros(d), torch.eye(d)  # mean 0, L·Lᵀ = 1
    return partial(train_once, vlm, *modules, inputs, K)


def activation_memory(vlm, batch, once):
    """{…}: GB that train.py plans for a step's activations, and that a step takes on a GPU."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    once(Clock("cuda"))
    used = torch.cuda.max_memory_allocated() - before
    planned = memory.of_a_step(vlm, 0, batch)["activations"]
    return {"planned GB": planned / 1e9, "used GB": used / 1e9}


def measure(vlm, args, counts):
    """[{column: value}], a line for each row that was timed."""
    device, N = vlm.model.device, counts[0]
    scorer = Scorer(vlm.width).to(device)  # its weights do not matter here
    if device.type != "cpu":
        scorer.to(vlm.model.dtype)  # as in infer.py
    if args.count:
        results, work = {}, answers(vlm, scorer, args, counts, Counted)
        for row, once in [*work.items(), *work.items()]:  # the first time sets up
            with Calls() as clock:
                results[row] = once(clock)
        return [{**row._asdict(), **calls} for row, calls in results.items()]

    work = answers(vlm, scorer, args, counts, Graphed if args.graphs else None)
    for batch, K in itertools.product(args.batch, counts[1:]):
        inputs = vlm.dummy_inputs(batch, args.text)
        work[Row(K, batch, "choosing")] = partial(choose_once, vlm, scorer, inputs, K)
    if args.training:
        row = Row(counts[-1], args.training, "training")
        work[row] = training(vlm, row.batch, row.tokens)
    results = in_turn(work, args.repeats, device)
    flops = prefill_flops(vlm, [K + args.text for K in counts])
    rows = []
    for row, times in results.items():
        line = {**row._asdict(), **times}
        if row.way == "training" and device.type == "cuda":
            line |= activation_memory(vlm, row.batch, work[row])
        if row.way in ("eager", "graphs"):
            line["TFLOPs"] = row.batch * flops[row.tokens + args.text] / 1e12
            line |= compared(times, results[row._replace(tokens=N)])
        rows.append(line)
    return rows


def compared(times, whole):
    """How many times faster than with all tokens (×), and choosing as a share of the prefill."""
    shares = {"choose / prefill": times["choose"]["median"] / times["prefill"]["median"]}
    for stage in times.keys() - {"encode", "choose", "project"}:
        shares[f"{stage} ×"] = whole[stage]["median"] / times[stage]["median"]
    return dict(sorted(shares.items()))


def tables(rows):
    """[(title, header, lines)] of rows {column: value}, which may be of several kinds."""
    def cell(value):
        if isinstance(value, dict):
            value = value["median"]
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    kinds = {}
    for row in rows:
        kinds.setdefault(TITLES.get(row["way"], "answers"), []).append(row)
    for title, rows in kinds.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines = [[cell(row.get(column, "–")) for column in columns] for row in rows]
        yield title, columns, lines


def parse_arguments():
    style = argparse.RawDescriptionHelpFormatter
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = ap.add_argument
    add("--model", help="folder or hub name of the VLM, or random:NAME, the true size with random "
        "weights (default: the model of your pruner, or of the one that ships; for --count "
        "random:llava-1.5-7b)")
    add("--keep", nargs="+", default=["33.3%", "22.2%", "11.1%"], metavar="K",
        help="tokens to keep (default: the papers' budgets, 33.3%% 22.2%% 11.1%%)")
    add("--choose", choices=RANKINGS, default="distinct",
        help="how the scorer's tokens are chosen (default: %(default)s)")
    add("--batch", type=int, nargs="+", default=[1],
        help="pictures at a time, one or several sizes (default: 1)")
    add("--text", type=int, default=95, metavar="T", help="text tokens (default: %(default)s)")
    add("--words", type=int, nargs="+", default=[8, 32], metavar="T",
        help="lengths of an answer to time, in tokens (default: 8 32)")
    add("--repeats", type=int, metavar="N", help="timed passes (default: 20 on a GPU, 5 on a CPU)")
    add("--graphs", action=argparse.BooleanOptionalAction,
        help="answers by CUDA graphs, too (default: on a GPU; a CPU records nothing)")
    add("--training", type=int, nargs="?", const=4, metavar="B",
        help="a training step of B pictures, too (without B: 4)")
    add("--count", action="store_true", help="count launches instead, of a LLaVA-1.5 made thin")
    add("--json", type=Path, metavar="FILE", help="save what was measured, and the conditions")
    add_device_arguments(ap)
    args = ap.parse_args()
    check(args, "text", "repeats", "training")
    if any(budget.average for budget in budgets(args.keep)):
        raise InputError(f"--keep {' '.join(args.keep)}: a timing keeps exactly as many in each "
                         "picture; leave ~ out")
    if min(*args.batch, *args.words) < 1:
        raise InputError("--batch and --words must be 1 or more")
    on_gpu = args.device.startswith("cuda")
    args.repeats = args.repeats or (20 if on_gpu else 5)
    args.graphs = on_gpu if args.graphs is None else args.graphs
    if args.count:
        if args.model not in (None, "random:llava-1.5-7b"):
            raise InputError(f"--model {args.model}: launches are counted of random:llava-1.5-7b "
                             "alone; leave --model out")
        args.device, args.model = "meta", "random:llava-1.5-7b"
    return args


def main():
    args = parse_arguments()
    name = args.model or load_pruner(default_pruner()[0])[1]["model"]
    vlm = load(name, args.device, DTYPES[number_type(args)])
    N = vlm.dummy_inputs(1, args.text)["input_ids"].shape[1] - args.text
    counts = [N, *(budget.of(N) for budget in budgets(args.keep, vlm))]
    if args.count:
        unit = "torch's calls without views, on a GPU about one launch each"
        rows = measure(narrow(vlm), args, counts)
    elif args.device == "meta":  # nothing runs, so there is nothing to time
        unit, rows = "TFLOPs", []
        for L, flops in prefill_flops(vlm, [K + args.text for K in counts]).items():
            row = Row(L - args.text, 1, "prefill")
            rows.append({**row._asdict(), "TFLOPs": flops / 1e12})
    else:
        unit = f"ms, medians of {args.repeats} passes, {args.dtype}"
        rows = measure(vlm, args, counts)
        if "llava-1.5-7b" in name:
            rows += PUBLISHED
    speed = {"model": name, "text": args.text, "unit": unit, "rows": rows}
    print(f"{name}, {args.text} text tokens: {unit}")
    for title, columns, lines in tables(rows):
        show(f"\n{title}", columns, lines)
    if args.json:
        save(args.json, "python bench.py", {"speed": speed})


if __name__ == "__main__":
    cli(main)
