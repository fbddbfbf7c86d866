"""
Charts and diagrams by pillow alone, drawn at twice their size and reduced, for smooth edges.

    lines = {"scorer": [(8, 95.2), (16, 99.5)]}
    line_chart(lines, "tokens", "retention", [8, 16], [90, 95, 100]).save("x.png")
"""
import math

from PIL import Image, ImageDraw, ImageFont

INK, PALE = "#282828", "#d7d7d7"
RED, BLUE = "#cd2d28", "#1f5aa0"
COLORS = [RED, BLUE, "#32874b", "#915ab4", "#dc821e", "#5f5f5f", "#0f919b", "#7d5537", "#dc5aa0",
          "#878c14"]
FONT = ImageFont.load_default(38)


def canvas(width, height):
    image = Image.new("RGB", (width, height), "white")
    return image, ImageDraw.Draw(image)


def label(draw, x, y, text, anchor, color=INK, font=FONT):
    """Text with its anchor (pillow's: "mm" is the middle, "mt" the middle of its top) at x, y."""
    draw.text((x, y), text, color, font, anchor)


def arrow(draw, *points):
    """An arrow along these points, its head at the last one."""
    draw.line(points, INK, 5, joint="curve")
    (x0, y0), (x, y) = points[-2:]
    scale = 24 / math.hypot(x - x0, y - y0)  # the head is 24 long, and as wide
    dx, dy = scale * (x - x0), scale * (y - y0)
    left = x - dx - dy / 2, y - dy + dx / 2
    right = x - dx + dy / 2, y - dy - dx / 2
    draw.polygon([(x, y), left, right], INK)


def box(draw, x, y, text, fill):
    """A box 220 x 100 with its centre at x, y."""
    corners = (x - 110, y - 50, x + 110, y + 50)
    draw.rounded_rectangle(corners, 16, fill, INK, 3)
    label(draw, x, y, text, "mm")


def along(value, ticks, warp):
    """Where a value lies on an axis: 0 at its first tick, 1 at its last."""
    first, last = warp(ticks[0]), warp(ticks[-1])
    return (warp(value) - first) / (last - first)


def line_chart(
    series,
    xlabel,
    ylabel,
    x_ticks,
    y_ticks,
    colors=COLORS,
    bold=None,
    warp_x=float,
    warp_y=float,
):
    """A line for each of series {name: [(x, y), …]}, with its name at its right end.

    Ticks span the axes; warp is a monotone function that stretches one. The line named `bold` is
    thick and lies above the others.
    """
    image, draw = canvas(2000, 1100)
    left, top, bottom = 170, 100, 950
    right = 1840 - max(draw.textlength(name, FONT) for name in series)

    def across(x):
        return left + along(x, x_ticks, warp_x) * (right - left)

    def up(y):
        return bottom - along(y, y_ticks, warp_y) * (bottom - top)

    label(draw, 20, 20, ylabel, "lt")
    label(draw, (left + right) / 2, 1080, xlabel, "mb")
    for tick in y_ticks:
        y = up(tick)
        draw.line((left, y, right, y), PALE, 2)
        label(draw, left - 20, y, f"{tick:g}", "rm")
    for tick in x_ticks:
        x = across(tick)
        draw.line((x, top, x, bottom), PALE, 2)
        label(draw, x, bottom + 20, f"{tick:g}", "mt")

    color = dict(zip(series, colors))
    for name in sorted(series, key=lambda name: name == bold):
        width = 14 if name == bold else 6
        points = [(across(x), up(y)) for x, y in series[name]]
        draw.line(points, color[name], width, joint="curve")
    ends = {name: up(points[-1][1]) for name, points in series.items()}
    height = 1100
    for name in sorted(ends, key=ends.get, reverse=True):  # from the bottom up
        height = min(ends[name], height - 54)
        draw.line((right, ends[name], right + 50, height), color[name], 3)
        label(draw, right + 60, height, name, "lm", color[name])
    return image.reduce(2)  # half the size, with smooth edges
