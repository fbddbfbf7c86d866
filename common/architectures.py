"""
Models of true size with random weights, noise for them, and where tokens lie in a picture.

    model = random_model("random:qwen3-vl-8b", "meta", torch.bfloat16)            # for counting
    pixels, N = dummy_pixels(model, batch=2, size=(672, 672))
    boxes(model, inputs)                                                          # (N, 4)
"""
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.initialization import no_init_weights
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from common.files import InputError

VICUNA = dict(
    model_type="llama",
    vocab_size=32064,
    rms_norm_eps=1e-5,
    max_position_embeddings=4096,
)
QWEN2_5 = dict(
    hidden_size=3584,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    intermediate_size=18944,
    vocab_size=152064,
    rms_norm_eps=1e-6,
    max_position_embeddings=128000,
    rope_theta=1e6,
    rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
)
QWEN2_5_VISION = dict(
    hidden_size=1280,
    out_hidden_size=3584,
    tokens_per_second=2,
)
QWEN3 = dict(
    hidden_size=4096,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=12288,
    vocab_size=151936,
    rms_norm_eps=1e-6,
    max_position_embeddings=262144,
    rope_theta=5e6,
    rope_scaling=dict(
        rope_type="default", mrope_section=[24, 20, 20], mrope_interleaved=True),
)
QWEN3_VISION = dict(
    hidden_size=1152,
    depth=27,
    num_heads=16,
    intermediate_size=4304,
    out_hidden_size=4096,
    patch_size=16,
    num_position_embeddings=2304,
    deepstack_visual_indexes=[8, 16, 24],
)
RANDOM = {  # the published configurations, where they differ from the stock one of their class
    "llava-1.5-7b": dict(model_type="llava", text_config=VICUNA),
    "llava-next-7b": dict(model_type="llava_next", text_config=VICUNA),
    "qwen2.5-vl-7b": dict(
        model_type="qwen2_5_vl", vision_config=QWEN2_5_VISION, text_config=QWEN2_5),
    "qwen3-vl-8b": dict(model_type="qwen3_vl", vision_config=QWEN3_VISION, text_config=QWEN3),
}


def random_model(name, device, dtype):
    """The architecture of that name, made where it is to be: a 7B in bfloat16 takes 14 GB."""
    if name[7:] not in RANDOM:
        raise InputError(f"{name}: no such architecture; there are "
                         f"{', '.join('random:' + known for known in RANDOM)}")
    config = AutoConfig.for_model(**RANDOM[name[7:]])
    with torch.device(device), no_init_weights():
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()
    for key, p in model.named_parameters():  # matrices small and random, norms one, biases zero
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.02)
        else:
            torch.nn.init.constant_(p, not key.endswith("bias"))
    return model


def pack(model, size):
    """What is at the places of a picture that is read whole and in tiles.

    (numbers (N,), (rows, columns) of tiles). A number is a patch's among those of the whole picture
    and then of all tiles; -1 ends a row of patches. The stock model packs the numbers as it would
    pack features, and cuts away what pads a picture of this size (height, width).
    """
    config, vision = model.config, model.config.vision_config
    rows, columns = get_anyres_image_grid_shape(
        size.tolist(), config.image_grid_pinpoints, vision.image_size)
    patches = (vision.image_size // vision.patch_size) ** 2
    numbers = torch.arange(patches * (1 + rows * columns))
    numbers = numbers.double().view(-1, patches, 1)  # as features one wide
    if hasattr(config, "vision_aspect_ratio"):  # LLaVA-OneVision
        options = {"vision_aspect_ratio": config.vision_aspect_ratio}
    else:
        options = {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    packed, _ = model.model.pack_image_features(
        [numbers], size[None], image_newline=torch.tensor([-1.0]), **options)
    return packed[0][:, 0].long(), (rows, columns)


def tokens_of_each(model, inputs):
    """(B,) how many tokens the model makes of each picture; None where all patches make as many.

    Only models that lay out tiles by the picture's size can make too many of one picture and too
    few of another. Elsewhere their sum tells, and the stock model compares that.
    """
    if not hasattr(model.config, "image_grid_pinpoints"):
        return None
    sizes = inputs["image_sizes"].cpu()
    return torch.tensor([len(pack(model, size)[0]) for size in sizes])


def cells(rows, columns):
    """(rows·columns, 4): x0, y0, x1, y1 of a grid's cells, row by row, as shares of the sides."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    corners = torch.stack([x, y, x + 1, y + 1], -1)
    return corners.view(-1, 4) / torch.tensor([columns, rows, columns, rows])


def boxes(model, inputs, tokens=None):
    """(N, 4): x0, y0, x1, y1 of each token in the first picture, as shares of its sides.

    All four are 0 for a token that is no patch: a class token, the end of a row. Where all pictures
    have as many `tokens`, these are a square that the model cuts out. InputError if not known.
    """
    vision = getattr(model.config, "vision_config", None)
    if tokens:
        side = vision.image_size // vision.patch_size
        patches = cells(side, side)
        return F.pad(patches, (0, 0, tokens - len(patches), 0))
    if model.config.model_type.startswith("qwen"):
        merge = vision.spatial_merge_size
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        return cells(rows // merge, columns // merge)
    if model.config.model_type != "llava_next":
        raise InputError("where this model's tokens lie in a picture is unknown; leave out --show")
    size, side = inputs["image_sizes"][0].cpu(), vision.image_size // vision.patch_size
    numbers, (rows, columns) = pack(model, size)
    tiles = cells(rows * side, columns * side).view(rows, side, columns, side, 4)
    tiles = tiles.transpose(1, 2).reshape(-1, 4)  # tile by tile
    height, width = size.tolist()
    scale = min(rows / height, columns / width)
    filled = torch.tensor([width * scale / columns, height * scale / rows])  # the rest is padding
    tiles = ((tiles - 0.5) / filled.repeat(2) + 0.5).clamp(0, 1)
    nowhere = torch.zeros(1, 4)  # number -1
    return torch.cat([cells(side, side), tiles, nowhere])[numbers]


def dummy_pixels(model, batch, size, tokens=None):
    """(noise for pictures of a size (height, width), N of each), for an architecture of RANDOM."""
    vision = model.config.vision_config
    if tokens:
        pixels = torch.randn(batch, 3, vision.image_size, vision.image_size)
        return {"pixel_values": pixels}, tokens
    if hasattr(vision, "spatial_merge_size"):
        merge = vision.spatial_merge_size
        rows, columns = (side // (vision.patch_size * merge) for side in size)
        grid = torch.tensor([[1, merge * rows, merge * columns]] * batch)
        patch = model.model.visual.patch_embed.proj.weight[0].numel()
        pixels = torch.randn(batch * rows * columns * merge ** 2, patch)
        return {"pixel_values": pixels, "image_grid_thw": grid}, rows * columns
    sizes = torch.tensor([size] * batch)
    numbers, (rows, columns) = pack(model, sizes[0])
    pixels = torch.randn(batch, 1 + rows * columns, 3, vision.image_size, vision.image_size)
    return {"pixel_values": pixels, "image_sizes": sizes}, len(numbers)
