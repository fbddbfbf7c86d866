"""
Train a Scorer for a frozen VLM, with next-token loss on captions and nothing else.

    python train.py                            # the embedded default: a tiny LLaVA, minutes on two CPU cores
    python train.py --data captions_train2014.json --images train2014/      # LLaVA-1.5-7B, the papers' recipe
    python train.py --data coco.json --model data/shapes/llava --steps 20   # any COCO captions, any LLaVA

No token is dropped in training: each gets through in proportion to its weight alpha. What counts is the deployed
path (hard top-K, no noise, no denoiser): the bar shows its loss on held-out captions, and with a question file the
run ends with its accuracy beside random tokens and a uniform grid.

Writes to --out: scorer.safetensors (all that inference needs), denoiser.safetensors, pruner.json.
"""
import argparse
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from tqdm import tqdm

from bench import accuracy_table, mean, read_questions, retention
from data.shapes.prepare import prepare
from denoiser import Denoiser
from infer import DTYPES, add_device_arguments
from model import HERE, InputError, cli, load, read_image
from throttler import Scorer, gumbel_top_k, scale_gate, select, soft_top_k, vp_gate, whitening

PROMPT = "Describe the image."
# defaults: the papers' recipe for a real model, and one that fits a tiny model and two CPU cores
PAPER = dict(model="llava-hf/llava-1.5-7b-hf", keep=64, steps=4000, batch=32, lr=2e-4, tau_end=0.1, anneal=0.5, recipe="papers")
SHAPES = dict(model="data/shapes/llava", keep=16, steps=320, batch=48, lr=1e-3, tau_end=0.002, anneal=0.85, recipe="ours")


def read_coco(path, images=None):
    """A COCO captions file as {image path: [captions]}. InputError names the field that is wrong, and the cure."""
    path = Path(path)
    folder = Path(images) if images else path.parent
    try:
        coco = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; --data takes a COCO captions file") from None
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: is not JSON ({e}); --data takes a COCO captions file") from None
    for field in ("images", "annotations"):
        if not isinstance(coco, dict) or not isinstance(coco.get(field), list) or not coco[field]:
            raise InputError(f"{path}: has no list '{field}'; --data takes a COCO captions file, which has one")
    try:
        names = {image["id"]: folder / image["file_name"] for image in coco["images"]}
        pairs = {}
        for a in coco["annotations"]:
            pairs.setdefault(names[a["image_id"]], []).append(str(a["caption"]).strip())
    except (KeyError, TypeError) as e:
        raise InputError(f"{path}: images need id and file_name, annotations the image_id of one of them and a caption "
                         f"(here {e!r} is missing)") from None
    for image in pairs:
        if not image.is_file():
            raise InputError(f"{path}: images name {image.name}, but {image} is not there; give their folder with --images")
    return pairs


def cosine(start, end, t):
    """From start to end along half a cosine as t goes from 0 to 1, then end."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1, t)))


def batches(pairs, batch, seed):
    """Endless (images, captions): every epoch all images in a new order, one of each image's captions at random."""
    paths, generator = list(pairs), torch.Generator().manual_seed(seed)
    queue = []
    while True:
        while len(queue) < batch:
            queue += torch.randperm(len(paths), generator=generator).tolist()
        part, queue = [paths[i] for i in queue[:batch]], queue[batch:]
        picks = torch.rand(batch, generator=generator).tolist()
        yield [read_image(p) for p in part], [pairs[p][int(u * len(pairs[p]))] for p, u in zip(part, picks)]


@torch.no_grad()
def feature_statistics(vlm, loader, images=1024, per_image=32):
    """Whitening (mean, L) of the encoder's features, from some tokens of some training images."""
    tokens = []
    while sum(map(len, tokens)) < images * per_image:
        pictures, _ = next(loader)
        inputs = vlm.inputs(pictures, [PROMPT] * len(pictures))
        X = vlm.encode(inputs)  # (B, N, d_v)
        some = torch.randperm(X.shape[1])[:per_image]
        X, valid = X[:, some], inputs.get("valid")
        tokens.append((X.flatten(0, 1) if valid is None else X[valid[:, some]]).float())
    return whitening(torch.cat(tokens))


def standardised(scores, valid=None):
    """(s - mean) / standard deviation over each row's real tokens, (B, N) -> (B, N)."""
    if valid is None:
        return F.layer_norm(scores, scores.shape[-1:])
    n = valid.sum(-1, keepdim=True)
    s = scores.masked_fill(~valid, 0)
    s = (s - s.sum(-1, keepdim=True) / n).masked_fill(~valid, 0)
    return (s / (s.square().sum(-1, keepdim=True) / n + 1e-5).sqrt()).masked_fill(~valid, -torch.inf)


def training_loss(vlm, scorer, denoiser, statistics, inputs, K, tau, gate="vp", recipe="papers"):
    """The training graph, (loss, alpha): no token is dropped, each gets through in proportion to its weight alpha.

    recipe "ours" differs in two lines, which bring what is trained closer to what is deployed:
    tau counts in standard deviations of an image's scores, or the scorer undoes the annealing by shrinking them;
    alpha also weighs each token in the LLM's attention, since a dropped token is not noise there, but absent.
    """
    X, valid = vlm.encode(inputs).float(), inputs.get("valid")  # (B, N, d_v), (B, N) or None
    K = vlm.budget(K, X, valid)
    with torch.autocast(vlm.model.device.type, vlm.model.dtype, enabled=vlm.model.dtype.itemsize == 2):
        scores = scorer(X, valid)  # (B, N)
        if recipe == "ours":
            scores = standardised(scores, valid)
        top_k = gumbel_top_k if gate == "gumbel" else soft_top_k
        alpha = top_k(scores, K, tau)  # (B, N), each row sums to K
        X_tilde = vp_gate(X, alpha, *statistics) if gate == "vp" else scale_gate(X, alpha)
        X_bar = denoiser(X_tilde)  # (B, N, d_v)
        return vlm.loss(inputs, X_bar, alpha=alpha if recipe == "ours" else None), alpha


@torch.no_grad()
def deployed_loss(vlm, scorer, held_out, K, batch):
    """Caption loss of what is deployed: hard top-K, no noise, no denoiser."""
    pairs, losses = [(p, captions[0]) for p, captions in held_out.items()], []
    for at in range(0, len(pairs), batch):
        part = pairs[at:at + batch]
        inputs = vlm.inputs([read_image(p) for p, _ in part], [PROMPT] * len(part), [c for _, c in part])
        X = vlm.encode(inputs)
        valid = inputs.get("valid")
        losses.append(vlm.loss(inputs, X, select(scorer(X, valid), vlm.budget(K, X, valid))).item())
    return mean(losses)


def write(path, content):
    """Write tensors or JSON so that a crash leaves the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    if path.suffix == ".safetensors":
        save_file({name: t.detach().cpu().contiguous() for name, t in content.items()}, temporary)
    else:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def rounded(value):
    """The same value with every float in it at five digits, for JSON that is read by people too."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def portable(path):
    """A path as it is written down: relative to this repository if inside it, else absolute; a hub name as it is."""
    full = next((p.resolve() for p in (Path(path), HERE / path) if p.exists()), None)
    return str(path if full is None else full.relative_to(HERE) if full.is_relative_to(HERE) else full)


def parse_arguments():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = lambda flag, text, **kw: ap.add_argument(flag, help=text, **kw)
    both = lambda name: f"{PAPER[name]}; without --data {SHAPES[name]}"
    add("--data", "COCO captions file (default: the embedded one, drawn if missing)", metavar="JSON")
    add("--images", "folder of its images (default: the file's own)", metavar="DIR")
    add("--model", f"the frozen VLM, a folder or hub name ({both('model')})")
    add("--questions", "question file for the closing table (the embedded default has one)", metavar="JSONL")
    add("--keep", f"budget, how many tokens to keep, or a share as 11.1%% ({both('keep')})", metavar="K")
    add("--steps", f"({both('steps')})", type=int)
    add("--batch", f"images a step ({both('batch')})", type=int)
    add("--lr", f"AdamW's learning rate, decayed by a cosine ({both('lr')})", type=float)
    add("--tau-end", f"tau falls from 2 to this ({both('tau_end')})", type=float, metavar="TAU")
    add("--anneal", f"… over this share of the steps ({both('anneal')})", type=float, metavar="SHARE")
    add("--recipe", "papers: the noise gate alone; ours: scores standardised, and log alpha added in the LLM's attention "
        f"({both('recipe')})", choices=("papers", "ours"))
    add("--gate", "ablation of the noise gate (%(default)s)", choices=("vp", "scale", "gumbel"), default="vp")
    add("--noise", "ablation: the noise has the features' covariance, each channel's own variance, or one for all "
        "(%(default)s)", choices=("whitened", "channel", "isotropic"), default="whitened")
    add("--denoiser", "ablation of its attention (%(default)s)", choices=("diagonal", "global", "none"), default="diagonal")
    add("--seed", "of weights, noise and order (%(default)s)", type=int, default=0)
    add("--out", "folder to write to (%(default)s)", type=Path, default=Path("out"))
    add_device_arguments(ap)
    args = ap.parse_args()
    for name, value in (PAPER if args.data else SHAPES).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not args.data:
        args.data = prepare() / "train.json"
        args.questions = args.questions or prepare() / "questions.jsonl"
    for name in ("steps", "batch", "lr", "tau_end", "anneal"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")
    return args


def main():
    start = time.time()
    args = parse_arguments()
    torch.manual_seed(args.seed)

    # data: some images are held out, to see the deployed loss on
    pairs = read_coco(args.data, args.images)
    questions = read_questions(args.questions) if args.questions else None
    n_out = min(200, max(1, len(pairs) // 20))
    held_out = dict(list(pairs.items())[-n_out:])
    training = dict(list(pairs.items())[:-n_out]) or held_out
    loader = batches(training, args.batch, args.seed)

    # the frozen VLM, and the two modules that learn
    vlm = load(args.model, args.device, DTYPES[args.dtype])
    K, N = vlm.budget(args.keep), vlm.tokens  # where N varies: K as given, N None
    args.keep = K
    if N is None and args.denoiser == "global":
        raise InputError("--denoiser global: sees padding where pictures have different numbers of tokens; leave it out")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--out {args.out}: cannot be made ({e.strerror}); give a folder to write to") from None
    scorer = Scorer(vlm.width).to(args.device)
    denoiser = torch.nn.Identity() if args.denoiser == "none" else Denoiser(vlm.width, args.denoiser == "diagonal")
    denoiser.to(args.device)
    learned = [*scorer.parameters(), *denoiser.parameters()]
    count = {"scorer": sum(p.numel() for p in scorer.parameters()),
             "denoiser": sum(p.numel() for p in denoiser.parameters()),
             "vlm (frozen)": sum(p.numel() for p in vlm.model.parameters())}
    print(f"{args.model}: {N or 'a varying number of'} visual tokens, keep {K}; {len(training)} images; parameters "
          + ", ".join(f"{k} {v:,}" for k, v in count.items()), file=sys.stderr)
    optimizer = torch.optim.AdamW(learned, lr=args.lr)
    mean_X, L = feature_statistics(vlm, loader, min(1024, len(training)))
    if args.noise != "whitened":
        variance = L.square().sum(1)  # (d_v,), the diagonal of L·Lᵀ
        L = (variance if args.noise == "channel" else variance.mean().expand_as(variance)).sqrt().diag()

    curve = []
    bar = tqdm(range(args.steps), desc="training", dynamic_ncols=True)
    for step in bar:
        # schedules
        tau = cosine(2.0, args.tau_end, step / (args.anneal * args.steps))
        optimizer.param_groups[0]["lr"] = cosine(args.lr, 0, step / args.steps)

        # forward: encoder -> scorer -> soft top-K -> noise gate -> denoiser -> frozen LLM
        images, captions = next(loader)
        inputs = vlm.inputs(images, [PROMPT] * args.batch, captions)
        loss, alpha = training_loss(vlm, scorer, denoiser, (mean_X, L), inputs, K, tau, args.gate, args.recipe)

        # backward: every gradient is the derivative of what ran above
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()

        # log
        if step % max(1, args.steps // 12) == 0 or step == args.steps - 1:
            kept = select(alpha.detach(), vlm.budget(K, alpha, inputs.get("valid")))
            top = alpha.detach().gather(1, kept.clamp_min(0))[kept >= 0]  # the alpha of what would be kept
            hardness = top.mean().item()  # must approach 1, or what is trained is not deployed
            curve.append({"step": step, "tau": tau, "loss": loss.item(), "hardness": hardness,
                          "deployed_loss": deployed_loss(vlm, scorer, held_out, K, args.batch)})
        bar.set_postfix(loss=f"{loss.item():.3f}", tau=f"{tau:.2f}", hard=f"{hardness:.2f}",
                        deployed=f"{curve[-1]['deployed_loss']:.3f}")
    if hardness < 0.9:
        print(f"warning: hardness {hardness:.2f} at the end: alpha is far from 0 and 1, so what was trained is not what "
              "is deployed; train longer or end at a lower --tau-end", file=sys.stderr)

    # save
    flags = {k: portable(v) if v and k in ("model", "data", "images", "questions") else v
             for k, v in vars(args).items() if k != "out"}
    settings = {"model": flags["model"], "width": vlm.width, "tokens": N, "keep": K, "parameters": count,
                "settings": flags, "curve": curve, "seconds": time.time() - start,
                "versions": {"python": platform.python_version(), "torch": torch.__version__,
                             "transformers": transformers.__version__}}
    write(args.out / "scorer.safetensors", scorer.state_dict())
    write(args.out / "denoiser.safetensors", {**denoiser.state_dict(), "whitening.mean": mean_X, "whitening.L": L})
    write(args.out / "pruner.json", rounded(settings))
    print(f"wrote {args.out}/", file=sys.stderr)

    # what it is worth, on questions that training never saw
    result = {"keep": K, "tokens": N, "seed": args.seed, "recipe": args.recipe, **curve[-1]}
    if questions:
        table = accuracy_table(vlm, scorer, questions, [K])
        full, ours = table[f"all {N}"], table[f"scorer {K}"]
        result |= {"accuracy_full": mean(full.values()), "accuracy": mean(ours.values()), "retention": retention(ours, full),
                   "retention_random": retention(table[f"random {K}"], full),
                   "retention_uniform": retention(table[f"uniform {K}"], full), "by_category": table}
    print(f'next: python infer.py IMAGE "QUESTION" --pruner {args.out} --show kept.png')
    print(json.dumps(rounded({**result, "seconds": time.time() - start})))


if __name__ == "__main__":
    cli(main)
