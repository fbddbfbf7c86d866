"""
Train a Scorer for a frozen VLM, with next-token loss on captions and nothing else.

    python train.py                  # the embedded default: a tiny LLaVA, minutes on two cores
    python train.py --data captions_train2014.json --images train2014/    # LLaVA-1.5-7B, on a GPU
    torchrun --nproc_per_node 8 train.py --data …                         # the same on eight GPUs

In training no token is dropped: each gets through in proportion to its weight alpha. What counts is
the deployed path: the chosen tokens stay, the rest is gone. The bar shows its loss on held-out
captions as "pruned"; "loss" is that of the training. Hardness is the mean alpha of the K largest:
at 1 each alpha is 0 or 1. A question file gives a closing table of what accuracy is kept.

Writes scorer.safetensors, pruner.json, log.jsonl and a checkpoint into --out, with --watch
watched.json, too. A run that was stopped or killed continues with --resume, and ends with the same
scorer, bit for bit.
"""
import argparse
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from common import memory
from common.budget import Budget, hardness_of, real_tokens
from common.files import ROOT, InputError, cli, portable, rounded
from common.processes import Processes
from common.pruner import RANKINGS, fingerprint, thresholds
from common.run import Run
from data.coco import Captions, digests, generator, load_batches, read_coco, split
from data.pictures import read_image
from data.questions import read_questions
from data.shapes.prepare import FOLDER, prepare
from denoiser import Denoiser
from eval.accuracy import accuracy_table, retention
from eval.tables import budgets
from model import DTYPES, add_device_arguments, load, number_type
from throttler import Scorer, distinct, select, soft_top_k, vp_gate, whitening

PROMPT = "Describe the image."
SPARSE = 5  # while tau falls, evaluations are this many times rarer


# --- the method -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Parts:
    """The parts of the method that an ablation replaces."""
    rank: Callable = distinct  # scores, X -> what each token is worth
    top_k: Callable = soft_top_k  # ranking, K, tau -> alpha
    gate: Callable = vp_gate  # X, alpha, mean, L, noise -> X̃
    denoiser: Callable = Denoiser  # d_v -> module


def raw_scores(scores, X):
    """The papers' ranking, --choose top. Soft top-K needs no standardised scores."""
    return scores


def forward(vlm, scorer, denoiser, statistics, inputs, noise, budget, tau, parts=Parts()):
    """The training graph, (loss, alpha): each token gets through in proportion to its alpha.

    statistics: mean (d_v,) and L (d_v, d_v) of the features. noise (B, N, d_v): standard normal.
    """
    X, valid = vlm.encode(inputs).float(), inputs.get("valid")  # (B, N, d_v), frozen
    K = budget.of(real_tokens(X, valid))
    s = scorer(X, valid)                                # (B, N)       a score for each token
    d = parts.rank(s, X)                                # (B, N)       less what a better one says
    alpha = parts.top_k(d, K, tau)                      # (B, N)       in [0, 1], a row sums to K
    X_tilde = parts.gate(X, alpha, *statistics, noise)  # (B, N, d_v)  μ + √α·(X-μ) + √(1-α)·L·ε
    X_bar = denoiser(X_tilde)                           # (B, N, d_v)  in training only
    return vlm.loss(inputs, X_bar), alpha               # next token, through the frozen LLM


def cosine(start, end, t):
    """From start to end along half a cosine as t goes from 0 to 1, then end."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1, t)))


def temperature(t):
    """tau: from 2 to 0.1 along a cosine over the first half of the training, then held."""
    return cosine(2.0, 0.1, 2 * t)


@torch.no_grad()
def feature_statistics(vlm, batches, seed, per_image=32):
    """(mean (d_v,), L (d_v, d_v), the most tokens that an image has), by some training images.

    Of each image `per_image` tokens count, drawn at random. What deepstack adds in later layers is
    whitened level by level: L is block-diagonal.
    """
    tokens, most, g = [], 0, generator(seed, "tokens")
    for _, inputs in batches:
        X = vlm.encode(inputs).float()  # (B, N, d_v)
        counts = vlm.visual(inputs).sum(1).tolist()
        for x, n in zip(X, counts):
            some = torch.randperm(n, generator=g)[:per_image]
            tokens.append(x[some.to(x.device)])
        most = max(most, *counts)
    levels = torch.cat(tokens).chunk(vlm.levels, -1)
    mean, L = zip(*[whitening(level) for level in levels])
    return torch.cat(mean), torch.block_diag(*L), most


def noise_for(vlm, inputs, samples, seed):
    """Standard normal noise (B, N, d_v), drawn where it is needed, for each sample by its number.

    So it is the same however a batch is split over devices and pieces, and after a resume.
    """
    device, rows = vlm.model.device, []
    for n, sample in zip(vlm.visual(inputs).sum(1).tolist(), samples):
        g = generator(seed, "noise", sample, device=device)
        rows.append(torch.randn(n, vlm.width, generator=g, device=device))
    return pad_sequence(rows, batch_first=True)


def words_in(inputs):
    """How many caption tokens the loss is a mean over."""
    return (inputs["labels"][:, 1:] != -100).sum()


@torch.no_grad()
def held_out_losses(graph, batches, budget, tau, processes, parts=Parts(), full=None):
    """Caption losses on held-out images, in nats per token.

    full_loss: nothing is pruned. No training changes it: give it where it is known.
    soft_loss: as in training. deployed_loss: of the kept tokens alone, without noise or denoiser.
    quarter_loss: as deployed, with a quarter of K. One ranking serves every budget, and the few
    show sooner than the many whether it is a good one.
    """
    vlm, scorer, *_ = graph
    sums = torch.zeros(5, device=vlm.model.device)
    for inputs, noise in batches:
        X, valid = vlm.encode(inputs).float(), inputs.get("valid")
        ranking = parts.rank(scorer(X, valid), X)  # (B, N)
        K = budget.of(real_tokens(X, valid))
        soft, _ = forward(*graph, inputs, noise, budget, tau, parts)
        deployed = vlm.loss(inputs, X, select(ranking, K))
        quarter = vlm.loss(inputs, X, select(ranking, quarter_of(K)))
        whole = torch.zeros_like(soft)
        if full is None:
            whole = vlm.loss(inputs, X)
        losses = torch.stack([whole, soft, deployed, quarter, torch.ones_like(soft)])
        sums += losses * words_in(inputs)
    processes.sum(sums)
    losses = (sums[:4] / sums[4]).tolist()
    if full is not None:
        losses[0] = full
    return dict(zip(("full_loss", "soft_loss", "deployed_loss", "quarter_loss"), losses))


def quarter_of(K):
    """A quarter of a budget, an int or a tensor (B,), and at least one token."""
    if torch.is_tensor(K):
        return (K // 4).clamp_min(1)
    return max(1, K // 4)


# --- a training, set up ---------------------------------------------------------------------------

def read_data(args, processes):
    """(training, held_out, questions): two lists of (path, captions), and rows with labels."""
    if not args.data:
        processes.once(prepare)
    questions = []
    if args.questions != "none":
        questions = read_questions(args.questions, args.images)
    captions = read_coco(args.data or FOLDER / "train.json", args.images)
    return *split(captions, args.seed), questions


def settings_of(args):
    """All that determines the outcome of a run, for pruner.json and --resume."""
    names = ("choose", "steps", "batch", "lr", "seed", "dtype", "watch", "eval_every")
    settings = {name: getattr(args, name) for name in names}
    return settings | {"data": portable(args.data or FOLDER / "train.json"),
                       "images": args.images and portable(args.images),
                       "model": portable(args.model), "keep": str(args.keep)}


def check_contents(run, args, vlm, pairs, questions):
    """InputError for a text that the model cannot take, and unless a resumed run finds the model,
    the captions and the pictures that it began with."""
    data = args.data or FOLDER / "train.json"
    for path, captions in pairs:
        for caption in captions:
            where = f"{data}: annotations: caption {caption[:30]!r} of {path.name}"
            vlm.check_text(f"{PROMPT} {caption}", where)
    for row in questions:
        vlm.check_text(row["text"], row["where"])

    captions = repr([(path.name, texts) for path, texts in pairs]).encode()
    contents = {f"--model {portable(args.model)}": fingerprint(vlm.model),
                f"--data {portable(data)}": hashlib.sha256(captions).hexdigest()}
    run.check_contents(contents | digests(pairs))


def frozen_vlm(args, processes, run, pairs, questions):
    """The frozen VLM, checked against the run and its data, where its weights belong."""
    device = "cpu" if args.shard else processes.device
    vlm = load(args.model, device, DTYPES[args.dtype])
    check_contents(run, args, vlm, pairs, questions)
    if args.shard:
        processes.shard(vlm)
    if args.checkpointing:
        memory.recompute(vlm)
    return vlm


def what_learns(vlm, args, parts, device):
    """(scorer and denoiser on the device, their AdamW, its first learning rate)."""
    torch.manual_seed(args.seed)
    scorer, denoiser = Scorer(vlm.width), parts.denoiser(vlm.width)
    modules = nn.ModuleDict({"scorer": scorer, "denoiser": denoiser}).to(device)
    lr = args.lr or 0.2 / scorer.head.in_features  # the papers' 2e-4 at width 1024
    return modules, torch.optim.AdamW(modules.parameters(), lr=lr), lr


class Batches:
    """Pictures with captions for the VLM, as many at a time as fit."""

    def __init__(self, vlm, args, at_once):
        self.vlm, self.args, self.at_once = vlm, args, at_once

    def load(self, data, *ranges, unreadable=None):
        """(sample numbers, inputs), piece by piece, for these ranges of samples of `data`."""
        pieces, n = [], self.at_once
        for samples in ranges:
            pieces += [samples[i:i + n] for i in range(0, len(samples), n)]
        if unreadable is None:
            unreadable = set()
        yield from load_batches(self.vlm, data, pieces, PROMPT, self.args.workers, unreadable)

    def with_noise(self, data, *ranges, unreadable=None):
        """(inputs, noise), for the training graph."""
        for samples, inputs in self.load(data, *ranges, unreadable=unreadable):
            yield inputs, noise_for(self.vlm, inputs, samples, self.args.seed)


def measure_features(vlm, args, batches, training, budget):
    """The features' (mean, L), by the first 1,024 images. InputError if K would keep them all."""
    some = range(min(1024, len(training)))
    mean, L, most = feature_statistics(vlm, batches.load(Captions(training), some), args.seed)
    if budget.of(most) == most:
        raise InputError(f"--keep {args.keep}: no picture has more tokens than {most}, so there is "
                         "nothing to choose; give fewer")
    return mean, L


# --- a training -----------------------------------------------------------------------------------

def train(args, parts=Parts()):
    """Train as the arguments say; returns what pruner.json holds. An ablation brings its parts."""
    if args.choose == "top":
        parts = replace(parts, rank=raw_scores)
    processes = Processes(args.device)

    # data: pictures with captions; some are held out, to see the deployed loss on
    training, held_out, questions = read_data(args, processes)
    run = Run(args.out, settings_of(args), processes, args.resume, args.overwrite)

    # model: the frozen VLM, and two modules that learn
    vlm = frozen_vlm(args, processes, run, training + held_out, questions)
    budget, = budgets([str(args.keep)], vlm)
    modules, optimizer, base_lr = what_learns(vlm, args, parts, processes.device)
    learned = list(modules.parameters())
    processes.say(f"{args.model}: {vlm.tokens or 'a varying number of'} visual tokens, keep "
                  f"{budget}; {len(training)} images to learn from, {len(held_out)} held out")
    at_once, pieces = processes.plan(vlm, sum(p.numel() for p in learned), args)
    batches = Batches(vlm, args, at_once)
    mean, L = measure_features(vlm, args, batches, training, budget)
    run.hold(modules, optimizer, {"mean": mean, "L": L})
    graph = (vlm, *modules.values(), (mean, L))

    # this process's part of every step that is left, and of every evaluation
    stream = training_stream(args, processes, run, batches, training)
    unseen_samples = processes.share(range(len(held_out)), even=args.shard)
    watched = watched_batches(args, batches)

    for step in run.steps(args.steps, args.save_every):
        tau = temperature(step / args.steps)
        lr = cosine(base_lr, 0, step / args.steps)
        optimizer.param_groups[0]["lr"] = lr
        if watched and step % max(1, args.steps // 40) == 0:
            watch(run, step, args, graph, watched, budget, tau, parts)

        # forward and backward, piece by piece
        totals = torch.zeros(3, device=vlm.model.device)
        for inputs, noise in islice(stream, pieces):
            loss, alpha = forward(*graph, inputs, noise, budget, tau, parts)
            words = words_in(inputs)
            (loss * words).backward()  # a sum over words: pieces and processes add up to the batch
            K = budget.of(real_tokens(alpha, inputs.get("valid")))
            hardness = hardness_of(alpha.detach(), K).sum()
            totals += torch.stack([loss.detach() * words, words, hardness])
        processes.sum(totals, *(p.grad for p in learned))
        loss, words, hardness = totals.tolist()
        loss, hardness = loss / words, hardness / args.batch

        # one step of AdamW, along the gradient of the mean over words
        for p in learned:
            p.grad /= words
        norm = nn.utils.clip_grad_norm_(learned, 1.0).item()
        run.check_finite(step, loss + norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # now and then: evaluate on the deployed path, log, keep the best scorer
        if is_evaluated(step, args):
            unseen = batches.with_noise(Captions(held_out), unseen_samples)
            full = run.curve[0]["full_loss"] if run.curve else None
            losses = held_out_losses(graph, unseen, budget, tau, processes, parts, full)
            run.log({"step": step, "tau": tau, "lr": lr, "loss": loss, **losses,
                     "hardness": hardness})
            if run.best(temperature(1)) is run.curve[-1]:
                run.write("scorer.safetensors", modules["scorer"].state_dict())
        pruned = run.curve[-1]["deployed_loss"]
        run.bar.set_postfix(loss=f"{loss:.3f}", pruned=f"{pruned:.3f}", hardness=f"{hardness:.2f}")

    if processes.first:
        return finish(run, args, vlm, modules["scorer"], budget, batches, held_out, questions)


def is_evaluated(step, args):
    """Whether the scorer is evaluated after this step: seldom while tau falls, as none is kept."""
    every = args.eval_every
    if temperature(step / args.steps) > temperature(1):
        every *= SPARSE
    return step % every == 0 or step == args.steps - 1


def training_stream(args, processes, run, batches, training):
    """(inputs, noise), piece by piece: this process's part of every step that is left."""
    samples = []
    for step in range(run.step, args.steps):
        first = step * args.batch
        samples.append(processes.share(range(first, first + args.batch)))
    return batches.with_noise(Captions(training, args.seed), *samples, unreadable=run.skipped)


def watched_batches(args, batches):
    """(inputs, noise) of the pictures of --watch."""
    pairs = [(ROOT / path, [PROMPT]) for path in args.watch]
    return list(batches.with_noise(Captions(pairs), range(len(pairs))))


@torch.no_grad()
def watch(run, step, args, graph, watched, budget, tau, parts):
    """Record alpha of the watched pictures, for the moving picture that results.draw makes."""
    alphas = []
    for inputs, noise in watched:
        _, alpha = forward(*graph, inputs, noise, budget, tau, parts)
        alphas.append(alpha)
    run.watch(step, tau, args.watch, alphas)


def finish(run, args, vlm, scorer, budget, batches, held_out, questions):
    """Write pruner.json, with the thresholds that make a budget hold on average; the closing table.

    All of it by the best scorer, not by the last one.
    """
    scorer.load_state_dict(load_file(args.out / "scorer.safetensors"))
    pieces = batches.load(Captions(held_out), range(len(held_out)))
    unseen = (inputs for _, inputs in pieces)
    pruner = {
        "model": portable(args.model),
        "width": vlm.width,
        "tokens": vlm.tokens,
        "keep": str(budget),
        "choose": args.choose,
        "settings": settings_of(args),
        "best": run.best(temperature(1)),
        "seconds": run.seconds(),
        "finished": True,
        "thresholds": thresholds(vlm, scorer, args.choose, unseen),
    }
    run.write("pruner.json", rounded(pruner))
    run.processes.say(f"wrote {args.out}; now python infer.py PICTURE QUESTION --pruner {args.out}")
    if not questions or args.shard:
        return pruner
    table = accuracy_table(vlm, scorer, pruner, questions, [budget])
    full = table[f"all {vlm.tokens or ''}".strip()]
    kept = retention(table[f"scorer {budget}"], full)
    return pruner | {"retention": kept, "by_category": table}


# --- the command line -----------------------------------------------------------------------------

def add_arguments(ap):
    """Three groups: what to learn from, how, and where the run is written."""
    add = ap.add_argument_group("data").add_argument
    add("--data", metavar="JSON",
        help="COCO captions file (default: the embedded one, drawn if missing)")
    add("--images", metavar="DIR", help="folder of its images (default: the file's own)")
    add("--model", help="the frozen VLM, a folder or hub name (default: llava-hf/llava-1.5-7b-hf; "
        "without --data the embedded tiny one)")
    add("--questions", metavar="JSONL", help="question file for the closing table, or none "
        "(default: without --data the embedded test questions)")

    add = ap.add_argument_group("method").add_argument
    add("--keep", default="11.1%", metavar="K", help="tokens to keep: a number, or a share "
        "(default: 11.1%%, which is 64 of LLaVA-1.5's 576)")
    add("--choose", choices=RANKINGS, default="distinct", help="what is trained and kept: the "
        "highest scores, less what a better token already says (distinct), or as in the papers the "
        "highest scores alone (top) (default: %(default)s)")
    add("--steps", type=int, help="training steps (default: 4000; without --data 200)")
    add("--batch", type=int, default=32,
        help="images a step, over all processes (default: %(default)s)")
    add("--lr", type=float, help="AdamW's learning rate at the start (default: the papers' 2e-4 "
        "for a scorer 1024 wide, more for a narrower one)")
    add("--seed", type=int, default=0,
        help="decides first weights, noise, order and which pictures are held out (default: "
        "%(default)s)")

    add = ap.add_argument_group("run").add_argument
    add("--out", type=Path, default=Path("out"), metavar="DIR",
        help="folder to write to (default: %(default)s)")
    add("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--at-once", type=int, metavar="N",
        help="images in memory at a time (default: as many as fit)")
    add("--checkpointing", action="store_true",
        help="compute activations twice: slower, but far less memory")
    add("--shard", action="store_true", help="split the frozen LLM over torchrun's processes, for "
        "a model larger than a card; --batch must be a multiple of their number, and there is no "
        "closing table")
    add("--watch", nargs="+", type=portable, default=[], metavar="IMG", help="pictures whose alpha "
        "is recorded in watched.json; python -m results.draw training makes a moving picture of it")
    add("--eval-every", type=int, metavar="STEPS", help="steps between evaluations on held-out "
        "captions, once tau is down (default: a twentieth of all)")
    add("--save-every", type=int, default=100, metavar="STEPS",
        help="steps between checkpoints (default: %(default)s)")
    workers = max(0, min(4, (os.cpu_count() or 1) // 2 - 1))
    add("--workers", type=int, default=workers, metavar="N",
        help="processes that read pictures (default here: %(default)s)")
    add("--json", action="store_true", help="print the results as JSON on the last line")


def check_arguments(args):
    """The arguments with every default filled in. InputError for a value that cannot be."""
    try:
        args.keep = Budget.parse(args.keep)
    except ValueError as e:
        raise InputError(f"--keep {e}") from None
    if args.keep.average:
        raise InputError(f"--keep {args.keep}: training keeps exactly as many in each picture; "
                         "leave ~ out, and give it at inference")
    number_type(args)
    args.questions = args.questions or ("none" if args.data else FOLDER / "test.jsonl")
    if args.model is None:
        args.model = "llava-hf/llava-1.5-7b-hf" if args.data else "data/shapes/llava"
    if args.model.startswith("random:"):
        raise InputError(f"--model {args.model}: has no tokenizer; it is for bench.py")
    if args.steps is None:
        args.steps = 4000 if args.data else 200
    if args.eval_every is None:
        args.eval_every = max(5, args.steps // 20)
    for name in ("steps", "batch", "lr", "at_once", "eval_every", "save_every"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {value}: must be a number above 0")
    if not 0 <= args.seed < 2 ** 63:
        raise InputError(f"--seed {args.seed}: must be a whole number from 0 to 2^63 - 1")
    if args.workers < 0:
        raise InputError(f"--workers {args.workers}: must not be below 0")
    for picture in args.watch:
        read_image(ROOT / picture)
    return args


def parse_arguments(argv=None):
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(ap)
    add_device_arguments(ap)
    return check_arguments(ap.parse_args(argv))


def main():
    args = parse_arguments()
    pruner = train(args)
    if args.json and pruner:
        print(json.dumps(rounded(pruner)))


if __name__ == "__main__":
    cli(main)
