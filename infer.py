"""
Ask a VLM about a picture, with only the tokens that a pruner keeps.

    python infer.py data/shapes/examples/00000.jpg "What color is the star?"
    python infer.py img.jpg "question" --keep 32 --show kept.png  # which tokens, as a picture
    python infer.py img.jpg "question" --keep '~16'               # 16 on average, by the picture
    python infer.py img.jpg                                       # one question after another
    python infer.py --questions llava_pope_test.jsonl --images val2014/ --answers out.jsonl

A model that has no pruner yet, by a choice that needs no training:

    python infer.py img.jpg "question" --model llava-hf/llava-1.5-7b-hf --choose diversity

The kept tokens stay at their original positions; the rest never reaches the LLM. --keep K keeps the
K tokens that score high and say what no better one says, or with --choose top the K highest. --keep
~K keeps as many as rank above the threshold by which the held-out images of the training keep K on
average. --choose diversity, coverage, DPP, uniform (where the tokens are a square grid), CLS (for
CLIP), norm and random learn nothing, and need no pruner.

A question file is answered in LLaVA's evaluation format, for its official scorers (POPE's labels
are in github.com/AoiDragon/POPE, output/coco). A killed run resumes.
"""
import argparse
import json
import math
import sys
import timeit
from pathlib import Path

import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common.budget import Budget
from common.criteria import UNTRAINED
from common.files import InputError, check_place, cli, portable, write
from common.graphs import CACHE, Graphs
from common.pruner import (RANKINGS, check_average, chooser, default_pruner, fingerprint,
                           load_pruner)
from data.pictures import read_image, seen_by_model, sheet
from data.questions import answer_file, read_questions, score
from model import DTYPES, add_device_arguments, load, number_type

SOFTWARE = 0x0131  # EXIF's field for the program that drew a picture


# --- arguments that other scripts have, too -------------------------------------------------------

def add_pruner_arguments(parser):
    """--pruner, --model, --choose, --device, --dtype: what load_pruned needs."""
    add = parser.add_argument
    add("--pruner", type=Path, metavar="DIR",
        help="folder with a trained pruner, or none (default: one for this model: ./out once its "
        "training is finished, else the one that ships with this code)")
    add("--model", help="folder or hub name of the VLM (default: that of the pruner)")
    add("--choose", choices=[*RANKINGS, *UNTRAINED],
        help="what is kept. By a pruner: distinct (score less likeness to better tokens) or top "
        "(score alone). The others need none (default: as the pruner was trained, else diversity)")
    add_device_arguments(parser)


def add_choice_arguments(parser):
    """--keep, --threshold."""
    add = parser.add_argument_group("how many are kept").add_argument
    add("--keep", metavar="K",
        help="visual tokens to keep: a number, a share as 11.1%%, or all; ~16 or ~11.1%% is that "
        "many on average (default: as the pruner was trained; without a pruner 11.1%%)")
    add("--threshold", type=float, metavar="T",
        help="keep as many tokens as rank more than T standard deviations of the scores above the "
        "image's mean, at least one (a negative T as --threshold=-1)")


def add_question_arguments(parser, batch=16):
    """--questions, --images, --answers, --overwrite, --batch: what answer_questions needs."""
    add = parser.add_argument_group("question files").add_argument
    add("--questions", type=Path, metavar="JSONL", help="a question file instead of a picture")
    add("--images", metavar="DIR", help="folder of its pictures (default: the file's own)")
    add("--answers", type=Path, metavar="JSONL",
        help="file for the answers; if it is unfinished, it is continued")
    add("--overwrite", action="store_true", help="replace the file that --answers or --show names")
    add("--batch", type=int, default=batch, metavar="N",
        help="questions at a time (default: %(default)s)")


def load_pruned(args, budgets=(), T=None):
    """(vlm, scorer, settings) by those arguments; scorer is None where a criterion chooses.

    Never the pruner of another model, unless --pruner names it. InputError if they do not fit each
    other, or a budget or threshold T, which is found before the model is loaded.
    """
    folder, why = args.pruner, "by --pruner"
    without = str(folder) == "none"
    if without or folder is None:
        folder, why = default_pruner(args.model and portable(args.model))
    scorer, settings = None, {"keep": "11.1%"}
    if folder:
        scorer, settings = load_pruner(folder)
    name = args.model or settings.get("model")
    if not name:
        raise InputError("--model: is empty, and no pruner names one; give a folder or a hub name")
    if name.startswith("random:"):
        raise InputError(f"--model {name}: has random weights and no tokenizer; it is for bench.py")

    if without or args.choose in UNTRAINED or scorer is None:
        if args.choose in RANKINGS:
            raise InputError(f"--choose {args.choose}: needs a pruner, and there is none for "
                             f"{name}; train one, give its folder with --pruner, or choose by "
                             + ", ".join(UNTRAINED))
        scorer, settings["choose"] = None, args.choose or "diversity"
        if without:
            settings["keep"] = "11.1%"  # not what that pruner was trained for
        until = "" if args.choose else ", until one is trained by train.py (or given by --pruner)"
        print(f"model {name}, no pruner: {settings['choose']} chooses{until}", file=sys.stderr)
    else:
        print(f"model {name}, pruner {portable(folder)} ({why})", file=sys.stderr)
        if portable(name) != settings["model"]:
            print(f"warning: this pruner was trained for {settings['model']}; of another model's "
                  "tokens it knows nothing", file=sys.stderr)

    for budget in budgets:
        check_average(budget, T, args.choose or settings["choose"], settings)
    vlm = load(name, args.device, DTYPES[number_type(args)])
    if scorer:
        if vlm.width != settings["width"]:
            raise InputError(f"{folder}: trained for features {settings['width']} wide, but {name} "
                             f"has {vlm.width}; give the pruner of this model with --pruner, or "
                             "its model with --model")
        scorer.to(vlm.model.device)
        if vlm.model.device.type != "cpu":
            scorer.to(vlm.model.dtype)  # half precision is fast on a GPU alone
    return vlm, scorer, settings


# --- many questions -------------------------------------------------------------------------------

def look_at(vlm, rows, choose, seen):
    """Add the rows' images to `seen`: {image: (picture, its X (N, d_v), its keep (K,) or None)}."""
    new = list(dict.fromkeys(row["image"] for row in rows if row["image"] not in seen))
    if not new:
        return
    pictures = [read_image(image, vlm.processor.image_processor) for image in new]
    inputs = vlm.inputs(pictures, ["?"] * len(new))
    X = vlm.encode(inputs)  # (new, N, d_v)
    keep = choose(X, inputs)  # (new, K), or None
    for i, image in enumerate(new):
        x, kept = X[i], None
        if "valid" in inputs:
            x = x[inputs["valid"][i]]
        if keep is not None:
            kept = keep[i][keep[i] >= 0]
        seen[image] = pictures[i], x, kept


@torch.no_grad()
def ask(vlm, rows, choose, batch=16, max_new_tokens=128):
    """Answer the rows in batches of like length; yields [(row number, answer), …] batch by batch.

    choose(X, inputs) gives the tokens to keep, (B, K), or None for all. It never sees the question:
    an image that comes again within 4 batches is read, encoded and chosen from once.
    """
    with tqdm(total=len(rows), desc="questions", dynamic_ncols=True, leave=False) as bar:
        for start in range(0, len(rows), 4 * batch):
            window = range(len(rows))[start:start + 4 * batch]
            window = sorted(window, key=lambda i: len(rows[i]["text"]))
            seen = {}
            for at in range(0, len(window), batch):
                numbers = window[at:at + batch]
                part = [rows[i] for i in numbers]
                look_at(vlm, part, choose, seen)
                pictures, X, keep = zip(*(seen[row["image"]] for row in part))
                X = pad_sequence(X, batch_first=True)  # (B, N, d_v)
                keep = None if keep[0] is None else pad_sequence(keep, True, -1, "left")  # (B, K)
                inputs = vlm.inputs(list(pictures), [row["text"] for row in part])
                answers = vlm.generate(inputs, X, keep, max_new_tokens)
                yield list(zip(numbers, answers))
                bar.update(len(part))


def answer_questions(args, vlm, rows, choose, by, scorer):
    """Answer the rows of a question file, and print the figures if they have labels."""
    def answer(left):
        return ask(vlm, left, choose, args.batch, args.max_new_tokens)

    for row in rows:
        vlm.check_text(row["text"], row["where"])
    pruner = fingerprint(scorer) if scorer else "none"
    conditions = {"model": portable(vlm.name), "weights": fingerprint(vlm.model), "pruner": pruner,
                  **by, "dtype": args.dtype, "max_new_tokens": args.max_new_tokens}
    answers = answer_file(args.answers, rows, conditions, answer, args.overwrite)
    figures = score(rows, answers)
    print(f"{len(rows)} answers are in {args.answers}")
    if args.json:
        print(json.dumps({"questions": len(rows), "answers": str(args.answers), **conditions,
                          "figures": figures}))


# --- one picture ----------------------------------------------------------------------------------

def milliseconds(f):
    """How long f() takes, the shorter of two tries."""
    return 1000 * min(timeit.repeat(f, number=1, repeat=2))


@torch.no_grad()
def prefill_cost(vlm, inputs, X, keep=None):
    """(bytes, FLOPs) of reading a prompt: its KV cache, and the LLM's work to the first logits.

    As torch counts it, two FLOPs a multiply-add, with attention as plain matrix products: of its
    fused forms torch does not count all.
    """
    counter = FlopCounterMode(display=False)
    with vlm.prepared(vlm.embed(inputs, X, keep)) as given:
        with counter, sdpa_kernel(SDPBackend.MATH):
            cache = vlm.model(**given, use_cache=True, logits_to_keep=1)[CACHE]
    size = 0
    for layer in cache.layers:
        if hasattr(layer, "keys"):  # a recurrent layer has none
            size += layer.keys.nbytes + layer.values.nbytes
    return size, counter.get_total_flops()


def chat(vlm, image, X, keep, max_new_tokens):
    """Questions until the input ends. Each stands for itself; the picture is encoded once."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 is refused as a question
    prompt = "> " if sys.stdin and sys.stdin.isatty() else ""
    while True:
        try:
            question = input(prompt).strip()
        except (EOFError, KeyboardInterrupt, RuntimeError):  # the last if standard input is closed
            return
        if not question:
            continue
        try:
            inputs = vlm.inputs([image], [question])
        except InputError as e:
            print("error:", e, file=sys.stderr)
            continue
        answer, = vlm.generate(inputs, X, keep, max_new_tokens)
        print(answer, flush=True)


def draw(args, vlm, inputs, image, X, kept, scorer, answers):
    """Write the sheet of --show."""
    picture = seen_by_model(vlm, inputs, image)
    scores = scorer(X)[0].float().cpu() if scorer else None
    boxes = vlm.boxes(inputs)  # (N, 4)
    paper = sheet(picture, boxes, scores, torch.tensor(kept), X[0].cpu(), args.question, answers)
    mark = Image.Exif()
    mark[SOFTWARE] = "diffprune"
    write(args.show, paper, {"exif": mark})
    print(f"wrote {args.show}")


@torch.no_grad()
def answer_one(args, vlm, image, choose, scorer):
    """Answer the question about one picture, or all that are asked about it."""
    vlm.check_text(args.question or "", "the question")
    try:
        inputs = vlm.inputs([image], [args.question or "?"])
    except InputError as e:
        raise InputError(f"{args.image}: {e}") from None
    X = vlm.encode(inputs)  # (1, N, d_v)
    N = X.shape[1]
    keep = choose(X, inputs)  # (1, K), or None
    kept = list(range(N)) if keep is None else keep[0].tolist()
    if args.question is None:
        print(f"kept {len(kept)} of {N} visual tokens", flush=True)
        return chat(vlm, image, X, keep, args.max_new_tokens)

    if args.show:
        vlm.boxes(inputs)  # where it is not known, nobody need wait for the answer
    answer, = vlm.generate(inputs, X, keep, args.max_new_tokens)
    print(answer, flush=True)
    if args.show:
        full_answer, = vlm.generate(inputs, X, None, args.max_new_tokens)
        draw(args, vlm, inputs, image, X, kept, scorer, (full_answer, answer))
    # each with the kept tokens, and with all
    cache, flops = zip(prefill_cost(vlm, inputs, X, keep), prefill_cost(vlm, inputs, X))
    ms = (milliseconds(lambda: vlm.generate(inputs, X, choose(X, inputs), 1)),
          milliseconds(lambda: vlm.generate(inputs, X, None, 1)))
    print(f"kept {len(kept)} of {N} visual tokens")
    print(f"reading the prompt: {flops[0] / 1e9:,.2f} GFLOP instead of {flops[1] / 1e9:,.2f}, "
          f"{ms[0]:.0f} ms with the choice instead of {ms[1]:.0f}, "
          f"KV cache {cache[0] / 1e6:,.2f} MB instead of {cache[1] / 1e6:,.2f}")
    if args.json:
        print(json.dumps({"answer": answer, "kept": kept, "tokens": N, "cache_bytes": cache,
                          "prefill_flops": flops, "prefill_ms": ms}))


# --- the script -----------------------------------------------------------------------------------

def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("image", nargs="?", help="a picture (JPEG, PNG, …), or - for standard input")
    add("question", nargs="?", help="without it, a prompt for questions that ends on Ctrl-D")
    add_choice_arguments(parser)
    add_pruner_arguments(parser.add_argument_group("pruner and model"))
    add = parser.add_argument_group("output").add_argument
    add("--max-new-tokens", type=int, default=128, metavar="N",
        help="tokens of an answer (default: %(default)s)")
    add("--show", type=Path, metavar="PNG",
        help="draw what was kept (LLaVA-1.5, LLaVA-NeXT, Qwens), with the answers by all and by "
        "the kept tokens")
    add("--json", action="store_true", help="print the results as JSON on the last line")
    add("--graphs", action="store_true",
        help="replay CUDA graphs, so that the GPU does not wait for Python (a CPU takes the same "
        "steps)")
    add_question_arguments(parser)
    return parser.parse_args()


def check_inference(args):
    """The Budget of --keep, or None. InputError for arguments that are wrong, or so together."""
    one, many = args.image is not None, args.questions is not None
    if one == many or many != (args.answers is not None):
        raise InputError("give a picture, or --questions together with --answers")
    if args.threshold is not None and (args.keep or not math.isfinite(args.threshold)):
        raise InputError(f"--threshold {args.threshold}: must be finite, and without --keep")
    check_questions(args)
    if args.image == "-" and not (args.question and sys.stdin):
        raise InputError("-: a picture from standard input needs its question on the command line")
    if args.question is not None and not args.question.strip():
        raise InputError("the question is empty; leave it out to be asked for questions")
    if args.show:
        if not args.question:
            raise InputError(f"--show {args.show}: draws the answers to one question; give a "
                             "picture and a question")
        check_place("--show", args.show, args.image, (".png", ".jpg"))
        if args.show.exists() and not (args.overwrite or drawn_here(args.show)):
            raise InputError(f"--show {args.show}: is there, and was not drawn by infer.py; give "
                             "another name, or --overwrite it")
    try:
        return Budget.parse(args.keep) if args.keep else None
    except ValueError as e:
        raise InputError(f"--keep {e}") from None


def check_questions(args):
    """InputError for counts that cannot be, and where --answers may not be written."""
    if min(args.batch, args.max_new_tokens) < 1:
        raise InputError("--batch and --max-new-tokens must be 1 or more")
    if args.answers:
        check_place("--answers", args.answers, args.questions, (".jsonl",))


def drawn_here(path):
    """Whether --show drew this file."""
    try:
        with Image.open(path) as picture:
            return picture.getexif().get(SOFTWARE) == "diffprune"
    except Exception:  # a decoder may fail in any way
        return False


def main():
    args = parse_arguments()
    budget = check_inference(args)
    if args.questions:
        rows = read_questions(args.questions, args.images, need=("question_id", "image", "text"))
    else:
        image = read_image(sys.stdin.buffer if args.image == "-" else args.image)
    vlm, scorer, settings = load_pruned(args, [budget], args.threshold)
    if args.graphs:
        vlm = Graphs(vlm)
    choose, by = chooser(vlm, scorer, settings, budget, args.threshold, args.choose)
    if args.questions:
        answer_questions(args, vlm, rows, choose, by, scorer)
    else:
        answer_one(args, vlm, image, choose, scorer)


if __name__ == "__main__":
    cli(main)
