"""
Draw the README's pictures again, from the code and the pruner that ships.

    python assets/draw.py        # seconds; writes assets/kept.png
"""
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from infer import dimmed, load_pruner, seen_by_model  # noqa: E402
from model import load, read_image  # noqa: E402
from throttler import select  # noqa: E402

SHAPES = HERE.parent / "data/shapes"
ASKED = ["What color is the star?", "How many shapes are there?", "Where is the cross?",
         "What shape is the blue thing?", "Is there a red cross?", "Where is the square?"]


def kept():
    """Six scenes: the picture, the tokens that are kept, a question, and the answers with all and with few tokens."""
    vlm, (scorer, settings) = load(SHAPES / "llava"), load_pruner(SHAPES / "pruner")
    side, K = 192, settings["keep"]
    sheet = Image.new("RGB", (3 * (2 * side + 34), 2 * (side + 66)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=17)
    for i, (path, question) in enumerate(zip(sorted((SHAPES / "examples").glob("*.jpg")), ASKED)):
        inputs = vlm.inputs([read_image(path)], [question])
        X = vlm.encode(inputs)
        keep = select(scorer(X), K)
        image = seen_by_model(vlm, inputs)
        x, y = 12 + i % 3 * (2 * side + 34), 10 + i // 3 * (side + 66)
        sheet.paste(image.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        sheet.paste(dimmed(image, keep[0], vlm.tokens, side), (x + side + 8, y))
        draw.text((x, y + side + 6), question, "black", font)
        draw.text((x, y + side + 28), f"all {vlm.tokens}: {vlm.generate(inputs, X)[0]}", "gray", font)
        draw.text((x + side + 8, y + side + 28), f"these {K}: {vlm.generate(inputs, X, keep)[0]}", (190, 30, 30), font)
    sheet.save(HERE / "kept.png", optimize=True)


if __name__ == "__main__":
    kept()
