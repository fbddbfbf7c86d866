"""
What a run leaves on disk: safetensors, JSON and a picture, never pickles. A crash or a full disk leaves the old file
or the new one.

    write(Path("out/log.jsonl"), rounded([{"step": 0, "loss": 2.34567891}]))     # {"step": 0, "loss": 2.3457}
    tensors, state = read_checkpoint(Path("out/checkpoint.safetensors"))
"""
import json
import os
from pathlib import Path

from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from model import HERE, InputError


def write(path, content, note=None):
    """Write tensors, JSON, lines of JSON or a picture, by the name's ending; note: a safetensors file's metadata."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        if path.suffix == ".safetensors":
            save_file({name: t.detach().cpu().contiguous() for name, t in content.items()}, temporary, note)
        elif path.suffix == ".png":
            content.save(temporary, "PNG")
        elif path.suffix == ".jsonl":
            temporary.write_text("".join(json.dumps(line) + "\n" for line in content))
        else:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as e:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({e}); make room there or give another place") from None


def read_checkpoint(path):
    """(tensors, state): all of a run in one file, so that its pieces always belong together."""
    try:
        with safe_open(path, "pt") as file:
            return load_file(path), json.loads(file.metadata()["state"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        raise InputError(f"--resume: {path} cannot be read ({e}); leave --resume away to start a run") from None


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


def loss_chart(curve, w=640, h=360):
    """The held-out losses over the steps, from all tokens to what is used."""
    image, series = Image.new("RGB", (w, h), "white"), {"full_loss": "grey", "soft_loss": "blue", "hard_loss": "green",
                                                        "deployed_loss": "red"}
    pen, last = ImageDraw.Draw(image), max(1, curve[-1]["step"])
    top = max(e.get(name, 0) for e in curve for name in series)  # a run from before some were logged can be resumed
    at = lambda step, loss: (50 + (w - 70) * step / last, h - 30 - (h - 60) * loss / top)
    pen.rectangle((*at(0, top), *at(last, 0)), outline="grey")
    pen.text((w - 90, h - 22), f"step {last}", fill="black")
    for value in (0, top / 2, top):
        pen.text((8, at(0, value)[1] - 6), f"{value:.2f}", fill="black")
    for i, (name, color) in enumerate(series.items()):
        pen.line([at(e["step"], e[name]) for e in curve if name in e], fill=color, width=2)
        pen.text((60 + 140 * i, 8), f"{name} {curve[-1][name]:.3f}", fill=color)
    return image
