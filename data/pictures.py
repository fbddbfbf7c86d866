"""
Pictures: bring any of them into one form, and draw what a pruner keeps.

    image = read_image("img.jpg")                            # upright RGB, as a person sees it
    frame(image, vlm.boxes(inputs), alpha)                   # each patch as bright as its alpha
    sheet(image, boxes, scores, keep, X, question, answers)  # what infer.py --show writes
"""
import io
import math
import textwrap
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError

from common.files import InputError, out_of_memory, short

# an EPS would start Ghostscript
RASTER = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA"]
PIXELS = 89_478_485  # of a decoded picture at most: three bytes of each are 256 MB
Image.MAX_IMAGE_PIXELS = None  # pillow counts before a JPEG is made smaller; decode() counts after
FILE = 2 ** 30  # bytes; /dev/zero has more
TURN = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF's orientation -> pillow's Transpose
RED, BLUE = (220, 30, 30), (40, 70, 220)
HEAT = [(20, 10, 60), (210, 60, 80), (250, 240, 160)]  # cosine similarity 0, ½, 1

# nobody reads the comments of a PNG; pillow gives up the picture when one has a megabyte
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


# --- read -----------------------------------------------------------------------------------------

def read_image(source, processor=None):
    """A picture from a path or a stream, as upright RGB on white. InputError, with the cure, if it
    cannot be read, or if a VLM's image processor, where given, refuses it."""
    name, content = "the picture", b""
    cure = "get it once more, or save it anew as JPEG or PNG"
    try:
        if isinstance(source, (str, Path)):
            name = source
            source = open(name, "rb")
        with source:
            content = source.read(FILE)
        image = decode(content)
        if processor:
            processor(images=image)
        return image
    except InputError as e:
        reason, cure = e.args
    except Exception as e:  # a decoder may fail in any way
        if out_of_memory(e):
            raise
        reason = short(e)
        if content.startswith(b"version https://git-lfs"):
            reason, cure = "it is a Git LFS pointer", "run git lfs pull"
        elif isinstance(e, UnidentifiedImageError):
            reason = f"it is none of {', '.join(RASTER)}, or damaged"
        elif getattr(e, "errno", None):
            reason, cure = e.strerror, "check its name and its permissions"
    raise InputError(f"{name}: cannot be read as an image ({reason}); {cure}")


def decode(content):
    """A file's bytes as upright RGB. InputError(reason, cure) for a size that is not for models."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content), formats=RASTER) as image:
            image.verify()  # a PNG's checksums, which pillow does not look at when it decodes
        with Image.open(io.BytesIO(content), formats=RASTER) as image:
            width, height = image.size
            if max(width, height) > 200 * min(width, height):
                # a processor that scales its short side would fill the memory
                raise InputError(f"{width} x {height} pixels", "crop it: at most 1:200 will do")
            fraction = 1
            while width * height > fraction ** 2 * PIXELS:
                fraction *= 2
            # a JPEG can be decoded at a half, a quarter, an eighth; nothing else can
            image.draft(image.mode, (width // fraction, height // fraction))
            if image.width * image.height > PIXELS:
                raise InputError(f"{width} x {height} pixels", "make it smaller than 89 megapixels")
            return upright(image)


def upright(image):
    """An open picture as RGB: turned as its EXIF says, grey of any depth scaled to 0 … 255,
    transparency on white."""
    transparent_as_scaled(image)
    try:
        turn = TURN.get(image.getexif().get(0x0112))
    except Exception:  # broken metadata of an intact picture
        turn = None
    if image.mode[0] in "IF":  # 12, 16 or 32 bits, or floats, which convert() would cut off at 255
        image = grey_in_8_bits(image)
    if image.has_transparency_data:
        named = "transparency" in image.info  # a colour, not a channel of the file
        image = image.convert("RGBA")
        seen = named or image.getchannel("A").getbbox()
        if seen or not image.convert("RGB").getbbox():  # else the channel was never filled
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def transparent_as_scaled(image):
    """A PNG may name one colour that stands for transparent. Pillow scales samples of 2, 4 and 16
    bits to 8, and leaves that colour as it is."""
    clear = image.info.get("transparency")
    if image.format != "PNG" or not image.tile or clear is None:
        return
    samples = image.tile[0][3]  # pillow's name of the samples in the file, until it reads them
    if samples in ("L;2", "L;4"):
        image.info["transparency"] = clear * {"L;2": 85, "L;4": 17}[samples]
    if samples == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def grey_in_8_bits(image):
    """Grey of more than 8 bits, from black to the white of its kind, scaled to 0 … 255."""
    whites = [1, 255, 4095, 65535]
    if image.format in ("PNG", "PPM"):
        whites = [65535]
    image = image.convert("F")
    dark, bright = image.getextrema()
    if not math.isfinite(bright - dark):
        raise ValueError("its samples are no numbers")
    black = min(dark, 0)
    white = min((value for value in whites if value >= bright), default=bright)
    scale = 255 / (white - black)
    clear = image.info.pop("transparency", None)
    grey = image.point(lambda value: value * scale + (0.5 - black * scale)).convert("L")  # rounded
    if clear is not None:
        samples = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.float32)
        where = (255 * (samples == clear)).byte().numpy().tobytes()
        grey.paste(255, mask=Image.frombytes("L", image.size, where))
    return grey


# --- draw -----------------------------------------------------------------------------------------

def mask(size, boxes, values):
    """A grey picture of that size: `values` (N,) in 0 … 255 in the boxes (N, 4). Where boxes
    overlap, the largest."""
    picture = Image.new("L", size)
    pen = ImageDraw.Draw(picture)
    pixels = (boxes * torch.tensor(size).repeat(2)).round().int().tolist()
    for i in values.argsort().tolist():
        x0, y0, x1, y1 = pixels[i]
        if x1 > x0 and y1 > y0:  # a class token has no place
            pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill=int(values[i]))
    return picture


def frame(image, boxes, alpha):
    """The picture with each patch as bright as its alpha (N,): clear at 1, nearly white at 0.
    boxes (N, 4): 0 … 1."""
    white = Image.new("RGB", image.size, "white")
    pale = Image.blend(image, white, 0.8)
    return Image.composite(image, pale, mask(image.size, boxes, 255 * alpha))


def seen_by_model(vlm, inputs, image):
    """The first picture of `inputs` as vlm.boxes() counts: cropped where the model crops, else the
    whole image."""
    if vlm.tokens is None:
        return image
    processor = vlm.processor.image_processor
    mean = torch.tensor(processor.image_mean).view(3, 1, 1)
    std = torch.tensor(processor.image_std).view(3, 1, 1)
    pixels = inputs["pixel_values"][0].float().cpu() * std + mean  # (3, H, W)
    pixels = (255 * pixels.clamp(0, 1)).round().byte()
    _, H, W = pixels.shape
    content = pixels.permute(1, 2, 0).contiguous().numpy().tobytes()  # (H, W, 3)
    return Image.frombytes("RGB", (W, H), content)


def chosen(N, tokens, value=1):
    """(N,): `value` for these tokens, else 0."""
    return torch.zeros(N).index_fill(0, tokens, value)


def likeness(X, side):
    """A picture of the cosine similarities of the tokens X (M, d), side x side pixels."""
    x = F.normalize(X.float(), dim=-1)
    cosine = (x @ x.T).clamp(0, 1)  # (M, M)
    content = (255 * cosine).byte().numpy().tobytes()
    grey = Image.frombytes("L", cosine.shape, content)
    grey = grey.resize((side, side), Image.Resampling.NEAREST)
    return ImageOps.colorize(grey, HEAT[0], HEAT[2], HEAT[1])


def sheet(image, boxes, scores, keep, X, question, answers, side=400):
    """What was kept, on one sheet: the patches; the highest and the lowest scores; cosine
    similarities of those tokens, or of the kept ones where nothing scores (scores None).

    image: as the model saw it. boxes (N, 4), scores (N,), keep (K,), X (N, d). answers: (by all
    tokens, by those kept).
    """
    N, K = len(boxes), len(keep)
    scale = side / max(image.size)
    size = [max(1, round(scale * length)) for length in image.size]
    image = image.resize(size, Image.Resampling.BICUBIC)
    legend = [(None, f"{K} tokens kept, {N - K} dropped (pale)")]
    panels = [(frame(image, boxes, chosen(N, keep)), legend)]
    compared = keep
    if scores is not None:
        order = scores.argsort(descending=True)
        top, bottom = order[:K], order[K:][-K:]
        compared = torch.cat([top, bottom])
        colored = image.copy()
        for color, tokens in ((RED, top), (BLUE, bottom)):
            places = mask(image.size, boxes, chosen(N, tokens, 150))
            colored.paste(color, (0, 0), places)
        legend = [(RED, f"the {K} highest scores"), (BLUE, f"the {len(bottom)} lowest scores")]
        panels.append((colored, legend))
    legend = [(None, "their cosine similarity:"), *zip(HEAT, ("0", "0.5", "1"))]
    panels.append((likeness(X[compared], side), legend))
    words = [f"What is kept: {K} of {N} visual tokens", f"Question: {question}",
             f"Answer by all tokens: {answers[0]}", f"Answer by the kept tokens: {answers[1]}"]
    return lay_out(words, panels, side)


def lay_out(words, panels, side):
    """Paper with words, and under them panels, each a picture and its legend [(color, word), …]."""
    lines = []
    for text in words:
        lines += textwrap.wrap(text, 43 * len(panels), max_lines=2, placeholder=" …")
    top = 20 + 22 * len(lines)
    width = len(panels) * (side + 10) + 10
    paper = Image.new("RGB", (width, top + side + 40), "white")
    pen, font = ImageDraw.Draw(paper), ImageFont.load_default(15)
    pen.multiline_text((10, 10), "\n".join(lines), fill="black", font=font, spacing=6)
    for i, (panel, legend) in enumerate(panels):
        x = 10 + i * (side + 10)
        paper.paste(panel, (x, top))
        for color, word in legend:
            if color:
                pen.rectangle((x, top + side + 12, x + 14, top + side + 26), fill=color)
                x += 20
            pen.text((x, top + side + 10), word, fill="black", font=font)
            x += 15 + pen.textlength(word, font=font)
    return paper
