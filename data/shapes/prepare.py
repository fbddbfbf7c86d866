"""
The embedded default's data: scenes of one to three coloured shapes, drawn from a seed.

    python data/shapes/prepare.py        # a few seconds; draws only what is missing

Writes, beside this file (as data/shakespeare_char/prepare.py does in nanoGPT):

    train/*.jpg, train.json         4,000 scenes, two captions each, in COCO's captions format
    test/*.jpg, questions.jsonl     300 other scenes, one question of each of five kinds a scene,
                                    in LLaVA's evaluation format plus `label` and `category`
    examples/*.jpg                  6 scenes to try infer.py on; these are in git, the rest is not

Training reads captions only; the questions are never trained on by the pruner.
"""
import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
SIZE = 96  # pixels a side: 12 x 12 = 144 patches of 8
SHAPES = ["circle", "square", "triangle", "star", "cross"]
COLORS = {
    "red": (205, 40, 45), "green": (45, 150, 60), "blue": (45, 85, 205),
    "yellow": (235, 205, 50), "purple": (140, 60, 170), "orange": (240, 130, 35),
}
PLACES = ["top left", "top right", "bottom left", "bottom right"]  # index: 2·(lower half) + (right half)
NUMBERS = ["zero", "one", "two", "three"]
SPLITS = {"train": 4000, "test": 300, "examples": 6}


def draw_scene(seed):
    """Draw one scene. Returns (image, objects); every object has shape, color, place, x, y, r (pixels).

    Shapes and colours are distinct within a scene, so that "the circle" and "the red shape" name one object; no
    centre lies within 8 pixels of a midline, so that its quadrant is beyond doubt.
    """
    rng = random.Random(seed)
    objects = []
    n = rng.randint(1, 3)
    shapes, colors = rng.sample(SHAPES, n), rng.sample(list(COLORS), n)
    while len(objects) < n:
        r = rng.uniform(9, 14)
        x, y = rng.uniform(r + 1, SIZE - r - 1), rng.uniform(r + 1, SIZE - r - 1)
        if min(abs(x - SIZE / 2), abs(y - SIZE / 2)) < 8:
            continue
        if any(math.hypot(x - o["x"], y - o["y"]) < r + o["r"] + 4 for o in objects):
            continue
        place = PLACES[2 * (y > SIZE / 2) + (x > SIZE / 2)]
        objects.append(dict(shape=shapes[len(objects)], color=colors[len(objects)], place=place, x=x, y=y, r=r))

    # background: a random texture (blobs, grain or stripes) between two muted tones
    w, h = rng.choice([(5, 5), (12, 12), (32, 32), (16, 1), (1, 16)])
    texture = Image.frombytes("L", (w, h), rng.randbytes(w * h)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    level = rng.randint(70, 190)
    tones = [tuple(min(255, max(0, level + s * 25 + rng.randint(-15, 15))) for _ in range(3)) for s in (-1, 1)]
    image = ImageOps.colorize(texture, *tones)

    # the shapes, drawn at four times the size and scaled down, for smooth edges
    s = 4
    mask = Image.new("L", (SIZE * s, SIZE * s))
    for o in objects:
        mask.paste(0, (0, 0, SIZE * s, SIZE * s))
        draw_shape(ImageDraw.Draw(mask), o["shape"], o["x"] * s, o["y"] * s, o["r"] * s)
        color = tuple(min(255, max(0, c + rng.randint(-18, 18))) for c in COLORS[o["color"]])
        image.paste(color, (0, 0), mask.resize((SIZE, SIZE), Image.Resampling.BOX))
    return image, objects


def draw_shape(draw, shape, x, y, r):
    """Fill one shape of radius r around (x, y)."""
    def polygon(radii, turn=-math.pi / 2):
        angles = [turn + 2 * math.pi * i / len(radii) for i in range(len(radii))]
        draw.polygon([(x + q * r * math.cos(a), y + q * r * math.sin(a)) for q, a in zip(radii, angles)], fill=255)

    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "square":
        draw.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=255)
    elif shape == "triangle":
        polygon([1.15] * 3)
    elif shape == "star":
        polygon([1.15, 0.45] * 5)
    elif shape == "cross":
        draw.rectangle((x - r, y - 0.35 * r, x + r, y + 0.35 * r), fill=255)
        draw.rectangle((x - 0.35 * r, y - r, x + 0.35 * r, y + r), fill=255)


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


def write(path, text):
    """Write a text file in one step: to a temporary name, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def prepare(splits=SPLITS):
    """Draw every missing scene, write the two JSON files, and return the folder they are in."""
    jobs = [(split, i, f"{split}/{i:05d}.jpg") for split, n in splits.items() for i in range(n)]
    files = ["train.json", "questions.jsonl", *(name for *_, name in jobs)]
    if all((HERE / name).exists() for name in files):
        return HERE
    images, annotations, lines = [], [], []
    for split, i, name in tqdm(jobs, desc="drawing scenes", unit="scene", dynamic_ncols=True):
        image, objects = draw_scene(f"{split}-{i}")  # a seed of its own for each scene: the splits are disjoint
        rng = random.Random(f"text-{split}-{i}")
        if not (HERE / name).exists():
            (HERE / split).mkdir(exist_ok=True)
            temporary = HERE / split / f"{i}.tmp"
            image.save(temporary, "JPEG", quality=92)
            temporary.replace(HERE / name)
        if split == "train":
            images.append(dict(id=i, file_name=name, height=SIZE, width=SIZE))
            annotations += [dict(id=2 * i + j, image_id=i, caption=caption(objects, rng)) for j in range(2)]
        if split == "test":
            for kind, text, label in questions(objects, rng):
                lines.append(dict(question_id=len(lines), image=name, text=text, label=label, category=kind))
    write(HERE / "train.json", json.dumps(dict(images=images, annotations=annotations)))
    write(HERE / "questions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return HERE


if __name__ == "__main__":
    prepare()
