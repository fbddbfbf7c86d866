"""
The embedded default's data: drawn scenes of one to four coloured shapes among clutter.

    python -m data.shapes.prepare        # half a minute; at once if this very code has drawn them

Writes beside this file, as data/shakespeare_char/prepare.py does in nanoGPT:

    train/*.jpg, train.json              4,000 scenes, two captions each, in COCO's captions format
    validation/*.jpg, validation.jsonl   200 others, five questions each; every choice is made here
    test/*.jpg, test.jsonl               500 others, five questions each; reported, decided nothing
    examples/*.jpg                       6 scenes to try infer.py on; these are in git
"""
import colorsys
import hashlib
import math
import random
from contextlib import suppress
from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from common.files import cli, write

FOLDER = Path(__file__).resolve().parent
SPLITS = {
    "train": 4000,
    "validation": 200,
    "test": 500,
    "examples": 6,
}
SIZE = 96  # pixels a side: 12 x 12 = 144 patches of 8
FINE = 4  # scenes are drawn four times as large and scaled down, for smooth edges

SHAPES = ["circle", "square", "triangle", "star", "cross"]
COLORS = {
    "red": (205, 40, 45),
    "green": (45, 150, 60),
    "blue": (45, 85, 205),
    "yellow": (235, 205, 50),
    "purple": (140, 60, 170),
    "orange": (240, 130, 35),
}
PLACES = ["top left", "top right", "bottom left", "bottom right"]  # 2·(lower half) + (right half)
NUMBERS = ["zero", "one", "two", "three", "four"]
HOLLOW = ["hollow circle", "hollow square", "hollow triangle"]
GREY = [f"grey {shape}" for shape in SHAPES]
STRANGE = HOLLOW + GREY
RADII = {  # distances of the corners from the centre
    "circle": [1] * 48,
    "square": [1.2] * 4,
    "triangle": [1.15] * 3,
    "star": [1.15, 0.45] * 5,
}
CLUTTER = 40  # the most in a scene: scribbles and blobs
STRANGERS = 32  # the most in a scene: outlines and grey shapes


# --- what is in a scene ---------------------------------------------------------------------------

def place_objects(rng):
    """One to four objects that do not touch: dicts of shape, color, place, x, y, r (pixels).

    Shapes and colours are distinct within a scene, so "the circle" and "the red shape" each name
    one object. No centre is within 6 pixels of a midline, so its quadrant is beyond doubt.
    """
    n = rng.randint(1, 4)
    shapes = rng.sample(SHAPES, n)
    colors = rng.sample(list(COLORS), n)
    objects, tries = [], 0
    while len(objects) < n:
        tries += 1
        if tries % 200 == 0:
            objects = []  # the first ones left no room
        r = rng.uniform(12, 18)
        x = rng.uniform(r + 1, SIZE - r - 1)
        y = rng.uniform(r + 1, SIZE - r - 1)
        clear = min(abs(x - SIZE / 2), abs(y - SIZE / 2)) >= 6
        for o in objects:
            clear &= math.hypot(x - o["x"], y - o["y"]) >= r + o["r"] + 3
        if clear:
            i = len(objects)
            place = PLACES[2 * (y > SIZE / 2) + (x > SIZE / 2)]
            objects.append(dict(shape=shapes[i], color=colors[i], place=place, x=x, y=y, r=r))
    return objects


def rgb(hue, saturation, value):
    """A colour as pillow takes it, (red, green, blue) from 0 to 255."""
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value))


def place_strangers(seed):
    """Outlines and grey shapes that no text mentions: dicts of shape, color, tone, x, y, r.

    Real pictures are full of things that nobody asks about, and so are these.
    """
    rng = random.Random(f"strangers-{seed}")
    strangers = []
    for _ in range(rng.randint(0, STRANGERS)):
        tone = rng.random()
        x = rng.uniform(0, SIZE)
        y = rng.uniform(0, SIZE)
        if rng.random() < 0.5:
            shape = rng.choice(HOLLOW)
            r = rng.uniform(8, 12)
            color = rgb(tone, rng.uniform(0.6, 1), rng.uniform(0.5, 1))
        else:
            shape = rng.choice(GREY)
            r = rng.uniform(5, 8)
            color = rgb(0, 0, 0.15 + 0.8 * tone)
        strangers.append(dict(shape=shape, color=color, tone=tone, x=x, y=y, r=r))
    return strangers


# --- the picture ----------------------------------------------------------------------------------

def draw_scene(seed):
    """Draw one scene from a seed of any kind: (picture, objects)."""
    rng = random.Random(seed)
    objects = place_objects(rng)
    image = draw_background(rng)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(0, CLUTTER)):
        draw_clutter(draw, rng)
    for stranger in place_strangers(seed):
        draw_shape(draw, stranger, stranger["color"], FINE)
    for o in objects:
        color = [min(255, c + rng.randint(-18, 18)) for c in COLORS[o["color"]]]
        draw_shape(draw, o, tuple(color), FINE)
    return image.resize((SIZE, SIZE), Image.BOX), objects


def draw_background(rng):
    """A random texture of two muted tones, FINE times as large: blobs, grain or stripes."""
    w, h = rng.choice([(5, 5), (12, 12), (32, 32), (16, 1), (1, 16)])
    noise = Image.frombytes("L", (w, h), rng.randbytes(w * h))
    texture = noise.resize((SIZE, SIZE))
    level = rng.randint(70, 190)
    dark = [level - 25 + rng.randint(-15, 15) for _ in range(3)]
    bright = [level + 25 + rng.randint(-15, 15) for _ in range(3)]
    colored = ImageOps.colorize(texture, dark, bright)
    return colored.resize((SIZE * FINE, SIZE * FINE), Image.BILINEAR)


def corners(x, y, radii, turn=0.0):
    """The corners of a polygon around (x, y): one at each of these distances, evenly turned."""
    points = []
    for i, r in enumerate(radii):
        angle = turn + 2 * math.pi * i / len(radii)
        points.append((x + r * math.cos(angle), y + r * math.sin(angle)))
    return points


def draw_clutter(draw, rng):
    """Draw a scribble or a blob, at a random place and in a random colour."""
    x = rng.uniform(0, SIZE * FINE)
    y = rng.uniform(0, SIZE * FINE)
    color = rgb(rng.random(), rng.uniform(0.2, 1), rng.uniform(0.15, 1))
    if rng.random() < 0.5:
        n = rng.randint(2, 9)
        points = [(x + rng.gauss(0, 28), y + rng.gauss(0, 28)) for _ in range(n)]
        draw.line(points, color, rng.randint(3, 10), joint="curve")
    else:
        n = rng.randint(5, 9)
        size = rng.uniform(10, 24)
        radii = [size * rng.uniform(0.4, 1) for _ in range(n)]
        draw.polygon(corners(x, y, radii), color)


def draw_shape(draw, thing, color, scale):
    """Draw an object or a stranger, `scale` times as large as it is."""
    *look, shape = thing["shape"].split()
    x, y, r = [thing[name] * scale for name in "xyr"]
    fill, outline = color, None
    if look == ["hollow"]:
        fill, outline = None, color
    if shape == "cross":
        arm = 0.35 * r
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill)
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill)
        return
    turn = -math.pi / 2
    if shape == "square":
        turn = math.pi / 4
    radii = [r * share for share in RADII[shape]]
    draw.polygon(corners(x, y, radii, turn), fill, outline, 3 * scale)


# --- the texts ------------------------------------------------------------------------------------

def named(color, shape):
    """a red star, an orange cross"""
    article = "an" if color == "orange" else "a"
    return f"{article} {color} {shape}"


def caption(objects, rng):
    """A sentence with the number of objects, and of each its colour, shape and place, shuffled."""
    n = len(objects)
    parts = []
    for o in rng.sample(objects, n):
        parts.append(f"{named(o['color'], o['shape'])} at the {o['place']}")
    if n == 1:
        return f"One shape: {parts[0]}."
    return f"{NUMBERS[n].capitalize()} shapes: {', '.join(parts[:-1])} and {parts[-1]}."


def questions(objects, rng):
    """One question of each kind about one of the objects: [(kind, question, answer), …]."""
    o = rng.choice(objects)
    right = o["color"], o["shape"]
    present = [(p["color"], p["shape"]) for p in objects]
    absent = [pair for pair in product(COLORS, SHAPES) if pair not in present]
    near = [(c, s) for c, s in absent if c == o["color"] or s == o["shape"]]  # one word is wrong
    pair = rng.choice([right, right, rng.choice(absent), rng.choice(near)])
    exists = "yes" if pair in present else "no"
    return [
        ("color", f"What color is the {o['shape']}?", o["color"]),
        ("shape", f"What shape is the {o['color']} thing?", o["shape"]),
        ("where", f"Where is the {o['shape']}?", o["place"]),
        ("count", "How many shapes are there?", NUMBERS[len(objects)]),
        ("exists", f"Is there {named(*pair)}?", exists),
    ]


# --- the files ------------------------------------------------------------------------------------

def prepare(splits=SPLITS):
    """Draw the scenes and write the JSON files, unless this very code has; returns their folder."""
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    scenes = [(split, i, f"{split}/{i:05d}.jpg") for split, n in splits.items() for i in range(n)]
    names = ["train.json", "validation.jsonl", "test.jsonl", *(name for *_, name in scenes)]
    complete = all((FOLDER / name).exists() for name in names)
    if complete and code in (FOLDER / "train.json").read_text():
        return FOLDER

    for split in splits:
        with suppress(OSError):  # write() reports a folder that cannot be made
            (FOLDER / split).mkdir(exist_ok=True)
    images = []
    annotations = []
    rows = {"validation": [], "test": []}
    for split, i, name in tqdm(scenes, desc="drawing scenes", dynamic_ncols=True):
        image, objects = draw_scene(f"{split}-{i}")  # a seed of its own: the splits are disjoint
        rng = random.Random(f"text-{split}-{i}")
        if split != "examples" or not (FOLDER / name).exists():
            write(FOLDER / name, image)
        if split == "train":
            images.append(dict(id=i, file_name=name, height=SIZE, width=SIZE))
            for j in range(2):
                text = caption(objects, rng)
                annotations.append(dict(id=2 * i + j, image_id=i, caption=text))
        elif split in rows:
            for kind, text, answer in questions(objects, rng):
                rows[split].append(dict(question_id=len(rows[split]), image=name, text=text,
                                        label=answer, category=kind))
    for split, lines in rows.items():
        write(FOLDER / f"{split}.jsonl", lines)
    coco = dict(info={"code": code}, images=images, annotations=annotations)
    write(FOLDER / "train.json", coco)  # the last: all is there, and by which code
    return FOLDER


if __name__ == "__main__":
    cli(prepare)
