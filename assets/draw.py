"""
Draw every picture of the README again, from the code and the pruner that ships.

    python assets/draw.py               # all of them, seconds
    python assets/draw.py gate graphs   # only assets/gate.png and assets/graphs.png
    python assets/draw.py tables        # print the rows of the README's tables of measurements
"""
import functools
import json
import math
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench import retention  # noqa: E402
from data.shapes.prepare import draw_scene  # noqa: E402
from data.shapes.study import spread  # noqa: E402
from denoiser import Denoiser  # noqa: E402
from infer import chooser, dimmed, load_pruner, seen_by_model  # noqa: E402
from model import load, read_image  # noqa: E402
from throttler import soft_top_k, vp_gate, whitening  # noqa: E402
from train import LOSSES  # noqa: E402

SHAPES = HERE.parent / "data/shapes"
EXAMPLES = sorted((SHAPES / "examples").glob("*.jpg"))
ASKED = ["What color is the star?", "How many shapes are there?", "Where is the cross?",
         "What shape is the blue thing?", "Is there a red cross?", "Where is the square?"]
COLORS = [(31, 90, 160), (200, 60, 50), (60, 140, 80), (150, 100, 180), (220, 140, 40), (110, 110, 110), (20, 150, 160)]
INK, PALE = (40, 40, 40), (215, 215, 215)


# --- the little that is needed to draw with pillow --------------------------------------------------------------------
# Everything is drawn at twice its size and reduced by finish(), for smooth edges; all sizes here are the doubled ones.

def font(size=38):
    return ImageFont.load_default(size=size)


def canvas(width, height):
    image = Image.new("RGB", (width, height), "white")
    return image, ImageDraw.Draw(image)


def finish(image, name):
    image.reduce(2).save(HERE / f"{name}.png", optimize=True)


def ticks(low, high, n=6):
    """Round numbers from low to high, about n of them."""
    raw = (high - low) / n
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def line_chart(name, series, xlabel, ylabel, colors=COLORS, marks=False, log_x=False, x_ticks=None, y_range=None,
               size=(2000, 1000)):
    """assets/{name}.png: one line per series {label: [(x, y), …]}, a legend at the right. log_x: budgets, say."""
    image, draw = canvas(*size)
    left, top, bottom = 190, 40, size[1] - 150
    right = size[0] - 170 - max(draw.textlength(label, font()) for label in series)
    xs, ys = zip(*(point for points in series.values() for point in points))
    scale = math.log if log_x else float
    x0, x1 = scale(min(xs)), scale(max(xs))
    y0, y1 = y_range or (min(ys), max(ys))

    def at(x, y):
        return left + (scale(x) - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    for y in ticks(y0, y1):
        draw.line([(left, at(min(xs), y)[1]), (right, at(min(xs), y)[1])], PALE, 2)
        draw.text((left - 20, at(min(xs), y)[1]), f"{y:g}", INK, font(), anchor="rm")
    for x in x_ticks or ticks(min(xs), max(xs)):
        draw.line([(at(x, y0)[0], bottom), (at(x, y0)[0], bottom + 14)], INK, 3)
        draw.text((at(x, y0)[0], bottom + 24), f"{x:g}", INK, font(), anchor="mt")
    draw.line([(left, bottom), (right, bottom)], INK, 3)
    draw.text(((left + right) / 2, size[1] - 20), xlabel, INK, font(), anchor="mb")
    upright = Image.new("RGB", (bottom - top, 60), "white")
    ImageDraw.Draw(upright).text(((bottom - top) / 2, 30), ylabel, INK, font(), anchor="mm")
    image.paste(upright.rotate(90, expand=True), (10, top))
    for i, (label, points) in enumerate(series.items()):
        color, y = colors[i % len(colors)], top + 30 + 64 * i
        draw.line([at(*point) for point in points], color, 7, joint="curve")
        for x, y_ in (at(*point) for point in points if marks):
            draw.ellipse((x - 11, y_ - 11, x + 11, y_ + 11), color)
        draw.line([(right + 40, y), (right + 100, y)], color, 7)
        draw.text((right + 120, y), label, INK, font(), anchor="lm")
    finish(image, name)


def arrow(draw, *points, color=INK):
    """Along these points; the head at the last."""
    draw.line(points, color, 5, joint="curve")
    (x0, y0), (x1, y1) = points[-2:]
    length = math.hypot(x1 - x0, y1 - y0)
    dx, dy = 24 * (x1 - x0) / length, 24 * (y1 - y0) / length
    draw.polygon([(x1, y1), (x1 - dx - dy / 2, y1 - dy + dx / 2), (x1 - dx + dy / 2, y1 - dy - dx / 2)], color)


def box(draw, x, y, text, fill="white", width=236, height=100):
    """A box with its centre at x, y."""
    draw.rounded_rectangle((x - width / 2, y - height / 2, x + width / 2, y + height / 2), 16, fill, INK, 3)
    draw.text((x, y), text, INK, font(36), anchor="mm")


# --- the pictures ---------------------------------------------------------------------------------------------------

@functools.cache
def tiny():
    """The tiny LLaVA, and how its shipped pruner chooses."""
    vlm = load(SHAPES / "llava")
    return vlm, chooser(vlm, *load_pruner(SHAPES / "pruner"))[0]


def shipped(image, question="?"):
    """(vlm, inputs, X, keep) for one scene."""
    vlm, choose = tiny()
    inputs = vlm.inputs([read_image(image)], [question])
    X = vlm.encode(inputs)
    return vlm, inputs, X, choose(X, inputs)


def kept():
    """Six scenes: the picture, the tokens that are kept, a question, and the answers with all and with few tokens."""
    side = 192
    sheet = Image.new("RGB", (3 * (2 * side + 34), 2 * (side + 66)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (path, question) in enumerate(zip(EXAMPLES, ASKED)):
        vlm, inputs, X, keep = shipped(path, question)
        image = seen_by_model(vlm, inputs)
        x, y = 12 + i % 3 * (2 * side + 34), 10 + i // 3 * (side + 66)
        sheet.paste(image.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        sheet.paste(dimmed(image, keep[0], vlm.tokens, side), (x + side + 8, y))
        draw.text((x, y + side + 6), question, "black", font(17))
        draw.text((x, y + side + 28), f"all {vlm.tokens}: {vlm.generate(inputs, X)[0]}", "gray", font(17))
        pruned = f"these {keep.shape[1]}: {vlm.generate(inputs, X, keep)[0]}"
        draw.text((x + side + 8, y + side + 28), pruned, (190, 30, 30), font(17))
    sheet.save(HERE / "kept.png", optimize=True)


def soft_top_k_():
    """alpha over 48 normally spread scores, as tau falls."""
    N, K, taus = 48, 16, (2.0, 1.0, 0.5, 0.2, 0.1)
    scores = torch.special.ndtri((torch.arange(N, 0, -1) - 0.5) / N)
    series = {f"tau = {tau:g}": list(enumerate(soft_top_k(scores, K, tau).tolist(), 1)) for tau in taus}
    series["hard top-K"] = [(1, 1), (K + 0.5, 1), (K + 0.5, 0), (N, 0)]
    shades = [(165, 190, 220), (120, 160, 205), (75, 125, 185), (40, 90, 160), (15, 45, 100), COLORS[1]]
    line_chart("soft_top_k", series, f"tokens, highest score first (K = {K} of {N})", "alpha", shades, y_range=(0, 1),
               x_ticks=(1, 8, K, 24, 32, 40, 48), size=(2000, 900))


def gate():
    """The three strongest whitened components of a scene's features as red, green and blue, gated at four alphas."""
    vlm, inputs, X, *_ = shipped(EXAMPLES[0])
    scenes = [draw_scene(f"train-{i}")[0] for i in range(100)]
    mean, L = whitening(vlm.encode(vlm.inputs(scenes, ["?"] * len(scenes))))
    top = L[:, -3:] / L[:, -3:].square().sum(0)  # whitened coordinate i is (x - mean)·v_i / √λ_i
    torch.manual_seed(0)
    side, gap, (image, draw) = 420, 40, canvas(5 * 460 + 40, 540)
    panels = {"the scene": seen_by_model(vlm, inputs).resize((side, side), Image.Resampling.BICUBIC)}
    for share in (1, 0.7, 0.3, 0):
        gated = vp_gate(X, torch.full(X.shape[:2], float(share)), mean, L)[0]  # (N, d_v)
        rgb = (128 + 55 * ((gated - mean) @ top)).clamp(0, 255).byte()
        grid = math.isqrt(len(rgb))
        tokens = Image.frombytes("RGB", (grid, grid), rgb.numpy().tobytes())
        panels[f"alpha = {share}"] = tokens.resize((side, side), Image.Resampling.NEAREST)
    for i, (label, panel) in enumerate(panels.items()):
        image.paste(panel, (gap + i * (side + gap), 20))
        draw.text((gap + i * (side + gap) + side / 2, side + 44), label, INK, font(42), anchor="mt")
    finish(image, "gate")


def attention():
    """How strongly each output token of a Denoiser depends on each input token, with both masks; white is exactly 0."""
    N, cell, (image, draw) = 12, 56, canvas(1760, 850)
    for k, diagonal in enumerate((True, False)):
        torch.manual_seed(0)
        denoiser = Denoiser(64, diagonal)
        for layer in (denoiser.block.attn.out, denoiser.block.mlp[-1]):  # they start at zero; as if trained
            torch.nn.init.normal_(layer.weight, std=0.3)
        J = torch.autograd.functional.jacobian(lambda x: denoiser(x[None])[0], torch.randn(N, 64))  # (N, 64, N, 64)
        J = J.square().sum((1, 3)).sqrt()  # (N, N)
        for i in range(N):
            for j in range(N):
                shade = 0 if J[i, j] == 0 else 0.15 + 0.85 * (J[i, j] / J.max()).item() ** 0.5
                x, y = 110 + 860 * k + cell * j, 100 + cell * i
                fill = tuple(round(255 + (c - 255) * shade) for c in COLORS[0])
                draw.rectangle((x, y, x + cell - 4, y + cell - 4), fill, PALE)
        middle = 110 + 860 * k + cell * N / 2
        title = "identity mask: Denoiser" if diagonal else "full mask: the ablation"
        draw.text((middle, 40), title, INK, font(), anchor="mm")
        draw.text((middle, 100 + cell * N + 40), "input token", INK, font(), anchor="mm")
        upright = Image.new("RGB", (cell * N, 50), "white")
        ImageDraw.Draw(upright).text((cell * N / 2, 25), "output token", INK, font(), anchor="mm")
        image.paste(upright.rotate(90, expand=True), (40 + 860 * k, 100))
    finish(image, "attention")


def graphs():
    """Training above inference, the same parts in the same columns, so that what is gone is seen."""
    vlm, inputs, X, keep = shipped(EXAMPLES[0])
    scene, few = seen_by_model(vlm, inputs), dimmed(seen_by_model(vlm, inputs), keep[0], vlm.tokens)
    learned, frozen = (250, 221, 190), (226, 232, 240)
    image, draw = canvas(2480, 1240)
    columns = [150 + 310 * i for i in range(8)]  # scene, encoder, scorer, top-K, gate, denoiser, projector, LLM

    def graph(y, title, parts, given, wanted):
        up = y - 190
        draw.text((30, y - 300), title, INK, font(44))
        image.paste(scene.resize((180, 180), Image.Resampling.BICUBIC), (columns[0] - 90, y - 90))
        at = dict(zip(("encoder", "scorer", "top", "gate", "denoiser", "projector", "llm"), columns[1:]))
        arrow(draw, (columns[0] + 90, y), (at["encoder"] - 118, y))
        arrow(draw, (at["encoder"], y - 50), (at["encoder"], up), (at["scorer"] - 118, up))
        arrow(draw, (at["scorer"] + 118, up), (at["top"] - 118, up))
        arrow(draw, (at["top"] + 118, up), (at["gate"], up), (at["gate"], y - 50))
        row = [name for name in ("encoder", "gate", "denoiser", "projector", "llm") if name in parts]
        for a, b in zip(row, row[1:]):
            arrow(draw, (at[a] + 118, y), (at[b] - 118, y))
        arrow(draw, (at["llm"], y + 150), (at["llm"], y + 50))
        draw.text((at["llm"], y + 160), given, INK, font(36), anchor="mt")
        arrow(draw, (at["llm"], y - 50), (at["llm"], y - 150))
        draw.text((at["llm"], y - 164), wanted, INK, font(36), anchor="mb")
        for name, (text, fill) in parts.items():
            box(draw, at[name], up if name in ("scorer", "top") else y, text, fill)
        labels = [("encoder", "gate", "X: all N tokens", y), ("scorer", "top", "s", up), ("top", "gate", "alpha", up)]
        if "denoiser" not in parts:
            labels[2:] = [("top", "gate", "keep", up), ("gate", "projector", "K tokens", y)]
        for a, b, text, height in labels:
            x = at["gate"] - 90 if a == "top" else (at[a] + at[b]) / 2
            draw.text((x, height - 14), text, INK, font(34), anchor="mb")
        return at

    common = {"encoder": ("Encoder", frozen), "scorer": ("Scorer", learned), "projector": ("Projector", frozen),
              "llm": ("LLM", frozen)}
    at = graph(390, "Training", {**common, "top": ("soft top-K", "white"), "gate": ("noise gate", "white"),
                                 "denoiser": ("Denoiser", learned)}, "caption", "next-token loss")
    graph(970, "Inference", {**common, "top": ("top-K", "white"), "gate": ("gather", "white")}, "question", "answer")
    image.paste(few.resize((180, 180), Image.Resampling.BICUBIC), (at["gate"] - 90, 970 + 70))
    for i, (text, fill) in enumerate((("learned", learned), ("frozen", frozen), ("no parameters", "white"))):
        x = 1500 + 300 * i
        draw.rounded_rectangle((x, 40, x + 50, 80), 8, fill, INK, 3)
        draw.text((x + 66, 60), text, INK, font(36), anchor="lm")
    finish(image, "graphs")


def accuracy():
    """Retention against budget for every way of choosing, from what `bench.py accuracy --json` saved."""
    table = json.loads((HERE / "accuracy.json").read_text())["accuracy"]
    whole, series = next(iter(table.values())), {}
    for name, by_category in list(table.items())[1:]:
        label, K = name.rsplit(" ", 1)
        series.setdefault({"scorer": "this scorer", "uniform": "grid"}.get(label, label), []).append(
            (int(K.removeprefix("~")), retention(by_category, whole)))
    series = {label: sorted(points) for label, points in series.items()}
    line_chart("accuracy", series, "tokens kept, of 144", "retention, %", marks=True, log_x=True,
               x_ticks=sorted({K for points in series.values() for K, _ in points}))


def speed():
    """LLaVA-1.5-7B's times against tokens kept, as `bench.py speed --json assets/speed.json` saved them."""
    rows = json.loads((HERE / "speed.json").read_text())["speed"]["rows"]
    labels = {"first": "to first token", "prefill": "LLM prefill", "encode": "encoder", "select": "scorer + top-K"}
    series = {label: sorted((int(name.split()[1]), row[stage]["median"] / 1000) for name, row in rows.items()
                            if row[stage]["median"] > 0.01) for stage, label in labels.items()}
    line_chart("speed", series, "visual tokens that the LLM reads, of 576", "seconds", marks=True,
               x_ticks=sorted({x for points in series.values() for x, _ in points}),
               y_range=(0, series["to first token"][-1][1]))


# --- the README's tables ----------------------------------------------------------------------------------------------

def tables():
    """Every row of the README's tables of measurements, in order, from the JSON that train.py and bench.py saved."""
    read = lambda file, table=None: json.loads((HERE / f"{file}.json").read_text())[table or file]
    row = lambda *cells: "| " + " | ".join(cells) + " |"
    per_cent = lambda by, whole: [f"{100 * a:.1f}" for a in by.values()] + [f"{retention(by, whole):.1f}"]
    three_losses = lambda end: " / ".join(f"{end[k]:.2f}" if k in end else "–" for k in LOSSES)
    runs = [json.loads(line) for line in (HERE / "runs.jsonl").read_text().splitlines()]
    for run in runs:
        whole, scorer = run["by_category"]["all 144"], f"scorer {run['keep']}"
        name = f"{scorer.replace('~', '')}, seed {run['seed']}" + ", papers" * (run["recipe"] == "papers")
        name += ", image" * (run["recipe"] == "ours" and run["budget"] == "image")
        yield row(name, *per_cent(run["by_category"][scorer], whole), f"{run['hardness']:.2f}",
                  three_losses(run))
    whole, *_ = read("accuracy").values()
    for name, by_category in read("accuracy").items():
        yield row(name, *per_cent(by_category, whole))
    ceiling = read("ceiling")
    for name, by_category in ceiling.items():
        if not name.startswith("all"):
            yield row(name, *per_cent(by_category, ceiling["all" + ", trained on" * name.endswith("trained on")]))
    for file in ("ablations_full", "ablations"):
        for name, variant in read(file, "ablations").items():
            kept = [spread(v) if len(v) > 1 else f"{v[0]:.1f}" for v in variant["retention"].values()]
            yield row(name, f"{variant['hardness']:.2f}", three_losses(variant), *kept)
    budgets = read("budgets")
    for name, at in budgets["retention"].items():
        kept = {K: sum(cell["kept"]) / len(cell["kept"]) for K, cell in at.items()}
        by_T = name.endswith("threshold")
        cells = {K: spread(cell["retention"]) + f" @ {kept[K]:.1f}" * by_T for K, cell in at.items()}
        yield row(name, *(cells.get(K, "–") for K in budgets["retention"]["image, top-K"]))
    for name, by_shapes in budgets["by_shapes"].items():
        yield row(name, *(f"{kept['mean']:.1f} ({kept['p10']}–{kept['p90']})" for kept in by_shapes.values()))
    probes = read("probes")
    for name in probes["vp"]:
        vp, gumbel = (sum(probes[gate][name]) / len(probes[gate][name]) for gate in ("vp", "gumbel"))
        yield row(name.replace("_", " "), f"{vp:.4f}", f"{gumbel:.4f}", f"{vp / gumbel:.2f}")
    for line in probes["noise_like_dropping"]:
        yield row(f"{line['share']:.0%}", f"{line['noise']:.1f}", f"{line['dropped']:.1f}")
    for name, at in read("speed")["rows"].items():
        yield row(name, f"{at['tflops']:.2f}", *(f"{at[s]['median']:,.0f}" for s in
                  ("encode", "select", "project", "prefill", "first", "decode")), f"{at['cache_bytes'] / 1e6:.0f}",
                  f"{at['ratio']['prefill']:.2f}×", f"{at['ratio']['first']:.2f}×")


PICTURES = {"kept": kept, "soft_top_k": soft_top_k_, "gate": gate, "attention": attention, "graphs": graphs,
            "accuracy": accuracy, "speed": speed}

if __name__ == "__main__":
    if sys.argv[1:] == ["tables"]:
        sys.exit(print("\n".join(tables())))
    with torch.no_grad():
        for name in sys.argv[1:] or PICTURES:
            PICTURES[name]()
            print(f"wrote assets/{name}.png")
