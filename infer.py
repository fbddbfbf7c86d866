"""
Ask a VLM about a picture, with only the tokens that the scorer keeps.

    python infer.py data/shapes/examples/00000.jpg "What color is the star?"
    python infer.py img.jpg "question" --keep 32 --show kept.png      # which tokens, as a picture
    python infer.py img.jpg "question" --keep all                     # the stock model, for comparison

The scores are cut at the K-th highest: what lies above stays, at its original position; the rest never reaches the LLM.
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file

from model import HERE, InputError, cli, load, read_image
from throttler import Scorer, select

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_pruner():
    """out/ where there is one, else the pruner that ships with the embedded default."""
    return Path("out") if Path("out/pruner.json").exists() else HERE / "data/shapes/pruner"


def load_pruner(folder):
    """(scorer, settings) from a folder that train.py wrote. InputError if a file is missing or does not fit."""
    folder = Path(folder)
    for name in ("pruner.json", "scorer.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: no such file; --pruner must be a folder that train.py wrote")
    try:
        settings = json.loads((folder / "pruner.json").read_text(encoding="utf-8"))
        scorer = Scorer(settings["width"])
        settings["model"], settings["keep"]  # needed later
        scorer.load_state_dict(load_file(folder / "scorer.safetensors"))
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as e:
        reason = " ".join(str(e).split())[:200]
        raise InputError(f"{folder}: scorer.safetensors and pruner.json do not fit together ({reason}); train again") from None
    return scorer.eval().requires_grad_(False), settings


def add_pruner_arguments(ap):
    """--pruner, --model, --device, --dtype: what load_pruned needs."""
    ap.add_argument("--pruner", type=Path, default=default_pruner(), help="folder with a trained pruner (%(default)s)")
    ap.add_argument("--model", help="folder or hub name of the VLM (default: the one that the pruner was trained on)")
    add_device_arguments(ap)


def add_device_arguments(ap):
    gpu = torch.cuda.is_available()
    ap.add_argument("--device", default="cuda" if gpu else "cpu", help="where to run (%(default)s)")
    ap.add_argument("--dtype", choices=DTYPES, default="bfloat16" if gpu else "float32",
                    help="number type of the frozen VLM (%(default)s)")


def load_pruned(args):
    """(vlm, scorer, settings) by those arguments. InputError if pruner and model do not fit together."""
    scorer, settings = load_pruner(args.pruner)
    name = args.model or settings["model"]
    print(f"model {name}, pruner {args.pruner}", file=sys.stderr)
    vlm = load(name, args.device, DTYPES[args.dtype])
    if vlm.width != settings["width"]:
        raise InputError(f"{args.pruner}: trained for features {settings['width']} wide, but {name} has {vlm.width}; "
                         "give the pruner of this model with --pruner, or its model with --model")
    return vlm, scorer.to(args.device), settings


class FirstToken:
    """A streamer for generate() that only notes when the first new token came."""

    def __init__(self):
        self.calls = []

    def put(self, value):  # called for the prompt, then for each token
        self.calls.append(time.perf_counter())

    def end(self):
        pass


def patches(indices, N, side, value=255):
    """A mask picture of `side` pixels: `value` on these of the N patches, 0 elsewhere."""
    mask = torch.zeros(N, dtype=torch.uint8)
    mask[indices] = value
    grid = math.isqrt(N)
    return Image.frombytes("L", (grid, grid), mask.numpy().tobytes()).resize((side, side), Image.Resampling.NEAREST)


def dimmed(image, keep, N, side=384):
    """The picture as the LLM gets it: kept patches clear, dropped ones dimmed."""
    image = image.resize((side, side), Image.Resampling.BICUBIC)
    pale = Image.blend(image, Image.new("RGB", image.size, "white"), 0.8)
    return Image.composite(image, pale, patches(keep, N, side))


def picture(image, scores, keep, X, side=384):
    """Three squares: what is kept; the top K in red and the bottom K in blue; cosine similarity of those 2K tokens.

    image: PIL, as the model saw it; scores (N,), keep (K,), X (N, d).
    """
    N, order = len(scores), scores.argsort(descending=True)
    top, bottom = order[:len(keep)], order[len(keep):][-len(keep):]
    colored = image.resize((side, side), Image.Resampling.BICUBIC)
    colored.paste((220, 30, 30), (0, 0), patches(top, N, side, 150))
    colored.paste((40, 70, 220), (0, 0), patches(bottom, N, side, 150))
    x = F.normalize(X[torch.cat([top, bottom])].float(), dim=-1)
    cosine = ((x @ x.T).clamp(0, 1) * 255).byte()  # (2K, 2K), kept tokens first
    matrix = Image.frombytes("L", cosine.shape, cosine.numpy().tobytes()).resize((side, side), Image.Resampling.NEAREST)
    matrix = ImageOps.colorize(matrix, (20, 10, 60), (250, 240, 160), mid=(210, 60, 80))
    sheet = Image.new("RGB", (3 * side + 40, side + 20), "white")
    for i, part in enumerate((dimmed(image, keep, N, side), colored, matrix)):
        sheet.paste(part, (10 + i * (side + 10), 10))
    return sheet


def seen_by_model(vlm, inputs):
    """The first picture of `inputs` after the processor's resize and crop, as a PIL image."""
    p = vlm.processor.image_processor
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (p.image_mean, p.image_std))
    pixels = ((inputs["pixel_values"][0].float().cpu() * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.frombytes("RGB", pixels.shape[:0:-1], pixels.permute(1, 2, 0).contiguous().numpy().tobytes())


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("image", help="a picture (JPEG, PNG, …)")
    ap.add_argument("question")
    ap.add_argument("--keep", help="how many visual tokens to keep, a share as 11.1%%, or 'all' "
                                   "(default: what the pruner was trained for)")
    add_pruner_arguments(ap)
    ap.add_argument("--max-new-tokens", type=int, default=64, metavar="T", help="length of the answer at most (%(default)s)")
    ap.add_argument("--show", type=Path, metavar="PNG", help="write a picture of what was kept")
    ap.add_argument("--json", action="store_true", help="last line: answer, kept, tokens and timings as JSON")
    args = ap.parse_args()

    image = read_image(args.image)
    vlm, scorer, settings = load_pruned(args)
    budget = args.keep or settings["keep"]
    vlm.budget(budget)  # wrong input ends here, before the work
    if args.show and vlm.tokens is None:
        raise InputError("--show: draws a square grid of patches, as LLaVA-1.5 has; leave it out for this model")
    inputs = vlm.inputs([image], [args.question])
    X = vlm.encode(inputs)  # (1, N, d_v)
    N, K = X.shape[1], vlm.budget(budget, X)
    X[0, 0, 0].item()  # waits for the encoder, so that the clock starts after it
    start = time.perf_counter()
    scores = scorer(X)  # (1, N)
    keep = select(scores, K)  # (1, K)
    kept = keep[0].tolist()  # waits for the device
    selected = time.perf_counter()
    clock = FirstToken()
    answer = vlm.generate(inputs, X, keep if K < N else None, args.max_new_tokens, streamer=clock)[0]
    select_ms, prefill_ms = 1000 * (selected - start), 1000 * (clock.calls[1] - selected)

    print(answer)
    print(f"kept {K} of {N} visual tokens; selection {select_ms:.1f} ms, prefill {prefill_ms:.1f} ms (one cold run)")
    if args.show:
        try:
            picture(seen_by_model(vlm, inputs), scores[0].cpu(), keep[0].cpu(), X[0].cpu()).save(args.show)
        except (OSError, ValueError) as e:
            raise InputError(f"--show {args.show}: cannot be written ({e}); give a .png in a folder that exists") from None
        print(f"wrote {args.show}")
    if args.json:
        print(json.dumps({"answer": answer, "kept": kept, "tokens": N, "selection_ms": round(select_ms, 3),
                          "prefill_ms": round(prefill_ms, 3)}))


if __name__ == "__main__":
    cli(main)
