"""
The arguments of all programs: checked before any work begins.
"""
import math
import os
import sys
from pathlib import Path

from data.budget import Budget
from data.files import ROOT, InputError, portable, read_image
from data.shapes.prepare import FOLDER


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
    add("--choose", choices=("cover", "top"), default="cover", help="how the deployed model chooses: tokens that cover "
        "what scores high, or as in the papers the highest scores (default: %(default)s)")
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


def number_type(args):
    """The name of --dtype. Where it was left out it becomes bfloat16 on a GPU, and float32 elsewhere."""
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args.dtype


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


def check_texts(vlm, data, pairs, prompt, questions):
    """InputError for a caption or a question that the model cannot take."""
    for path, captions in pairs:
        for caption in captions:
            vlm.check_text(f"{prompt} {caption}", f"{data}: annotations: caption {caption[:30]!r} of {path.name}")
    for row in questions:
        vlm.check_text(row["text"], row["where"])


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
