"""
What every script leans on: files are written whole, and errors are one line that a person can act on.

This folder holds no lesson. Who reads the code to learn the method may skip it: the lesson is in throttler.py,
denoiser.py, train.py, model.py and infer.py.

    write(Path("out/log.jsonl"), rounded([{"step": 0, "loss": 2.34567891}]))     # {"step": 0, "loss": 2.3457}
"""
import json
import os
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent  # this repository


class InputError(Exception):
    """Something the user gave is wrong; the message says what, where and the cure in one line."""


def cli(main):
    """Run a script's main(); an InputError ends it with one line on stderr and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 must not end a long run
    try:
        main()
        print(end="", flush=True)
    except (InputError, torch.OutOfMemoryError) as e:
        cure = "" if isinstance(e, InputError) else "; take fewer images at a time, or --checkpointing in training"
        print("error:", short(e, 500) + cure, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader went away, as in `python infer.py … | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)


def short(reason, length=160):
    """What a library or a file says, on one line of bounded length."""
    text = " ".join(str(reason).split())
    return text if len(text) <= length else text[:length] + " …"


def write(path, content, note=None):
    """Write tensors, JSON, a picture or else lines of JSON, by the name's ending. After a crash the old file or the new
    one is there. Links are followed. note: a safetensors file's metadata, or options of a picture."""
    place, kind = Path(os.path.realpath(path)), Path(path).suffix.lower()
    temporary = place.with_name(f".{uuid.uuid4().hex}.tmp")  # unique: two runs may write the same file
    try:
        if place.exists() and not place.is_file():
            raise OSError("it is no ordinary file")
        if kind == ".safetensors":
            save_file({name: t.detach().cpu().contiguous() for name, t in content.items()}, temporary, note)
        elif kind in (".png", ".jpg", ".gif"):
            content.save(temporary, {".png": "PNG", ".jpg": "JPEG"}.get(kind, "GIF"), quality=92, **(note or {}))
        elif kind == ".json":
            temporary.write_text(json.dumps(content, indent=1) + "\n")
        else:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in content))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(place)
    except (OSError, SafetensorError) as e:
        raise InputError(f"{path}: cannot be written ({short(e)}); make room there or give another place") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def rounded(value):
    """The same value with every float in it at five digits, for JSON that is read by people too; None for NaN."""
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.5g}"), parse_constant={}.get)


def portable(path):
    """A path as it is written down: relative to this repository if inside it, else absolute; a hub name as it is."""
    full = (Path(path) if Path(path).exists() else ROOT / path).resolve()
    if not full.exists():
        return str(path)
    return str(full.relative_to(ROOT) if full.is_relative_to(ROOT) else full)
