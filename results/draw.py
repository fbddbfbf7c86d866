"""
Draw the pictures again, from the code, the pruner that ships and the JSON files beside this one.

    python -m results.draw                        # all of them, seconds
    python -m results.draw gate graphs            # only results/gate.png and results/graphs.png
    python -m results.draw losses --run out       # out/losses.png, from the log of a training
    python -m results.draw training --run out     # out/training.gif, of a training with --watch
"""
import argparse
import functools
import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

if not __package__:
    print("error: start it in the folder above, as python -m results.draw", file=sys.stderr)
    sys.exit(2)

import torch
from PIL import Image, ImageFont

from common.files import ROOT, InputError, cli, short, write
from common.pruner import chooser, load_pruner
from data.pictures import frame, read_image, seen_by_model
from data.shapes.prepare import draw_scene, questions
from eval.accuracy import retention
from model import load
from results.charts import INK, RED, arrow, box, canvas, label, line_chart
from throttler import soft_top_k, vp_gate, whitening

HERE = Path(__file__).resolve().parent
SMALL = ImageFont.load_default(17)
EXAMPLES = sorted((ROOT / "data/shapes/examples").glob("*.jpg"))


def read_json(path, cure):
    """What a JSON file holds, or a list of what its lines hold. InputError with this cure."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines()]
        return json.loads(text)
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be read ({short(e)}); {cure}") from None


# --- the example scenes ---------------------------------------------------------------------------

@functools.cache
def tiny():
    """The tiny VLM, and how the pruner that ships chooses."""
    vlm = load("data/shapes/llava")
    choose, _ = chooser(vlm, *load_pruner(ROOT / "data/shapes/pruner"))
    return vlm, choose


@functools.cache
def example(i):
    """An example scene with a question (the kinds take turns), its tokens and those kept."""
    vlm, choose = tiny()
    image = read_image(EXAMPLES[i])
    _, objects = draw_scene(f"examples-{i}")
    _, question, _ = questions(objects, random.Random(i))[i % 5]
    inputs = vlm.inputs([image], [question])
    X = vlm.encode(inputs)
    keep = choose(X, inputs)
    picture = seen_by_model(vlm, inputs, image).resize((192, 192))
    clear = torch.zeros(vlm.tokens).index_fill(0, keep[0], 1)  # (N,)
    pruned = frame(picture, vlm.boxes(inputs), clear)
    return SimpleNamespace(
        question=question,
        inputs=inputs,
        X=X,
        keep=keep,
        picture=picture,
        pruned=pruned,
    )


def kept():
    """Six scenes, the tokens kept of each, and the answers with all and with these tokens."""
    vlm, _ = tiny()
    sheet, draw = canvas(1254, 516)
    for i in range(len(EXAMPLES)):
        scene = example(i)
        x, y = 12 + i % 3 * 418, 10 + i // 3 * 258
        sheet.paste(scene.picture, (x, y))
        sheet.paste(scene.pruned, (x + 200, y))
        by_all, = vlm.generate(scene.inputs, scene.X)
        by_kept, = vlm.generate(scene.inputs, scene.X, scene.keep)
        few = f"these {scene.keep.shape[1]}: {by_kept}"
        label(draw, x, y + 198, scene.question, "la", INK, SMALL)
        label(draw, x, y + 220, f"all {vlm.tokens}: {by_all}", "la", "gray", SMALL)
        label(draw, x + 200, y + 220, few, "la", RED, SMALL)
    return sheet


# --- the parts of the method ----------------------------------------------------------------------

def soft_top_k_curves():
    """alpha over 48 normally distributed scores, as tau falls."""
    scores = torch.special.ndtri((torch.arange(48, 0, -1) - 0.5) / 48)  # descending
    series = {}
    for tau in (2, 1, 0.5, 0.2, 0.1):
        alpha = soft_top_k(scores, 16, tau).tolist()
        series[f"tau = {tau:g}"] = list(enumerate(alpha, 1))
    series["hard top-K"] = [(1, 1), (16.5, 1), (16.5, 0), (48, 0)]
    blues = ["#85aade", "#6693cc", "#4a7dbb", "#285aa0", "#0f2d64"]
    return line_chart(series, "tokens, highest score first (K = 16 of 48)", "alpha",
                      [1, 16, 32, 48], [0, 0.5, 1], [*blues, RED])


def gate():
    """A scene's three strongest whitened components as red, green and blue, at four alphas."""
    vlm, _ = tiny()
    scenes = [draw_scene(f"train-{i}")[0] for i in range(100)]
    mean, L = whitening(vlm.encode(vlm.inputs(scenes, ["?"] * len(scenes))))
    top = L[:, -3:] / L[:, -3:].square().sum(0)  # whitened: (x - mean)·v_i / √λ_i
    scene = example(0)
    panels = {"the scene": scene.picture}
    torch.manual_seed(0)
    for alpha in (1.0, 0.7, 0.3, 0.0):
        alphas = torch.full(scene.X.shape[:2], alpha)  # (1, N)
        X = vp_gate(scene.X, alphas, mean, L)[0]  # (N, d)
        components = (X - mean) @ top  # (N, 3)
        rgb = (128 + 55 * components).clamp(0, 255).byte()
        side = (vlm.side, vlm.side)
        panels[f"alpha = {alpha:g}"] = Image.frombytes("RGB", side, rgb.numpy().tobytes())
    image, draw = canvas(2340, 540)
    for i, (name, panel) in enumerate(panels.items()):
        x = 40 + i * 460
        image.paste(panel.resize((420, 420), Image.NEAREST), (x, 20))
        label(draw, x + 210, 464, name, "mt")
    return image.reduce(2)


# --- the two graphs -------------------------------------------------------------------------------

LEARNED, FROZEN, FIXED = "#faddbe", "#e2e8f0", "white"
PARTS = {  # name: (x of its centre, colour)
    "Encoder": (400, FROZEN),
    "Scorer": (670, LEARNED),
    "distinct": (940, FIXED),
    "soft top-K": (1210, FIXED),
    "top K": (1210, FIXED),
    "noise gate": (1480, FIXED),
    "gather": (1480, FIXED),
    "Denoiser": (1750, LEARNED),
    "Projector": (2020, FROZEN),
    "LLM": (2290, FROZEN),
}


def chain(draw, y, names):
    """Parts in a row, with arrows from each to the next."""
    for name, following in zip(names, names[1:]):
        x, _ = PARTS[name]
        next_x, _ = PARTS[following]
        arrow(draw, (x, y), (next_x - 110, y))
    for name in names:
        x, color = PARTS[name]
        box(draw, x, y, name, color)


def graph(image, draw, y, title, top_k, gate, given, result):
    """A path from picture to answer; the branch above it decides what its gate lets through."""
    above = y - 190
    encoder, distinct, choice, llm = 400, 940, 1210, 2290  # their columns
    label(draw, 40, y - 290, title, "la")
    image.paste(example(0).picture, (28, y - 96))
    arrow(draw, (220, y), (encoder - 110, y))
    arrow(draw, (encoder, y), (encoder, above), (560, above))
    arrow(draw, (distinct, y), (distinct, above + 50))  # it compares the features
    arrow(draw, (choice, above), (1480, above), (1480, y - 50))
    arrow(draw, (llm, y + 150), (llm, y + 50))
    arrow(draw, (llm, y - 50), (llm, y - 150))
    label(draw, llm, y + 160, given, "mt")
    label(draw, llm, y - 160, result, "mb")
    chain(draw, above, ["Scorer", "distinct", top_k])
    chain(draw, y, ["Encoder", *gate, "Projector", "LLM"])


def graphs():
    """Training and inference, the same parts in the same columns: one sees what falls away."""
    image, draw = canvas(2450, 1150)
    graph(image, draw, 370, "Training", "soft top-K", ["noise gate", "Denoiser"], "caption",
          "next-token loss")
    graph(image, draw, 850, "Inference", "top K", ["gather"], "question", "answer")
    image.paste(example(0).pruned, (1384, 930))
    label(draw, 1610, 980, "the tokens kept,\nat their own positions", "la")
    label(draw, 1225, 30, "orange learns, blue is frozen, white has no parameters", "mt")
    return image.reduce(2)


# --- what was measured ----------------------------------------------------------------------------

def accuracy():
    """Retention against budget for each way of choosing; stretched near 100, where they crowd."""
    table = read_json(HERE / "accuracy.json", "measure it as RESULTS.md says")["accuracy"]
    series = {}
    for row, by_kind in table.items():
        way, _, K = row.rpartition(" ")
        if K.isdecimal() and way != "all":
            retained = retention(by_kind, table["all 144"])
            series.setdefault(way, []).append((int(K), retained))
    for points in series.values():
        points.sort(reverse=True)  # fewer and fewer tokens
    budgets = [K for K, _ in series["scorer"]]
    lowest = min(y for points in series.values() for _, y in points)
    ticks = [tick for tick in (20, 40, 60, 80, 90, 95, 98, 99, 100) if tick > lowest - 20]

    def stretched(y):
        return -math.log(102 - y)

    return line_chart(series, "tokens kept, of 144", "retention, %", budgets, ticks,
                      bold="scorer", warp_x=math.log, warp_y=stretched)


def losses(run):
    """Draw a training's held-out losses over its steps: deployed, soft, and of all tokens."""
    curve = read_json(run / "log.jsonl", "give a training with --run")
    series, highest = {}, 0
    for name in ("deployed_loss", "soft_loss", "full_loss"):
        points = [(entry["step"], entry[name]) for entry in curve]
        highest = max(highest, *(loss for _, loss in points))
        series[f"{name} {points[-1][1]:.3f}"] = points
    steps = [0, max(1, curve[-1]["step"])]
    ticks = [tick for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if tick < 2.5 * highest]
    write(run / "losses.png",
          line_chart(series, "step", "nats per token", steps, ticks, warp_y=math.log))


def training(run):
    """Draw a training as a GIF: each patch of the watched pictures as bright as its alpha."""
    cure = "give a finished training with --watch"
    watched = read_json(run / "watched.json", cure)
    vlm = load(read_json(run / "pruner.json", cure)["model"])
    pictures = []
    for path in watched["images"]:
        image = read_image(ROOT / path)
        inputs = vlm.inputs([image], ["?"])
        image = seen_by_model(vlm, inputs, image).resize((112, 112))
        pictures.append((image, vlm.boxes(inputs)))
    places = [(10 + i % 3 * 122, 10 + i // 3 * 122) for i in range(len(pictures))]
    bottom = places[-1][1] + 126
    moments = watched["frames"][::-2][::-1]  # every other one, and the last
    sheets = []
    for moment in moments:
        sheet, draw = canvas(376, bottom + 46)
        for (image, boxes), alpha, place in zip(pictures, moment["alpha"], places):
            alpha = torch.tensor(alpha[:len(boxes)])  # without padding
            sheet.paste(frame(image, boxes, alpha), place)
        step, tau = moment["step"], moment["tau"]
        label(draw, 10, bottom, f"step {step}   tau {tau:.2f}", "la", INK, SMALL)
        done = step / max(1, moments[-1]["step"])
        draw.rectangle((10, bottom + 28, 10 + 356 * done, bottom + 34), RED)
        sheets.append(sheet)

    colors, _ = canvas(752, bottom)  # one palette for all frames: of pale and of clear pictures
    colors.paste(sheets[0])
    for (image, _), (x, y) in zip(pictures, places):
        colors.paste(image, (376 + x, y))
    palette = colors.quantize(256)
    sheets = [sheet.quantize(palette=palette, dither=0) for sheet in sheets]
    first, *others = sheets + sheets[-1:] * 12  # the end stays a while
    options = dict(save_all=True, append_images=others, duration=150, loop=0)
    write(run / "training.gif", first, options)


PICTURES = {
    "kept": kept,
    "soft_top_k": soft_top_k_curves,
    "gate": gate,
    "graphs": graphs,
    "accuracy": accuracy,
}
OF_A_RUN = {"losses": losses, "training": training}


@torch.no_grad()
def main():
    style = argparse.RawDescriptionHelpFormatter
    ap = argparse.ArgumentParser(
        prog="python -m results.draw", description=__doc__, formatter_class=style)
    known = ", ".join(PICTURES | OF_A_RUN)
    ap.add_argument("names", nargs="*", metavar="PICTURE",
                    help=f"of {known} (default: all but the last two)")
    ap.add_argument("--run", type=Path, default=Path("out"), metavar="DIR",
                    help="of losses and training (default: %(default)s)")
    args = ap.parse_args()
    for name in args.names or PICTURES:
        if name in PICTURES:
            write(HERE / f"{name}.png", PICTURES[name]())
        elif name in OF_A_RUN:
            try:
                OF_A_RUN[name](args.run)
            except (LookupError, TypeError) as e:
                raise InputError(f"--run {args.run}: its files are not train.py's "
                                 f"({short(repr(e))}); give a training") from None
        else:
            raise InputError(f"{name}: there is no such picture; choose from {known}")
        print(f"wrote {name}")


if __name__ == "__main__":
    cli(main)
