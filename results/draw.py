"""
Draw the pictures again, from the code, the pruner that ships and the JSON files beside this one.

    python -m results.draw                        # all of them, seconds
    python -m results.draw gate graphs            # only results/gate.png and results/graphs.png
    python -m results.draw losses --run out       # out/losses.png, from the log.jsonl of a training
    python -m results.draw training --run out     # out/training.gif, of a training with --watch
"""
import argparse
import functools
import json
import math
import random
from pathlib import Path

import torch
from PIL import Image, ImageOps

from common.budget import hardness_of
from results.charts import COLORS, INK, arrow, box, canvas, font, half, line_chart, loss_chart
from common.files import ROOT, InputError, cli, write
from data.pictures import frame, read_image, seen_by_model
from common.pruner import chooser, load_pruner
from data.shapes.prepare import draw_scene, questions
from denoiser import Denoiser
from eval.accuracy import retention
from eval.tables import mean
from model import load
from throttler import soft_top_k, vp_gate, whitening

HERE, EXAMPLES = Path(__file__).resolve().parent, sorted((ROOT / "data/shapes/examples").glob("*.jpg"))
LEARNED, FROZEN = (250, 221, 190), (226, 232, 240)


@functools.cache
def tiny():
    """The tiny VLM, and how the pruner that ships chooses."""
    vlm = load("data/shapes/llava")
    return vlm, chooser(vlm, *load_pruner(ROOT / "data/shapes/pruner"))[0]


@functools.cache
def example(i):
    """(question, inputs, X, keep, picture) of an example scene. The kinds of question take turns."""
    vlm, choose = tiny()
    image, objects = read_image(EXAMPLES[i]), draw_scene(f"examples-{i}")[1]
    question = questions(objects, random.Random(i))[i % 5][1]
    inputs = vlm.inputs([image], [question])
    X = vlm.encode(inputs)
    return question, inputs, X, choose(X, inputs), seen_by_model(vlm, inputs, image)


def shown(i, alpha, side):
    """An example scene with each patch as bright as its alpha (N,)."""
    _, inputs, *_, image = example(i)
    return frame(image.resize((side, side), Image.Resampling.BICUBIC), tiny()[0].boxes(inputs), alpha)


def kept():
    """Six scenes: the picture, the tokens that are kept, a question, and the answers with all and with few tokens."""
    sheet, draw = canvas(1254, 516)
    for i in range(len(EXAMPLES)):
        vlm, (question, inputs, X, keep, _) = tiny()[0], example(i)
        x, y = 12 + i % 3 * 418, 10 + i // 3 * 258
        sheet.paste(shown(i, torch.ones(vlm.tokens), 192), (x, y))
        sheet.paste(shown(i, torch.zeros(vlm.tokens).index_fill(0, keep[0], 1), 192), (x + 200, y))
        draw.text((x, y + 198), question, INK, font(17))
        draw.text((x, y + 220), f"all {vlm.tokens}: {vlm.generate(inputs, X)[0]}", "gray", font(17))
        draw.text((x + 200, y + 220), f"these {keep.shape[1]}: {vlm.generate(inputs, X, keep)[0]}", COLORS[0], font(17))
    return sheet


def soft_top_k_curves():
    """alpha over 48 normally spread scores, as tau falls."""
    scores, series = torch.special.ndtri((torch.arange(48, 0, -1) - 0.5) / 48), {}
    for tau in (2, 1, 0.5, 0.2, 0.1):
        series[f"tau = {tau:g}"] = list(enumerate(soft_top_k(scores, 16, tau).tolist(), 1))
    series["hard top-K"] = [(1, 1), (16.5, 1), (16.5, 0), (48, 0)]
    shades = [(165, 190, 220), (120, 160, 205), (75, 125, 185), (40, 90, 160), (15, 45, 100), COLORS[0]]
    return half(line_chart(series, "tokens, highest score first (K = 16 of 48)", "alpha", [1, 8, 16, 24, 32, 40, 48],
                           [0, 0.2, 0.4, 0.6, 0.8, 1], shades))


def gate():
    """The three strongest whitened components of a scene's features as red, green and blue, gated at four alphas."""
    vlm, (_, _, X, _, scene) = tiny()[0], example(0)
    scenes = [draw_scene(f"train-{i}")[0] for i in range(100)]
    mean, L = whitening(vlm.encode(vlm.inputs(scenes, ["?"] * len(scenes))))
    top = L[:, -3:] / L[:, -3:].square().sum(0)  # whitened coordinate i is (x - mean)·v_i / √λ_i
    torch.manual_seed(0)
    panels = {"the scene": scene}
    for share in (1, 0.7, 0.3, 0):
        gated = vp_gate(X, torch.full(X.shape[:2], float(share)), mean, L)[0]  # (N, d)
        rgb = (128 + 55 * ((gated - mean) @ top)).clamp(0, 255).byte()
        panels[f"alpha = {share}"] = Image.frombytes("RGB", (vlm.side, vlm.side), rgb.numpy().tobytes())
    image, draw = canvas(2340, 540)
    for i, (label, panel) in enumerate(panels.items()):
        image.paste(panel.resize((420, 420), Image.Resampling.NEAREST), (40 + i * 460, 20))
        draw.text((250 + i * 460, 464), label, INK, font(42), anchor="mt")
    return half(image)


def attention():
    """How strongly each output token of a Denoiser depends on each input token, with both masks; white is exactly 0."""
    image, draw = canvas(1460, 800)
    for x, diagonal, title in ((50, True, "identity mask: Denoiser"), (810, False, "full mask: the ablation")):
        torch.manual_seed(0)
        denoiser = Denoiser(64, diagonal)
        for layer in (denoiser.block.attn.out, denoiser.block.mlp[-1]):  # they start at zero; as if trained
            torch.nn.init.normal_(layer.weight, std=0.3)
        J = torch.autograd.functional.jacobian(lambda x: denoiser(x[None])[0], torch.randn(12, 64))  # (12, 64, 12, 64)
        J = J.square().sum((1, 3)).sqrt()  # (12, 12)
        grey = (255 * (1 - (J / J.max()).sqrt())).byte()
        matrix = Image.frombytes("L", (12, 12), grey.numpy().tobytes()).resize((600, 600), Image.Resampling.NEAREST)
        image.paste(ImageOps.colorize(matrix, COLORS[1], "white"), (x, 100))
        draw.rectangle((x, 100, x + 600, 700), None, INK, 3)
        draw.text((x + 300, 50), title, INK, font(), anchor="mm")
    draw.text((730, 750), "across: input token; down: output token; white: exactly 0", INK, font(), anchor="mm")
    return half(image)


def graphs():
    """Training and inference: the same parts in the same columns, so that what falls away is seen."""
    image, draw = canvas(2360, 1080)
    columns = ["scene", "Encoder", "Scorer", "soft top-K", "noise gate", "Denoiser", "Projector", "LLM"]
    at = {name: 130 + 300 * i for i, name in enumerate(columns)} | {"choose K": 1030, "gather": 1330}
    fill = {"Encoder": FROZEN, "Projector": FROZEN, "LLM": FROZEN, "Scorer": LEARNED, "Denoiser": LEARNED}
    rows = [("Training", ["Scorer", "soft top-K"], ["noise gate", "Denoiser", "Projector", "LLM"], "caption",
             "next-token loss"),
            ("Inference", ["Scorer", "choose K"], ["gather", "Projector", "LLM"], "question", "answer")]
    for i, (title, upper, lower, given, wanted) in enumerate(rows):
        y, lower = 370 + 480 * i, ["Encoder", *lower]
        draw.text((40, y - 290), title, INK, font(44))
        image.paste(example(0)[-1].resize((180, 180), Image.Resampling.BICUBIC), (40, y - 90))
        arrow(draw, (220, y), (at["Encoder"] - 118, y))
        arrow(draw, (at["Encoder"], y), (at["Encoder"], y - 190), (at[upper[0]] - 118, y - 190))
        arrow(draw, (at[upper[-1]], y - 190), (at[lower[1]], y - 190), (at[lower[1]], y - 50))
        arrow(draw, (at["LLM"], y + 150), (at["LLM"], y + 50))
        draw.text((at["LLM"], y + 160), given, INK, font(36), anchor="mt")
        arrow(draw, (at["LLM"], y - 50), (at["LLM"], y - 150))
        draw.text((at["LLM"], y - 160), wanted, INK, font(36), anchor="mb")
        for level, names in ((y - 190, upper), (y, lower)):
            for a, b in zip(names, names[1:]):
                arrow(draw, (at[a], level), (at[b] - 118, level))
            for name in names:
                box(draw, at[name], level, name, fill.get(name, "white"))
    arrow(draw, (at["choose K"], y), (at["choose K"], y - 140))  # covering compares the features
    few = torch.zeros(tiny()[0].tokens).index_fill(0, example(0)[3][0], 1)
    image.paste(shown(0, few, 180), (at["gather"] - 90, y + 70))
    draw.text((1000, 30), "orange learns, blue is frozen, white has no parameters", INK, font(36))
    return half(image)


def saved(name):
    path = HERE / f"{name}.json"
    if not path.exists():
        raise InputError(f"{path}: is not there; measure it first, as its section of RESULTS.md says")
    return json.loads(path.read_text(encoding="utf-8"))[name]


def accuracy():
    """Retention against budget for every way of choosing, best first; stretched towards 100, where they crowd."""
    table, series = saved("accuracy"), {}
    full = next(iter(table.values()))
    for name, by_category in table.items():
        label, _, K = name.rpartition(" ")
        if label and label != "all" and K.isdecimal():
            series.setdefault(label, []).append((int(K), retention(by_category, full)))
    series = {label: sorted(points) for label, points in series.items()}
    best_first = dict(sorted(series.items(), key=lambda item: -item[1][0][1]))
    lowest = min(kept for points in series.values() for _, kept in points)
    ticks = [kept for kept in (0, 20, 40, 60, 80, 90, 95, 98, 99, 100) if kept > lowest - 20]
    return half(line_chart(best_first, "tokens kept, of 144", "retention, %", [K for K, _ in series["scorer"]], ticks,
                           warp_x=math.log, warp_y=lambda kept: -math.log(102 - min(kept, 100.5))))


def losses(run):
    """Draw a training's four held-out losses over its steps, beside its log."""
    try:
        lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise InputError(f"{run}/log.jsonl: cannot be read ({e.strerror}); give a training with --run") from None
    write(run / "losses.png", loss_chart([json.loads(line) for line in lines]))
    print(f"wrote {run / 'losses.png'}")


def training(run):
    """Draw a training as a moving picture: each patch of the watched images as bright as its alpha."""
    try:
        watched, made = (json.loads((run / f"{name}.json").read_text()) for name in ("watched", "pruner"))
    except OSError as e:
        raise InputError(f"{e.filename}: cannot be read ({e.strerror}); train with --watch, to the end") from None
    vlm, pictures, frames, side = load(made["model"]), [], [], 112
    for path in watched["images"]:
        image = read_image(ROOT / path)
        inputs = vlm.inputs([image], ["?"])
        image = seen_by_model(vlm, inputs, image).resize((side, side), Image.Resampling.BICUBIC)
        pictures.append((image, vlm.boxes(inputs)))
    rows = math.ceil(len(pictures) / 3)
    for at in watched["frames"][::2]:
        sheet, draw = canvas(3 * side + 40, rows * (side + 10) + 60)
        hardness = []
        for i, ((image, boxes), alpha) in enumerate(zip(pictures, at["alpha"])):
            alpha = torch.tensor(alpha[:len(boxes)])
            sheet.paste(frame(image, boxes, alpha), (10 + i % 3 * (side + 10), 10 + i // 3 * (side + 10)))
            hardness += hardness_of(alpha[None], round(alpha.sum().item())).tolist()
        y, width = rows * (side + 10) + 14, 3 * side + 20
        draw.text((10, y), f"step {at['step']}   hardness {mean(hardness):.2f}", INK, font(15))
        draw.rectangle((10, y + 28, 10 + width * at["step"] / max(1, watched["frames"][-1]["step"]), y + 34), COLORS[0])
        frames.append(sheet)
    sheet = frames[-1].copy()  # one palette for all frames, of pictures with and without pale patches
    for i, (image, _) in enumerate(pictures[:3]):
        sheet.paste(image, (10 + i * (side + 10), 10))
    palette = sheet.quantize(128)
    frames = [sheet.quantize(palette=palette, dither=Image.Dither.NONE) for sheet in frames + frames[-1:] * 12]
    write(run / "training.gif", frames[0], dict(save_all=True, append_images=frames[1:], duration=150, loop=0))
    print(f"wrote {run / 'training.gif'}")


PICTURES = {"kept": kept, "soft_top_k": soft_top_k_curves, "gate": gate, "attention": attention, "graphs": graphs,
            "accuracy": accuracy}


@torch.no_grad()
def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("names", nargs="*", metavar="PICTURE", help=f"of {', '.join(PICTURES)} (default: all of these), or "
                    "losses or training")
    ap.add_argument("--run", type=Path, default=Path("out"), metavar="DIR", help="of losses, training (default: out)")
    args = ap.parse_args()
    for name in args.names or PICTURES:
        if name in ("losses", "training"):
            (losses if name == "losses" else training)(args.run)
            continue
        if name not in PICTURES:
            raise InputError(f"{name}: there is no such picture; choose from {', '.join(PICTURES)}, losses, training")
        write(HERE / f"{name}.png", PICTURES[name]())
        print(f"wrote results/{name}")


if __name__ == "__main__":
    cli(main)
