"""
Pictures: bring any of them into one form, and draw what a pruner keeps.

    image = read_image("img.jpg")                                   # upright RGB, as a person sees it
    frame(image, vlm.boxes(inputs), alpha)                          # each patch as bright as its alpha
    sheet(image, boxes, scores, keep, X, question, answers)         # what infer.py --show writes
"""
import io
import math
import textwrap
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.files import InputError, short

RASTER = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA"]  # an EPS would start Ghostscript
TURN = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF's orientation -> pillow's Transpose
RED, BLUE = (220, 30, 30), (40, 70, 220)
HEAT = [(20, 10, 60), (210, 60, 80), (250, 240, 160)]  # cosine similarity 0, ½, 1


def read_image(source, processor=None):
    """A picture from a path, bytes or a stream, as upright RGB on white. InputError if it cannot be read, if it is too
    large or too thin, or if a VLM's image processor, where given, refuses it."""
    name = source if isinstance(source, (str, Path)) else "the picture"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=RASTER) as image:
                if max(image.size) > 200 * min(image.size):  # a processor that scales its short side fills the memory
                    raise ValueError(f"{image.width} x {image.height} pixels, thinner than 1:200")
                image = upright(image)
            if processor:
                processor(images=image)
        return image
    except Exception as e:  # a decoder may fail in any way
        raise InputError(f"{name}: cannot be read as an image ({short(e)}); give another, as JPEG or PNG") from None


def upright(image):
    """An open picture as RGB: turned as its EXIF says, grey of any depth scaled to 0 … 255, transparency on white."""
    try:
        turn = TURN.get(image.getexif().get(0x0112))
    except Exception:  # broken metadata of an intact picture
        turn = None
    if image.mode[0] in "IF":  # 12, 16 or 32 bits, or floats, which convert() would cut off at 255
        whites = [65535] if image.format in ("PNG", "PPM") else [1, 255, 4095, 65535]
        image = image.convert("F")
        dark, bright = image.getextrema()
        if not math.isfinite(bright - dark):
            raise ValueError("its samples are no numbers")
        black, white = min(dark, 0), min([value for value in whites if value >= bright], default=bright)
        scale = 255 / (white - black)
        samples = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.float32)
        clear = samples == image.info.pop("transparency", math.nan)  # one grey may stand for transparent
        image = image.point(lambda value: value * scale + (0.5 - black * scale)).convert("L")  # rounded
        image.paste(255, mask=Image.frombytes("L", image.size, (255 * clear).byte().numpy().tobytes()))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def mask(size, boxes, values):
    """A grey picture of that size: `values` (N,) in 0 … 255 in the boxes (N, 4). Where boxes overlap, the largest."""
    picture = Image.new("L", size)
    pen = ImageDraw.Draw(picture)
    for i in values.argsort().tolist():
        x0, y0, x1, y1 = (boxes[i] * torch.tensor(size).repeat(2)).round().int().tolist()
        if x1 > x0 and y1 > y0:  # a class token has no place
            pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill=int(values[i]))
    return picture


def frame(image, boxes, alpha):
    """The picture with each patch as bright as its alpha (N,): clear at 1, nearly white at 0. boxes (N, 4): 0 … 1."""
    pale = Image.blend(image, Image.new("RGB", image.size, "white"), 0.8)
    return Image.composite(image, pale, mask(image.size, boxes, 255 * alpha))


def seen_by_model(vlm, inputs, image):
    """The first picture of `inputs` as vlm.boxes() counts: cropped where the model crops, else the whole image."""
    if vlm.tokens is None:
        return image
    processor = vlm.processor.image_processor
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    pixels = ((inputs["pixel_values"][0].float().cpu() * std + mean).clamp(0, 1) * 255).round().byte()  # (3, H, W)
    return Image.frombytes("RGB", pixels.shape[:0:-1], pixels.permute(1, 2, 0).contiguous().numpy().tobytes())


def sheet(image, boxes, scores, keep, X, question, answers, side=400):
    """What was kept, on one sheet: the patches; the highest and the lowest scores; cosine similarities of those tokens.

    image: as the model saw it. boxes (N, 4), scores (N,), keep (K,), X (N, d). answers: (by all tokens, by those kept).
    """
    N, K, order = len(scores), len(keep), scores.argsort(descending=True)
    top, bottom = order[:K], order[K:][-K:]
    scale = side / max(image.size)
    image = image.resize([max(1, round(scale * length)) for length in image.size], Image.Resampling.BICUBIC)
    kept = frame(image, boxes, torch.zeros(N).index_fill(0, keep, 1))
    colored = image.copy()
    for color, tokens in ((RED, top), (BLUE, bottom)):
        colored.paste(color, (0, 0), mask(image.size, boxes, torch.zeros(N).index_fill(0, tokens, 150)))
    x = F.normalize(X[torch.cat([top, bottom])].float(), dim=-1)
    cosine = ((x @ x.T).clamp(0, 1) * 255).byte().contiguous()  # (2K, 2K), the highest scores first
    cosine = Image.frombytes("L", cosine.shape, cosine.numpy().tobytes()).resize((side, side), Image.Resampling.NEAREST)
    panels = [(kept, [(None, f"{K} tokens kept, {N - K} dropped (pale)")]),
              (colored, [(RED, f"the {K} highest scores"), (BLUE, f"the {len(bottom)} lowest scores")]),
              (ImageOps.colorize(cosine, HEAT[0], HEAT[2], HEAT[1]),
               [(None, "cosine similarity of these:"), (HEAT[0], "0"), (HEAT[1], "0.5"), (HEAT[2], "1")])]

    text = [f"What is kept: {K} of {N} visual tokens", f"Question: {question}", f"Answer by all tokens: {answers[0]}",
            f"Answer by the kept tokens: {answers[1]}"]
    lines = [line for words in text for line in textwrap.wrap(words, 130, max_lines=2, placeholder=" …")]
    top = 20 + 22 * len(lines)
    paper = Image.new("RGB", (3 * side + 40, top + side + 40), "white")
    pen, font = ImageDraw.Draw(paper), ImageFont.load_default(15)
    pen.multiline_text((10, 10), "\n".join(lines), fill="black", font=font, spacing=6)
    for i, (panel, legend) in enumerate(panels):
        x = 10 + i * (side + 10)
        paper.paste(panel, (x, top))
        for color, words in legend:
            if color:
                pen.rectangle((x, top + side + 12, x + 14, top + side + 26), fill=color)
                x += 20
            pen.text((x, top + side + 10), words, fill="black", font=font)
            x += 15 + pen.textlength(words, font=font)
    return paper
