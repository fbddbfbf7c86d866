"""
Train a Scorer for a frozen VLM, with next-token loss on captions and nothing else.

    python train.py                            # the embedded default: a tiny LLaVA, minutes on two CPU cores
    python train.py --data captions_train2014.json --images train2014/      # LLaVA-1.5-7B, on a GPU
    torchrun --nproc_per_node 8 train.py --data …                           # the same on eight GPUs

No token is dropped in training: each gets through in proportion to its weight alpha. What counts is the deployed path:
the chosen tokens stay, the rest is gone. The bar shows its loss on held-out captions as "pruned"; "loss" is that of
training, with repaired noise for the rest. Hardness is the mean alpha of the K largest. A question file gives a closing
table.

Writes scorer.safetensors, pruner.json, log.jsonl, watched.json and a checkpoint; --resume continues it bit for bit.
"""
import argparse
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from common.budget import Budget, hardness_of, real_tokens
from data.pictures import read_image
from data.coco import Captions, generator, load_batches, read_coco, split
from common.files import ROOT, InputError, cli, portable, rounded
from common.processes import Processes
from common.pruner import RANKINGS, fingerprint, thresholds
from data.questions import read_questions
from common.run import Run
from data.shapes.prepare import FOLDER, prepare
from denoiser import Denoiser
from eval.accuracy import accuracy_table, retention
from eval.tables import budgets
from model import DTYPES, add_device_arguments, load, number_type
from throttler import Scorer, distinct, select, soft_top_k, vp_gate, whitening

PROMPT = "Describe the image."


def cosine(start, end, t):
    """From start to end along half a cosine as t goes from 0 to 1, then end."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1, t)))


def temperature(t):
    """tau: from 2 to 0.1 along a cosine over the first half of the training (t from 0 to 1), then held."""
    return cosine(2.0, 0.1, 2 * t)


@dataclass(frozen=True)
class Parts:
    """The parts of the method that an ablation replaces."""
    rank: Callable = distinct  # scores, X -> what each token is worth
    top_k: Callable = soft_top_k  # ranking, K, tau -> alpha
    gate: Callable = vp_gate  # X, alpha, mean, L, noise -> X̃
    denoiser: Callable = Denoiser  # d_v -> module


# --- the method -------------------------------------------------------------------------------------------------------

@torch.no_grad()
def feature_statistics(vlm, batches, seed, per_image=32):
    """Mean (d,) and L (d, d) of the encoder's features, and the most tokens that an image has, by some training images.

    Of each image `per_image` tokens count.
    """
    tokens, most, g = [], 0, generator(seed, "tokens")
    for inputs, _ in batches:
        X = vlm.encode(inputs).float()  # (B, N, d)
        for x, n in zip(X, vlm.visual(inputs).sum(1).tolist()):
            tokens.append(x[torch.randperm(n, generator=g)[:per_image]])
            most = max(most, n)
    return *whitening(torch.cat(tokens)), most


def check_texts(vlm, data, pairs, prompt, questions):
    """InputError for a caption or a question that the model cannot take."""
    for path, captions in pairs:
        for caption in captions:
            vlm.check_text(f"{prompt} {caption}", f"{data}: annotations: caption {caption[:30]!r} of {path.name}")
    for row in questions:
        vlm.check_text(row["text"], row["where"])


def words_in(inputs):
    """How many caption tokens the loss is a mean over."""
    return (inputs["labels"][:, 1:] != -100).sum()


def forward(vlm, scorer, denoiser, statistics, inputs, noise, budget, tau, parts=Parts()):
    """The training graph, (loss, alpha): no token is dropped, each gets through in proportion to its weight alpha.

    statistics: mean (d,) and L (d, d) of the features. noise (B, N, d): standard normal. budget gives K.
    """
    X, valid = vlm.encode(inputs).float(), inputs.get("valid")  # (B, N, d)   frozen encoder
    s = scorer(X, valid)                                        # (B, N)      one score for each token
    d = parts.rank(s, X)                                        # (B, N)      less what a better one says
    alpha = parts.top_k(d, budget.of(real_tokens(X, valid)), tau)  # (B, N)   in [0, 1], each row sums to K
    X_tilde = parts.gate(X, alpha, *statistics, noise)          # (B, N, d)   μ + √α·(X-μ) + √(1-α)·L·ε
    X_bar = denoiser(X_tilde)                                   # (B, N, d)   in training only
    return vlm.loss(inputs, X_bar), alpha                       # next token, through the frozen LLM


@torch.no_grad()
def held_out_losses(graph, batches, budget, tau, processes, parts=Parts()):
    """Caption losses on held-out images, in nats per token, from all tokens to what is deployed.

    full: nothing is pruned. soft: as in training. hard: tau -> 0, so alpha is 1 for the K highest scores, else 0, but a
    dropped token is still there, as repaired noise. deployed: what is kept, without noise or denoiser.
    """
    vlm, scorer, *_ = graph
    sums = torch.zeros(5, device=vlm.model.device)
    for inputs, noise in batches:
        X, valid = vlm.encode(inputs).float(), inputs.get("valid")
        ranking = parts.rank(scorer(X, valid), X)  # (B, N)
        keep = select(ranking, budget.of(real_tokens(X, valid)))  # (B, K)
        full, deployed = vlm.loss(inputs, X), vlm.loss(inputs, X, keep)
        soft, hard = (forward(*graph, inputs, noise, budget, t, parts)[0] for t in (tau, 1e-9))
        sums += torch.stack([full, soft, hard, deployed, torch.ones_like(full)]) * words_in(inputs)
    processes.sum(sums)
    return dict(zip(("full_loss", "soft_loss", "hard_loss", "deployed_loss"), (sums[:4] / sums[4]).tolist()))


def train(args, parts=Parts()):
    """Train as the arguments say; returns what pruner.json holds. An ablation gives parts of its own."""
    processes = Processes(args.device)
    if args.choose == "top":  # the papers' ranking: the scores as they are
        parts = replace(parts, rank=lambda scores, X: scores)

    # data: pictures with captions; some are held out, to see the deployed loss on
    if not args.data:
        processes.once(prepare)
    data = args.data or FOLDER / "train.json"
    questions = [] if args.questions == "none" else read_questions(args.questions, args.images)
    training, held_out = split(read_coco(data, args.images), args.seed)
    settings = {name: getattr(args, name) for name in ("choose", "steps", "batch", "lr", "seed", "dtype", "watch")}
    settings |= {"data": portable(data), "model": portable(args.model), "keep": str(args.keep), "images": args.images}
    run = Run(args.out, settings, processes, args.resume, args.overwrite)

    # the frozen VLM, and the two modules that learn
    vlm = load(args.model, "cpu" if args.shard else processes.device, DTYPES[args.dtype])
    captions = repr([said for _, said in training + held_out]).encode()
    begun = {"model": fingerprint(vlm.model), "data": hashlib.sha256(captions).hexdigest()}
    for name, now in begun.items():  # a resumed run brings those that it began with
        if run.state.setdefault(name, now) != now:
            raise InputError(f"--{name} {settings[name]}: not the same content that the run in {args.out} began with; "
                             "--resume needs that")
    if args.shard:
        processes.shard(vlm)
    check_texts(vlm, data, training + held_out, PROMPT, questions)
    if args.checkpointing:
        vlm.recompute()
    budget, = budgets([str(args.keep)], vlm)
    torch.manual_seed(args.seed)
    modules = nn.ModuleDict({"scorer": Scorer(vlm.width), "denoiser": parts.denoiser(vlm.width)})
    scorer, denoiser = modules.to(processes.device).values()
    learned = list(modules.parameters())
    base_lr = args.lr or 0.2 / scorer.head.in_features  # the papers' 2e-4 at width 1024
    optimizer = torch.optim.AdamW(learned, lr=base_lr)
    processes.say(f"{args.model}: {vlm.tokens or 'a varying number of'} visual tokens, keep {budget}; {len(training)} "
                  f"images to learn from, {len(held_out)} held out")
    at_once, pieces = processes.plan(vlm, sum(p.numel() for p in learned), args)

    def batches(data, *ranges, bad=None):
        """(inputs, noise) for these ranges of sample numbers, as many at a time as fit; bad gathers the unreadable."""
        chunks = [samples[i:i + at_once] for samples in ranges for i in range(0, len(samples), at_once)]
        for samples, inputs, _ in load_batches(vlm, data, chunks, PROMPT, args.workers, set() if bad is None else bad):
            # drawn for each sample by its number alone: the same however a batch is split, and after a resume
            noise = [torch.randn(n, vlm.width, generator=generator(args.seed, "noise", g))
                     for n, g in zip(vlm.visual(inputs).sum(1).tolist(), samples)]
            yield inputs, pad_sequence(noise, batch_first=True).to(vlm.model.device)

    mean, L, most = feature_statistics(vlm, batches(Captions(training), range(min(1024, len(training)))), args.seed)
    if budget.of(most) == most:
        raise InputError(f"--keep {args.keep}: no picture has more tokens than {most}, so there is nothing to choose; "
                         "give fewer")
    run.hold(modules, optimizer, {"mean": mean, "L": L})
    graph = (vlm, scorer, denoiser, (mean, L))
    mine = [processes.share(range(i * args.batch, (i + 1) * args.batch)) for i in range(run.step, args.steps)]
    todo = batches(Captions(training, args.seed), *mine, bad=run.skipped)
    watched = list(batches(Captions([(ROOT / path, [PROMPT]) for path in args.watch]), range(len(args.watch))))

    for step in run.steps(args.steps, args.save_every):
        tau, lr = temperature(step / args.steps), cosine(base_lr, 0, step / args.steps)
        optimizer.param_groups[0]["lr"] = lr

        if watched and step % max(1, args.steps // 40) == 0:
            with torch.no_grad():
                run.watch(step, tau, args.watch, [forward(*graph, *b, budget, tau, parts)[1] for b in watched])

        # forward and backward, piece by piece
        totals = torch.zeros(3, device=vlm.model.device)
        for _, (inputs, noise) in zip(range(pieces), todo):  # in this order zip takes none too many
            loss, alpha = forward(*graph, inputs, noise, budget, tau, parts)
            words = words_in(inputs)
            (loss * words).backward()  # a sum over words, so that pieces and processes add up to the whole batch
            hardness = hardness_of(alpha.detach(), budget.of(real_tokens(alpha, inputs.get("valid"))))
            totals += torch.stack([loss.detach() * words, words, hardness.sum()])
        processes.sum(totals, *(p.grad for p in learned))
        loss, words, hardness = totals.tolist()
        loss, hardness = loss / words, hardness / args.batch

        # one step of AdamW
        for p in learned:
            p.grad /= words
        norm = nn.utils.clip_grad_norm_(learned, 1.0).item()
        run.check_finite(step, loss + norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # now and then: evaluate on the deployed path, log, keep the best
        if step % args.eval_every == 0 or step == args.steps - 1:
            some = batches(Captions(held_out), processes.share(range(len(held_out)), even=args.shard))
            losses = held_out_losses(graph, some, budget, tau, processes, parts)
            run.check_finite(step, sum(losses.values()))
            run.log({"step": step, "tau": tau, "lr": lr, "loss": loss, **losses, "hardness": hardness})
            if run.best(temperature(1)) is run.curve[-1]:
                run.write("scorer.safetensors", scorer.state_dict())
        pruned = run.curve[-1]["deployed_loss"]
        run.bar.set_postfix(loss=f"{loss:.3f}", pruned=f"{pruned:.3f}", hardness=f"{hardness:.2f}")

    # the thresholds that make a budget hold on average, and what all of it is worth
    made = {"model": portable(args.model), "width": vlm.width, "tokens": vlm.tokens, "keep": str(budget),
            "choose": args.choose, "settings": settings, "best": run.best(temperature(1)), "seconds": run.seconds(),
            "finished": processes.first}
    if processes.first:
        scorer.load_state_dict(load_file(args.out / "scorer.safetensors"))
        made["thresholds"] = thresholds(vlm, scorer, args.choose, (b[0] for b in batches(Captions(held_out), range(len(held_out)))))
        run.write("pruner.json", rounded(made))
        if questions and not args.shard:
            table = accuracy_table(vlm, scorer, made, questions, [budget])
            full, pruned = table[f"all {vlm.tokens or ''}".strip()], table[f"scorer {budget}"]
            made |= {"retention": retention(pruned, full), "by_category": table}
    return made


def add_training_arguments(ap):
    """Three groups: what to learn from, how, and where the run is made."""
    add = ap.add_argument_group("data").add_argument
    add("--data", metavar="JSON", help="COCO captions file (default: the embedded one, drawn if missing)")
    add("--images", metavar="DIR", help="folder of its images (default: the file's own)")
    add("--model", help="the frozen VLM, a folder or hub name (default: llava-hf/llava-1.5-7b-hf; without --data the "
        "embedded tiny one)")
    add("--questions", metavar="JSONL", help="question file for the closing table, or none (default: without --data "
        "the embedded test questions)")

    add = ap.add_argument_group("method").add_argument
    add("--keep", default="11.1%", metavar="K", help="tokens to keep: a number, or a share (default: 11.1%%, which is "
        "64 of LLaVA-1.5's 576)")
    add("--choose", choices=RANKINGS, default="distinct", help="what is kept: tokens that score high and "
        "say what no better one says, or as in the papers the highest scores (default: %(default)s)")
    add("--steps", type=int, help="training steps (default: 4000; without --data 200)")
    add("--batch", type=int, default=32, help="images a step, over all processes (default: %(default)s)")
    add("--lr", type=float, help="AdamW's learning rate at the start (default: the papers' 2e-4 for a scorer 1024 "
        "wide, more for a narrower one)")
    add("--seed", type=int, default=0, help="of weights, noise and order (default: %(default)s)")

    add = ap.add_argument_group("run").add_argument
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="folder to write to (default: %(default)s)")
    add("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--at-once", type=int, metavar="N", help="images in memory at a time (default: as many as fit)")
    add("--checkpointing", action="store_true", help="compute activations twice: slower, but far less memory")
    add("--shard", action="store_true", help="split the frozen LLM over torchrun's processes, for a model larger than "
        "a card; --batch must be a multiple of their number, and there is no closing table")
    add("--watch", nargs="+", type=portable, default=[], metavar="IMG", help="pictures whose alpha is recorded in "
        "watched.json as training goes on; python -m results.draw training makes a moving picture of it")
    add("--eval-every", type=int, metavar="STEPS", help="steps between evaluations on held-out captions (default: a "
        "twentieth of all, and at least 100)")
    add("--save-every", type=int, default=100, metavar="STEPS", help="steps between checkpoints (default: %(default)s)")
    add("--workers", type=int, default=max(0, min(4, (os.cpu_count() or 1) // 2 - 1)), metavar="N",
        help="processes that read pictures (default here: %(default)s)")
    add("--json", action="store_true", help="print the results as JSON on the last line")


def check_training(args):
    """The arguments with every default filled in. InputError for a value that cannot be."""
    try:
        args.keep = Budget.parse(args.keep)
    except ValueError as e:
        raise InputError(f"--keep {e}") from None
    if args.keep.average:
        raise InputError(f"--keep {args.keep}: training keeps exactly as many in each picture; leave ~ out, and give "
                         "it at inference")
    number_type(args)
    args.questions = args.questions or ("none" if args.data else FOLDER / "test.jsonl")
    args.model = args.model or ("llava-hf/llava-1.5-7b-hf" if args.data else "data/shapes/llava")
    args.steps = (4000 if args.data else 200) if args.steps is None else args.steps
    args.eval_every = max(100, args.steps // 20) if args.eval_every is None else args.eval_every
    for name in ("steps", "batch", "lr", "at_once", "eval_every", "save_every"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be a number above 0")
    if not 0 <= args.seed < 2 ** 63:
        raise InputError(f"--seed {args.seed}: must be a whole number from 0 to 2^63 - 1")
    for picture in args.watch:
        read_image(ROOT / picture)
    if args.workers < 0:
        raise InputError(f"--workers {args.workers}: must not be below 0")
    return args


def parse_arguments(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(ap)
    add_device_arguments(ap)
    return check_training(ap.parse_args(argv))


def main():
    args = parse_arguments()
    made = train(args)
    if args.json and made["finished"]:
        print(json.dumps(rounded(made)))


if __name__ == "__main__":
    cli(main)
