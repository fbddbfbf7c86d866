"""
Charts and diagrams with pillow alone. Everything is drawn at twice its size; half() reduces it, for smooth edges.

    half(line_chart({"scorer": [(8, 95.2), (16, 99.5)]}, "tokens", "retention", [8, 16], [90, 95, 100])).save("x.png")
"""
import math

from PIL import Image, ImageDraw, ImageFont

COLORS = [(200, 60, 50), (31, 90, 160), (60, 140, 80), (150, 100, 180), (220, 140, 40), (110, 110, 110), (20, 150, 160),
          (120, 80, 50), (230, 110, 170), (150, 160, 30)]
LOSSES = {"full_loss": "grey", "soft_loss": "blue", "hard_loss": "green", "deployed_loss": "red"}
INK, PALE = (40, 40, 40), (215, 215, 215)


def font(size=38):
    return ImageFont.load_default(size=size)


def canvas(width, height):
    image = Image.new("RGB", (width, height), "white")
    return image, ImageDraw.Draw(image)


def half(image):
    return image.reduce(2)


def arrow(draw, *points):
    """Along these points; the head at the last."""
    draw.line(points, INK, 5, joint="curve")
    (x0, y0), (x1, y1) = points[-2:]
    length = math.hypot(x1 - x0, y1 - y0)
    dx, dy = 24 * (x1 - x0) / length, 24 * (y1 - y0) / length
    draw.polygon([(x1, y1), (x1 - dx - dy / 2, y1 - dy + dx / 2), (x1 - dx + dy / 2, y1 - dy - dx / 2)], INK)


def box(draw, x, y, text, fill="white"):
    """A box 236 x 100 with its centre at x, y."""
    draw.rounded_rectangle((x - 118, y - 50, x + 118, y + 50), 16, fill, INK, 3)
    draw.text((x, y), text, INK, font(36), anchor="mm")


def line_chart(series, xlabel, ylabel, x_ticks, y_ticks, colors=COLORS, warp_x=float, warp_y=float):
    """A line for each of series {label: [(x, y), …]}, and a legend at the right. A later line is thinner than those
    before it, so that none hides another. warp: a monotone function that stretches an axis. Ticks span the axes."""
    image, draw = canvas(2000, 1100)
    left, bottom, width, height = 170, 950, 1660 - max(draw.textlength(label, font()) for label in series), 850

    def at(x, y):
        x = (warp_x(x) - warp_x(x_ticks[0])) / (warp_x(x_ticks[-1]) - warp_x(x_ticks[0]))
        y = (warp_y(y) - warp_y(y_ticks[0])) / (warp_y(y_ticks[-1]) - warp_y(y_ticks[0]))
        return left + x * width, bottom - y * height

    draw.text((20, 20), ylabel, INK, font())
    draw.text((left + width / 2, 1080), xlabel, INK, font(), anchor="mb")
    for y in y_ticks:
        draw.line([at(x_ticks[0], y), at(x_ticks[-1], y)], PALE, 2)
        draw.text((left - 20, at(x_ticks[0], y)[1]), f"{y:g}", INK, font(), anchor="rm")
    for x in x_ticks:
        draw.line([at(x, y_ticks[0]), at(x, y_ticks[-1])], PALE, 2)
        draw.text((at(x, y_ticks[0])[0], bottom + 20), f"{x:g}", INK, font(), anchor="mt")
    for i, (label, points) in enumerate(series.items()):
        color, thickness, y = colors[i % len(colors)], 4 + 2 * (len(series) - 1 - i), 130 + 64 * i
        draw.line([at(*point) for point in points], color, thickness, joint="curve")
        draw.line([(left + width + 40, y), (left + width + 100, y)], color, thickness)
        draw.text((left + width + 120, y), label, INK, font(), anchor="lm")
    return image


def loss_chart(curve, width=640, height=360):
    """The held-out losses of a log.jsonl over the steps, from all tokens to what is deployed."""
    image = Image.new("RGB", (width, height), "white")
    pen, font, last = ImageDraw.Draw(image), ImageFont.load_default(12), max(1, curve[-1]["step"])
    highest = max(entry[name] for entry in curve for name in LOSSES)

    def at(step, loss):
        return 50 + (width - 70) * step / last, height - 30 - (height - 60) * loss / highest

    pen.rectangle((*at(0, highest), *at(last, 0)), outline="grey")
    pen.text((width - 90, height - 22), f"step {last}", fill="black", font=font)
    for loss in (0, highest / 2, highest):
        pen.text((8, at(0, loss)[1] - 6), f"{loss:.2f}", fill="black", font=font)
    for i, (name, color) in enumerate(LOSSES.items()):
        pen.line([at(entry["step"], entry[name]) for entry in curve], fill=color, width=2)
        pen.text((55 + 145 * i, 8), f"{name} {curve[-1][name]:.3f}", fill=color, font=font)
    return image
