"""
What every script leans on: files are written whole, errors are one line that a person can act on.

This folder holds no lesson. If you read the code to learn the method, you may skip it: the lesson
is in throttler.py, denoiser.py, train.py, model.py, infer.py and bench.py.

    write(Path("out/log.jsonl"), rounded([{"loss": 2.34567891}]))      # {"loss": 2.3457}
"""
import json
import os
import signal
import sys
import threading
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent  # this repository


class InputError(Exception):
    """Something the user gave is wrong; the message says what, where and the cure in one line."""


# --- errors ---------------------------------------------------------------------------------------

def cli(main):
    """Run a script's main(). What a user can fix ends it with one line and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):
        # a terminal without UTF-8 must not end a long run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        print(end="", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader went away, as in `python infer.py … | head -1`
        forget_output()
        sys.exit(141)
    except Exception as e:
        cure = cure_for(e)
        if cure is None:
            raise
        *_, reason = str(e).strip().splitlines() or [type(e).__name__]  # a worker's has a traceback
        with suppress(OSError):
            print("error:", short(reason, 500) + cure, file=sys.stderr)
            print(end="", flush=True)
        forget_output()
        sys.exit(2)


def forget_output():
    """When Python ends it writes what is left; where it cannot, it would complain once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def cure_for(e):
    """What helps against an error that is no mistake in this code; None if it is one."""
    text = f"{type(e).__name__}: {e}"
    if isinstance(e, InputError):
        return ""
    if out_of_memory(e):
        return "; take fewer images at a time (--batch, in training --at-once or --checkpointing)"
    if "DataLoader" in text:
        return ("; it read pictures: perhaps memory is short, and --workers 0 needs the least. "
                "A training continues with --resume")
    lost = ("by peer", "gloo", "NCCL", "DistStoreError", "DistNetworkError")
    if any(word in text for word in lost):
        return ("; torchrun's processes have lost each other: if one has an error of its own, fix "
                "that. A training continues with --resume")
    if isinstance(e, OSError):
        return "; check that place (or the standard output), its permissions and the room there"
    return None


def out_of_memory(e):
    """Whether an error means that memory ran out. On a CPU torch has no class for that."""
    if isinstance(e, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "allocate memory" in str(e) or "not enough memory" in str(e)  # the latter on Windows


def short(reason, length=160):
    """What a library or a file says, on one line of bounded length."""
    text = " ".join(str(reason).split())
    return text if len(text) <= length else text[:length] + " …"


@contextmanager
def time_limit(seconds, what):
    """TimeoutError if it takes longer inside. No limit beside the main thread, and on Windows."""
    def stop(*_):
        raise TimeoutError(f"{what} does not end within {seconds} s")

    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- files ----------------------------------------------------------------------------------------

def read_text(path, needed):
    """The text of a file in UTF-8; `needed` says in an InputError what it should be."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); check its name and its "
                         "permissions") from None
    except ValueError as e:
        raise InputError(f"{path}: is not UTF-8 text ({short(e)}); give {needed}") from None


def check_writable(path):
    """OSError, which says why, where no file can be written at `path`."""
    place = os.path.realpath(path)
    folder, name = os.path.split(place)
    if not os.path.isdir(folder):
        raise OSError(f"there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"no file may be made in {folder}")
    if len(os.fsencode(name)) > 255:
        raise OSError("its name is too long")
    if os.path.exists(place):
        if not os.path.isfile(place):
            raise OSError("it is no ordinary file")
        if not os.access(place, os.W_OK):
            raise OSError("it is write-protected")


def check_place(flag, path, source, endings):
    """InputError, before any work, unless `path` can be written and is not what is read."""
    if path.suffix not in endings:
        raise InputError(f"{flag} {path}: give a name that ends in {' or '.join(endings)}")
    try:
        check_writable(path)
    except OSError as e:
        raise InputError(f"{flag} {path}: cannot be written ({e}); give another place") from None
    with suppress(OSError):  # where one of them is not there
        if os.path.samefile(path, source):  # a link to it, too
            raise InputError(f"{flag} {path}: is the file that is read; give another name")


def lock(file, where):
    """Keep other runs from writing this open file until it is closed. InputError if one does."""
    try:
        import fcntl  # Windows has none
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{where}: another run is writing there; wait, or give another "
                         "name") from None
    except (ImportError, OSError):  # some file systems know no locks: then nobody can tell
        pass


def write(path, content, note=None):
    """Write tensors, JSON, a picture or else lines of JSON, by the name's ending.

    After a crash the old file or the new one is there. Links are followed. note: a safetensors
    file's metadata, or options of a picture.
    """
    place = Path(os.path.realpath(path))
    kind = Path(path).suffix.lower()
    temporary = place.with_name(f".{uuid.uuid4().hex}.tmp")  # two runs may write the same file
    try:
        check_writable(path)
        if kind == ".safetensors":
            tensors = {name: t.detach().cpu().contiguous() for name, t in content.items()}
            save_file(tensors, temporary, note)
        elif kind in (".png", ".jpg", ".gif"):
            picture_format = kind[1:].replace("jpg", "jpeg")
            content.save(temporary, picture_format, quality=92, **(note or {}))
        elif kind == ".json":
            temporary.write_text(json.dumps(content, indent=1) + "\n")
        else:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in content))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(place)
    except (OSError, SafetensorError) as e:
        raise InputError(f"{path}: cannot be written ({short(e)}); make room there, allow "
                         "writing there, or give another place") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def rounded(value):
    """The same value with every float in it at five digits, for JSON that is read by people too;
    None for NaN."""
    def five_digits(text):
        return float(f"{float(text):.5g}")
    return json.loads(json.dumps(value), parse_float=five_digits, parse_constant={}.get)


def portable(path):
    """A path as it is written down: relative to this repository if inside it, else absolute; a hub
    name as it is."""
    full = Path(path if os.path.exists(path) else ROOT / path).resolve()
    if not os.path.exists(full):
        return str(path)
    return str(full.relative_to(ROOT) if full.is_relative_to(ROOT) else full)
