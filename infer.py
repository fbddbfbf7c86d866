"""
Ask a VLM about a picture, with only the tokens that the scorer keeps.

    python infer.py data/shapes/examples/00000.jpg "What color is the star?"
    python infer.py img.jpg "question" --keep 32 --show kept.png      # which tokens, as a picture
    python infer.py img.jpg "question" --keep '~16'                   # 16 on average, more or fewer by the picture
    python infer.py img.jpg "question" --keep all                     # the stock model, for comparison
    python infer.py img.jpg                                           # many questions; the image is read once
    python infer.py --questions llava_pope_test.jsonl --images val2014/ --answers out.jsonl

--keep K keeps the K tokens of the image that score highest. --threshold T keeps what lies more than T standard
deviations above the image's mean score, and --keep ~K takes the T that train.py found to keep about K on average. They
stay at their original positions; the rest never reaches the LLM.
The last form answers a file in LLaVA's evaluation format, for its official scorers. A killed run is gone on with.
"""
import argparse
import copy
import hashlib
import inspect
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
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache, LlamaModel

from data.questions import answer_file, read_questions, score
from model import HERE, InputError, cli, load, read_image
from throttler import Scorer, count_above, select, standardised

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"  # until 5.23


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
        settings = {**json.loads((folder / "pruner.json").read_text(encoding="utf-8")), "file": folder / "pruner.json"}
        scorer = Scorer(settings["width"])
        settings["model"], settings["keep"]  # needed later
        if not all(math.isfinite(entry["threshold"]) for entry in settings.get("thresholds", {}).values()):
            raise ValueError("a threshold is no number")
        scorer.load_state_dict(load_file(folder / "scorer.safetensors"))
        for name, tensor in scorer.state_dict().items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} holds what is no number")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError, SafetensorError) as e:
        reason = " ".join(str(e).split())[:200]
        raise InputError(f"{folder}: scorer.safetensors and pruner.json do not fit together ({reason}); train again"
                         ) from None
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
    if vlm.processor is None:
        raise InputError(f"--model {name}: has random weights and no tokenizer; it is for bench.py speed")
    if vlm.width != settings["width"]:
        raise InputError(f"{args.pruner}: trained for features {settings['width']} wide, but {name} has {vlm.width}; "
                         "give the pruner of this model with --pruner, or its model with --model")
    return vlm, scorer.to(args.device).deploy(DTYPES[args.dtype]), settings


def chooser(vlm, scorer, settings, budget=None, T=None):
    """(choose, what it goes by): choose(X, inputs) -> keep (B, K), or None for all tokens.

    budget: a number, share, 'all' or '~K' (None: what the pruner was trained for); or T, a threshold. InputError for a
    budget that cannot be, or one that the pruner has no threshold for.
    """
    budget = settings["keep"] if budget is None else budget
    if T is None and str(budget).startswith("~"):
        known, made = settings.get("thresholds", {}), settings.get("file", "the pruner")
        if not known:
            raise InputError(f"--keep {budget}: {made} has no thresholds, since the run has not ended (train.py "
                             "--resume) or is older than they are; give --threshold or a whole number")
        if budget[1:] not in known:
            raise InputError(f"--keep {budget}: {made} has thresholds for {', '.join(f'~{K}' for K in known)}; "
                             "give one of these, --threshold, or a whole number")
        if "%" not in budget and vlm.tokens != settings.get("tokens"):
            raise InputError(f"--keep {budget}: was found for {settings.get('tokens')} visual tokens, but {vlm.name} "
                             f"has {vlm.tokens or 'a varying number'}; give --threshold or a whole number")
        T = known[budget[1:]]["threshold"]
    if T is None:
        budget = vlm.budget(budget)  # wrong input ends here, before the work
        if budget in ("all", vlm.tokens):
            return lambda X, inputs: None, {"keep": budget}

    def choose(X, inputs):
        valid = inputs.get("valid")
        scores = scorer(X, valid)  # (B, N)
        K = vlm.budget(budget, X, valid) if T is None else count_above(standardised(scores, valid), T)
        return select(scores, K)
    return choose, {"keep": budget} if T is None else {"threshold": T}


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


@torch.no_grad()
def ask(vlm, rows, choose, batch=16, max_new_tokens=128):
    """Answer the rows in batches of like length; yields [(row number, answer), …] batch by batch.

    choose(X, inputs) gives the tokens to keep, (B, K), or None for all. It never sees the question: an image that comes
    again within 16 batches is encoded and chosen from once.
    """
    with tqdm(total=len(rows), desc="questions", dynamic_ncols=True, leave=False) as bar:
        for start in range(0, len(rows), 16 * batch):
            window = sorted(range(start, min(start + 16 * batch, len(rows))), key=lambda i: len(rows[i]["text"]))
            seen = {}  # image: (its X, its keep)
            for part in (window[at:at + batch] for at in range(0, len(window), batch)):
                images = [rows[i]["image"] for i in part]
                pictures = [read_image(image) for image in images]
                new = {image: picture for image, picture in zip(images, pictures) if image not in seen}
                if new:
                    inputs = vlm.inputs(list(new.values()), ["?"] * len(new))
                    X = vlm.encode(inputs)  # (new, N, d_v)
                    keep = choose(X, inputs)
                    counts = inputs["valid"].sum(1) if "valid" in inputs else [X.shape[1]] * len(X)
                    seen |= {image: (X[j, :counts[j]], None if keep is None else keep[j][keep[j] >= 0])
                             for j, image in enumerate(new)}
                X, keep = zip(*(seen[image] for image in images))
                X = pad_sequence(X, batch_first=True)  # (B, N, d_v)
                keep = None if keep[0] is None else pad_sequence(keep, True, -1, "left")  # (B, K)
                inputs = vlm.inputs(pictures, [rows[i]["text"] for i in part])
                yield list(zip(part, vlm.generate(inputs, X, keep, max_new_tokens)))
                bar.update(len(part))


# --- one picture ----------------------------------------------------------------------------------------------------

@torch.no_grad()
def image_cache(vlm, inputs, X, keep=None):
    """Keys and values of the prompt up to the image's last token: the same for every question about the image."""
    after = inputs["input_ids"][0].flip(0).eq(vlm.image_id).int().argmax()  # text tokens behind the image
    sequence = vlm.embed(inputs, X, keep)
    length = sequence["attention_mask"].shape[1] - after
    prefix = {name: t[:, :length] if name == "inputs_embeds" else t[..., :length] for name, t in sequence.items()}
    cache = DynamicCache(config=vlm.model.config.text_config)
    vlm.model.model.language_model(**prefix, **{CACHE: cache})
    return cache


def timed_answer(vlm, inputs, X, keep, max_new_tokens, cache=None):
    """(answer, milliseconds to its first token); with a cache the image is not read again."""
    start, clock = time.perf_counter(), FirstToken()
    options = {} if cache is None else {CACHE: copy.deepcopy(cache)}
    answer = vlm.generate(inputs, X, keep, max_new_tokens, streamer=clock, **options)[0]
    return answer, 1000 * (clock.calls[1] - start)


def chat(vlm, image, X, keep, max_new_tokens):
    """Questions from the keyboard until Ctrl-D. Each stands for itself; all share the image's tokens and cache."""
    cache = image_cache(vlm, vlm.inputs([image], ["?"]), X, keep)
    full_ms = None
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if not question:
            continue
        inputs = vlm.inputs([image], [question])
        answer, ms = timed_answer(vlm, inputs, X, keep, max_new_tokens, cache)
        full_ms = full_ms or timed_answer(vlm, inputs, X, keep, 1)[1]  # once, to see what the cache saves
        print(f"{answer}\n(prefill {ms:.1f} ms; {full_ms:.1f} ms if the image were read again)")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("image", nargs="?", help="a picture (JPEG, PNG, …), or - for standard input")
    ap.add_argument("question", nargs="?", help="without it, a prompt for questions that ends on Ctrl-D")
    ap.add_argument("--keep", metavar="K", help="visual tokens to keep, a share as 11.1%%, or 'all' (default: the "
                    "pruner's); '~K': K on average, by the threshold that the pruner was calibrated with")
    ap.add_argument("--threshold", type=float, metavar="T", help="keep what scores more than T standard deviations "
                    "above the image's mean, at least one token (a negative one as --threshold=-1)")
    add_pruner_arguments(ap)
    ap.add_argument("--max-new-tokens", type=int, default=128, metavar="T", help="of an answer at most (%(default)s)")
    ap.add_argument("--show", type=Path, metavar="PNG", help="write a picture of what was kept")
    ap.add_argument("--json", action="store_true", help="last line: answer, kept, tokens and timings as JSON")
    ap.add_argument("--questions", type=Path, metavar="FILE", help="a question file instead of a picture")
    ap.add_argument("--images", metavar="DIR", help="folder of its images (default: the file's own)")
    ap.add_argument("--answers", type=Path, metavar="JSONL", help="the answers; an unfinished file is gone on with")
    ap.add_argument("--overwrite", action="store_true", help="begin --answers anew")
    ap.add_argument("--batch", type=int, default=16, help="questions at a time (%(default)s)")
    args = ap.parse_args()

    if (args.image is None) == (args.questions is None) or (args.questions is None) != (args.answers is None):
        raise InputError("give a picture, or --questions together with --answers")
    if args.threshold is not None and args.keep is not None:
        raise InputError("--keep and --threshold: both say how many tokens to keep; give one of them")
    if args.threshold is not None and not math.isfinite(args.threshold):
        raise InputError(f"--threshold {args.threshold}: must be a finite number, as 1.5")
    if min(args.batch, args.max_new_tokens) < 1:
        raise InputError("--batch and --max-new-tokens must be 1 or more")
    if args.questions and args.answers.exists() and args.answers.samefile(args.questions):
        raise InputError(f"--answers {args.answers}: is the question file; give another name")
    if args.questions:
        rows = read_questions(args.questions, args.images, need=("question_id", "image", "text"))
    elif "://" in args.image:
        raise InputError(f"{args.image}: pictures on the web are not read; download it and give the file")
    elif args.image == "-" and args.question is None:
        raise InputError("-: a picture from standard input needs its question on the command line")
    else:
        image = read_image(sys.stdin.buffer if args.image == "-" else args.image)
    vlm, scorer, settings = load_pruned(args)
    choose, by = chooser(vlm, scorer, settings, args.keep, args.threshold)
    if args.show and vlm.tokens is None:
        raise InputError("--show: draws a square grid of patches, as LLaVA-1.5 has; leave it out for this model")

    if args.questions:
        pruner = hashlib.sha256((args.pruner / "scorer.safetensors").read_bytes()).hexdigest()[:12]
        made = {"model": vlm.name, "pruner": pruner, **by, "dtype": args.dtype, "max_new_tokens": args.max_new_tokens}
        answer = lambda left: ask(vlm, left, choose, args.batch, args.max_new_tokens)
        try:
            said = answer_file(args.answers, rows, made, answer, args.overwrite)
        except OSError as e:
            raise InputError(f"--answers {args.answers}: {e.strerror or e}; give a file in a folder there is") from None
        table = score(rows, said) if all("label" in row for row in rows) else None
        return print(json.dumps({"questions": len(rows), "answers": str(args.answers), **made, "figures": table}))

    inputs = vlm.inputs([image], [args.question or "?"])
    X = vlm.encode(inputs)  # (1, N, d_v)
    X[0, 0, 0].item()  # waits for the encoder, so that the clock starts after it
    start, N = time.perf_counter(), X.shape[1]
    keep = choose(X, inputs)  # (1, K), or None
    kept = list(range(N)) if keep is None else keep[0].tolist()  # waits for the device
    select_ms = 1000 * (time.perf_counter() - start)
    if args.show:
        try:
            picture(seen_by_model(vlm, inputs), scorer(X)[0].cpu(), torch.tensor(kept), X[0].cpu()).save(args.show)
        except (OSError, ValueError) as e:
            raise InputError(f"--show {args.show}: cannot be written ({e}); give a .png in a folder there is") from None
        print(f"wrote {args.show}")
    if args.question is None:
        return chat(vlm, image, X, keep, args.max_new_tokens)
    answer, prefill_ms = timed_answer(vlm, inputs, X, keep, args.max_new_tokens)
    print(answer)
    print(f"kept {len(kept)} of {N} visual tokens; selection {select_ms:.1f} ms, prefill {prefill_ms:.1f} ms (cold)")
    if args.json:
        print(json.dumps({"answer": answer, "kept": kept, "tokens": N, "selection_ms": round(select_ms, 3),
                          "prefill_ms": round(prefill_ms, 3)}))


if __name__ == "__main__":
    cli(main)
