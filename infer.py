"""
Ask a VLM about a picture, with only the tokens that the scorer keeps.

    python infer.py data/shapes/examples/00000.jpg "What color is the star?"
    python infer.py img.jpg "question" --keep 32 --show kept.png      # which tokens, as a picture
    python infer.py img.jpg "question" --keep all                     # the stock model, for comparison
    python infer.py img.jpg                                           # many questions; the image is read once
    python infer.py --questions llava_pope_test.jsonl --images val2014/ --answers out.jsonl

The scores are cut at the K-th highest: what lies above stays, at its original position; the rest never reaches the LLM.
The last form answers a file in LLaVA's evaluation format, for its official scorers. A killed run is gone on with.
"""
import argparse
import base64
import copy
import csv
import hashlib
import inspect
import io
import itertools
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

from model import HERE, InputError, cli, load, read_image
from throttler import Scorer, select

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"  # until 5.23
LETTER = "\nAnswer with the option's letter from the given choices directly."  # LLaVA's suffix for multiple choice
LETTER_CN = "\n请直接回答选项字母。"  # … where the file's name has _cn


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
        for name, tensor in scorer.state_dict().items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} holds what is no number")
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as e:
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


# --- question files -------------------------------------------------------------------------------------------------

def read_questions(path, images=None, need=("image", "text", "label")):
    """Rows of a question file, `image` made a full path. InputError names the line that is wrong.

    One JSON object a line; or ScienceQA's list and MMBench's .tsv, turned into such rows as LLaVA turns them.
    """
    path = Path(path)
    folder = Path(images) if images else path.parent
    if not path.is_file():
        raise InputError(f"{path}: no such question file; check --questions")
    try:
        text = path.read_text(encoding="utf-8")
        lines = (science_qa(text) if text.startswith("[") else
                 mmbench(text, LETTER_CN if "_cn" in path.name else LETTER) if path.suffix == ".tsv" else
                 text.strip("\n").split("\n"))
    except (OSError, ValueError, LookupError, TypeError, csv.Error) as e:
        raise InputError(f"{path}: cannot be read ({e!r}); give a question file of LLaVA's, in UTF-8") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = {"category": "all", **(json.loads(line) if isinstance(line, str) else line)}
            row |= {field: row[field] for field in need} | {"category": str(row["category"])}
            if not isinstance(row["text"], str):
                raise TypeError("text is none")
            row["image"] = folder / row["image"] if isinstance(row["image"], str) else row["image"]
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{path}: line {number} needs {', '.join(need)} in one JSON object ({e!r})") from None
        if isinstance(row["image"], Path) and not row["image"].is_file():
            raise InputError(f"{path}: line {number}: no image {row['image']}; give its folder with --images")
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: holds no question; give LLaVA's format, one JSON object a line")
    return rows


def science_qa(text):
    """What has a picture in llava_test_CQM-A.json. Its scorer knows such questions by the <image> in the prompt."""
    rows = []
    for row in filter(lambda row: "image" in row, json.loads(text)):
        prompt = row["conversations"][0]["value"].replace("<image>", "").strip() + LETTER
        rows.append({"question_id": row["id"], "image": row["image"], "text": prompt, "prompt": "<image>\n" + prompt})
    return rows


def mmbench(text, suffix):
    """A table of hint, question, options and a picture in base64."""
    csv.field_size_limit(2 ** 31 - 1)
    rows = []
    for row in csv.DictReader(io.StringIO(text, newline=""), delimiter="\t"):
        row = {name: value for name, value in row.items() if (value or "").lower() not in ("", "nan", "none")}
        options = itertools.takewhile(row.__contains__, "ABCD")
        parts = [row[name] for name in ("hint", "question") if name in row] + [f"{c}. {row[c]}" for c in options]
        rows.append({"question_id": int(row["index"]), "image": base64.b64decode(row["image"]),
                     "text": "\n".join(parts) + suffix, "category": row.get("category", "all"),
                     **({"label": row["answer"]} if "answer" in row else {})})
    return rows


@torch.no_grad()
def ask(vlm, rows, choose, batch=16, max_new_tokens=128, desc="questions"):
    """Answer the rows in batches of like length; yields [(row number, answer), …] batch by batch.

    choose(X, inputs) gives the tokens to keep, (B, K), None for all, or (other tokens, keep). It never sees the
    question: an image that comes again within 16 batches is encoded and chosen from once.
    """
    with tqdm(total=len(rows), desc=desc, dynamic_ncols=True, leave=False) as bar:
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
                    X, keep = keep if isinstance(keep, tuple) else (X, keep)
                    counts = inputs["valid"].sum(1) if "valid" in inputs else [X.shape[1]] * len(X)
                    seen |= {image: (X[j, :counts[j]], None if keep is None else keep[j][keep[j] >= 0])
                             for j, image in enumerate(new)}
                X, keep = zip(*(seen[image] for image in images))
                X = pad_sequence(X, batch_first=True)  # (B, N, d_v)
                keep = None if keep[0] is None else pad_sequence(keep, True, -1, "left")  # (B, K)
                inputs = vlm.inputs(pictures, [rows[i]["text"] for i in part])
                yield list(zip(part, vlm.generate(inputs, X, keep, max_new_tokens)))
                bar.update(len(part))


def answer_file(path, rows, settings, answer, overwrite=False):
    """The answers to the rows, in their order, and in the file `path`; answer(rows) yields as ask() does.

    Each batch is appended as it comes, and the whole put in order at the end. An answer_id stands for settings and
    question: the file of a killed run is gone on with, and one that was made otherwise refused.
    """
    def store(answers):
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in answers), encoding="utf-8")
        temporary.replace(path)

    ids = [hashlib.sha256(json.dumps([settings, i, row["question_id"], row["text"]]).encode()).hexdigest()[:22]
           for i, row in enumerate(rows)]
    done = {}
    if path.exists() and not overwrite:
        try:
            *lines, rest = path.read_text(encoding="utf-8").split("\n")  # rest: a line that a kill cut off, or nothing
            done = {row["answer_id"]: row for row in map(json.loads, lines)}
            if not '{"question_id"'.startswith(rest[:14]):
                raise ValueError(rest)
        except (ValueError, KeyError, TypeError):
            raise InputError(f"--answers {path}: is no answer file; give another name, or --overwrite it") from None
        if not done.keys() <= set(ids):
            raise InputError(f"--answers {path}: answers other questions, or was made with other settings ({settings} "
                             f"now, {done.popitem()[1].get('metadata')} then); give another name, or --overwrite it")
        print(f"{path}: {len(done)} of {len(rows)} answers are there", file=sys.stderr)
    store(done.values())
    left = [i for i, id in enumerate(ids) if id not in done]
    with open(path, "a", encoding="utf-8") as file:
        for part in answer([rows[i] for i in left]):
            for i, text in ((left[j], text) for j, text in part):
                done[ids[i]] = {"question_id": rows[i]["question_id"], "prompt": rows[i].get("prompt", rows[i]["text"]),
                                "text": text, "answer_id": ids[i], "model_id": settings["model"], "metadata": settings}
                file.write(json.dumps(done[ids[i]]) + "\n")
            file.flush()
    store(done[id] for id in ids)
    return [done[id]["text"] for id in ids]


def normal(text):
    return str(text).strip().lower().removesuffix(".")


def figures(said, labels, yes_no=False):
    """Accuracy of these answers; with yes_no POPE's five figures, counted as LLaVA's eval_pope.py counts."""
    if not yes_no:
        return {"accuracy": sum(normal(s) == normal(label) for s, label in zip(said, labels)) / len(said)}
    yes = [not {"No", "no", "not"} & set(s.split(".")[0].replace(",", "").split(" ")) for s in said]
    true = [normal(label) == "yes" for label in labels]
    TP = sum(y and t for y, t in zip(yes, true))
    precision, recall = TP / max(1, sum(yes)), TP / max(1, sum(true))
    return {"accuracy": sum(y == t for y, t in zip(yes, true)) / len(said), "precision": precision, "recall": recall,
            "f1": 2 * TP / max(1, sum(yes) + sum(true)), "yes": sum(yes) / len(said)}


def score(rows, said):
    """Print and return the figures per category and of all rows."""
    yes_no = {normal(row["label"]) for row in rows} <= {"yes", "no"}
    table = {}
    for category in [*sorted({row["category"] for row in rows} - {"all"}), "all"]:
        mine = [(text, row["label"]) for text, row in zip(said, rows) if category in (row["category"], "all")]
        table[category] = figures(*zip(*mine), yes_no)
    print(f"{'category':24}" + "".join(f"{name:>11}" for name in table["all"]))
    for category, values in table.items():
        print(f"{category:24}" + "".join(f"{100 * v:11.1f}" for v in values.values()))
    return table


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
    ap.add_argument("--keep", help="visual tokens to keep, a share as 11.1%%, or 'all' (default: the pruner's)")
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
    budget = vlm.budget(args.keep or settings["keep"])  # wrong input ends here, before the work
    if args.show and vlm.tokens is None:
        raise InputError("--show: draws a square grid of patches, as LLaVA-1.5 has; leave it out for this model")

    if args.questions:
        pruner = hashlib.sha256((args.pruner / "scorer.safetensors").read_bytes()).hexdigest()[:12]
        made = {"model": vlm.name, "pruner": pruner, "keep": budget, "dtype": args.dtype,
                "max_new_tokens": args.max_new_tokens}

        def choose(X, inputs):
            valid = inputs.get("valid")
            return select(scorer(X, valid), vlm.budget(budget, X, valid)) if budget != vlm.tokens else None
        answer = lambda left: ask(vlm, left, choose, args.batch, args.max_new_tokens)
        try:
            said = answer_file(args.answers, rows, made, answer, args.overwrite)
        except OSError as e:
            raise InputError(f"--answers {args.answers}: {e.strerror or e}; give a file in a folder there is") from None
        table = score(rows, said) if all("label" in row for row in rows) else None
        return print(json.dumps({"questions": len(rows), "answers": str(args.answers), **made, "figures": table}))

    inputs = vlm.inputs([image], [args.question or "?"])
    X = vlm.encode(inputs)  # (1, N, d_v)
    N, K = X.shape[1], vlm.budget(budget, X)
    X[0, 0, 0].item()  # waits for the encoder, so that the clock starts after it
    start = time.perf_counter()
    scores = scorer(X)  # (1, N)
    keep = select(scores, K)  # (1, K)
    kept = keep[0].tolist()  # waits for the device
    select_ms = 1000 * (time.perf_counter() - start)
    if args.show:
        try:
            picture(seen_by_model(vlm, inputs), scores[0].cpu(), keep[0].cpu(), X[0].cpu()).save(args.show)
        except (OSError, ValueError) as e:
            raise InputError(f"--show {args.show}: cannot be written ({e}); give a .png in a folder there is") from None
        print(f"wrote {args.show}")
    keep = keep if K < N else None
    if args.question is None:
        return chat(vlm, image, X, keep, args.max_new_tokens)
    answer, prefill_ms = timed_answer(vlm, inputs, X, keep, args.max_new_tokens)
    print(answer)
    print(f"kept {K} of {N} visual tokens; selection {select_ms:.1f} ms, prefill {prefill_ms:.1f} ms (cold)")
    if args.json:
        print(json.dumps({"answer": answer, "kept": kept, "tokens": N, "selection_ms": round(select_ms, 3),
                          "prefill_ms": round(prefill_ms, 3)}))


if __name__ == "__main__":
    cli(main)
