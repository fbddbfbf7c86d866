"""
Train a Scorer for a frozen VLM, with next-token loss on captions and nothing else.

    python train.py                            # the embedded default: a tiny LLaVA, minutes on two CPU cores
    python train.py --data captions_train2014.json --images train2014/      # LLaVA-1.5-7B, the papers' recipe
    torchrun --nproc_per_node 8 train.py --data …                           # the same on eight GPUs
    python train.py --data coco.json --model data/shapes/llava --steps 20   # any COCO captions, any LLaVA

No token is dropped in training: each gets through in proportion to its weight alpha. What counts is the deployed
path (the top K or what lies above a threshold, no noise, no denoiser): the bar shows its loss on held-out captions, and
with a question file the run ends with its accuracy beside random tokens and a uniform grid.

Writes to --out: scorer.safetensors (all that inference needs), denoiser.safetensors, pruner.json; log.jsonl and
curve.png; checkpoint.safetensors, from which --resume goes on bit for bit.
"""
import argparse
import atexit
import json
import math
import os
import platform
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from tqdm import tqdm

from bench import accuracy_table, mean, retention, spread_of
from data.coco import Captions, check_fit, generator, load_batches, read_coco
from data.files import loss_chart, portable, read_checkpoint, rounded, write
from data.questions import read_questions
from data.shapes.prepare import prepare
from denoiser import Denoiser
from infer import DTYPES, add_device_arguments
from model import HERE, InputError, cli, load
from throttler import (Scorer, count_above, gumbel_top_k, noise_factor, scale_gate, select, soft_top_k, standardised,
                       threshold, vp_gate, whitening)

PROMPT = "Describe the image."
# defaults with --data (LLaVA-1.5-7B, as in the papers) and without (a tiny model, two CPU cores)
REAL = dict(model="llava-hf/llava-1.5-7b-hf", keep="64", steps=4000, batch=32, lr=2e-4, recipe="papers")
SHAPES = dict(model="data/shapes/llava", keep="16", steps=400, batch=48, lr=2e-3, recipe="ours")
RECIPES = {"papers": dict(whiten=False, standardise=False, presence=False, denoiser="diagonal", budget="image",
                          tau_start=2.0, tau_end=0.1, anneal=0.5),
           "ours": dict(whiten=True, standardise=True, presence=True, denoiser="none", budget="batch",
                        tau_start=1.0, tau_end=0.02, anneal=0.8)}
LOSSES = ("soft_loss", "hard_loss", "deployed_loss")  # in the log, beside full_loss: see held_out_losses
FREE = {"device", "workers", "accumulate", "checkpointing", "save_every", "patience", "questions"}  # on --resume
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


def cosine(start, end, t):
    """From start to end along half a cosine as t goes from 0 to 1, then end."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1, t)))


@torch.no_grad()
def feature_statistics(vlm, batches, seed, per_image=32):
    """Whitening (mean, L) of the encoder's features, from some tokens of some training images."""
    tokens, g = [], generator(seed, "tokens")
    for _, inputs, _ in batches:
        X, valid = vlm.encode(inputs), inputs.get("valid")  # (B, N, d_v)
        some = torch.randperm(X.shape[1], generator=g)[:per_image].to(X.device)
        tokens.append((X[:, some].flatten(0, 1) if valid is None else X[:, some][valid[:, some]]).float())
    return whitening(torch.cat(tokens))


def with_noise(graph, samples, inputs, seed):
    """training_loss's first arguments, with ε (B, N, d_v) among the statistics. It is drawn for each sample by its
    number alone, so it is the same however a batch is split over parts and processes, and after a resume."""
    vlm, scorer, denoiser, statistics = graph
    device = vlm.model.device
    torch.manual_seed(generator(seed, "gumbel", samples[0]).initial_seed())  # that gate draws its own
    noise = [torch.randn(n, vlm.width, device=device, generator=generator(seed, "noise", g, device=device))
             for n, g in zip(vlm.visual(inputs).sum(1).tolist(), samples)]
    return vlm, scorer, denoiser, (*statistics, torch.nn.utils.rnn.pad_sequence(noise, batch_first=True))


def pooled(values, K, budget):
    """Rows that share one budget, and the budget of each: images (B, N) with K, or the batch (1, B·N) with the sum."""
    if budget == "image":
        return values, K
    return values.reshape(1, -1), K.sum() if torch.is_tensor(K) else K * len(values)


def training_loss(vlm, scorer, denoiser, statistics, inputs, K, tau, gate="vp", standardise=False, presence=False,
                  budget="image"):
    """The training graph, (loss, alpha): no token is dropped, each gets through in proportion to its weight alpha.

    statistics: mean and L for the noise gate, and the noise if it is given; K: the budget; tau: the temperature; gate:
    vp, or an ablation. Additions of ours, so that what is trained is what is deployed. budget: image, or one for the
    whole batch (see pooled). standardise: tau counts in standard deviations of an image's scores, or the scorer undoes
    the annealing by shrinking them. presence: alpha also weighs each token in the LLM's attention, since in use a
    dropped token is not noise there, but absent.
    """
    X, valid = vlm.encode(inputs).float(), inputs.get("valid")  # (B, N, d_v), (B, N) or None
    K = vlm.budget(K, X, valid)
    with torch.autocast(vlm.model.device.type, vlm.model.dtype, enabled=vlm.model.dtype.itemsize == 2):
        scores = scorer(X, valid)  # (B, N)
        if standardise:
            scores = standardised(scores, valid)
        top_k = gumbel_top_k if gate == "gumbel" else soft_top_k
        rows, k = pooled(scores, K, budget)
        alpha = top_k(rows, k, tau).view_as(scores)  # (B, N), each row sums to K, or all to B·K
        X_tilde = vp_gate(X, alpha, *statistics) if gate == "vp" else scale_gate(X, alpha)
        X_bar = denoiser(X_tilde)  # (B, N, d_v)
        return vlm.loss(inputs, X_bar, alpha=alpha if presence else None), alpha


def graph_flags(args):
    """training_loss's arguments that are flags."""
    return {name: getattr(args, name) for name in ("gate", "standardise", "presence", "budget")}


def tau_at(recipe, t, start, end):
    """The temperature as t goes from 0 to 1, and then. Papers: along a cosine; ours: geometric, a line in log tau."""
    return cosine(start, end, t) if recipe == "papers" else start * (end / start) ** min(1, t)


def drawn(keep, u):
    """A budget from a range LOW:HIGH, log-uniform as u goes from 0 to 1; a single budget as it is."""
    low, _, high = str(keep).partition(":")
    if not high:
        return keep
    try:
        start, end = (float(text.removesuffix("%")) for text in (low, high))
        if not 0 < start <= end < math.inf or (low[-1] == "%") != (high[-1] == "%"):
            raise ValueError
        K = start * (end / start) ** u
    except (ValueError, IndexError):
        raise InputError(f"--keep {keep}: must be one budget, or a range as 8:32 or 5%:20%, lower end first") from None
    return f"{K:.4g}%" if low[-1] == "%" else round(K)


def words_in(inputs):
    """How many caption tokens the loss is a mean over."""
    return (inputs["labels"][:, 1:] != -100).sum()


def sum_over_processes(*tensors):
    for t in tensors if WORLD > 1 else ():
        dist.all_reduce(t)


@torch.no_grad()
def held_out_losses(graph, batches, K, tau, args):
    """Caption losses on held-out images, from all tokens to what is used: {full, soft, hard, deployed}.

    Full: nothing is pruned. Soft: as in training. Hard: tau -> 0, so alpha is 0 or 1, but a dropped token is still
    there, as repaired noise. Deployed: it is gone, without noise or denoiser. From soft to hard is lost what leaked
    through a soft alpha, from hard to deployed what the LLM did with the slots. The top K of each image are kept; with
    --budget batch what lies above one threshold for the images in memory together, and one token at least.
    """
    vlm, scorer, *_ = graph
    names, sums = ("full", "soft", "hard", "deployed"), torch.zeros(5, device=vlm.model.device)
    for g, inputs, _ in batches:
        soft, hard = (training_loss(*with_noise(graph, g, inputs, args.seed), inputs, K, t, **graph_flags(args))[0]
                      for t in (tau, 1e-9))  # the same noise
        X, valid = vlm.encode(inputs), inputs.get("valid")
        scores, counts = scorer(X, valid), vlm.budget(K, X, valid)
        if args.budget == "batch":
            z, total = standardised(scores, valid), pooled(scores, counts, "batch")[1]
            counts = count_above(z, threshold(z, int(total)))
        deployed = vlm.loss(inputs, X, select(scores, counts))
        full = vlm.loss(inputs, X)
        sums += torch.stack([full, soft, hard, deployed, torch.ones_like(full)]) * words_in(inputs)
    sum_over_processes(sums)
    return dict(zip(names, (sums[:-1] / sums[-1]).tolist()))


@torch.no_grad()
def calibrate(vlm, scorer, batches, K):
    """{budget: threshold and counts}: above which z the held-out images have so many tokens on average.

    Budgets: ½, ¾, 1, 1½, 2 and 3 times K. Counts: mean, 10th and 90th percentile over the images. An image with no
    token above the threshold keeps one, so the mean of a very low budget can come out a little higher.
    """
    if K == "all":
        return {}
    share = str(K).endswith("%")
    size, most = (float(K[:-1]), 100) if share else (K, vlm.tokens or math.inf)
    names = {m: f"{size * m:.4g}%" if share else str(round(size * m)) for m in (0.5, 0.75, 1, 1.5, 2, 3)} | {1: str(K)}
    totals = {name: 0 for m, name in names.items() if name != "0" and "e" not in name and size * m <= most}
    z = []
    for _, inputs, _ in batches:
        X, valid = vlm.encode(inputs), inputs.get("valid")
        z.extend(standardised(scorer(X, valid), valid))
        for b in totals:
            totals[b] += int(pooled(X, vlm.budget(b, X, valid), "batch")[1])
    z = torch.nn.utils.rnn.pad_sequence(z, True, -math.inf)  # (images, N)
    result = {}
    for b, total in totals.items():
        T = threshold(z, total)
        result[b] = {"threshold": T, **spread_of(count_above(z, T).tolist())}
    return result


def best_of(curve, settled):
    """The evaluation with the lowest deployed loss once tau is at its end. Until then the latest is the best: while
    alpha is soft, a low deployed loss is luck."""
    return min([e for e in curve if e["step"] >= settled] or curve[-1:], key=lambda e: e["deployed_loss"])


def parse_arguments():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = lambda flag, text, **kw: ap.add_argument(flag, help=text, **kw)
    both = lambda name: f"{REAL[name]}; without --data {SHAPES[name]}"
    recipe = lambda name: ", ".join(f"{r} {RECIPES[r][name]}" for r in RECIPES)
    add("--data", "COCO captions file (default: the embedded one, drawn if missing)", metavar="JSON")
    add("--images", "folder of its images (default: the file's own)", metavar="DIR")
    add("--model", f"the frozen VLM, a folder or hub name ({both('model')})")
    add("--questions", "question file for the closing table, or none (the embedded default has one)", metavar="JSONL")
    add("--keep", "budget, how many tokens to keep, or a share as 11.1%%; a range as 8:32 draws one for each step, "
        f"log-uniform, and its geometric mean is deployed ({both('keep')}; by --recipe ours from half to double)",
        metavar="K")
    add("--budget", "image: so many tokens of each image, as in the papers; batch: so many on average, for which the "
        "images that are in memory together compete; in use a threshold, as --keep ~K of infer.py "
        f"({recipe('budget')})", choices=("image", "batch"))
    add("--steps", f"({both('steps')})", type=int)
    add("--batch", f"images a step, over all GPUs ({both('batch')})", type=int)
    add("--accumulate", "split a GPU's share in this many parts, to fit its memory (%(default)s)", type=int, default=1)
    add("--checkpointing", "recompute activations in the backward pass: slower, far less memory", action="store_true")
    add("--lr", f"AdamW's learning rate, decayed by a cosine ({both('lr')})", type=float)
    add("--tau-start", f"tau falls from this ({recipe('tau_start')})", type=float, metavar="TAU")
    add("--tau-end", f"… to this ({recipe('tau_end')})", type=float, metavar="TAU")
    add("--anneal", f"… over this share of the steps ({recipe('anneal')})", type=float, metavar="SHARE")
    add("--recipe", "the default of every flag whose help names both recipes, and the shape of tau's fall "
        f"({both('recipe')})", choices=RECIPES)
    switch = dict(action=argparse.BooleanOptionalAction)
    add("--whiten", f"the scorer reads whitened tokens ({recipe('whiten')})", **switch)
    add("--standardise", "tau counts in standard deviations of an image's scores, always with --budget batch "
        f"({recipe('standardise')})", **switch)
    add("--presence", f"log alpha is added in the LLM's attention ({recipe('presence')})", **switch)
    add("--gate", "ablation of the noise gate (%(default)s)", choices=("vp", "scale", "gumbel"), default="vp")
    add("--noise", "ablation: the noise has the features' covariance, each channel's own variance, or one for all "
        "(%(default)s)", choices=("whitened", "channel", "isotropic"), default="whitened")
    add("--denoiser", f"its attention, or none: no denoiser ({recipe('denoiser')})",
        choices=("diagonal", "global", "none"))
    add("--seed", "of weights, noise and order (%(default)s)", type=int, default=0)
    add("--out", "folder to write to (%(default)s)", type=Path, default=Path("out"))
    add("--resume", "go on from the checkpoint in --out", action="store_true")
    add("--overwrite", "replace the run that is in --out", action="store_true")
    add("--save-every", "steps between checkpoints (%(default)s)", type=int, default=100, metavar="STEPS")
    add("--eval-every", "steps between evaluations on held-out captions (a twelfth of all)", type=int, metavar="STEPS")
    add("--patience", "once tau is at its end, stop after this many evaluations without a lower deployed loss "
        "(0: never; the best is kept anyway)", type=int, default=0, metavar="N")
    workers = min(4, os.cpu_count() // 2) if os.cpu_count() > 2 else 0
    add("--workers", "processes that read pictures (%(default)s)", type=int, default=workers)
    add_device_arguments(ap)
    args = ap.parse_args()
    defaults = REAL if args.data else SHAPES
    args.recipe = args.recipe or defaults["recipe"]
    defaults = {**defaults, **RECIPES[args.recipe]}
    if args.recipe == "ours":
        K = int(defaults["keep"])
        defaults["keep"] = f"{K // 2}:{2 * K}"
    if (args.budget or defaults["budget"]) == "batch":
        if args.standardise is False:
            raise InputError("--no-standardise: images that share a budget need a common scale; add --budget image")
        defaults["standardise"] = True
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.eval_every is None:
        args.eval_every = max(1, args.steps // 12)
    for name in ("steps", "batch", "lr", "tau_start", "tau_end", "anneal", "accumulate", "save_every", "eval_every"):
        if not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be a number above 0")
    if args.anneal > 1:
        raise InputError(f"--anneal {args.anneal}: is a share of the steps, 1 at most; tau must arrive")
    if min(args.patience, args.workers) < 0:
        raise InputError("--patience and --workers must not be below 0")
    if args.budget == "batch" and WORLD * args.accumulate * 2 > args.batch:
        raise InputError(f"--budget batch: {WORLD} processes times --accumulate {args.accumulate} leave one image of "
                         f"--batch {args.batch} at a time, which competes with none; raise --batch, or add "
                         "--budget image")
    if WORLD * args.accumulate > args.batch:
        raise InputError(f"--batch {args.batch}: is fewer than {WORLD} processes times --accumulate {args.accumulate}")
    return args


def main():
    start = time.time()
    args = parse_arguments()

    # processes: one, or those of torchrun; each takes its parts of every batch, the first one writes and speaks
    if WORLD > 1:
        gpu = args.device.startswith("cuda")
        args.device = f"cuda:{os.environ['LOCAL_RANK']}" if gpu else args.device
        dist.init_process_group("nccl" if gpu else "gloo", device_id=torch.device(args.device) if gpu else None)
        atexit.register(dist.destroy_process_group)
    parts = WORLD * args.accumulate
    say = lambda text: RANK or tqdm.write(text, file=sys.stderr)

    # data: some images are held out, to see the deployed loss on
    if not args.data:
        folder = prepare() if RANK == 0 else HERE / "data/shapes"
        sum_over_processes(torch.zeros(1, device=args.device))  # the others wait for the first one here
        args.data, args.questions = folder / "train.json", args.questions or folder / "questions.jsonl"
    pairs = read_coco(args.data, args.images)
    questions = read_questions(args.questions) if args.questions not in (None, "none") else None
    n_out = min(200, max(1, len(pairs) // 20))
    data = Captions(list(pairs.items())[:-n_out], list(pairs.items())[-n_out:], args.seed)

    # the run in --out: none, one to go on with, or one to replace
    flags = {k: portable(v) if v and k in ("model", "data", "images", "questions") else v
             for k, v in vars(args).items() if k not in ("out", "resume", "overwrite")} | {"parts": parts}
    state = {"step": 0, "curve": [], "unreadable": 0, "skipped": [], "seconds": 0, "settings": flags}
    checkpoint = args.out / "checkpoint.safetensors"
    there = [f for f in map(args.out.joinpath, (checkpoint.name, "pruner.json", "scorer.safetensors")) if f.exists()]
    if args.resume:
        tensors, state = read_checkpoint(checkpoint)
        old = state["settings"]  # and, for a checkpoint from before they were flags:
        old = {**RECIPES.get(old.get("recipe"), {}), "budget": "image", "parts": 1, **old}
        free = FREE if args.budget == "batch" or args.gate == "gumbel" else FREE | {"parts"}  # they depend on the parts
        for k in sorted(flags, key=lambda k: k not in ("data", "recipe")):  # first what sets others
            if k not in free and old.get(k) != flags[k]:
                name = "--accumulate times processes" if k == "parts" else f"--{k.replace('_', '-')}"
                raise InputError(f"{name} {flags[k]}: the run in {args.out} has {old.get(k)}; --resume needs the same")
    elif there and not args.overwrite:
        raise InputError(f"--out {args.out}: holds a run ({there[0].name}); --resume goes on, --overwrite replaces it")

    # the frozen VLM, and the two modules that learn
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns when worker processes start
    torch.manual_seed(args.seed)
    vlm = load(args.model, args.device, DTYPES[args.dtype])
    if vlm.processor is None:
        raise InputError(f"--model {args.model}: has random weights and no tokenizer; it is for bench.py speed")
    for end in (0, 1):
        vlm.budget(drawn(args.keep, end))  # both ends of a range must be possible
    K, N = vlm.budget(drawn(args.keep, 0.5)), vlm.tokens  # what is deployed; where N varies: as it was given, and None
    by_threshold = args.budget == "batch" and K not in ("all", N)  # by T, not by the top K
    if N is None and args.denoiser == "global":
        raise InputError("--denoiser global: sees padding where pictures vary in their number of tokens; leave it out")
    check_fit(vlm, args.data, pairs, PROMPT)
    if args.checkpointing:
        vlm.recompute()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--out {args.out}: cannot be made ({e.strerror}); give a folder to write to") from None
    scorer = Scorer(vlm.width)
    denoiser = torch.nn.Identity() if args.denoiser == "none" else Denoiser(vlm.width, args.denoiser == "diagonal")
    pruner = torch.nn.ModuleDict({"scorer": scorer, "denoiser": denoiser}).to(args.device)
    learned, at_once = list(pruner.parameters()), math.ceil(args.batch / parts)
    count = {name: sum(p.numel() for p in module.parameters())
             for name, module in (("scorer", scorer), ("denoiser", denoiser), ("vlm (frozen)", vlm.model))}
    say(f"{args.model}: {N or 'a varying number of'} visual tokens, keep {K}; {len(data.training)} images; parameters "
        + ", ".join(f"{k} {v:,}" for k, v in count.items()))
    about = {"model": flags["model"], "width": vlm.width, "tokens": N, "keep": f"~{K}" if by_threshold else K,
             "parameters": count, "settings": flags,
             "versions": {"python": platform.python_version(), "torch": torch.__version__,
                          "transformers": transformers.__version__}}
    say(vlm.memory_plan(sum(p.numel() for p in learned), at_once, args.checkpointing))
    optimizer = torch.optim.AdamW(learned, lr=args.lr)
    skipped = set(state["skipped"])
    loader = lambda batches: load_batches(vlm, data, batches, PROMPT, args.workers, skipped)

    # where the run stands: what is random depends on the seed and the step alone, so no generator need be saved
    if args.resume:
        try:
            pruner.load_state_dict({k: tensors.pop(k) for k in pruner.state_dict()})
            statistics = [tensors.pop(f"whitening.{name}").to(args.device) for name in ("mean", "L")]
            moments = {}
            for name, t in tensors.items():  # adam.3.exp_avg: of the parameter number 3
                moments.setdefault(int(name.split(".")[1]), {})[name.split(".")[2]] = t
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        except (KeyError, ValueError, IndexError, RuntimeError) as e:
            raise InputError(f"{checkpoint}: does not fit this run ({e!r}); start again with --overwrite") from None
    else:
        first = range(min(1024, len(data.training)))
        batches = [first[i:i + 32] for i in first[::32]]
        mean_X, L = feature_statistics(vlm, loader(batches), args.seed)
        if args.whiten:
            scorer.whiten(mean_X, L)
        statistics = [mean_X, noise_factor(L, args.noise)]
    for t in (*pruner.state_dict().values(), *statistics) if WORLD > 1 else ():
        dist.broadcast(t.data, 0)
    whitened = dict(zip(("whitening.mean", "whitening.L"), statistics))
    graph = (vlm, scorer, denoiser, statistics)  # what training_loss needs
    before, curve, settled = state["seconds"], state["curve"], args.anneal * args.steps
    seconds = lambda: before + time.time() - start

    def save(**progress):
        names = [[]] * WORLD
        if WORLD > 1:
            dist.all_gather_object(names, sorted(skipped))
        skipped.update(*names)
        state.update(progress, skipped=sorted(skipped), seconds=seconds())
        adam = {f"adam.{i}.{k}": t for i, m in optimizer.state_dict()["state"].items() for k, t in m.items()}
        if RANK == 0:
            write(checkpoint, {**pruner.state_dict(), **whitened, **adam}, {"state": json.dumps(state)})

    def diverged(what):
        return InputError(f"step {step}: {what}; {checkpoint} is from before step {state['step']}; "
                          "try a lower --lr or --dtype float32")

    if not args.resume:
        save()  # a folder that cannot be written to is found out now
    signals = []  # finish the step at the first one, go at once at the second
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(128 + number) if signals else signals.append(number))
    samples = loader([range(step * args.batch, (step + 1) * args.batch)[part::parts]
                      for step in range(state["step"], args.steps) for part in range(RANK, parts, WORLD)])
    bar = tqdm(range(state["step"], args.steps), desc="training", initial=state["step"], total=args.steps,
               dynamic_ncols=True, disable=RANK > 0)
    held_out = [range(-i, -min(i + at_once, n_out + 1), -1) for i in range(1, n_out + 1, at_once)]
    failures, waited, mark = state["unreadable"], 0.0, time.time()
    for step in bar:
        # early stopping
        if args.patience and curve and len(curve) - 1 - curve.index(best_of(curve, settled)) >= args.patience:
            say(f"stopped before step {step}: the deployed loss has not fallen for {args.patience} evaluations")
            break

        # schedules
        tau = tau_at(args.recipe, step / settled, args.tau_start, args.tau_end)
        optimizer.param_groups[0]["lr"] = lr = cosine(args.lr, 0, step / args.steps)

        # forward and backward: encoder -> scorer -> soft top-K -> noise gate -> denoiser -> frozen LLM, part by part
        optimizer.zero_grad(set_to_none=True)
        K_now = drawn(args.keep, random.Random(f"{args.seed} budget {step}").random())
        totals = torch.zeros(5, device=vlm.model.device)  # loss and words, hardness, unreadable images, signals
        for _ in range(args.accumulate):
            waited -= time.time()
            g, inputs, unreadable = next(samples)
            waited += time.time()
            noisy = with_noise(graph, g, inputs, args.seed)
            loss, alpha = training_loss(*noisy, inputs, K_now, tau, **graph_flags(args))
            words = words_in(inputs)
            (loss * words).backward()  # a sum over words, so that parts and processes add up to the whole batch
            shares, k = pooled(alpha.detach(), vlm.budget(K_now, alpha, inputs.get("valid")), args.budget)
            kept = select(shares, k)  # (rows, k)
            top = shares.gather(1, kept.clamp_min(0)) * (kept >= 0)
            hardness = (top.sum(1) / (kept >= 0).sum(1)).mean() * len(alpha)  # must approach 1, as it is in use
            counts = totals.new_tensor([unreadable, len(signals)])
            totals += torch.cat([torch.stack([loss.detach() * words, words, hardness]), counts])
        sum_over_processes(totals, *(p.grad for p in learned))
        loss, words, hardness, unreadable, stop = totals.tolist()
        loss, hardness = loss / words, hardness / args.batch
        for p in learned:
            p.grad /= words
        norm = torch.nn.utils.clip_grad_norm_(learned, 1.0).item()
        if not math.isfinite(loss + norm):
            raise diverged(f"the loss is {loss}, its gradient {norm}")
        optimizer.step()

        # evaluate, log, keep the best
        last = step == args.steps - 1
        if step % args.eval_every == 0 or last:
            waiting = waited / (time.time() - mark)
            losses = held_out_losses(graph, loader(held_out[RANK::WORLD]), K, tau, args)
            if not math.isfinite(sum(losses.values())):
                raise diverged(f"the losses on held-out captions are {losses}")
            curve.append({"step": step, "tau": tau, "lr": lr, "loss": loss,
                          **{f"{k}_loss": v for k, v in losses.items()}, "hardness": hardness,
                          "seconds": seconds(), "waiting": waiting})
            best = best_of(curve, settled)
            if RANK == 0:
                if best is curve[-1]:
                    write(args.out / "scorer.safetensors", scorer.state_dict())
                    write(args.out / "denoiser.safetensors", {**denoiser.state_dict(), **whitened})
                write(args.out / "pruner.json",
                      rounded({**about, "best_step": best["step"], "curve": curve, "seconds": seconds()}))
                write(args.out / "log.jsonl", rounded(curve))
                write(args.out / "curve.png", loss_chart(curve))
            waited, mark = 0.0, time.time()
        bar.set_postfix(loss=f"{loss:.3f}", tau=f"{tau:.2f}", hard=f"{hardness:.2f}",
                        deployed=f"{curve[-1]['deployed_loss']:.3f}", waiting=f"{100 * curve[-1]['waiting']:.0f}%")

        # checkpoint
        failures, seen = failures + int(unreadable), (step + 1) * args.batch
        too_many = unreadable and failures > max(1, 0.01 * seen)
        if (step + 1) % args.save_every == 0 or last or stop or too_many:
            save(step=step + 1, unreadable=failures)
        if too_many:
            raise InputError(f"--images: {failures} of {seen} images could not be read, more than 1 % "
                             f"({', '.join(sorted(skipped)[:5])}); repair them, then --resume")
        if stop:
            bar.close()
            say(f"stopped by a signal after step {step}; the same command with --resume goes on from there")
            sys.exit(128 + (signals or [signal.SIGTERM])[0])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if RANK:
        return
    if curve[-1]["hardness"] < 0.9:
        say(f"warning: hardness {curve[-1]['hardness']:.2f} at the end: alpha is far from 0 and 1. If hard_loss is "
            "above soft_loss, end at a lower --tau-end; if deployed_loss is above hard_loss, try --presence")
    if skipped:
        say(f"unreadable images, {len(skipped)}, each replaced by the next: {', '.join(sorted(skipped))}")
    best = best_of(curve, settled)
    scorer.load_state_dict(load_file(args.out / "scorer.safetensors"))
    about["thresholds"] = rounded(calibrate(vlm, scorer, loader(held_out), K))  # as infer.py will read them
    write(args.out / "pruner.json", rounded({**about, "best_step": best["step"], "curve": curve, "seconds": seconds()}))
    say(f"wrote {args.out}/ (step {best['step']})")

    # what it is worth, on questions that training never saw
    result = {"keep": about["keep"], "tokens": N, "seed": args.seed, "recipe": args.recipe, "budget": args.budget}
    result |= best
    if questions:
        vlm.model.eval()
        table = accuracy_table(vlm, scorer, about, questions, [about["keep"]])
        full, ours = table[f"all {N or ''}".strip()], table[f"scorer {about['keep']}"]
        result |= {"accuracy_full": mean(full.values()), "accuracy": mean(ours.values()),
                   "retention": retention(ours, full), "retention_random": retention(table[f"random {K}"], full),
                   **({"retention_uniform": retention(table[f"uniform {K}"], full)} if N else {}), "by_category": table}
    print(f'next: python infer.py IMAGE "QUESTION" --pruner {args.out} --show kept.png')
    print(json.dumps(rounded({**result, "seconds": seconds()})))


if __name__ == "__main__":
    cli(main)
