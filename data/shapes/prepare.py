"""
The embedded default's data: drawn scenes of one to four coloured shapes among clutter.

    python -m data.shapes.prepare        # half a minute; at once if this very code has drawn them before

Writes, beside this file (as data/shakespeare_char/prepare.py does in nanoGPT):

    train/*.jpg, train.json              4,000 scenes, two captions each, in COCO's captions format
    validation/*.jpg, validation.jsonl   200 other scenes with five questions each; every choice is made on these
    test/*.jpg, test.jsonl               500 other scenes with five questions each; reported, and chose nothing
    examples/*.jpg                       6 scenes to try infer.py on; these are in git, the rest is not
"""
import colorsys
import hashlib
import math
import random
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from common.files import cli, write

FOLDER = Path(__file__).resolve().parent
SIZE = 96  # pixels a side: 12 x 12 = 144 patches of 8
FINE = 4  # scenes are drawn at four times the size and scaled down, for smooth edges
SHAPES = ["circle", "square", "triangle", "star", "cross"]
COLORS = {
    "red": (205, 40, 45), "green": (45, 150, 60), "blue": (45, 85, 205),
    "yellow": (235, 205, 50), "purple": (140, 60, 170), "orange": (240, 130, 35),
}
PLACES = ["top left", "top right", "bottom left", "bottom right"]  # index: 2·(lower half) + (right half)
NUMBERS = ["zero", "one", "two", "three", "four"]
CLUTTER, STRANGERS = 40, 32  # scribbles and blobs, and larger things that have no name, in a scene: at the most
STRANGE = [*(f"hollow {s}" for s in SHAPES[:3]), *(f"grey {s}" for s in SHAPES)]
SPLITS = {"train": 4000, "validation": 200, "test": 500, "examples": 6}


def place_objects(rng):
    """One to four objects that do not touch: dicts of shape, color, place, x, y, r (pixels).

    Shapes and colours are distinct within a scene, so that "the circle" and "the red shape" name one object. No
    centre lies within 6 pixels of a midline, so that its quadrant is beyond doubt.
    """
    n = rng.randint(1, 4)
    shapes, colors = rng.sample(SHAPES, n), rng.sample(list(COLORS), n)
    objects, tries = [], 0
    while len(objects) < n:
        tries += 1
        if tries % 200 == 0:
            objects = []  # the first ones left no room
        r = rng.uniform(12, 18)
        x, y = rng.uniform(r + 1, SIZE - r - 1), rng.uniform(r + 1, SIZE - r - 1)
        clear = min(abs(x - SIZE / 2), abs(y - SIZE / 2)) >= 6
        if clear and all(math.hypot(x - o["x"], y - o["y"]) >= r + o["r"] + 3 for o in objects):
            place, i = PLACES[2 * (y > SIZE / 2) + (x > SIZE / 2)], len(objects)
            objects.append(dict(shape=shapes[i], color=colors[i], place=place, x=x, y=y, r=r))
    return objects


def place_strangers(seed):
    """Outlines and grey shapes, which no text speaks of: dicts of shape, color, tone (0 … 1), x, y, r (pixels)."""
    rng, things = random.Random(f"strangers-{seed}"), []
    for _ in range(rng.randint(0, STRANGERS)):
        tone, x, y = rng.random(), rng.uniform(0, SIZE), rng.uniform(0, SIZE)
        if rng.random() < 0.5:
            shape, r = rng.choice(STRANGE[:3]), rng.uniform(8, 12)
            color = colorsys.hsv_to_rgb(tone, rng.uniform(0.6, 1), rng.uniform(0.5, 1))
        else:
            shape, r, color = rng.choice(STRANGE[3:]), rng.uniform(5, 8), [0.15 + 0.8 * tone] * 3
        things.append(dict(shape=shape, color=tuple(int(255 * c) for c in color), tone=tone, x=x, y=y, r=r))
    return things


def draw_scene(seed):
    """Draw one scene from a seed of any kind. Returns (picture, objects)."""
    rng = random.Random(seed)
    objects, side = place_objects(rng), SIZE * FINE

    # background: a random texture (blobs, grain or stripes) between two muted tones
    w, h = rng.choice([(5, 5), (12, 12), (32, 32), (16, 1), (1, 16)])
    texture = Image.frombytes("L", (w, h), rng.randbytes(w * h)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    level = rng.randint(70, 190)
    tones = [tuple(min(255, max(0, level + s * 25 + rng.randint(-15, 15))) for _ in range(3)) for s in (-1, 1)]
    image = ImageOps.colorize(texture, *tones).resize((side, side), Image.Resampling.BILINEAR)

    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(0, CLUTTER)):
        draw_clutter(draw, rng)
    for o in place_strangers(seed):
        draw_shape(draw, o, o["color"], FINE)
    for o in objects:
        draw_shape(draw, o, tuple(min(255, max(0, c + rng.randint(-18, 18))) for c in COLORS[o["color"]]), FINE)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX), objects


def around(x, y, radii, turn=0.0):
    """The corners of a polygon around (x, y): one at each of these distances, evenly turned."""
    angles = [turn + 2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(radii, angles)]


def draw_clutter(draw, rng):
    """Draw one small thing, a scribble or a blob, at a random place and in a random colour."""
    x, y = rng.uniform(0, SIZE * FINE), rng.uniform(0, SIZE * FINE)
    color = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.2, 1), rng.uniform(0.15, 1)))
    if rng.random() < 0.5:
        points = [(x + rng.gauss(0, 28), y + rng.gauss(0, 28)) for _ in range(rng.randint(2, 9))]
        draw.line(points, fill=color, width=rng.randint(3, 10), joint="curve")
    else:
        n, size = rng.randint(5, 9), rng.uniform(10, 24)
        draw.polygon(around(x, y, [size * rng.uniform(0.4, 1) for _ in range(n)]), color)


def draw_shape(draw, o, color, scale):
    """Draw an object or a stranger, `scale` times as large as it is."""
    (*look, shape), x, y, r = o["shape"].split(), o["x"] * scale, o["y"] * scale, o["r"] * scale
    fill, outline = (None, color) if look == ["hollow"] else (color, None)
    if shape == "cross":
        draw.rectangle((x - r, y - 0.35 * r, x + r, y + 0.35 * r), fill)
        draw.rectangle((x - 0.35 * r, y - r, x + 0.35 * r, y + r), fill)
    else:
        radii = {"circle": [1] * 48, "square": [1.2] * 4, "triangle": [1.15] * 3, "star": [1.15, 0.45] * 5}[shape]
        corners = around(x, y, [r * q for q in radii], math.pi / 4 if shape == "square" else -math.pi / 2)
        draw.polygon(corners, fill, outline, 3 * scale)


def caption(objects, rng):
    """One sentence that names the number, and every object with its colour, shape and place, in random order."""
    n, things = len(objects), rng.sample(objects, len(objects))
    parts = [f"{'an' if o['color'] == 'orange' else 'a'} {o['color']} {o['shape']} at the {o['place']}" for o in things]
    text = parts[0] if n == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return f"{NUMBERS[n].capitalize()} shape{'s' * (n > 1)}: {text}."


def questions(objects, rng):
    """One question of each kind: [(category, question, answer), …]."""
    o = rng.choice(objects)
    present = {(p["color"], p["shape"]) for p in objects}
    absent = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in present]
    near = [(c, s) for c, s in absent if c == o["color"] or s == o["shape"]]  # only one of the two words is wrong
    color, shape = rng.choice([(o["color"], o["shape"])] * 2 + [rng.choice(absent), rng.choice(near)])
    article = "an" if color == "orange" else "a"
    return [
        ("color", f"What color is the {o['shape']}?", o["color"]),
        ("shape", f"What shape is the {o['color']} thing?", o["shape"]),
        ("where", f"Where is the {o['shape']}?", o["place"]),
        ("count", "How many shapes are there?", NUMBERS[len(objects)]),
        ("exists", f"Is there {article} {color} {shape}?", "yes" if (color, shape) in present else "no"),
    ]


def prepare(splits=SPLITS):
    """Draw the scenes, unless this file as it is has drawn them; write the JSON files; return their folder."""
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    jobs = [(split, i, f"{split}/{i:05d}.jpg") for split, n in splits.items() for i in range(n)]
    files = ["train.json", "validation.jsonl", "test.jsonl", *(name for *_, name in jobs)]
    if all((FOLDER / name).exists() for name in files) and code in (FOLDER / "train.json").read_text():
        return FOLDER
    images, annotations, rows = [], [], {"validation": [], "test": []}
    for split, i, name in tqdm(jobs, desc="drawing scenes", unit="scene", dynamic_ncols=True):
        image, objects = draw_scene(f"{split}-{i}")  # a seed of its own for each scene: the splits are disjoint
        rng = random.Random(f"text-{split}-{i}")
        if split != "examples" or not (FOLDER / name).exists():
            with suppress(OSError):  # where a folder cannot be made, write() says so
                (FOLDER / split).mkdir(exist_ok=True)
            write(FOLDER / name, image)
        if split == "train":
            images.append(dict(id=i, file_name=name, height=SIZE, width=SIZE))
            annotations += [dict(id=2 * i + j, image_id=i, caption=caption(objects, rng)) for j in range(2)]
        if split in rows:
            for kind, text, said in questions(objects, rng):
                rows[split].append(dict(question_id=len(rows[split]), image=name, text=text, label=said, category=kind))
    for split, lines in rows.items():
        write(FOLDER / f"{split}.jsonl", lines)
    write(FOLDER / "train.json", dict(info={"code": code}, images=images, annotations=annotations))  # all is there
    return FOLDER


if __name__ == "__main__":
    cli(prepare)
