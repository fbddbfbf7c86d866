"""
Ask a VLM about a picture, with only the tokens that the scorer keeps.

    python infer.py data/shapes/examples/00000.jpg "What color is the star?"
    python infer.py img.jpg "question" --keep 32 --show kept.png      # which tokens, as a picture
    python infer.py img.jpg "question" --keep '~16'                   # 16 on average, more or fewer by the picture
    python infer.py img.jpg                                           # many questions; the image is read once
    python infer.py --questions llava_pope_test.jsonl --images val2014/ --answers out.jsonl

The kept tokens stay at their original positions; the rest never reaches the LLM. --keep K keeps the K
tokens that score high and say what no better one says, or with --choose top the K highest. --keep ~K keeps as many as score above the threshold by
which the held-out images of the training keep K on average.
The last form answers a file in LLaVA's evaluation format, for its official scorers. A killed run resumes.
"""
import argparse
import copy
import inspect
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache, LlamaModel

from common.budget import Budget
from common.files import InputError, cli, portable, write
from data.pictures import read_image, seen_by_model, sheet
from common.pruner import RANKINGS, chooser, default_pruner, fingerprint, load_pruner
from data.questions import answer_file, read_questions, score
from model import DTYPES, add_device_arguments, load, number_type, take

CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"  # until 5.23


def add_pruner_arguments(parser):
    """--pruner, --model, --device, --dtype: what load_pruned needs."""
    parser.add_argument("--pruner", type=Path, metavar="DIR", help="folder with a trained pruner (default: ./out once "
                        "its training is finished, else the one that ships with this code)")
    parser.add_argument("--model", help="folder or hub name of the VLM (default: the one it was trained for)")
    add_device_arguments(parser)


def add_choice_arguments(parser):
    """--keep, --threshold, --choose."""
    add = parser.add_argument_group("what is kept").add_argument
    add("--keep", metavar="K", help="visual tokens to keep: a number, a share as 11.1%%, or all; ~16 or ~11.1%% is "
        "that many on average (default: as the pruner was trained)")
    add("--threshold", type=float, metavar="T", help="keep as many tokens as score more than T standard "
        "deviations above the image's mean, at least one (a negative T as --threshold=-1)")
    add("--choose", choices=RANKINGS, help="by score less likeness to better tokens, or by score alone "
        "(default: as the pruner was trained)")


def add_question_arguments(parser, batch=16, required=False):
    """--questions, --images, --answers, --overwrite, --batch: what answer_questions needs."""
    add = parser.add_argument_group("question files").add_argument
    add("--questions", type=Path, metavar="JSONL", required=required, help="a question file instead of a picture")
    add("--images", metavar="DIR", help="folder of its pictures (default: the file's own)")
    add("--answers", type=Path, metavar="JSONL", required=required,
        help="file for the answers; if it is unfinished, it is continued")
    add("--overwrite", action="store_true", help="begin --answers anew")
    add("--batch", type=int, default=batch, metavar="N", help="questions at a time (default: %(default)s)")


def load_pruned(args, kind=None):
    """(vlm, scorer, settings) by those arguments; kind: a class in place of load(). InputError if they do not fit."""
    folder, why = (args.pruner, "by --pruner") if args.pruner else default_pruner()
    scorer, settings = load_pruner(folder)
    name = args.model or settings["model"]
    print(f"model {name}, pruner {args.pruner or portable(folder)} ({why})", file=sys.stderr)
    if portable(name) != settings["model"]:
        print(f"warning: this pruner was trained for {settings['model']}; of another model's tokens it knows nothing",
              file=sys.stderr)
    vlm = (kind or load)(name, args.device, DTYPES[number_type(args)])
    if vlm.processor is None:
        raise InputError(f"--model {name}: has random weights and no tokenizer; it is for bench.py speed")
    if vlm.width != settings["width"]:
        raise InputError(f"{folder}: trained for features {settings['width']} wide, but {name} has {vlm.width}; give "
                         "the pruner of this model with --pruner, or its model with --model")
    return vlm, scorer.to(vlm.model.device), settings


@torch.no_grad()
def ask(vlm, rows, choose, batch=16, max_new_tokens=128):
    """Answer the rows in batches of like length; yields [(row number, answer), …] batch by batch.

    choose(X, inputs) gives the tokens to keep, (B, K), or None for all. It never sees the question: an image that comes
    again within 16 batches is read, encoded and chosen from once.
    """
    with tqdm(total=len(rows), desc="questions", dynamic_ncols=True, leave=False) as bar:
        for start in range(0, len(rows), 16 * batch):
            window = sorted(range(start, min(start + 16 * batch, len(rows))), key=lambda i: len(rows[i]["text"]))
            seen = {}  # image: (picture, its X, its keep)
            for at in range(0, len(window), batch):
                part = window[at:at + batch]
                new = list(dict.fromkeys(rows[i]["image"] for i in part if rows[i]["image"] not in seen))
                if new:
                    pictures = [read_image(image, vlm.processor.image_processor) for image in new]
                    inputs = vlm.inputs(pictures, ["?"] * len(new))
                    X, valid = vlm.encode(inputs), inputs.get("valid")  # (new, N, d_v)
                    keep = choose(X, inputs)
                    for j, image in enumerate(new):
                        real = X[j] if valid is None else X[j, valid[j]]
                        seen[image] = pictures[j], real, None if keep is None else keep[j][keep[j] >= 0]
                pictures, X, keep = zip(*(seen[rows[i]["image"]] for i in part))
                X = pad_sequence(X, batch_first=True)  # (B, N, d_v)
                keep = None if keep[0] is None else pad_sequence(keep, True, -1, "left")  # (B, K)
                inputs = vlm.inputs(list(pictures), [rows[i]["text"] for i in part])
                yield list(zip(part, vlm.generate(inputs, X, keep, max_new_tokens)))
                bar.update(len(part))


@torch.no_grad()
def image_cache(vlm, inputs, X, keep=None):
    """Keys and values of the prompt up to the image's last token: the same for every question about it.

    None where they are not: the image's tokens look ahead at the question (PaliGemma), or a recurrent
    layer reads.
    """
    after = inputs["input_ids"][0].flip(0).eq(vlm.image_id).int().argmax()  # text tokens behind the image
    sequence = vlm.embed(inputs, X, keep)
    told = sequence.pop("told", {})
    before = torch.arange(sequence["attention_mask"].shape[1] - after, device=X.device)[None]  # (1, L'')
    mask = told.get("attention_mask")
    looks_ahead = torch.is_tensor(mask) and mask[..., before[0], before.shape[1]:].any()
    if looks_ahead or not vlm.exact:
        return None
    sequence.pop("input_ids", None)
    prefix = {name: take(value, name, before) for name, value in (sequence | told).items()}
    cache = DynamicCache(config=vlm.model.config.get_text_config(decoder=True))
    vlm.decoder(**prefix, **{CACHE: cache})
    return cache


def answer_to(vlm, inputs, X, keep, max_new_tokens, cache=None):
    """The answer to one question; with a cache the image is not read again."""
    options = {} if cache is None else {CACHE: copy.deepcopy(cache)}
    return vlm.generate(inputs, X, keep, max_new_tokens, **options)[0]


def prefill_ms(*question):
    """How long the first token of an answer takes: the shortest of three tries; after a second no more are made."""
    times = []
    while len(times) < 3 and max(times, default=0) < 1000:
        start = time.perf_counter()
        answer_to(*question)
        times.append(1000 * (time.perf_counter() - start))
    return min(times)


def chat(vlm, image, X, keep, max_new_tokens):
    """Questions until the input ends. Each stands for itself; all share the image's tokens and cache."""
    cache, all_ms = image_cache(vlm, vlm.inputs([image], ["?"]), X, keep), None
    prompt = "> " if sys.stdin and sys.stdin.isatty() else ""
    while True:
        try:
            question = input(prompt).strip()
        except (EOFError, KeyboardInterrupt, RuntimeError):  # the last where standard input is closed
            return
        if not question:
            continue
        try:
            inputs = vlm.inputs([image], [question])
        except InputError as e:
            print("error:", e, file=sys.stderr)
            continue
        print(answer_to(vlm, inputs, X, keep, max_new_tokens, cache))
        ms, all_ms = prefill_ms(vlm, inputs, X, keep, 1, cache), all_ms or prefill_ms(vlm, inputs, X, None, 1)
        print(f"(prefill {ms:.0f} ms, cached; all {X.shape[1]} tokens, not cached: {all_ms:.0f} ms)", flush=True)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", help="a picture (JPEG, PNG, …), or - for standard input")
    parser.add_argument("question", nargs="?", help="without it, a prompt for questions that ends on Ctrl-D")
    add_choice_arguments(parser)
    add_pruner_arguments(parser.add_argument_group("pruner and model"))
    add = parser.add_argument_group("output").add_argument
    add("--max-new-tokens", type=int, default=128, metavar="N", help="tokens of an answer (default: %(default)s)")
    add("--show", type=Path, metavar="PNG", help="draw what was kept, with the answers by all and by the kept tokens")
    add("--json", action="store_true", help="print the results as JSON on the last line")
    add_question_arguments(parser)
    return parser.parse_args()


def check_inference(args):
    """The Budget of --keep, or None. InputError for arguments that are wrong or do not go together."""
    if (args.image is None) == (args.questions is None) or (args.questions is None) != (args.answers is None):
        raise InputError("give a picture, or --questions together with --answers")
    if args.threshold is not None and (args.keep or not math.isfinite(args.threshold)):
        raise InputError(f"--threshold {args.threshold}: must be a finite number; give it without --keep")
    if min(args.batch, args.max_new_tokens) < 1:
        raise InputError("--batch and --max-new-tokens must be 1 or more")
    if args.image == "-" and not (args.question and sys.stdin):
        raise InputError("-: a picture from standard input needs its question on the command line")
    if args.question is not None and not args.question.strip():
        raise InputError("the question is empty; leave it out to be asked for questions")
    if args.show and not args.question:
        raise InputError(f"--show {args.show}: draws the answers to one question; give a picture and a question")
    if args.questions and args.answers.resolve() == args.questions.resolve():
        raise InputError(f"--answers {args.answers}: is the question file; give another name")
    for flag, path, endings in (("--show", args.show, (".png", ".jpg")), ("--answers", args.answers, (".jsonl",))):
        if path and (path.suffix not in endings or not path.parent.is_dir()):
            raise InputError(f"{flag} {path}: give a name that ends in {' or '.join(endings)}, in a folder there is")
    try:
        return Budget.parse(args.keep) if args.keep else None
    except ValueError as e:
        raise InputError(f"--keep {e}") from None


def answer_questions(args, vlm, rows, choose, goes_by, scorer):
    """Answer the rows of a question file, and print the figures if they have labels."""
    for row in rows:
        vlm.check_text(row["text"], row["where"])
    made = {"model": portable(vlm.name), "weights": fingerprint(vlm.model), "pruner": fingerprint(scorer), **goes_by,
            "dtype": args.dtype, "max_new_tokens": args.max_new_tokens}
    said = answer_file(args.answers, rows, made, lambda left: ask(vlm, left, choose, args.batch, args.max_new_tokens),
                       args.overwrite)
    figures = score(rows, said)
    if figures is None and {row["category"] for row in rows} <= {"adversarial", "popular", "random"}:
        print("POPE's labels are in github.com/AoiDragon/POPE, output/coco; with them LLaVA scores the answers:\n"
              "python llava/eval/eval_pope.py --annotation-dir output/coco "
              f"--question-file {args.questions} --result-file {args.answers}")
    print(f"{len(rows)} answers are in {args.answers}")
    if args.json:
        print(json.dumps({"questions": len(rows), "answers": str(args.answers), **made, "figures": figures}))


@torch.no_grad()
def answer_one(args, vlm, image, choose, scorer):
    """Answer the question about one picture, or all that are asked about it."""
    vlm.check_text(args.question or "", "the question")
    try:
        inputs = vlm.inputs([image], [args.question or "?"])
    except InputError as e:
        raise InputError(f"{args.image}: {e}") from None
    X = vlm.encode(inputs)  # (1, N, d_v)
    keep, N = choose(X, inputs), X.shape[1]  # (1, K), or None
    kept = list(range(N)) if keep is None else keep[0].tolist()
    if args.question is None:
        return chat(vlm, image, X, keep, args.max_new_tokens)

    answer = answer_to(vlm, inputs, X, keep, args.max_new_tokens)
    print(answer, flush=True)
    full_answer = answer_to(vlm, inputs, X, None, args.max_new_tokens if args.show else 1)
    ms, all_ms = prefill_ms(vlm, inputs, X, keep, 1), prefill_ms(vlm, inputs, X, None, 1)
    start = time.perf_counter()
    choose(X, inputs)
    select_ms = 1000 * (time.perf_counter() - start)
    if args.show:
        picture, scores = seen_by_model(vlm, inputs, image), scorer(X)[0].cpu()
        write(args.show, sheet(picture, vlm.boxes(inputs), scores, torch.tensor(kept), X[0].cpu(), args.question,
                               (full_answer, answer)))
        print(f"wrote {args.show}")
    print(f"kept {len(kept)} of {N} tokens, choice and prefill {select_ms + ms:.0f} ms (all tokens: {all_ms:.0f} ms)")
    if args.json:
        print(json.dumps({"answer": answer, "kept": kept, "tokens": N, "selection_ms": round(select_ms, 3),
                          "prefill_ms": round(ms, 3), "prefill_ms_all": round(all_ms, 3)}))


def main():
    args = parse_arguments()
    budget = check_inference(args)
    if args.questions:
        rows = read_questions(args.questions, args.images, need=("question_id", "image", "text"))
    else:
        image = read_image(sys.stdin.buffer if args.image == "-" else args.image)
    vlm, scorer, settings = load_pruned(args)
    choose, goes_by = chooser(vlm, scorer, settings, budget, args.threshold, args.choose)
    if args.questions:
        answer_questions(args, vlm, rows, choose, goes_by, scorer)
    else:
        answer_one(args, vlm, image, choose, scorer)


if __name__ == "__main__":
    cli(main)
