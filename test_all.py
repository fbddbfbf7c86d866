"""
Each claim of the method against something that cannot share our bug.

Run: python -m pytest -q test_all.py

Oracles: a bisection for the soft top-K, finite differences for every gradient, attention with a
mask for the denoiser, simulation against closed forms for the gate, stock transformers and the full
model with masked tokens for deployment.
"""
import base64
import concurrent.futures
import fcntl
import contextlib
import copy
import functools
import gc
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
import zlib
from importlib.metadata import entry_points
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

# All is tested on the CPU: autograd refuses to run in a fork that sees a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers import CLIPImageProcessorPil, LlavaNextImageProcessorPil, Qwen2VLImageProcessorPil
from transformers import StaticCache
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import bench
import infer
import throttler
import train
from data import coco as coco_files
from common import architectures, criteria, files, memory, pruner
from common import run as running
from data import pictures, questions
from common.budget import Budget, count_above, hardness_of, quantiles, threshold
from common.files import InputError
from common.graphs import Graphed, Graphs
from data.pictures import read_image
from common.processes import Processes
from data.shapes import prepare as shapes
from data.shapes import pretrain
from common.weights import find, one_line
from denoiser import Denoiser, DiagonalAttention
from eval import accuracy, serve, tables
from model import VLM, Llava, load
from results import charts, draw, report, serving, study
from throttler import Attention, Scorer
from throttler import distinct, select, soft_top_k, standardised, vp_gate, whitening

ROOT = Path(__file__).resolve().parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)
TINY = ROOT / "data/shapes/llava"
TEMPLATE = (TINY / "chat_template.jinja").read_text()
PICTURES = ROOT / "data/shapes/examples"
EXAMPLES = sorted(PICTURES.glob("*.jpg"))
PICTURE = EXAMPLES[0]
SHIPPED = ("--pruner", ROOT / "data/shapes/pruner", "--keep", 16, "--device", "cpu")
FLOORS = [  # each imports only from itself and from those before it
    ("throttler",),
    ("denoiser", "common"),
    ("data",),
    ("model",),
    ("infer",),
    ("eval",),
    ("train", "bench"),
    ("results",),
]
AUTO_CLASSES = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
EVIL = {
    "auto_map": dict.fromkeys(AUTO_CLASSES, "evil.Evil"),
    "processor_class": "Evil",
}
QUESTIONS = [
    "Where is the star?",
    "How many shapes are there?",
    "Is there a red circle, or some other thing?",
]
CAPTIONS = ["One shape.", "Two.", "Three shapes: a red"]
SIZES = [(96, 96), (150, 40), (48, 130)]  # width, height: mixed in one batch
SCENES = [shapes.draw_scene(f"test-{i}")[0].resize(size) for i, size in enumerate(SIZES)]
close = functools.partial(torch.testing.assert_close, rtol=0)

# The tiny random models, one of each class.
VOCAB = json.loads((TINY / "config.json").read_text())["text_config"]["vocab_size"]
IMAGE = "<|image_pad|>"  # the token of number VOCAB, which the tiny tokenizer is given
LLAMA = dict(
    model_type="llama", vocab_size=VOCAB,
    hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
    pad_token_id=3, bos_token_id=1, eos_token_id=2,
)
CLIP = dict(
    model_type="clip_vision_model",
    hidden_size=48, intermediate_size=64, num_hidden_layers=3,
    num_attention_heads=4, image_size=32, patch_size=8,
)
LLAVA = dict(model_type="llava", text_config=LLAMA, vision_config=CLIP, image_token_index=4)
SIGLIP = dict(
    vision_config={**CLIP, "model_type": "siglip_vision_model"},
    vision_feature_layer=-1,
)
GRID = [[32, 64], [64, 32], [64, 64], [96, 32]]
MROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
LLM = {**LLAMA, "vocab_size": VOCAB + 8, "head_dim": 16, "max_position_embeddings": 1024}
SQUARE = {
    **CLIP,
    "model_type": "siglip_vision_model",
    "num_hidden_layers": 2,
    "vision_use_head": False,
}
LAYERS = ["sliding_attention", "full_attention"]
QWEN = dict(
    image_token_id=VOCAB, video_token_id=6,
    vision_start_token_id=7, vision_end_token_id=8,
)
QWEN_EYE = dict(
    depth=3, hidden_size=32, intermediate_size=48, num_heads=2,
    out_hidden_size=64, patch_size=8,
)
TINY_CONFIGS = {
    "llava": LLAVA,
    "llava, full": {
        **LLAVA,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": [-2, 1],
    },
    "llava, SigLIP": {**LLAVA, **SIGLIP, "vision_feature_select_strategy": "full"},
    "llava_next": {**LLAVA, "model_type": "llava_next", "image_grid_pinpoints": GRID},
    "qwen2_5_vl": dict(
        QWEN, model_type="qwen2_5_vl",
        vision_config=dict(QWEN_EYE, window_size=32, fullatt_block_indexes=[1]),
        text_config={**LLM, "model_type": "qwen2_5_vl_text", "rope_parameters": MROPE},
    ),
    "qwen3_vl": dict(  # deepstack
        QWEN, model_type="qwen3_vl",
        vision_config=dict(
            QWEN_EYE,
            deepstack_visual_indexes=[0, 1],
            num_position_embeddings=64,
        ),
        text_config={
            **LLM,
            "model_type": "qwen3_vl_text",
            "num_hidden_layers": 3,
            "rope_parameters": MROPE,
        },
    ),
    "qwen3_5": dict(  # a recurrent layer
        QWEN, model_type="qwen3_5",
        vision_config=dict(QWEN_EYE, num_position_embeddings=64),
        text_config={
            **LLM,
            "model_type": "qwen3_5_text",
            "rope_parameters": MROPE,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "internvl": dict(
        model_type="internvl", image_token_id=VOCAB, image_seq_length=16,
        text_config={**LLM, "model_type": "qwen2"},
        vision_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, image_size=[32, 32], patch_size=[4, 4],
        ),
    ),
    "idefics3": dict(
        model_type="idefics3", image_token_id=4, scale_factor=2,
        text_config=LLM,
        vision_config={**SQUARE, "model_type": "idefics3_vision"},
    ),
    "gemma3": dict(  # reads a picture in both directions, in windows; generates from no embeddings
        model_type="gemma3", image_token_index=VOCAB, mm_tokens_per_image=16,
        boi_token_index=VOCAB + 1, eoi_token_index=VOCAB + 2,
        vision_config=SQUARE,
        text_config={
            **LLM,
            "model_type": "gemma3_text",
            "sliding_window": 128,
            "query_pre_attn_scalar": 16,
            "layer_types": LAYERS,
        },
    ),
    "mistral3": dict(
        model_type="mistral3", image_token_index=VOCAB, spatial_merge_size=2,
        text_config={**LLM, "model_type": "mistral", "sliding_window": None},
        vision_config=dict(
            model_type="pixtral", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, head_dim=16, image_size=64, patch_size=8,
        ),
    ),
    "paligemma": dict(  # reads picture and question in both directions
        model_type="paligemma", image_token_index=4, projection_dim=64, hidden_size=64,
        text_config={**LLM, "model_type": "gemma"},
        vision_config=SQUARE,
    ),
}


class Calls(TorchDispatchMode):
    """Counts the torch operations inside a with block."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def same_numbers_each_time():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def vlm():
    return load(TINY)


def run(main, *argv):
    """Calls main() with these command-line arguments."""
    arguments = [str(argument) for argument in argv]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [main.__module__, *arguments])
        main()


def complaint(pattern, f, *args, **options):
    """f(…) must fail with an InputError of one short line that matches the pattern."""
    with pytest.raises(InputError, match=pattern) as error:
        f(*args, **options)
    message = str(error.value)
    assert "\n" not in message.strip()
    assert len(message) < 600


def processor_parts(name):
    """(image processor, extra tokens, chat template, other settings) of a tiny model."""
    square = {"height": 32, "width": 32}
    llava = dict(size={"shortest_edge": 32}, crop_size=32)
    extra_tokens = {"image_token": IMAGE}
    template = TEMPLATE.replace("<image>", IMAGE)
    settings = {}
    if name.startswith("qwen"):
        extra_tokens = {}
        size = dict(shortest_edge=256, longest_edge=9216)
        image_processor = Qwen2VLImageProcessorPil(patch_size=8, size=size)
    elif name == "internvl":
        extra_tokens = {
            "context_image_token": IMAGE,
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        }
        settings = {"image_seq_length": 16}
        image_processor = transformers.GotOcr2ImageProcessorPil(
            size=square, crop_to_patches=True, max_patches=3)
    elif name == "idefics3":
        extra_tokens = {}
        template = TEMPLATE
        settings = {"image_seq_len": 4}
        image_processor = transformers.Idefics3ImageProcessorPil(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    elif name == "gemma3":
        extra_tokens |= {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
        template = TEMPLATE.replace("<image>", "<start_of_image>")
        settings = {"image_seq_length": 16}
        image_processor = transformers.Gemma3ImageProcessorPil(size=square)
    elif name == "mistral3":
        size = {"longest_edge": 64}
        image_processor = transformers.PixtralImageProcessorPil(patch_size=16, size=size)
    elif name == "paligemma":
        extra_tokens = {}
        template = None
        image_processor = transformers.SiglipImageProcessorPil(size=square)
        image_processor.image_seq_length = 16
    else:
        extra_tokens = {}
        template = TEMPLATE
        settings = {"patch_size": 8}
        if name == "llava_next":
            image_processor = LlavaNextImageProcessorPil(image_grid_pinpoints=GRID, **llava)
        else:
            image_processor = CLIPImageProcessorPil(**llava)
    return image_processor, extra_tokens, template, settings


def save_processor(name, folder):
    """What a published folder holds beside config.json and weights; returns the tokenizer."""
    image_processor, extra_tokens, template, settings = processor_parts(name)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    if name.startswith("qwen"):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    if extra_tokens:
        tokenizer = AutoTokenizer.from_pretrained(TINY, extra_special_tokens=extra_tokens)
        numbers = tokenizer.convert_tokens_to_ids(list(extra_tokens.values()))
        assert VOCAB in (numbers[0], min(numbers))
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(settings))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return tokenizer


TOKEN_FIELDS = {  # the fields of a config.json that number a token which the tokenizer was given
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "boi_token_index": "<start_of_image>",
    "eoi_token_index": "<end_of_image>",
}


def save_tiny(name, folder):
    """A tiny random model of TINY_CONFIGS with its processor, as it would be published."""
    torch.manual_seed(0)
    tokenizer = save_processor(name, folder)
    config = copy.deepcopy(TINY_CONFIGS[name])
    for field, token in TOKEN_FIELDS.items():
        if config.get(field, 4) != 4:  # 4 is <image>, which the tokenizer has anyway
            config[field] = tokenizer.convert_tokens_to_ids(token)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    for matrix in matrices:
        torch.nn.init.normal_(matrix, std=0.2)  # more than usual, so that every token matters
    model.save_pretrained(folder)


class PixtralProcessor:
    """For Mistral 3: rows of places, each followed by a token. The stock one needs torchvision."""
    image_token = IMAGE

    def __init__(self, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.image_processor = transformers.PixtralImageProcessorPil.from_pretrained(folder)
        self.image_token_ids = self.tokenizer.convert_tokens_to_ids([IMAGE])

    def __call__(self, images, text, **options):
        pixels = self.image_processor(images, return_tensors="pt")
        sizes = pixels["image_sizes"].tolist()
        texts = []
        for prompt, (height, width) in zip(text, sizes):
            row = width // 16 * IMAGE + ";"
            texts.append(prompt.replace(IMAGE, height // 16 * row))
        words = self.tokenizer(texts, **options)
        return transformers.BatchFeature({**words, **pixels})


def load_tiny(folder, **options):
    config = (folder / "config.json").read_text()
    if "mistral3" not in config:
        return load(folder, **options)
    model = AutoModelForImageTextToText.from_pretrained(folder, **options)
    return load(model, processor=PixtralProcessor(folder))


def rounds_nowhere(norm):
    """Makes an RMSNorm compute in the type of its input; the stock one rounds to float32 inside."""
    norm.forward = functools.partial(
        F.rms_norm,
        normalized_shape=norm.weight.shape,
        weight=norm.weight,
        eps=norm.variance_epsilon,
    )


@pytest.fixture(scope="module", params=TINY_CONFIGS)
def backbone(request, tmp_path_factory):
    """(vlm in float64, inputs with captions, X) of each class: three pictures in one batch."""
    folder = tmp_path_factory.mktemp("tiny")
    try:
        save_tiny(request.param, folder)
    except ImportError:  # an older transformers
        pytest.skip("its image processor needs torchvision here")
    vlm = load_tiny(folder, dtype=torch.float64)
    for module in vlm.decoder.modules():
        is_rms_norm = type(module).__name__.endswith("RMSNorm")
        if is_rms_norm and hasattr(module, "variance_epsilon"):
            rounds_nowhere(module)
    inputs = vlm.inputs(SCENES, QUESTIONS, CAPTIONS)
    return vlm, inputs, vlm.encode(inputs)


def real(inputs, X):
    """(B, N) bool: which tokens are no padding."""
    everything = torch.ones(X.shape[:2], dtype=torch.bool)
    return inputs.get("valid", everything)


def stock(vlm, inputs, shown=None):
    """Inputs of the stock model; a mask hides all visual tokens but those `shown`, (B, N) bool."""
    plain = {name: tensor for name, tensor in inputs.items() if name != "valid"}
    if vlm.typed:
        plain["mm_token_type_ids"] = (inputs["input_ids"] == vlm.image_id).int()
    mask = plain["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    inner = getattr(vlm.model, "model", None)
    if hasattr(inner, "get_rope_index"):
        positions, _ = inner.get_rope_index(
            plain["input_ids"],
            plain["mm_token_type_ids"],
            image_grid_thw=plain["image_grid_thw"],
            attention_mask=mask,
        )
    if shown is not None:
        without_padding = shown[real(inputs, shown)]
        mask = mask.masked_scatter(vlm.visual(inputs), without_padding.long())
    return {**plain, "attention_mask": mask, "position_ids": positions}


def some(X, inputs):
    """keep (B, K): the tokens that are longer than others, another number for each image."""
    lengths = X.norm(dim=-1).masked_fill(~real(inputs, X), -torch.inf)
    z = standardised(lengths)
    return select(z, count_above(z, 0.8))


# --- soft top-K -----------------------------------------------------------------------------------

def bisection(scores, K, tau):
    """alpha by halving an interval 80 times."""
    x = scores / tau
    low = x.amin(-1, keepdim=True) - 60
    high = x.amax(-1, keepdim=True) + 60
    for _ in range(80):
        b = (low + high) / 2
        alpha = torch.distributions.Laplace(b, 1).cdf(x)
        too_many = alpha.sum(-1, keepdim=True) > K
        low = b.where(too_many, low)
        high = high.where(too_many, b)
    return alpha


@pytest.mark.parametrize("tau", [2.0, 0.3, 0.1, 0.01])
@pytest.mark.parametrize("N", [1, 2, 7, 144, 576, 2880])
def test_soft_top_k_is_the_bisection(N, tau):
    noise = torch.randn(N, dtype=torch.float64)
    line = torch.linspace(-1e4, 1e4, N).double()
    ties, extremes = noise.round(), 1e4 * noise.sign()
    scores = torch.stack([noise, 0 * noise, 1e4 * noise, ties, extremes, line])
    padded = F.pad(scores, (0, 3), value=-torch.inf)
    for K in (0, 0.01 * N, max(1, N // 9), N / 3, N - 0.5, N):
        alpha, padding = soft_top_k(padded, K, tau).split([N, 3], dim=1)
        assert (padding == 0).all()
        assert alpha.min() >= 0 and alpha.max() <= 1
        assert alpha.sum(1).tolist() == pytest.approx(6 * [K], rel=1e-6)
        close(alpha, bisection(scores, K, tau), atol=1e-7, rtol=1e-6)
        ascending = alpha.gather(1, scores.argsort())
        assert (ascending.diff() >= -1e-12).all(), "not monotone in the score"
        close(soft_top_k(scores + 3.0, K, tau), alpha, atol=1e-7)


@pytest.mark.parametrize("tau", [2.0, 0.5, 0.1])
def test_gradient_of_soft_top_k_is_finite_differences(tau):
    def three_of_nine(scores):
        return soft_top_k(scores, 3.0, tau)

    scores = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(three_of_nine, scores)


@pytest.mark.parametrize("tau", [2.0, 0.5, 0.1])
def test_gradient_of_soft_top_k_is_finite_everywhere(tau):
    all_alike = torch.zeros(2880)
    far_apart = 1e4 * torch.randn(2880)
    extremes = torch.tensor([1e4, 1e4, -1e4])
    padded = F.pad(torch.randn(50), (0, 9), value=-torch.inf)
    for scores in (all_alike, far_apart, extremes, padded):
        scores.requires_grad_()
        N = scores.isfinite().sum().item()
        for K in (0, 1, 2, N):
            alpha = soft_top_k(scores, K, tau)
            weighted = alpha @ torch.randn(len(scores))
            gradient, = torch.autograd.grad(weighted, scores)
            assert gradient.isfinite().all()
            assert not gradient[scores.isneginf()].any()


def test_alpha_becomes_the_selection_as_tau_falls():
    scores = torch.randn(5, 144)
    keep = select(scores, 16)
    highest = scores.argsort(descending=True)[:, :16]
    assert keep.equal(highest.sort().values)
    selection = torch.zeros_like(scores).scatter(1, keep, 1.0)
    gaps = []
    for tau in (1.0, 0.1, 1e-2, 1e-3, 1e-5):
        alpha = soft_top_k(scores, 16, tau)
        gaps.append((alpha - selection).abs().max().item())
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_soft_top_k_computes_half_precision_in_double(dtype):
    scores = torch.randn(5, 144).to(dtype)
    exact = soft_top_k(scores.double(), 7, 0.2)
    assert soft_top_k(scores, 7, 0.2).equal(exact.to(dtype))


@pytest.mark.parametrize("choose, K", [
    (soft_top_k, -1), (soft_top_k, 145), (soft_top_k, math.nan),
    (select, 0), (select, 145),
])
def test_a_wrong_number_of_tokens_is_refused(choose, K):
    with pytest.raises(ValueError, match="K must lie"):
        choose(torch.randn(5, 144), K)


def test_each_picture_keeps_its_own_number_of_its_own_tokens():
    """Of the second one's five places two are padding."""
    nothing = -math.inf
    ranking = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 3.0, 2.0, nothing, nothing]])
    assert select(ranking, torch.tensor([2, 1])).tolist() == [[0, 1], [-1, 1]]
    assert select(ranking, torch.tensor([1, 3])).tolist() == [[-1, -1, 0], [0, 1, 2]]
    assert select(ranking, 5).tolist() == [[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2]]
    for K in ([5, 4], [0, 3], [6, 3]):
        with pytest.raises(ValueError, match=re.escape(f"the [5, 3] tokens there are, not {K}")):
            select(ranking, torch.tensor(K))


@pytest.mark.parametrize("tau", [0, -1, math.nan])
def test_a_temperature_that_is_not_above_zero_is_refused(tau):
    with pytest.raises(ValueError, match="tau must be positive"):
        soft_top_k(torch.randn(5, 144), 16, tau)


# --- the noise gate, the denoiser -----------------------------------------------------------------

@pytest.fixture(scope="module")
def features(vlm):
    """(images, 144, 128) of a real encoder: far from normalised, and of low rank."""
    images = [shapes.draw_scene(f"test-gate-{i}")[0] for i in range(100)]
    inputs = vlm.inputs(images, ["?"] * len(images))
    return vlm.encode(inputs).double()


def covariance(X):
    return X.flatten(0, -2).T.cov(correction=0)


def test_gate_preserves_mean_and_covariance(features):
    X = features  # (100, 144, 128)
    mean, L = (tensor.double() for tensor in whitening(X))
    C = covariance(X)
    close(L @ L.T, C, atol=1e-6 * C.diagonal().max().item(), rtol=1e-4)
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        alpha = torch.full(X.shape[:2], share, dtype=X.dtype)
        gated = vp_gate(X, alpha, mean, L)
        # 14,400 tokens of an effective rank below 32 have a sampling error of √(32/14400) = 5 %
        assert (covariance(gated) - C).norm() / C.norm() < 0.06
        drift = gated.mean((0, 1)) - mean
        assert drift.norm() / C.trace().sqrt() < 0.02
        if share == 0:
            cosine = F.cosine_similarity((X - mean).flatten(), (gated - mean).flatten(), dim=0)
            assert abs(cosine) < 0.02, "something of the token is left at alpha = 0"
    ones = torch.ones(X.shape[:2])
    assert vp_gate(X, ones, mean, L).equal(X), "alpha = 1 must return X bit for bit"


def test_gate_survives_degenerate_features_and_both_ends_of_alpha():
    alpha = torch.tensor([[0.0, 1e-30, 1e-13, 0.5, 1 - 1e-7, 1.0]], requires_grad=True)
    low_rank = torch.randn(40, 3) @ torch.randn(3, 16)
    constant_channel = torch.randn(100, 16)
    constant_channel[:, 5] = 2.5
    few_tokens = torch.randn(6, 16)
    all_alike = torch.ones(10, 16)
    for X in (low_rank, constant_channel, few_tokens, all_alike):
        mean, L = whitening(X)
        gated = vp_gate(X[None, :6], alpha, mean, L)
        gradient, = torch.autograd.grad(gated.square().sum(), alpha)
        for tensor in (mean, L, gated, gradient):
            assert tensor.isfinite().all()
    other_statistics = whitening(torch.randn(500, 16))
    assert vp_gate(all_alike[None, :6], alpha, *other_statistics).isfinite().all()


def test_a_direction_that_the_sample_lacks_gets_a_little_noise():
    """A hundred millionth of the largest variance; the deviation is the root of that."""
    three_directions = torch.randn(40, 3) @ torch.randn(3, 16)
    _, L = whitening(three_directions)
    deviations = torch.linalg.svdvals(L)  # descending
    close(deviations[3:] / deviations[0], torch.full((13,), 1e-4), atol=1e-5)


def test_channel_noise_leaks_and_whitened_noise_does_not(features):
    """The share of x that a linear map of x̃ explains.

    It is α if noise is whitened, else tr(α·C·(α·C + (1-α)·D)⁻¹·C) / tr C with D = diag C.
    """
    X = features.flatten(0, 1)  # (14400, 128)
    C = covariance(features)
    D = C.diagonal().diag()
    mean, L = (tensor.double() for tensor in whitening(features))
    a = 0.11
    alpha = torch.full((1, len(X)), a, dtype=X.dtype)

    def explained(noise_factor):
        gated = vp_gate(X[None], alpha, mean, noise_factor)[0] - mean
        fit = gated @ torch.linalg.lstsq(gated, X - mean).solution
        rest = (X - mean - fit).square().sum()
        return 1 - (rest / (X - mean).square().sum()).item()

    leak = a * C @ torch.linalg.solve(a * C + (1 - a) * D, C)
    closed_form = (leak.trace() / C.trace()).item()
    assert abs(explained(L) - a) < 0.02
    assert abs(explained(D.sqrt()) - closed_form) < 0.02
    assert closed_form > 3 * a


def test_our_attention_is_torchs_own():
    x = torch.randn(2, 11, 128)
    ours = Attention(128)
    torchs = torch.nn.MultiheadAttention(128, 2, batch_first=True)
    torchs.load_state_dict({
        "in_proj_weight": ours.qkv.weight,
        "in_proj_bias": ours.qkv.bias,
        "out_proj.weight": ours.out.weight,
        "out_proj.bias": ours.out.bias,
    })
    expected, _ = torchs(x, x, x)
    close(ours(x), expected, atol=1e-5)


NAMES_IN_TORCH = {
    "attn.qkv.": "self_attn.in_proj_",
    "attn.out.": "self_attn.out_proj.",
    "mlp.0.": "linear1.",
    "mlp.2.": "linear2.",
}


def named_as_in_torch(block):
    """The weights of a Block by the names of torch.nn.TransformerEncoderLayer."""
    weights = {}
    for name, tensor in block.state_dict().items():
        for ours, torchs in NAMES_IN_TORCH.items():
            name = name.replace(ours, torchs)
        weights[name] = tensor
    return weights


def test_a_scorer_is_torchs_own_transformer_and_a_linear_head():
    """Two pre-norm blocks, heads of 64. Padding is no key, and scores -inf."""
    scorer = Scorer(128).requires_grad_(False)
    for p in scorer.parameters():
        p += 0.1 * torch.randn_like(p)
    layer = torch.nn.TransformerEncoderLayer(
        128, 2, 512, dropout=0, activation="gelu", batch_first=True, norm_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2, torch.nn.LayerNorm(128), False)
    for block, torchs in zip(scorer.blocks, encoder.layers, strict=True):
        torchs.load_state_dict(named_as_in_torch(block))
    encoder.norm.load_state_dict(scorer.norm.state_dict())
    X = 5 * torch.randn(3, 11, 128)
    valid = torch.arange(11) < torch.tensor([11, 7, 1])[:, None]
    encoded = encoder(X, src_key_padding_mask=~valid)
    expected = encoded @ scorer.head.weight[0] + scorer.head.bias
    found = scorer(X, valid)
    close(found[valid], expected[valid], atol=1e-4)
    assert found[~valid].isneginf().all()
    assert scorer(X)[0].allclose(found[0], atol=1e-4)
    with torch.device("meta"):
        wide = Scorer(1030)
    assert wide.inp.out_features == wide.head.in_features == 1024


def test_diagonal_attention_is_torchs_own_under_a_diagonal_mask():
    x, q, k = torch.randn(3, 2, 11, 128)
    diagonal = DiagonalAttention(128)
    identity = torch.eye(11, dtype=torch.bool)
    masked = F.scaled_dot_product_attention(q, k, diagonal.value(x), attn_mask=identity)
    close(diagonal(x), diagonal.out(masked), atol=1e-6)


@pytest.mark.parametrize("diagonal, d_v", [(True, 16), (False, 16), (True, 1030)])
def test_denoiser_repairs_each_token_from_itself_alone(diagonal, d_v):
    denoiser = Denoiser(d_v, diagonal)
    x = torch.randn(1, 5, d_v)
    assert denoiser(x).equal(x), "it starts as the identity"
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.3)
    assert not denoiser(x).isclose(x).all()
    other_third = x + F.one_hot(torch.tensor(2), 5)[:, None]
    moved = (denoiser(x) != denoiser(other_third)).any(-1)[0]
    if diagonal:
        assert moved.tolist() == [False, False, True, False, False]
    else:
        assert moved.all()
    assert denoiser.block.norm1.normalized_shape == (min(d_v, 1024),)


# --- budgets and choices --------------------------------------------------------------------------

@pytest.mark.parametrize("text, N, K", [
    ("16", 144, 16), ("16", 9, 9), ("~16", 144, 16), ("all", 144, 144),
    ("11.1%", 576, 64), ("11.1%", 144, 16), ("0.1%", 144, 1), ("100%", 7, 7),
])
def test_a_budget_counts_tokens_and_survives_its_own_text(text, N, K):
    budget = Budget.parse(text)
    assert budget.of(N) == K
    assert budget.of(torch.tensor([N, N])).tolist() == [K, K]
    assert Budget.parse(str(budget)) == budget


def test_what_is_no_budget_is_refused():
    assert Budget.parse("all").everything
    assert Budget.parse("~16").average
    assert str(Budget.parse("~16").exact) == "16"
    for text in ("0", "-1", "1.5", "", "~", "~all", "101%", "0%", "8:32", "x", "1e3", "nan%", "٣"):
        with pytest.raises(ValueError, match="is not a budget"):
            Budget.parse(text)


def greedy(value, K, N):
    """K times the token i of the highest value(i, kept), in the order of their choice."""
    kept = []
    while len(kept) < K:
        free = [i for i in range(N) if i not in kept]
        best = max(free, key=lambda i: value(i, kept))
        kept.append(best)
    return kept


def test_greedy_choices_are_their_definitions_written_out():
    X = torch.randn(10, 20, 40) + 2 * torch.randn(40)
    by_distance = criteria.max_min_diversity(X, 7)  # (10, 7)
    by_volume = criteria.dpp(X, 7)
    by_coverage = criteria.coverage(X, 7)
    for image, x in enumerate(X.double()):
        centred = x - x.mean(0)
        cosine = F.cosine_similarity(x[:, None], x, dim=-1)  # (20, 20)
        likeness = F.cosine_similarity(centred[:, None], centred, dim=-1).clamp_min(0)

        def distance(i, kept):
            others = kept or [j for j in range(20) if j != i]
            return min(1 - cosine[i, j].item() for j in others)

        def volume(i, kept):
            rows = [*kept, i]
            determinant = torch.logdet(cosine[rows][:, rows])
            return round(determinant.item(), 9)  # the first: 0

        def covered(i, kept):
            nearest = likeness[:, [*kept, i]].amax(1)
            return nearest.sum().item()

        assert by_distance[image].tolist() == sorted(greedy(distance, 7, 20))
        assert by_volume[image].tolist() == sorted(greedy(volume, 7, 20))
        first, *others = by_coverage[image].tolist()
        best, *next_best = greedy(covered, 7, 20)
        # Not the tokens themselves: two tokens may cover equally much.
        assert covered(first, others) == pytest.approx(covered(best, next_best), rel=1e-5)


def test_the_longest_features_are_kept():
    lengths = torch.tensor([[3, 1, 4, 2, 9, 5, 6], [7, 6, 5, 4, 3, 2, 1]])
    X = F.normalize(torch.randn(2, 7, 5), dim=-1) * lengths[..., None]
    assert criteria.feature_norm(X, 3).tolist() == [[4, 5, 6], [0, 1, 2]]


@pytest.mark.parametrize("choose", [criteria.max_min_diversity, criteria.dpp, criteria.coverage])
def test_greedy_choices_take_no_token_twice_even_if_all_are_alike(choose):
    alike = torch.ones(2, 30, 3)
    keep = choose(alike, 20)
    assert (keep.diff(dim=1) > 0).all()


def distinct_in_a_loop(s, x, c):
    """The ranking of one image, token by token: its score, less what the better ones say."""
    z = (s - s.mean()) / s.std(correction=0)
    x = x - x.mean(0)
    d = z.clone()
    for i in range(len(z)):
        likeness = 0.0
        for j in range(len(z)):
            if z[j] > z[i]:
                cosine = x[i] @ x[j] / (x[i].norm() * x[j].norm())
                likeness = max(likeness, cosine.item())
        d[i] = z[i] - c * likeness
    return d


def test_distinct_is_the_double_loop_also_in_a_padded_batch():
    scores = 3 * torch.randn(6, 20)
    X = torch.randn(6, 20, 12) + 2 * torch.randn(12)
    padded_scores = F.pad(scores, (0, 4), value=-torch.inf)
    padded_X = F.pad(X, (0, 0, 0, 4), value=9.0)
    ranking = distinct(padded_scores, padded_X)  # (6, 24)
    assert (ranking[:, 20:] == -torch.inf).all()
    for s, x, d in zip(scores.double(), X.double(), ranking):
        expected = distinct_in_a_loop(s, x, throttler.C)
        close(d[:20].double(), expected, atol=1e-3)
    alone = [distinct(scores[i:i + 1], X[i:i + 1])[0] for i in range(6)]
    for K in (1, 5, 20):
        keep = select(ranking, K)
        assert keep.equal(select(torch.stack(alone), K)), "alone and in a padded batch"
        assert keep.max() < 20


@pytest.mark.parametrize("choose", [
    lambda X: distinct(X[..., 0], X), lambda X: criteria.max_min_diversity(X, 9),
    lambda X: criteria.dpp(X, 9), lambda X: criteria.coverage(X, 9),
    lambda X: criteria.feature_norm(X, 9),
])
def test_tokens_in_half_precision_are_compared_in_float32(choose):
    X = (5 * torch.randn(10, 144, 64)).bfloat16()
    assert choose(X).equal(choose(X.float()))


def test_a_larger_budget_keeps_what_a_smaller_one_kept():
    padded_scores = F.pad(3 * torch.randn(1, 20), (0, 4), value=-torch.inf)
    ranking = distinct(padded_scores, torch.randn(1, 24, 12))
    smaller = set()
    for K in range(1, 21):
        kept = set(select(ranking, K)[0].tolist())
        assert smaller < kept
        smaller = kept


def test_distinct_keeps_exactly_k_of_a_grey_picture_and_of_ties():
    scores, ties = torch.randn(2, 30), torch.zeros(2, 30)
    X, grey = torch.randn(2, 30, 8), torch.ones(2, 30, 3)
    close(distinct(scores, grey), standardised(scores), atol=0)
    for K in (1, 7, 30):
        assert select(distinct(ties, X), K).shape == (2, K)
        keep = select(distinct(ties, grey), K)
        assert (keep.diff(dim=1) > 0).all()


def test_the_gradient_of_distinct_is_that_of_z():
    scores = torch.randn(2, 30, requires_grad=True)
    X, weights = torch.randn(2, 30, 8), torch.randn(2, 30)
    d, z = distinct(scores, X), standardised(scores)
    through_d, = torch.autograd.grad((d * weights).sum(), scores)
    through_z, = torch.autograd.grad((z * weights).sum(), scores)
    close(through_d, through_z, atol=0)


def test_the_ranking_takes_as_many_torch_calls_for_any_k():
    counts = set()
    for N, K in ((144, 4), (144, 72), (576, 64)):
        scores, X = torch.randn(1, N), torch.randn(1, N, 16)
        with Calls() as calls:
            select(distinct(scores, X), K)
        counts.add(calls.count)
    count, = counts
    assert count < 60


def test_hardness_is_the_mean_of_the_largest_weights():
    alpha = torch.tensor([[0.9, 0.1, 0.6, 0.4], [1.0, 0.0, 1.0, 0.0]])
    assert hardness_of(alpha, 2).tolist() == pytest.approx([0.75, 1.0])
    own_budgets = torch.tensor([1, 4])
    assert hardness_of(alpha, own_budgets).tolist() == pytest.approx([0.9, 0.5])


# --- the training graph, the scenes ---------------------------------------------------------------

def test_scorer_gradient_is_finite_differences_through_everything(backbone, monkeypatch):
    """train.forward itself, in float64, noise held fixed."""
    vlm, inputs, X = backbone
    if not hasattr(vlm.decoder.norm, "variance_epsilon"):
        pytest.skip("its norms round to float32")

    def float_but_for_double(tensor):
        return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)

    vlm.decoder.rotary_emb.float()
    monkeypatch.setattr(torch.Tensor, "float", float_but_for_double)
    scorer = Scorer(vlm.width).double()
    denoiser = Denoiser(vlm.width).double()
    for layer in (denoiser.block.attn.out, denoiser.block.mlp[-1]):
        torch.nn.init.normal_(layer.weight, std=0.02)  # zero as they start, they hide the rest
    statistics = [tensor.double() for tensor in whitening(X)]
    noise = torch.randn_like(X)

    def loss(*weights):  # which gradcheck changes in place
        graph = vlm, scorer, denoiser, statistics, inputs, noise
        return train.forward(*graph, Budget(5), 0.5)[0]

    weights = (
        scorer.head.weight,
        scorer.blocks[0].attn.qkv.weight,
        denoiser.block.attn.value.weight,
    )
    tolerance = dict(eps=1e-5, atol=1e-8, rtol=1e-3)
    assert torch.autograd.gradcheck(loss, weights, fast_mode=True, **tolerance)
    assert not any(p.requires_grad for p in vlm.model.parameters())
    assert not vlm.model.training


@pytest.mark.parametrize("rank", [distinct, train.raw_scores])
def test_held_out_losses_lead_from_all_tokens_to_the_deployed_ones(backbone, rank):
    """Full and deployed by the stock model, whose mask hides what is dropped; soft by the gate.

    The denoiser, here a factor of 1.5, is in the soft one alone.
    """
    vlm, inputs, X = backbone
    valid = real(inputs, X)
    scores = 0.1 * torch.randn(X.shape[:2]).masked_fill(~valid, -torch.inf)
    statistics, noise = whitening(X.float()), torch.randn(X.shape)

    def scorer(X, valid):
        return scores

    def denoiser(X):
        return 1.5 * X

    graph = vlm, scorer, denoiser, statistics
    budget = Budget(share=0.3)
    arguments = [(inputs, noise)], budget, 0.7, Processes("cpu"), train.Parts(rank=rank)
    losses = train.held_out_losses(graph, *arguments)

    ranking = rank(scores, X)  # (B, N)
    K = (0.3 * valid.sum(1)).round().long()  # (B,), of each picture's own tokens
    few = (K // 4).clamp_min(1)
    place = ranking.argsort(dim=1, descending=True).argsort(dim=1)  # (B, N), 0 is the highest
    full = vlm.model(**stock(vlm, inputs, valid)).loss
    if vlm.exact:
        deployed = vlm.model(**stock(vlm, inputs, place < K[:, None])).loss
        quarter = vlm.model(**stock(vlm, inputs, place < few[:, None])).loss
    else:  # no mask hides a token from a recurrent layer
        deployed = vlm.loss(inputs, X, select(ranking, K))
        quarter = vlm.loss(inputs, X, select(ranking, few))
    alpha = soft_top_k(ranking, K, 0.7)
    gated = vp_gate(X.float(), alpha, *statistics, noise)
    soft = vlm.loss(inputs, denoiser(gated))
    expected = [loss.item() for loss in (full, soft, deployed, quarter)]
    assert list(losses.values()) == pytest.approx(expected, abs=1e-4)
    different = {round(loss, 3) for loss in losses.values()}
    assert len(different) == 4

    known = train.held_out_losses(graph, *arguments, full=1.5)
    assert known == losses | {"full_loss": 1.5}
    *_, most = train.feature_statistics(vlm, [([0], inputs)], 0)
    assert most == valid.sum(1).max()


class KnownLosses:
    """In place of a VLM: the loss of a batch stands in its inputs."""
    model = SimpleNamespace(device="cpu")

    def encode(self, inputs):
        return torch.randn(1, 9, 4)

    def loss(self, inputs, X, keep=None):
        return inputs["loss"]


def test_a_held_out_loss_is_a_mean_over_words():
    """One word at 4 nats and three words at 8: 7 nats a word."""
    def scorer(X, valid):
        return X[..., 0]

    statistics = torch.zeros(4), torch.eye(4)
    graph = KnownLosses(), scorer, torch.nn.Identity(), statistics
    one = {"labels": torch.tensor([[-100, -100, -100, 5]]), "loss": torch.tensor(4.0)}
    three = {"labels": torch.tensor([[-100, 5, 5, 5]]), "loss": torch.tensor(8.0)}
    batches = [(inputs, torch.randn(1, 9, 4)) for inputs in (one, three)]
    losses = train.held_out_losses(graph, batches, Budget(2), 0.5, Processes("cpu"))
    assert list(losses.values()) == 4 * [7.0]

    def add_that_of_another_process(sums):
        sums += torch.tensor([12.0, 12, 12, 12, 1])  # one word at 12 nats

    two = SimpleNamespace(sum=add_that_of_another_process)
    losses = train.held_out_losses(graph, batches, Budget(2), 0.5, two)
    assert list(losses.values()) == 4 * [8.0]


def test_feature_statistics_are_of_tokens_drawn_from_all_of_each_picture(monkeypatch):
    """Pictures of 100, 100 and 40 tokens, each of which holds its own number in all four channels.

    Padding holds -1. Two levels of two channels: alike within a level, and without covariance
    beyond.
    """
    counts = torch.tensor([[100], [100], [40]])
    numbers = torch.arange(100.0)
    visual = numbers < counts  # (3, 100)
    X = numbers.where(visual, -1).unsqueeze(-1).expand(-1, -1, 4)  # (3, 100, 4)
    vlm = SimpleNamespace(levels=2, encode=lambda inputs: X, visual=lambda inputs: visual)
    batches = [([0, 1, 2], None)]
    whitened = []

    def spy(tokens):
        whitened.append(tokens)
        return whitening(tokens)

    monkeypatch.setattr(train, "whitening", spy)
    mean, L, most = train.feature_statistics(vlm, batches, seed=0)
    drawn = whitened[0][:, 0]
    by_picture = drawn.view(3, 32).tolist()
    for tokens in by_picture:
        assert len(set(tokens)) == 32, "a token twice"
        assert min(tokens) >= 0, "padding"
    assert max(by_picture[0]) > 64
    assert by_picture[0] != by_picture[1]
    assert most == 100
    level = torch.full((2, 2), drawn.var(correction=0).item())
    close(L @ L.T, torch.block_diag(level, level), atol=0.1)
    close(mean, drawn.mean().expand(4), atol=1e-3)
    train.feature_statistics(vlm, batches, seed=1)
    assert not whitened[0].equal(whitened[2])


def what_learns_first(vlm, seed):
    """(modules, optimizer) of a run before its first step, whatever was drawn before."""
    torch.randn(1)
    settings = SimpleNamespace(seed=seed, lr=None)
    modules, optimizer, _ = train.what_learns(vlm, settings, train.Parts(), "cpu")
    return modules, optimizer


def test_the_seed_decides_the_first_weights(vlm):
    modules, optimizer = what_learns_first(vlm, seed=3)
    same, _ = what_learns_first(vlm, seed=3)
    other, _ = what_learns_first(vlm, seed=4)
    for name in ("scorer.head.weight", "denoiser.block.attn.value.weight"):
        weight = modules.state_dict()[name]
        assert weight.equal(same.state_dict()[name])
        assert not weight.equal(other.state_dict()[name])
    parameters = {*modules["scorer"].parameters(), *modules["denoiser"].parameters()}
    assert parameters == set(optimizer.param_groups[0]["params"])


def test_each_sample_has_its_own_noise_whatever_else_is_in_the_batch(vlm):
    inputs = vlm.inputs(SCENES, QUESTIONS)
    noise = train.noise_for(vlm, inputs, [0, 7, 4000], 3)  # (3, 144, 128)
    in_another_batch = train.noise_for(vlm, inputs, [7, 8, 9], 3)
    assert noise[1].equal(in_another_batch[0])
    other_seed = train.noise_for(vlm, inputs, [0, 7, 4000], 4)
    assert not noise.isclose(other_seed).all(-1).any()
    close(covariance(noise.flatten(1).T), torch.eye(3), atol=0.05)


def test_the_training_is_the_papers_but_for_the_ranking():
    parts = train.Parts()
    assert parts.rank is distinct, "ours; the papers' is --choose top"
    assert parts.top_k is soft_top_k
    assert parts.gate is vp_gate
    assert parts.denoiser is Denoiser
    assert isinstance(parts.denoiser(16).block.attn, DiagonalAttention)
    assert throttler.C == 4, "as the shipped pruner and all results"
    args = train.parse_arguments(["--data", "coco.json"])
    assert (args.steps, args.batch, args.keep.of(576)) == (4000, 32, 64)
    assert args.eval_every == 200, "a twentieth of the steps"
    with torch.device("meta"):
        *_, rate = train.what_learns(SimpleNamespace(width=1024), args, parts, "meta")
    assert rate == pytest.approx(2e-4, rel=0.05)


def test_tau_falls_along_half_a_cosine_to_the_middle_of_the_run():
    for t in (0, 0.125, 0.25, 0.375):
        half_cosine = (1 + math.cos(math.pi * 2 * t)) / 2
        assert train.temperature(t) == pytest.approx(0.1 + 1.9 * half_cosine)
    assert [train.temperature(t) for t in (0.5, 1)] == pytest.approx([0.1, 0.1])


def test_scenes_are_unambiguous_and_splits_disjoint():
    scenes = []
    for split in (*shapes.SPLITS, "pretrain"):
        scenes += [shapes.draw_scene(f"{split}-{i}") for i in range(24)]
    different = {image.tobytes() for image, _ in scenes}
    assert len(different) == len(scenes)
    for image, objects in scenes:
        assert len({o["shape"] for o in objects}) == len(objects)
        assert len({o["color"] for o in objects}) == len(objects)
        for o in objects:  # the middle of every object has its colour: clutter lies behind
            pixel = image.getpixel((round(o["x"]), round(o["y"])))
            distance = {name: math.dist(pixel, rgb) for name, rgb in shapes.COLORS.items()}
            assert min(distance, key=distance.get) == o["color"]
            assert o["place"] == place_of(o["x"], o["y"])
            assert min(abs(o["x"] - 48), abs(o["y"] - 48)) >= 6, "nearly in two quarters"


def place_of(x, y):
    """In which quarter of a scene of 96 x 96 pixels a point lies."""
    row = "top" if y < 48 else "bottom"
    column = "left" if x < 48 else "right"
    return f"{row} {column}"


def test_captions_and_answers_tell_what_is_in_the_scene():
    star = dict(color="orange", shape="star", place="top left")
    cross = dict(color="blue", shape="cross", place="bottom right")
    number = "Two shapes: "
    first, second = "an orange star at the top left", "a blue cross at the bottom right"
    both = {f"{number}{first} and {second}.", f"{number}{second} and {first}."}
    captions, pairs, named = set(), set(), set()
    for seed in range(200):
        captions.add(shapes.caption([star, cross], random.Random(seed)))
        kinds = shapes.questions([star, cross], random.Random(seed))
        pairs |= {(text, answer) for kind, text, answer in kinds if kind != "exists"}
        named |= {(text, answer) for kind, text, answer in kinds if kind == "exists"}
    assert captions == both
    assert shapes.caption([star], random.Random(0)) == f"One shape: {first}."
    assert pairs == {
        ("What color is the star?", "orange"), ("What color is the cross?", "blue"),
        ("What shape is the orange thing?", "star"), ("What shape is the blue thing?", "cross"),
        ("Where is the star?", "top left"), ("Where is the cross?", "bottom right"),
        ("How many shapes are there?", "two"),
    }
    there = {"Is there an orange star?", "Is there a blue cross?"}
    assert {text for text, answer in named if answer == "yes"} == there
    absent = {text for text, answer in named if answer == "no"}
    assert {"Is there a blue star?", "Is there an orange cross?"} < absent - there


def test_half_of_the_absent_things_that_are_asked_for_have_one_word_right():
    """The others are any of the 29 that are absent; of these 9 have, too."""
    star = dict(color="orange", shape="star", place="top left")
    kinds = [shapes.questions([star], random.Random(seed))[-1] for seed in range(1000)]
    absent = [text for _, text, answer in kinds if answer == "no"]
    near = [text for text in absent if "orange" in text or "star" in text]
    assert len(absent) == pytest.approx(500, abs=60)
    assert len(near) / len(absent) == pytest.approx(0.5 + 0.5 * 9 / 29, abs=0.07)


def test_patches_are_labelled_by_the_uppermost_thing_and_by_its_quarter():
    """A purple circle at the top right, on a grey square that reaches below it."""
    square = dict(shape="grey square", color=(9, 9, 9), tone=0.5, x=72, y=40, r=12)
    circle = dict(shape="circle", color="purple", place="top right", x=72, y=24, r=14)
    labels = pretrain.label_patches([circle], [square]).view(4, 12, 12)
    on_circle = 1 + shapes.SHAPES.index("circle"), 1 + list(shapes.COLORS).index("purple"), 1, 1
    assert labels[:, 3, 9].tolist() == list(on_circle)
    on_square = 1 + len(shapes.SHAPES) + shapes.STRANGE.index("grey square"), 6 + 3 + 1, 0, 1
    assert labels[:, 5, 9].tolist() == list(on_square)
    background = [labels[:, row, column].tolist() for row in (0, 11) for column in (0, 11)]
    assert background == [[0, 0, 0, quarter] for quarter in range(4)]


def test_packed_texts_see_the_picture_and_themselves_and_learn_answers_to_their_end(vlm):
    segment = torch.tensor([[0, 0, 1]])
    seen = pretrain.visible(segment, 2)[0, 0].int()  # two tokens of a picture come first
    assert seen.tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    _, objects = shapes.draw_scene("test-0")
    tokenizer = vlm.processor.tokenizer
    packed = pretrain.pack(objects, tokenizer, random.Random(0), 150, exists=False)
    answers, prompts = set(), set()
    for number in packed[:, 1].unique():
        ids, _, positions, target = packed[packed[:, 1] == number].unbind(1)
        assert positions.tolist() == list(range(150, 150 + len(ids)))
        prompts.add(tokenizer.decode(ids[target == 0]))
        answers.add(tokenizer.decode(ids[target == 1]).strip())
    assert f"{shapes.NUMBERS[len(objects)]}</s>" in answers
    assert all(prompt.endswith(" ASSISTANT:") for prompt in prompts)
    assert all(answer.endswith("</s>") and answer != "</s>" for answer in answers)


def test_what_the_pretraining_asks_for_is_what_the_tiny_model_has_learned(vlm, monkeypatch):
    """Its loss on four scenes, from all or some tokens, is low only if all is in its place."""
    def descend(folder, modules, loss_at, *_, **options):
        for number in (0.5, 0.9):  # with fewer than all tokens, and with all
            monkeypatch.setattr(random, "random", lambda: number)
            losses.append(loss_at(0).item())

    losses, drawings = [], [shapes.draw_scene(f"test-{i}") for i in range(4)]
    scenes = [objects for _, objects in drawings]
    X = vlm.encode(vlm.inputs([image for image, _ in drawings], 4 * ["?"]))
    regions = torch.stack([pretrain.label_patches(objects, [])[2] for objects in scenes])
    monkeypatch.setattr(pretrain, "descend", descend)
    with torch.no_grad():
        pretrain.train_language(
            None, vlm.model, vlm.processor.tokenizer, X, scenes, regions, 1, False, batch=24)
    assert max(losses) < 0.12


def test_the_pretraining_warms_up_for_a_hundred_steps_and_then_cools_down(tmp_path, monkeypatch):
    rates, modules = [], torch.nn.Linear(1, 1)
    step = torch.optim.AdamW.step

    def step_spy(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_spy)
    pretrain.descend(tmp_path / "run", modules, lambda step: modules.weight.sum(), 400, 1.0, 0.0)
    cosines = [(1 + math.cos(math.pi * i / 400)) / 2 for i in range(400)]
    expected = [min(1, (i + 1) / 100) * share for i, share in enumerate(cosines)]
    assert rates == pytest.approx(expected)


def test_a_class_token_learns_colours_places_and_how_many_there_are():
    star = dict(shape="star", color="green", place="bottom left")
    circle = dict(shape="circle", color="orange", place="top left")
    facts = pretrain.content([star, circle])
    green_star, orange_circle = 5 * 1 + 3, 5 * 5 + 0
    star_below, circle_above, two = 30 + 4 * 3 + 2, 30, 50 + 1
    expected = {green_star, orange_circle, star_below, circle_above, two}
    assert set(facts.nonzero().flatten().tolist()) == expected


def test_a_subset_leaves_some_of_each_object_unless_it_is_uniform(monkeypatch):
    x, region = torch.randn(144, 8), torch.zeros(144, dtype=torch.long)
    region[[5, 77, 78]] = torch.tensor([1, 2, 2])
    lost = set()
    for way in range(3):
        monkeypatch.setattr(random, "randrange", lambda ways: way)
        for _ in range(50):
            keep = pretrain.subset(x, region, 16)
            assert (keep.diff() > 0).all() and len(keep) == 16
            if len(region[keep].unique()) < 3:
                lost.add(way)
    assert lost == {0}


def test_scenes_that_this_code_did_not_draw_are_drawn_again(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "FOLDER", tmp_path)
    one_of_each = dict.fromkeys(shapes.SPLITS, 1)
    picture = shapes.prepare(one_of_each) / "test/00000.jpg"
    drawn = picture.read_bytes()
    contents = {path.read_bytes() for path in tmp_path.glob("*/*.jpg")}
    assert len(contents) == 4, "no scene is in two splits"
    rows = questions.read_questions(tmp_path / "test.jsonl")
    assert [row["category"] for row in rows] == ["color", "shape", "where", "count", "exists"]
    assert {row["image"] for row in rows} == {picture}
    for path in tmp_path.rglob("*.*"):
        path.write_bytes(b"{}")
    picture = shapes.prepare(one_of_each) / "test/00000.jpg"
    assert picture.read_bytes() == drawn


# --- a run that is stopped, split or disturbed ----------------------------------------------------

def captions_file(folder, field="images", changes={}):
    """A COCO captions file of the six examples, after changes to its second image or annotation."""
    images = [dict(id=i, file_name=path.name) for i, path in enumerate(EXAMPLES)]
    captions = [dict(id=i, image_id=i, caption=f"Caption{i * ' red'}. ") for i in range(6)]
    content = {"images": images, "annotations": captions}
    content[field][1] |= changes
    path = folder / "coco.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    return path


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """tiny(…): a run of six steps on the example scenes, to tmp_path/out."""
    monkeypatch.setattr(train, "SPARSE", 1)
    paths = ["--data", captions_file(tmp_path), "--images", PICTURES, "--model", TINY]
    settings = "--keep 20 --steps 6 --batch 4 --eval-every 2 --save-every 1 --workers 0".split()
    argv = [*paths, "--out", tmp_path / "out", *settings, "--device", "cpu"]
    return functools.partial(run, train.main, *argv)


def in_a_process(f):
    """f() in a forked process of one thread; its exit code, or minus the signal that killed it."""
    def with_one_thread():
        torch.set_num_threads(1)
        f()

    child = multiprocessing.get_context("fork").Process(target=with_one_thread)
    child.start()
    child.join()
    return child.exitcode


def signal_on_call(patch, number, where, name, nth):
    """From now on the nth call of where.name begins with a signal to this process."""
    f = getattr(where, name)
    calls = itertools.count(1)

    def with_signal(*args, **options):
        if next(calls) == nth:
            signal.raise_signal(number)
        return f(*args, **options)

    patch.setattr(where, name, with_signal)


def log_of(out):
    """The rows of a run's log; seconds, which differ between equal runs, are 0."""
    lines = (out / "log.jsonl").read_text().splitlines()
    return [json.loads(line) | {"seconds": 0} for line in lines]


def tensors_of(out):
    """All that a run has saved: of its scorer and of its checkpoint."""
    scorer = load_file(out / "scorer.safetensors")
    return scorer | load_file(out / "checkpoint.safetensors")


def training_pictures(folder, images):
    """[(picture, captions), …] that a run of seed 0 on these images learns from."""
    pairs = coco_files.read_coco(captions_file(folder), images)
    training, _ = coco_files.split(pairs, 0)
    return training


def hold_out_two(pairs, seed, patch):
    """(training, held_out) of a run that holds out one picture more than it would."""
    def split(pairs, given):
        assert given == seed
        return training, held_out

    training, held_out = coco_files.split(pairs, seed)
    held_out.append(training.pop())
    patch.setattr(train, "split", split)
    return training, held_out


CLIPPING = torch.nn.utils, "clip_grad_norm_", 2  # the second call of it
INTERRUPTIONS = [  # signal, on which call, --save-every, exit code, steps that are saved
    (signal.SIGKILL, CLIPPING, 1, -9, 1),
    (signal.SIGKILL, (os, "fsync", 2), 1, -9, 1),
    (signal.SIGKILL, (train, "held_out_losses", 2), 1, -9, 4),
    (signal.SIGTERM, CLIPPING, 100, 143, 6),
    (signal.SIGINT, CLIPPING, 100, 130, 8),
]


def test_killed_and_stopped_five_times_it_ends_as_if_it_had_not_been(tmp_path, tiny, monkeypatch):
    """A kill costs the step.

    A first SIGTERM or SIGINT lets the step end, and saves before --save-every says so.
    """
    whole, out = tmp_path / "whole", tmp_path / "out"
    settings = ["--steps", 9, "--watch", EXAMPLES[0]]
    assert in_a_process(lambda: tiny(*settings, "--out", whole)) == 0
    for number, call, save_every, code, step in INTERRUPTIONS:
        argv = [*settings, "--save-every", save_every]
        with monkeypatch.context() as patch:
            signal_on_call(patch, number, *call)
            assert in_a_process(lambda: tiny(*argv)) == code, call
        _, state = running.read_checkpoint(out / "checkpoint.safetensors")
        assert state["step"] == step
        settings = [*settings, "--resume"]
    assert in_a_process(lambda: tiny(*settings, "--workers", 1)) == 0

    expected, tensors = tensors_of(whole), tensors_of(out)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].equal(tensor), name
    assert log_of(out) == log_of(whole)
    assert len(log_of(whole)) == 5
    frames = json.loads((whole / "watched.json").read_text())["frames"]
    assert json.loads((out / "watched.json").read_text())["frames"] == frames
    assert [frame["step"] for frame in frames] == list(range(9))
    for frame in frames:
        assert sum(frame["alpha"][0]) == pytest.approx(20, abs=0.01)


def adam_moments(out):
    """Adam's first moments of all that learns, in one vector: the gradients of the steps so far."""
    tensors = load_file(out / "checkpoint.safetensors")
    names = [name for name in sorted(tensors) if name.endswith("exp_avg")]
    return torch.cat([tensors[name].flatten() for name in names])


def train_in_two_processes(*argv):
    """stderr of train.py under torchrun."""
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    command = [sys.executable, *launcher, ROOT / "train.py", *argv]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_processes_and_parts_are_the_whole_batch(tmp_path, tiny):
    """The same gradients from two processes, also with a sharded LLM, and from parts of 3 and 1.

    The LLM's words are faint, so that no gradient is long enough to be clipped, which would hide a
    factor.
    """
    faint = changed(tmp_path, "model.safetensors", {"language_model.lm_head.weight": 0.02})
    short = ["--model", faint, "--steps", 2, "--eval-every", 1, "--out"]
    _, *usual = tiny.args  # after main
    for name, *more in (["two"], ["sharded", "--shard"]):
        stderr = train_in_two_processes(*usual, *short, tmp_path / name, *more)
        assert "Traceback" not in stderr
        assert stderr.count("keep 20") == 1
    tiny(*short, tmp_path / "one")
    tiny(*short, tmp_path / "parts", "--at-once", 3)
    expected = adam_moments(tmp_path / "one")
    assert 0 < expected.norm() < 0.1
    for other in ("two", "sharded", "parts"):
        error = (expected - adam_moments(tmp_path / other)).abs().max()
        assert error < 1e-4 * expected.abs().max(), other
        for row, expected_row in zip(log_of(tmp_path / other), log_of(tmp_path / "one")):
            assert expected_row == pytest.approx(row, rel=2e-4)


def test_a_shard_is_half_of_every_layer():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    vlm = load(TINY)
    whole = memory.of_a_step(vlm, 0, 1)["frozen"]
    layers = vlm.model.model.language_model.layers
    half = sum(p.nbytes for p in layers.parameters()) / 2
    Processes.shard(SimpleNamespace(world=2, device="cpu"), vlm)
    dist.destroy_process_group()
    saved = whole - memory.of_a_step(vlm, 0, 1)["frozen"]
    assert saved == pytest.approx(half, rel=0.01)


def test_a_checkpoint_brings_back_all_of_a_run(tmp_path):
    def start(resume):
        modules = torch.nn.ModuleDict({"scorer": torch.nn.Linear(2, 2)})
        optimizer = torch.optim.AdamW(modules.parameters())
        run = running.Run(tmp_path, {"batch": 4}, Processes("cpu"), resume)
        run.hold(modules, optimizer, {"mean": torch.randn(2)})
        return run

    run = start(resume=False)
    run.modules["scorer"](torch.ones(2)).sum().backward()
    run.optimizer.step()
    run.log({"step": 2, "tau": 0.1, "deployed_loss": 1.0})
    run.write("scorer.safetensors", run.modules["scorer"].state_dict())
    run.skipped.add("broken.jpg")
    run.before = 100.0
    run.save(3)
    run.lock.close()
    again = start(resume=True)
    assert again.step == 3
    assert again.skipped == {"broken.jpg"}
    assert 100 < again.seconds() < 200
    assert again.curve == run.curve
    assert again.statistics["mean"].equal(run.statistics["mean"])
    close(again.modules.state_dict(), run.modules.state_dict(), atol=0)
    moments = again.optimizer.state_dict()["state"]
    close(moments, run.optimizer.state_dict()["state"], atol=0)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_is_not_lost_to_another_or_to_a_full_disk(tmp_path, tiny):
    def on_a_full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # no file may become larger
        complaint("checkpoint.safetensors: cannot be written", tiny, "--overwrite")

    out = tmp_path / "out"
    complaint("--resume", tiny, "--resume")
    tiny("--steps", 1)
    before = contents(out)
    complaint("--overwrite", tiny)
    same_captions = shutil.copy(tmp_path / "coco.json", tmp_path / "copy.json")
    same_pictures = shutil.copytree(PICTURES, tmp_path / "pictures")
    for option, value in (
        ("--keep", 19), ("--seed", 1), ("--batch", 5), ("--lr", 1), ("--steps", 2),
        ("--choose", "top"), ("--dtype", "bfloat16"), ("--watch", PICTURE),
        ("--eval-every", 1), ("--data", same_captions), ("--images", same_pictures),
        ("--model", "another"),
    ):
        complaint(f"^{option}", tiny, "--steps", 1, "--resume", option, value)
    with open(out / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        complaint("another run is writing there", tiny, "--overwrite")
    assert in_a_process(on_a_full_disk) == 0
    assert contents(out) == before


def test_a_run_is_not_continued_with_other_content(tmp_path, tiny, monkeypatch):
    """Other captions in the same file, other weights in the same folder, half a checkpoint."""
    def refused(field):
        complaint(f"^{field} .* content", tiny, "--steps", 1, "--resume")

    tiny("--steps", 1)
    captions_file(tmp_path, "annotations", {"caption": "Another."})
    assert in_a_process(lambda: refused("--data")) == 0
    monkeypatch.setattr(train, "fingerprint", lambda model: "of other weights")
    assert in_a_process(lambda: refused("--model")) == 0
    checkpoint = tmp_path / "out/checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-9])
    complaint("checkpoint.safetensors", tiny, "--resume", "--steps", 1)
    tiny("--overwrite", "--steps", 1)
    (tmp_path / "out/scorer.safetensors").unlink()
    complaint("scorer.safetensors.*--overwrite", tiny, "--resume", "--steps", 1)
    complaint("a loss or its gradient is", tiny, "--overwrite", "--lr", 1e30)


def test_a_run_writes_over_no_file_of_the_users(tmp_path, tiny):
    folder = tmp_path / "own"
    folder.mkdir()
    for name in ("log.jsonl", "watched.json"):
        path = folder / name
        path.write_text("my own")
        complaint(f"holds {name}.*--overwrite", tiny, "--out", folder)
        assert path.read_text() == "my own"
        path.unlink()
    no_utf8 = os.fsdecode(b"caf\xe9")
    complaint("UTF-8|utf-8", tiny, "--out", tmp_path / no_utf8)
    complaint("nothing to choose", tiny, "--out", tmp_path / "all", "--keep", "all")


@pytest.mark.parametrize("command, pattern", [
    ("train --keep 0", "--keep '0' is not a budget"),
    ("train --keep 145", "145: .*144 visual tokens"),
    ("train --keep ~16", "~16"),
    ("train --lr inf", "--lr inf"),
    ("train --seed 18446744073709551616", "--seed"),
    ("train --questions none.jsonl", "none.jsonl"),
    ("train --watch a.jpg", "a.jpg"),
    ("train --data no.json", "no.json"),
    ("train --model ./no/such", "no/such"),
    ("train --model ''", "^model '': no such"),
    ("train --out LICENSE", "--out"),
    ("train --device meta", "random:"),
    ("train --model random:llava-1.5-7b", "for bench.py"),
    ("infer PICTURE ? --model random:llava-1.5-7b", "for bench.py"),
    ("infer PICTURE ? --device cuda:99", "cuda:99"),
    ("infer PICTURE ? --device toaster", "--device cpu"),
    ("infer gone.jpg ?", "gone.jpg"),
    ("infer -", "standard input"),
    ("infer", "picture"),
    ("infer --questions q", "--answers"),
    ("infer PICTURE ? --keep 145", "144"),
    ("infer PICTURE ' '", "empty"),
    ("infer PICTURE ? --keep 9 --threshold 1", "without --keep"),
    ("infer PICTURE ? --pruner no", "no:"),
    ("infer PICTURE --show k.png", "--show"),
    ("infer PICTURE ? --show no/k.png", "--show no/k.png"),
    ("infer PICTURE 'a <image>' --keep 9", "<image>"),
    ("infer --questions q --answers a.json", "ends in .jsonl"),
    ("bench --keep 0", "--keep"),
    ("bench --keep 9 ~16", "9 ~16: .*leave ~ out"),
    ("bench --count", "leave --model out"),
    ("bench --json /no/x.json", "--json"),
])
def test_wrong_arguments_are_one_line_and_leave_nothing(
        command, pattern, tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(ROOT)
    programs = {
        "train": tiny,
        "infer": functools.partial(run, infer.main, "--device", "cpu"),
        "bench": functools.partial(run, bench.main, "--model", TINY, "--device", "cpu"),
    }
    program, *argv = shlex.split(command.replace("PICTURE", str(PICTURE)))
    complaint(pattern, programs[program], *argv)
    assert not (tmp_path / "out/checkpoint.safetensors").exists()


def test_processes_that_cannot_work_together_are_refused(vlm, monkeypatch):
    for rank, world in (("0", "2"), ("1", "1"), ("a", "1")):
        monkeypatch.setattr(os, "environ", {"RANK": rank, "WORLD_SIZE": world})
        complaint("torchrun", Processes, "cpu")
    monkeypatch.setattr(os, "environ", {"RANK": "", "WORLD_SIZE": ""})
    processes = Processes("cpu")
    args = SimpleNamespace(batch=8, at_once=3, checkpointing=False, shard=True)
    assert processes.plan(vlm, 1000, args) == (3, 3)
    for processes.world in (9, 3):
        complaint("--batch 8", processes.plan, vlm, 1000, args)


def test_processes_share_the_memory_and_the_one_with_the_least_room_decides(vlm, monkeypatch):
    """Two processes of eight pictures: here three fit at once, in the other one two."""
    def all_reduce(tensor, op):
        smaller_or_larger = {dist.ReduceOp.MIN: min, dist.ReduceOp.MAX: max}[op]
        tensor.fill_(smaller_or_larger(tensor.item(), 2))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(memory, "system_memory", lambda: (8e9, "a test"))
    one = Processes("cpu")
    assert memory.free("cpu") == (8e9, "a test")
    assert memory.free("cpu", world=2) == (4e9, "a test")
    one.world = 2
    args = SimpleNamespace(batch=8, at_once=3, checkpointing=False, shard=False)
    assert one.plan(vlm, 1000, args) == (2, 2)


@pytest.mark.parametrize("checkpointing, batch, plan, planned", [
    (False, 20, (2, 10), "10.0"),
    (True, 20, (8, 3), "10.0"),
    (True, 5, (5, 1), "7.0"),
])
def test_a_plan_goes_by_whether_activations_are_computed_twice(
        checkpointing, batch, plan, planned, monkeypatch, capsys):
    """A picture takes 4 GB, or 1 GB, beside 1 GB of what learns; 9 of 10 GB may be used."""
    def of_a_step(vlm, learned, B, recompute=False):
        return {"frozen": 1e9, "learned": 1e9, "activations": B * (1e9 if recompute else 4e9)}

    monkeypatch.setattr(memory, "of_a_step", of_a_step)
    monkeypatch.setattr(memory, "system_memory", lambda: (10e9, "a test"))
    args = SimpleNamespace(batch=batch, at_once=None, checkpointing=checkpointing, shard=False)
    assert Processes("cpu").plan(None, 1000, args) == plan
    in_words = (f"{plan[0]} images at a time, {plan[1]} times a step: about {planned} GB with "
                "the model")
    assert in_words in capsys.readouterr().err


def test_work_that_is_done_once_is_the_first_processs():
    done, one = [], Processes("cpu")
    one.once(lambda: done.append("the first"))
    one.first = False
    one.once(lambda: done.append("another"))
    assert done == ["the first"]


def a_run(folder, settings):
    """A run of a module of two weights, before its first step."""
    modules = torch.nn.ModuleDict({"scorer": torch.nn.Linear(1, 1)})
    started = running.Run(folder, settings, Processes("cpu"))
    started.hold(modules, torch.optim.AdamW(modules.parameters()), {})
    return started


def test_one_unreadable_image_in_a_hundred_is_borne_and_two_are_not(tmp_path):
    def read_for_three_steps():
        for step in started.steps(3, 100):
            started.skipped.add(f"{step}.jpg")  # one of the hundred of each step
            steps.append(step)
        started.skipped.add("another.jpg")
        list(started.steps(4, 100))

    started, steps = a_run(tmp_path, {"batch": 100}), []
    complaint("4 of 100 images could not be read", read_for_three_steps)
    assert steps == [0, 1, 2]


def test_a_second_signal_ends_a_run_at_once(tmp_path):
    def run_that_is_stopped_twice():
        for _ in a_run(tmp_path, {"batch": 1}).steps(9, 100):
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)

    assert in_a_process(run_that_is_stopped_twice) == 143
    _, state = running.read_checkpoint(tmp_path / "checkpoint.safetensors")
    assert state["step"] == 0, "the step was not finished"


@pytest.mark.parametrize("device, dtype", [("cpu", "float32"), ("cuda:1", "bfloat16")])
def test_numbers_are_as_exact_as_the_device_is_fast_at(device, dtype):
    args = SimpleNamespace(device=device, dtype=None)
    assert infer.number_type(args) == dtype


def test_schedules_clipping_and_the_budget_reach_the_optimizer(tmp_path, tiny, monkeypatch):
    rates, norms, schedule, statistics_of = [], [], [], []
    step, forward = torch.optim.AdamW.step, train.forward

    def step_spy(optimizer):
        group, = optimizer.param_groups
        gradient = torch.cat([p.grad.flatten() for p in group["params"]])
        rates.append(group["lr"])
        norms.append(gradient.norm().item())
        return step(optimizer)

    def steep_forward(*graph):
        *_, budget, tau, _ = graph
        if torch.is_grad_enabled():
            schedule.append((budget.count, tau))
        loss, alpha = forward(*graph)
        return 1e4 * loss, alpha

    def whitening_spy(X):
        statistics_of.append(len(X))
        return whitening(X)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_spy)
    monkeypatch.setattr(train, "forward", steep_forward)
    monkeypatch.setattr(train, "whitening", whitening_spy)
    tiny("--steps", 12, "--lr", 1e-4, "--eval-every", 20)
    half_cosine = [(1 + math.cos(math.pi * i / 12)) / 2 for i in range(12)]
    assert rates == pytest.approx([1e-4 * share for share in half_cosine])
    for row in log_of(tmp_path / "out"):
        assert row["lr"] == pytest.approx(rates[row["step"]], rel=1e-4)
    assert norms == pytest.approx([1.0] * 12, rel=1e-3), "longer than 1, and clipped to it"
    assert schedule == [(20, train.temperature(i / 12)) for i in range(12)]
    assert statistics_of == [5 * 32], "32 tokens of each training image"


def light_of(inputs):
    """One number for each picture of a batch, by which it is recognised."""
    return inputs["pixel_values"].sum((1, 2, 3)).tolist()


def test_a_training_goes_by_its_seed_through_its_own_pictures_with_fresh_noise(
        tmp_path, tiny, vlm, monkeypatch):
    """Three steps of four samples, from four pictures; the two others are held out.

    Of their five captions the first is evaluated each time.
    """
    path = captions_file(tmp_path)
    content = read_captions_file(path)
    content["annotations"] += [dict(id=6 + i, image_id=i % 6, caption=f"{i}") for i in range(24)]
    path.write_text(json.dumps(content))
    pairs = coco_files.read_coco(path, PICTURES)
    training, held_out = hold_out_two(pairs, 3, monkeypatch)
    samples = coco_files.Captions(training, 3)
    forward, learned_from, evaluated_on, noises, results = train.forward, [], [], [], []
    unseen_texts = []

    def spy(*graph):
        frozen, scorer, _, _, inputs, noise, *_ = graph
        loss, alpha = forward(*graph)
        if torch.is_grad_enabled():
            learned_from.extend(light_of(inputs))
            noises.extend(noise[:, 0, 0].tolist())
            hardness = alpha.topk(20).values.mean()
            results.append((loss.item(), hardness.item()))
        else:
            evaluated_on.extend(light_of(inputs))
            for row in inputs["labels"]:
                unseen_texts.append(vlm.processor.tokenizer.decode(row[row != -100]).strip())
        assert not any(p.requires_grad for p in frozen.model.parameters())
        for p in scorer.parameters():
            assert p.grad is None or not p.grad.any()
        return loss, alpha

    monkeypatch.setattr(train, "forward", spy)
    tiny("--seed", 3, "--steps", 3, "--eval-every", 2)
    expected = [samples[number][1] for number in range(12)]
    expected_light = light_of(vlm.inputs(expected, ["?"] * 12))
    assert learned_from == pytest.approx(expected_light, rel=1e-4)
    unseen = [read_image(path) for path, _ in held_out]
    unseen_light = light_of(vlm.inputs(unseen, ["?", "?"]))
    assert evaluated_on == pytest.approx(2 * unseen_light, rel=1e-4)
    assert unseen_texts == 2 * [f"{captions[0]}</s>" for _, captions in held_out]
    assert len(set(noises)) == 12
    log = log_of(tmp_path / "out")
    logged = torch.tensor([(row["loss"], row["hardness"]) for row in log])
    assert logged.allclose(torch.tensor(results[::2]), atol=1e-3)
    assert len({row["full_loss"] for row in log}) == 1


def test_all_that_counts_as_learning_learns(tmp_path, tiny, vlm, capsys):
    first, _ = what_learns_first(vlm, seed=3)
    tiny("--seed", 3, "--steps", 3, "--eval-every", 2)
    count = sum(p.numel() for p in first.parameters())
    stderr = capsys.readouterr().err
    assert f"{count:,} parameters learn" in stderr, "what the memory plan counts"
    last = load_file(tmp_path / "out/checkpoint.safetensors")
    for name, weight in first.state_dict().items():
        assert not weight.equal(last[name]), name


def test_the_best_scorer_after_the_annealing_is_kept(tmp_path, tiny, monkeypatch, capsys):
    """And the thresholds and the closing table are its own."""
    deployed = iter([0.1, 5.0, 4.0, 3.0, 2.5, 2.0])
    quarter = iter([1.0, 1.0, 1.0, 1.0, 1.0, 4.0])
    evaluated, closing, calibrated = [], [], []

    def held_out_losses(graph, *_):
        _, scorer, *_ = graph
        evaluated.append(scorer.head.weight.clone())
        return {
            "full_loss": 1.0,
            "soft_loss": 3.0,
            "deployed_loss": next(deployed),
            "quarter_loss": next(quarter),
        }

    def thresholds(vlm, scorer, choose, batches):
        closing.append(scorer.head.weight.clone())
        pixels, = [inputs["pixel_values"] for inputs in batches]
        calibrated.extend([choose, pixels.sum().item()])
        return {"images": 1, "shares": [0.1, 1.0], "values": [1.0, -1.0]}

    def accuracy_table(vlm, scorer, *_):
        closing.append(scorer.head.weight.clone())
        return {"all 144": {"a": 0.8}, "scorer 20": {"a": 0.4}}

    for replacement in (held_out_losses, thresholds, accuracy_table):
        monkeypatch.setattr(train, replacement.__name__, replacement)
    monkeypatch.setattr(train, "hardness_of", lambda alpha, K: 0.79 * torch.ones(len(alpha)))
    questions_file = tmp_path / "q.jsonl"
    files.write(questions_file, [question(label="red")])
    pairs = coco_files.read_coco(tmp_path / "coco.json", PICTURES)
    _, held_out = hold_out_two(pairs, 0, monkeypatch)
    tiny("--steps", 10, "--choose", "top", "--questions", questions_file, "--json")
    out, err = capsys.readouterr()
    assert "warning: hardness 0.79 at the end" in err
    result = json.loads(out.splitlines()[-1])
    assert result["retention"] == 50

    unseen = [read_image(path) for path, _ in held_out]
    light = sum(light_of(load(TINY).inputs(unseen, ["?", "?"])))
    assert calibrated == ["top", pytest.approx(light, rel=1e-4)]
    log = log_of(tmp_path / "out")
    assert [row["step"] for row in log] == [0, 2, 4, 6, 8, 9]
    assert log[-3]["tau"] == log[-1]["tau"] == 0.1
    scorer, settings = pruner.load_pruner(tmp_path / "out")
    best = evaluated[4]
    assert settings["best"]["step"] == 8, "the first, 0.1, was luck: tau was high"
    assert scorer.head.weight.equal(best)
    assert [weight.equal(best) for weight in closing] == [True, True]


def test_watched_alphas_are_those_of_the_scorer_of_their_step(tmp_path, tiny, vlm):
    two = EXAMPLES[:2]
    tiny("--steps", 2, "--at-once", 1, "--watch", *two)
    first, second = json.loads((tmp_path / "out/watched.json").read_text())["frames"]
    assert [first["tau"], second["tau"]] == [2, 0.1]
    modules, _ = what_learns_first(vlm, seed=0)
    X = vlm.encode(vlm.inputs([read_image(path) for path in two], ["?", "?"]))
    scores = modules["scorer"](X).detach()
    expected = soft_top_k(distinct(scores, X), 20, 2.0)
    close(torch.tensor(first["alpha"]), expected, atol=1e-4)
    assert hardness_of(torch.tensor(second["alpha"]), 20).min() > hardness_of(expected, 20).max()


def test_evaluations_are_rare_until_tau_is_down(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(train, "SPARSE", 3)
    tiny("--steps", 16)
    log = log_of(tmp_path / "out")
    assert [row["step"] for row in log] == [0, 6, 8, 10, 12, 14, 15]


def test_an_unreadable_image_is_skipped_and_two_of_five_stop_the_run(
        tmp_path, tiny, capsys, monkeypatch):
    """One is cut off; the other is read, and then refused by the model's processor."""
    images = shutil.copytree(PICTURES, tmp_path / "images")
    training = training_pictures(tmp_path, images)
    argv = ["--images", images, "--steps", 2, "--batch", 5, "--workers", 1, "--overwrite"]
    first, second = training[1][0], training[3][0]
    first.write_bytes(first.read_bytes()[:500])
    tiny(*argv)
    warning = f"unreadable images, 1, each replaced by the next: {first}"
    assert warning in capsys.readouterr().err

    too_long = read_image(second)
    kind = type(load(TINY).processor.image_processor)
    process = kind.__call__

    def process_but_one(self, images, *args, **options):
        nested = isinstance(images, list)
        pictures = sum(images, []) if nested else [images]
        if too_long in pictures:
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return process(self, images, *args, **options)

    monkeypatch.setattr(kind, "__call__", process_but_one)
    names = sorted([first, second])
    complaint(f"2 of 5 images could not be read.*{names[0]}.*{names[1]}", tiny, *argv)


def test_a_loss_in_half_precision_is_a_mean_in_float32():
    half = load(TINY, dtype=torch.bfloat16)
    inputs = half.inputs(SCENES, QUESTIONS, CAPTIONS)
    X = half.encode(inputs)
    loss = half.loss(inputs, X)
    labels = inputs["labels"][:, 1:]
    logits = half.logits(inputs, X)[:, :-1][labels != -100].double()
    expected = F.cross_entropy(logits, labels[labels != -100])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("dtype, choose, rank", [
    ("bfloat16", "distinct", distinct),
    ("float16", "top", train.raw_scores),
])
def test_half_precision_changes_little_and_the_frozen_model_not_at_all(
        tmp_path, tiny, monkeypatch, dtype, choose, rank):
    out, half = tmp_path / "out", tmp_path / "half"
    ranks, loaded, forward = set(), [], train.forward

    def forward_spy(*graph):
        *_, parts = graph
        ranks.add(parts.rank)
        return forward(*graph)

    def load_spy(*args):
        loaded.append(load(*args))
        return loaded[-1]

    monkeypatch.setattr(train, "forward", forward_spy)
    monkeypatch.setattr(train, "load", load_spy)
    argv = ["--steps", 2, "--choose", choose]
    tiny(*argv)
    tiny(*argv, "--out", half, "--dtype", dtype, "--checkpointing", "--at-once", 2)
    assert ranks == {rank}
    assert [frozen.model.dtype for frozen in loaded] == [torch.float32, getattr(torch, dtype)]
    assert [frozen.decoder.training for frozen in loaded] == [False, True], "as checkpointing needs"
    _, settings = pruner.load_pruner(out)
    assert (settings["keep"], settings["choose"]) == ("20", choose)
    for tensor in load_file(half / "checkpoint.safetensors").values():
        assert tensor.dtype == torch.float32
    for row, expected in zip(log_of(half), log_of(out)):
        assert row["deployed_loss"] == pytest.approx(expected["deployed_loss"], rel=0.1)
    trained_with, untouched = loaded[0].model.state_dict(), load(TINY).model.state_dict()
    for a, b in zip(trained_with.values(), untouched.values()):
        assert a.equal(b)


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(60)


def send_half_a_batch():
    """And hang, as seen by who reads it: a worker that was killed just then sends no more."""
    for connection in gc.get_objects():
        if isinstance(connection, Connection) and connection.writable:
            promised = struct.pack("!i", 10 ** 6)  # bytes of a message
            os.write(connection.fileno(), promised + b"half")
    hang()


def run_out_of_memory():
    bytearray(10 ** 15)


@pytest.mark.parametrize("fault, pattern", [
    (be_killed, "DataLoader worker .* exited unexpectedly|killed by signal"),
    (hang, "reading a batch of pictures does not end"),
    (send_half_a_batch, "reading a batch of pictures does not end"),
    (run_out_of_memory, "MemoryError"),
])
def test_whatever_befalls_a_worker_the_run_ends_with_one_line(
        fault, pattern, tiny, monkeypatch, capfd):
    def read_in_a_worker(*source):
        if torch.utils.data.get_worker_info():
            fault()
        return read_image(*source)

    monkeypatch.setattr(coco_files, "read_image", read_in_a_worker)
    monkeypatch.setattr(coco_files, "WAIT", 3)
    with pytest.raises(SystemExit):
        files.cli(lambda: tiny("--workers", 1))
    *_, last = capfd.readouterr().err.strip().splitlines()
    assert re.match(f"error: .*({pattern}).*; .*(--workers 0|fewer images)", last)


def test_the_time_limit_is_for_reading_pictures_and_not_for_a_step(tmp_path, vlm, monkeypatch):
    def read_and_look_at_the_alarm(*source):
        alarms.append(signal.getitimer(signal.ITIMER_REAL)[0])
        return read_image(*source)

    alarms = []
    monkeypatch.setattr(coco_files, "read_image", read_and_look_at_the_alarm)
    pairs = coco_files.read_coco(captions_file(tmp_path), PICTURES)
    samples = coco_files.Captions(list(pairs.items()))
    for _ in coco_files.load_batches(vlm, samples, [[0], [1]], "Describe it.", 0, set()):
        alarms.append(signal.getitimer(signal.ITIMER_REAL)[0])
    read, stepped, read_again, stepped_again = alarms
    assert stepped == stepped_again == 0
    assert 0 < read <= 600
    assert 0 < read_again <= 600


def test_workers_need_no_shared_memory_for_pictures(tmp_path, vlm, monkeypatch):
    """Torch would take 64 MB of /dev/shm in a container for its own; here it has none at all."""
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", no_space)
    monkeypatch.setattr(coco_files, "WAIT", 20)
    pairs = coco_files.read_coco(captions_file(tmp_path), PICTURES)
    samples = coco_files.Captions(list(pairs.items()), seed=0)

    def batches(workers):
        numbers = [[0, 1], [2, 3, 4]]
        loader = coco_files.load_batches(vlm, samples, numbers, "Describe it.", workers, set())
        return list(loader)

    for without, packed in zip(batches(workers=0), batches(workers=1), strict=True):
        numbers, inputs = without
        same_numbers, same_inputs = packed
        assert tuple(numbers) == tuple(same_numbers)
        assert inputs.keys() == same_inputs.keys()
        for name, tensor in inputs.items():
            assert tensor.equal(same_inputs[name]), name


def test_a_resumed_run_needs_the_pictures_that_it_began_with(tmp_path, tiny):
    """Of another size, or with other bytes; one that could not be read may be replaced."""
    images = shutil.copytree(PICTURES, tmp_path / "images")
    argv = ["--images", images, "--steps", 1]
    training = training_pictures(tmp_path, images)
    unseen, = set(images.iterdir()) - {path for path, _ in training}
    broken, other = training[2][0], training[0][0]
    content = broken.read_bytes()
    broken.write_bytes(content[:500])
    tiny(*argv)
    broken.write_bytes(content)
    tiny(*argv, "--resume")

    def refused():
        complaint(f"{other.name}: not the same content", tiny, *argv, "--resume")

    longer = EXAMPLES[-1].read_bytes() + b"longer"
    other_end = other.read_bytes()[:-9] + b"123456789"
    for other, wrong in ((other, longer), (other, other_end), (unseen, longer)):
        content = other.read_bytes()
        other.write_bytes(wrong)
        assert in_a_process(refused) == 0
        other.write_bytes(content)

    paired = captions_file(tmp_path).read_text(encoding="utf-8-sig")
    first, second = EXAMPLES[0].name, EXAMPLES[1].name
    for old, new in ((first, "-"), (second, first), ("-", second)):
        paired = paired.replace(f'"{old}"', f'"{new}"')  # the same captions and pictures
    (tmp_path / "coco.json").write_text(paired)

    def refused_pairs():
        complaint("^--data .* content", tiny, *argv, "--resume")

    assert in_a_process(refused_pairs) == 0


def test_a_large_picture_is_known_by_its_middle(tmp_path):
    digests = set()
    for middle in (b"a", b"b"):
        path = tmp_path / "large.jpg"
        path.write_bytes(100_000 * b"-" + middle + 100_000 * b"-")
        digests.add(coco_files.digest(path))
    assert len(digests) == 2


def test_every_import_goes_down():
    floor, paths = {}, []
    for number, names in enumerate(FLOORS):
        for name in names:
            floor[name] = number
            in_folder = sorted(ROOT.glob(f"{name}/**/*.py"))
            paths += in_folder or [ROOT / f"{name}.py"]
    assert len(paths) > 20
    for path in paths:
        own = path.relative_to(ROOT).with_suffix("").parts[0]
        imported = re.findall(r"^ *(?:from|import) (\w+)", path.read_text(), re.M)
        for name in set(imported) & set(floor) - {own}:
            assert floor[name] < floor[own], (path, name)


def logits_of(vlm, sequence):
    """Logits of the prefill's last state and of each of eight decoded tokens, (8, B, V)."""
    with vlm.prepared(sequence) as given:
        generated = vlm.model.generate(**given, max_new_tokens=8, min_new_tokens=8,
                                       output_logits=True, return_dict_in_generate=True)
    return torch.stack(generated.logits)


def mask_of(keep, N):
    """(B, N) bool: the tokens in keep (B, K), in which -1 is padding."""
    with_padding = torch.zeros(len(keep), N + 1, dtype=torch.bool)
    return with_padding.scatter(1, keep + 1, True)[:, 1:]


def test_pruning_is_the_stock_model_with_pruned_tokens_masked(backbone):
    vlm, inputs, X = backbone
    B, N, _ = X.shape  # images, visual tokens
    plain, full = stock(vlm, inputs), vlm.embed(inputs, X)
    rounds = not hasattr(vlm.decoder.norm, "variance_epsilon")
    near = 2e-5 if rounds else 1e-8
    close(logits_of(vlm, full), logits_of(vlm, plain), atol=near)
    close(vlm.loss(inputs, X), vlm.model(**plain).loss.double(), atol=2e-6)
    numbers = torch.arange(N).expand(B, -1)
    everything = numbers.masked_fill(~real(inputs, X), -1).sort(1).values
    nothing = torch.full((B, 1), -1)
    for keep in (everything, nothing, some(X, inputs)):
        pruned = vlm.embed(inputs, X, keep)
        masked = stock(vlm, inputs, mask_of(keep, N))
        vlm.model.generate(**plain, max_new_tokens=2)  # leaves rope_deltas, which must not matter
        if vlm.exact or keep is everything:
            close(logits_of(vlm, pruned), logits_of(vlm, masked), atol=near)
            expected = vlm.model(**masked).loss.double()
            close(vlm.loss(inputs, X, keep), expected, atol=2e-6)
    assert pruned["attention_mask"].shape[1] < full["attention_mask"].shape[1]

    # A deliberate mistake must be seen: nothing dropped, or positions closed up.
    closed_up = (pruned["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    closed_up = closed_up.expand_as(pruned["position_ids"])
    for mistake in (full, {**pruned, "position_ids": closed_up}):
        error = logits_of(vlm, mistake) - logits_of(vlm, masked)
        assert error.abs().max() > 1e-3


def test_labels_are_the_caption_and_the_end_of_text(backbone):
    vlm, inputs, _ = backbone
    for row, caption in zip(inputs["labels"], CAPTIONS, strict=True):
        text = vlm.processor.tokenizer.decode(row[row != -100])
        assert text.strip() == caption + "</s>"


def test_gradient_checkpointing_changes_nothing(backbone):
    """Also with gaps in the positions.

    Where there is no mask, transformers takes these for packed sequences.
    """
    vlm, inputs, X = backbone
    x = X.clone().requires_grad_()
    keep = some(X, inputs)
    results, calls = [], []
    for module in vlm.decoder.modules():
        module.attention_dropout = 0.5  # of the training that made it; here nothing may be dropped
    mlp = vlm.decoder.layers[0].mlp
    hook = mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for start in (vlm.model.eval, lambda: memory.recompute(vlm)):
        start()
        losses = [vlm.loss(inputs, x), vlm.loss(inputs, x, keep)]
        gradient = torch.autograd.grad(sum(losses), x)
        results.append((losses, gradient))
    hook.remove()
    slope, = torch.autograd.grad(vlm.loss(inputs, x, keep), x)
    vlm.model.eval()  # which turns it off
    close(*results, atol=1e-12, rtol=1e-9)
    kept = mask_of(keep, X.shape[1])
    assert slope[kept].norm(dim=-1).min() > 0, "it reaches every kept token"
    assert not slope[~kept].any()
    assert len(calls) == 2 + 4, "it must run twice for each loss"


def test_gradient_checkpointing_drops_nothing_where_a_layer_would():
    class Decoder(torch.nn.Sequential):
        def gradient_checkpointing_enable(self, options):
            assert self.training, "transformers does it in train mode only"

    decoder = Decoder(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5))
    memory.recompute(SimpleNamespace(decoder=decoder))
    x = torch.randn(50, 3)
    assert decoder(x).equal(decoder[0](x))


def brightness(vlm, dark, picture):
    """(patches of all tiles,): how much brighter than a dark one a picture is at each patch."""
    light = vlm.inputs([picture], ["?"])["pixel_values"] - dark["pixel_values"]
    if "image_grid_thw" in dark:  # (patches, pixels): four are a token
        four_patches = 4 * light.shape[1]
        return light.view(-1, four_patches).sum(1)
    tiles = light.flatten(0, -4)  # (tiles, 3, 32, 32)
    patches = tiles.unflatten(2, (4, 8)).unflatten(4, (4, 8))  # (tiles, 3, 4, 8, 4, 8)
    return patches.sum((1, 3, 5)).flatten()


def test_a_box_is_where_its_token_looks(backbone):
    """In a picture that is white in one box only, the brightest patch of a view is that token's."""
    vlm, inputs, _ = backbone
    has_grid = vlm.tokens or "image_grid_thw" in inputs
    if not has_grid and "newline" not in str(vlm.model.state_dict().keys()):
        complaint("is unknown", vlm.boxes, inputs)
        return
    sizes = SIZES[:1] if vlm.tokens else SIZES  # LLaVA-1.5 crops to a square, and speaks of that
    for size in sizes:
        dark = vlm.inputs([Image.new("RGB", size)], ["?"])
        boxes, N = vlm.boxes(dark), vlm.encode(dark).shape[1]
        assert boxes.shape == (N, 4)
        nowhere = (boxes == 0).all(1)  # a class token, the ends of rows
        looking = (~nowhere).nonzero().flatten().tolist()
        assert (boxes[looking, 2:] > boxes[looking, :2]).all()
        patch_of = torch.arange(N)
        if vlm.tokens == 17:  # with the class token of 'full'
            patch_of = patch_of - 1
        if "image_sizes" in dark:
            patch_of, _ = architectures.pack(vlm.model, dark["image_sizes"][0])
            assert nowhere.sum() == (patch_of == -1).sum() > 1
        for i in looking[::5]:
            corners = boxes[i] * torch.tensor(2 * size)
            picture = Image.new("RGB", size)
            picture.paste("white", corners.round().int().tolist())
            light = brightness(vlm, dark, picture)
            if "image_sizes" in dark:  # the whole picture comes first, then its tiles
                other_view = slice(16, None) if i < 16 else slice(16)
                light[other_view] = -1
            assert light.argmax() == patch_of[i]
            assert light.max() > 0


def test_the_memory_plan_is_what_autograd_keeps(vlm):
    """Nothing of the encoder, and logits at the caption only."""
    inputs = vlm.inputs(SCENES, QUESTIONS, CAPTIONS)
    scorer, denoiser = Scorer(128), Denoiser(128)
    statistics = whitening(vlm.encode(inputs))
    graph = vlm, scorer, denoiser, statistics, inputs, torch.randn(3, 144, 128)
    weights, kept = set(), {}
    for module in (vlm.model, scorer, denoiser):
        weights |= {tensor.data_ptr() for tensor in module.state_dict().values()}

    def keep_storage(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    def unpack(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep_storage, unpack):
        loss, _ = train.forward(*graph, Budget(16), 0.5)
    used = sum(storage.nbytes() for place, storage in kept.items() if place not in weights)
    planned = memory.of_a_step(vlm, learned=1000, B=3)["activations"]
    assert loss.requires_grad
    assert 0.6 * planned < used < 1.2 * planned


def test_the_memory_plan_counts_weights_gradients_and_moments(vlm):
    _, L = whitening(torch.randn(500, 128))
    denoiser = Denoiser(128)
    weights = list(denoiser.parameters())
    optimizer = torch.optim.AdamW(weights)
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer.step()
    learned = [*weights, *(p.grad for p in weights), L]
    for state in optimizer.state.values():
        learned += [state["exp_avg"], state["exp_avg_sq"]]
    plan = memory.of_a_step(vlm, sum(p.numel() for p in weights), B=1)
    assert plan["learned"] == sum(tensor.nbytes for tensor in learned)
    assert plan["frozen"] == 4 * sum(p.numel() for p in vlm.model.parameters())
    almost_four = 16 * 10 ** 6 + L.nbytes + 3.7 * plan["activations"]
    free = almost_four / 0.9  # a tenth is the reserve; without it four would fit
    fitting = [memory.images_that_fit(vlm, 10 ** 6, share * free) for share in (1, 0.5, 0.1)]
    assert fitting == [3, 1, 0]


# --- other classes: tiny random models without a processor ----------------------------------------

# Pictures of noise, two a batch, as the processors of the classes hand them on. Patches are of
# 8 x 8 pixels, pictures of 32 x 32 unless they say otherwise.


def plain_pictures():
    return dict(pixel_values=torch.randn(2, 3, 32, 32))


def pictures_with_sizes():
    sizes = torch.tensor([[32, 32]] * 2)
    return dict(plain_pictures(), image_sizes=sizes)


def listed_patches(channels):
    """The patches of both pictures in one list: 6 x 4 and 4 x 8 of them."""
    grid = torch.tensor([[1, 6, 4], [1, 4, 8]])
    patches = torch.randn(24 + 32, channels * 64)
    return dict(pixel_values=patches, image_grid_thw=grid)


def patches_of_two_frames():
    return listed_patches(channels=6)


def patches_of_one_frame():
    return listed_patches(channels=3)


def square_patches():
    grid = torch.tensor([[1, 4, 4]] * 2)
    patches = torch.randn(32, 3, 8, 8)
    return dict(pixel_values=patches, image_grid_thw=grid)


def patches_to_merge():
    inputs = square_patches()
    inputs["pixel_values"] = inputs["pixel_values"].flatten(1)
    inputs["image_merge_sizes"] = torch.tensor([2, 2])
    return inputs


def three_tiles():
    """A picture as a whole, and its two halves."""
    sizes = torch.tensor([[60, 30], [30, 64]])
    return dict(pixel_values=torch.randn(2, 3, 3, 32, 32), image_sizes=sizes)


def one_tile():
    pixels = torch.randn(2, 1, 3, 32, 32)
    mask = torch.ones(2, 1, 32, 32, dtype=torch.long)
    return dict(pixel_values=pixels, pixel_attention_mask=mask)


def one_tile_with_an_aspect():
    pixels = torch.randn(2, 1, 1, 3, 32, 32)
    aspects = torch.ones(2, 1, dtype=torch.long)
    mask = torch.ones(2, 1, 1, dtype=torch.long)
    return dict(pixel_values=pixels, aspect_ratio_ids=aspects, aspect_ratio_mask=mask)


def bare_patches():
    return dict(image_patches=torch.randn(2, 16, 192))


def patches_with_positions():
    y, x = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    positions = torch.stack([x, y], -1).view(1, 16, 2)
    positions = positions.expand(2, -1, -1).contiguous()
    return dict(pixel_values=torch.rand(2, 16, 192), image_position_ids=positions)


def patches_to_pool():
    """Four tokens a picture, each pooled from a square of 2 x 2 patches."""
    squares = torch.arange(16).view(2, 2, 2, 2)
    pool = squares.transpose(1, 2).reshape(4, 4)
    return dict(
        pixel_values=torch.randn(2, 16, 192),
        image_token_pooling=torch.cat([pool, pool]),
        image_grids=torch.tensor([[2, 2, 0, 0]] * 2),
        image_num_crops=torch.tensor([1, 1]))


def patches_side_by_side():
    """Both pictures in one strip of 8 x 8 patches each."""
    sizes = torch.tensor([[8, 8]] * 2, dtype=torch.int32)
    return dict(pixel_values=torch.randn(1, 3, 8, 2 * 64 * 8), target_sizes=sizes)


def patches_with_a_mask():
    return dict(
        pixel_values=torch.randn(2, 16, 192),
        pixel_attention_mask=torch.ones(2, 16, dtype=torch.long),
        spatial_shapes=torch.tensor([[4, 4]] * 2))


IMAGE_ID = 100
BEGIN_ID, END_ID = 102, 103
HALF_SLIDING = ["sliding_attention", "full_attention"] * 2
HALF_LINEAR = ["linear_attention", "full_attention"] * 2
HALF_CONVOLVED = ["conv", "full_attention"] * 2

# language models
SMALL = dict(
    vocab_size=128, hidden_size=64, intermediate_size=96,
    num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
    max_position_embeddings=512,
    pad_token_id=0, bos_token_id=1, eos_token_id=2)
SMALL_LLAMA = dict(SMALL, model_type="llama")
SMALL_QWEN2 = dict(SMALL, model_type="qwen2")
SMALL_MISTRAL = dict(SMALL, model_type="mistral", sliding_window=None)
SMALL_COHERE = dict(SMALL, model_type="cohere2", sliding_window=64)
SMALL_MROPE = dict(SMALL, rope_parameters=MROPE)
SMALL_GLM = dict(
    SMALL, head_dim=64,
    rope_parameters=dict(MROPE, partial_rotary_factor=0.25))
SMALL_OPT = dict(
    model_type="opt", vocab_size=128, hidden_size=64, ffn_dim=96,
    num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=512, word_embed_proj_dim=64)
DEFAULT_ROPE = dict(rope_type="default", rope_theta=1e4)

# vision towers
TOWER = dict(
    hidden_size=32, intermediate_size=48,
    num_hidden_layers=2, num_attention_heads=2)
PATCHED = dict(TOWER, patch_size=8)  # of pictures of any size
FIXED = dict(PATCHED, image_size=32)
SIGLIP_TOWER = dict(FIXED, model_type="siglip_vision_model", vision_use_head=False)
GRID_TOWER = dict(
    depth=4, hidden_size=32, intermediate_size=48, num_heads=2,
    patch_size=8, spatial_merge_size=2,
    temporal_patch_size=2, out_hidden_size=64)
GLM_TOWER = dict(GRID_TOWER, image_size=32)

# the tokens about a picture
BY_ID = dict(image_token_id=IMAGE_ID)
BY_INDEX = dict(image_token_index=IMAGE_ID)
QWEN_IDS = dict(
    BY_ID, video_token_id=101,
    vision_start_token_id=BEGIN_ID, vision_end_token_id=END_ID)
GLM_IDS = dict(
    BY_ID, video_token_id=101,
    image_start_token_id=BEGIN_ID, image_end_token_id=END_ID,
    video_start_token_id=104, video_end_token_id=105)

ZOO = {  # model type: (pictures, N of each, config)
    "qwen2_vl": (patches_of_two_frames, [6, 8], dict(
        QWEN_IDS, text_config=SMALL_MROPE,
        vision_config=dict(
            depth=2, embed_dim=32, hidden_size=64, num_heads=2,
            patch_size=8, spatial_merge_size=2, mlp_ratio=2))),
    "qwen3_vl_moe": (patches_of_two_frames, [6, 8], dict(
        QWEN_IDS,
        text_config=dict(
            SMALL_MROPE, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=32),
        vision_config=dict(
            GRID_TOWER, num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1, 2]))),
    "glm4v": (patches_of_two_frames, [6, 8], dict(
        GLM_IDS, text_config=SMALL_GLM, vision_config=GLM_TOWER)),
    "glm46v": (patches_of_two_frames, [6, 8], dict(
        GLM_IDS,
        text_config=dict(SMALL_GLM, model_type="glm4v_text"),
        vision_config=dict(GLM_TOWER, model_type="glm4v_vision"))),
    "glm4v_moe": (patches_of_two_frames, [6, 8], dict(
        GLM_IDS, vision_config=GLM_TOWER,
        text_config=dict(
            SMALL_GLM, n_routed_experts=4, num_experts_per_tok=2,
            n_group=1, topk_group=1, moe_intermediate_size=32,
            first_k_dense_replace=1, n_shared_experts=1))),
    "hunyuan_vl": (patches_of_one_frame, [11, 12], dict(
        BY_ID, im_start_id=BEGIN_ID, im_end_id=END_ID, im_newline_id=104,
        vision_config=FIXED,
        text_config=dict(
            SMALL,
            rope_parameters=dict(DEFAULT_ROPE, mrope_section=[2, 2, 2, 2])))),
    "paddleocr_vl": (square_patches, [4, 4], dict(
        QWEN_IDS,
        text_config=dict(SMALL_MROPE, model_type="paddleocr_vl_text"),
        vision_config=dict(FIXED, model_type="paddleocr_vl_vision", image_size=64))),
    "video_llama_3": (patches_to_merge, [4, 4], dict(
        BY_ID, video_token_id=101,
        text_config=SMALL_QWEN2, vision_config=PATCHED)),
    "ernie4_5_vl_moe": (patches_of_one_frame, [6, 8], dict(
        GLM_IDS,
        vision_config=dict(
            depth=2, hidden_size=64, num_heads=4,
            patch_size=8, intermediate_size=64),
        text_config=dict(
            SMALL, moe_num_experts=4, moe_k=2, moe_intermediate_size=[32, 32],
            rope_parameters=dict(DEFAULT_ROPE, mrope_section=[3, 3, 2])))),
    "kimi_k25": (square_patches, [4, 4], dict(
        QWEN_IDS, projection_hidden_size=32, text_config=SMALL_LLAMA,
        vision_config=dict(PATCHED, pos_emb_height=8, pos_emb_width=8))),
    "llava_onevision": (three_tiles, [56, 52], dict(
        BY_INDEX, video_token_index=101,
        text_config=SMALL_QWEN2, vision_config=SIGLIP_TOWER,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]])),
    "smolvlm": (one_tile, [4, 4], dict(
        BY_ID, scale_factor=2, text_config=SMALL_LLAMA,
        vision_config=dict(SIGLIP_TOWER, model_type="smolvlm_vision"))),
    "idefics2": (one_tile, [6, 6], dict(
        BY_ID, text_config=SMALL_MISTRAL,
        vision_config=dict(SIGLIP_TOWER, model_type="idefics2_vision"),
        perceiver_config=dict(
            hidden_size=64, resampler_n_latents=6, resampler_depth=1,
            resampler_n_heads=2, resampler_head_dim=16,
            num_key_value_heads=2))),
    "pixtral": (pictures_with_sizes, [16, 16], dict(
        BY_INDEX, model_type="llava", vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        text_config=SMALL_MISTRAL,
        vision_config=dict(FIXED, model_type="pixtral", image_size=64, head_dim=16))),
    "aya_vision": (plain_pictures, [4, 4], dict(
        BY_INDEX, downsample_factor=2,
        vision_config=SIGLIP_TOWER, text_config=SMALL_COHERE)),
    "cohere2_vision": (plain_pictures, [4, 4], dict(
        BY_ID, downsample_factor=2, alignment_intermediate_size=64,
        vision_config=SIGLIP_TOWER, text_config=SMALL_COHERE)),
    "ovis2": (plain_pictures, [4, 4], dict(
        BY_ID, hidden_size=64, vocab_size=128,
        visual_indicator_token_ids=[110, 111, 112, 113, 114],
        text_config=SMALL_QWEN2,
        vision_config=dict(FIXED, vocab_size=40, hidden_stride=2))),
    "deepseek_vl": (plain_pictures, [16, 16], dict(
        BY_ID, text_config=SMALL_LLAMA, vision_config=SIGLIP_TOWER)),
    "janus": (plain_pictures, [16, 16], dict(
        BY_ID, text_config=SMALL_LLAMA,
        vision_config=dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            image_size=32, patch_size=8, mlp_ratio=1.5,
            projection_dim=64, num_image_tokens=16),
        vq_config=dict(
            embed_dim=8, num_embeddings=16, latent_channels=8,
            num_patches=4, base_channels=32, channel_multiplier=[1, 1],
            num_res_blocks=1, image_token_embed_dim=8, projection_dim=64))),
    "aria": (plain_pictures, [8, 8], dict(
        BY_INDEX, projector_patch_to_query_dict={16: 8},
        text_config=dict(
            SMALL, model_type="aria_text",
            moe_num_experts=4, moe_topk=2),
        vision_config=dict(SIGLIP_TOWER, model_type="idefics3_vision"))),
    "fuyu": (bare_patches, [16, 16], dict(
        BY_ID, patch_size=8,
        vocab_size=128, hidden_size=64, intermediate_size=96,
        num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
        text_config=dict(SMALL, model_type="persimmon"))),
    "llama4": (plain_pictures, [4, 4], dict(
        BY_INDEX, boi_token_index=BEGIN_ID, eoi_token_index=END_ID,
        text_config=dict(
            SMALL, intermediate_size_mlp=96,
            num_local_experts=2, num_experts_per_tok=1,
            attention_chunk_size=64, no_rope_layer_interval=2),
        vision_config=dict(
            FIXED, intermediate_size=128, vision_output_dim=32,
            pixel_shuffle_ratio=0.5,
            projector_input_dim=32, projector_output_dim=32))),
    "gemma4": (patches_with_positions, [4, 4], dict(
        BY_ID, boi_token_id=BEGIN_ID, eoi_token_id=END_ID,
        video_token_id=104, audio_token_id=105,
        boa_token_id=106, eoa_token_index=107, audio_config=None,
        text_config=dict(
            SMALL, sliding_window=64, hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=128,
            global_head_dim=16, num_global_key_value_heads=2,
            layer_types=HALF_SLIDING,
            use_bidirectional_attention="vision"),
        vision_config=dict(
            PATCHED, num_key_value_heads=2, head_dim=16,
            pooling_kernel_size=2, position_embedding_size=64))),
    "molmo2": (patches_to_pool, [4, 4], dict(
        image_patch_id=IMAGE_ID,
        image_start_token_id=BEGIN_ID, image_end_token_id=END_ID,
        low_res_image_start_token_id=104,
        frame_start_token_id=105, frame_end_token_id=106,
        text_config=dict(SMALL, additional_vocab_size=8),
        vision_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=2, head_dim=16,
            image_size=[32, 32], patch_size=8, num_position_embeddings=16),
        adapter_config=dict(
            hidden_size=32, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, intermediate_size=48,
            text_hidden_size=64, vision_feature_layer=[-1, -2]))),
    "minicpmv4_6": (patches_side_by_side, [4, 4], dict(
        BY_ID, video_token_id=101, insert_layer_id=0,
        text_config=dict(
            SMALL_MROPE, model_type="qwen3_5_text",
            linear_key_head_dim=16, linear_value_head_dim=16,
            linear_num_key_heads=2, linear_num_value_heads=4,
            layer_types=HALF_LINEAR),
        vision_config=dict(
            SIGLIP_TOWER, model_type="minicpmv4_6_vision",
            insert_layer_id=0, image_size=64))),
    "lfm2_vl": (patches_with_a_mask, [4, 4], dict(
        BY_ID, projector_hidden_size=48, downsample_factor=2,
        text_config=dict(
            SMALL, model_type="lfm2", layer_types=HALF_CONVOLVED,
            conv_L_cache=3, block_dim=64, conv_dim=64,
            block_auto_adjust_ff_dim=False),
        vision_config=dict(
            PATCHED, model_type="siglip2_vision_model",
            num_patches=16, vision_use_head=False))),
}
RECURRENT = ("lfm2_vl", "minicpmv4_6")
REFUSED = {
    "mllama": (one_tile_with_an_aspect, [1, 1], dict(
        BY_INDEX,
        text_config=dict(
            SMALL, cross_attention_layers=[1],
            rope_parameters=DEFAULT_ROPE),
        vision_config=dict(
            hidden_size=32, num_hidden_layers=2, num_global_layers=1,
            attention_heads=2, intermediate_size=48,
            vision_output_dim=64, image_size=32, patch_size=8,
            max_num_tiles=1, intermediate_layers_indices=[0],
            supported_aspect_ratios=[[1, 1]]))),
    "granite4_vision": (three_tiles, None, dict(  # N: as its features say
        BY_INDEX,
        text_config=dict(SMALL, embedding_multiplier=2.0, logits_scaling=3.0),
        vision_config=dict(SIGLIP_TOWER, hidden_size=64),
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
        downsample_rate="1/2",
        vision_feature_select_strategy="full",
        deepstack_layer_map=[[-1, 0], [0, 1]])),
    "blip-2": (plain_pictures, [8, 8], dict(
        BY_INDEX, num_query_tokens=8,
        vision_config=FIXED, text_config=SMALL_OPT,
        qformer_config=dict(TOWER, encoder_hidden_size=32))),
}


def random_model(model_type, config):
    """A stock model with weights large enough for every token to make a difference."""
    config = {"model_type": model_type} | copy.deepcopy(config)
    try:
        config = AutoConfig.for_model(**config)
    except ValueError:
        pytest.skip("this transformers has no such class")
    model = AutoModelForImageTextToText.from_config(config).eval()
    for key, weight in model.named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
        elif weight.numel() == 1 and "gate" in key:
            torch.nn.init.constant_(weight, 0.5)
    return model


def random_row(i, N):
    """(ids, mask, labels), each (L,): text, a picture of N tokens, text, and a caption as label."""
    before = torch.randint(3, 90, (3 + i,))
    after = torch.randint(3, 90, (4 + 2 * i,))
    caption = torch.randint(3, 90, (3 + i,))
    picture = torch.tensor([BEGIN_ID] + N * [IMAGE_ID] + [END_ID])
    ids = torch.cat([before, picture, after, caption])
    is_caption = torch.arange(len(ids)) >= len(ids) - len(caption)
    labels = ids.where(is_caption, -100)
    return torch.stack([ids, torch.ones_like(ids), labels])


def random_text(counts):
    """A left-padded row for each of `counts`: texts and captions of different lengths."""
    rows = [random_row(i, N) for i, N in enumerate(counts)]
    L = max(row.shape[1] for row in rows)
    padded = [F.pad(row, (L - row.shape[1], 0)) for row in rows]
    ids, mask, labels = torch.stack(padded, dim=1)  # (B, L) each
    labels = labels.where(mask.bool(), -100)
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def zoo_model(name):
    """(vlm, inputs): two rows of text, each with a picture and a caption."""
    pictures_of_class, counts, config = (ZOO | REFUSED)[name]
    torch.manual_seed(0)
    model = random_model(name, config)
    pixels = pictures_of_class()
    if counts is None:
        features = model.get_image_features(pixels["pixel_values"], pixels["image_sizes"])
        counts = [len(tokens) for tokens in features.deepstack_features[0][1]]
    inputs = random_text(counts) | pixels
    if name == "ernie4_5_vl_moe":
        inputs["moe_mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_ID).int()
    vlm = VLM(model, None, name)
    return vlm, vlm.finish(transformers.BatchFeature(inputs))


@pytest.mark.parametrize("name", REFUSED)
def test_a_class_that_the_method_does_not_fit_is_refused(name):
    def prepare():
        with one_line(name, "a trial"):
            vlm, inputs = zoo_model(name)
            vlm.embed(inputs, vlm.encode(inputs))

    complaint(f"{name}: .*", prepare)


@pytest.mark.parametrize("name", ZOO)
def test_every_other_class_is_exact_or_recurrent(name, monkeypatch):
    # transformers 5.24 forgets this field in Llama 4's own forward pass
    output_class = transformers.modeling_outputs.MoeCausalLMOutputWithPast
    monkeypatch.setattr(output_class, "image_outputs", None, raising=False)
    vlm, inputs = zoo_model(name)
    assert vlm.exact == (name not in RECURRENT)
    X = vlm.encode(inputs)  # (B, N, D)
    B, N, D = X.shape
    keep = torch.tensor([[-1, 1], [0, 3]])
    kept = torch.zeros(B, N, dtype=torch.bool)
    kept[0, 1] = True  # -1 is padding
    kept[1, [0, 3]] = True
    masked = stock(vlm, inputs, kept)

    whole_logits = logits_of(vlm, vlm.embed(inputs, X))
    close(whole_logits, logits_of(vlm, stock(vlm, inputs)), atol=5e-5)

    pruned_logits = logits_of(vlm, vlm.embed(inputs, X, keep))
    error = (pruned_logits - logits_of(vlm, masked)).abs().max()
    if vlm.exact:
        assert error < 5e-5
    else:
        assert error > 1

    costs = zip(infer.prefill_cost(vlm, inputs, X, keep), infer.prefill_cost(vlm, inputs, X))
    assert all(0 < pruned < full for pruned, full in costs)
    if not name.startswith("qwen"):
        complaint("leave out --show", vlm.boxes, inputs)

    x = X.clone().requires_grad_()
    loss = vlm.loss(inputs, x, keep)
    slope, = torch.autograd.grad(loss, x)
    assert slope[kept].norm(dim=-1).min() > 0
    assert not slope[~kept].any()
    if vlm.exact:
        del masked["labels"]
        labels = inputs["labels"][:, 1:]
        is_caption = labels != -100
        logits = vlm.model(**masked).logits[:, :-1]
        close(loss, F.cross_entropy(logits[is_caption], labels[is_caption]), atol=1e-5)


# --- model folders --------------------------------------------------------------------------------

def changed(folder, file, content):
    """A copy of the tiny LLaVA with one file replaced by a text, removed (None), or changed by a
    dict: fields of a JSON file, or a factor for each tensor of that name."""
    path = shutil.copytree(TINY, folder / "model") / file
    if content is None:
        path.unlink()
    elif isinstance(content, str):
        path.write_text(content)
    elif path.suffix == ".json":
        fields = json.loads(path.read_text())
        for key, value in content.items():
            if isinstance(value, dict):
                value = (fields.get(key) or {}) | value
            fields[key] = value
        path.write_text(json.dumps(fields))
    else:
        tensors = load_file(path)
        for name, factor in content.items():
            tensors[name] = factor * tensors[name]
        save_file(tensors, path, {"format": "pt"})
    return path.parent


def prompts_and_answers(vlm):
    inputs = vlm.inputs(SCENES, QUESTIONS)
    answers = vlm.generate(inputs, vlm.encode(inputs), max_new_tokens=8)
    return inputs["input_ids"].tolist(), answers


def replacing(pattern, content):
    """A tokenizer that replaces a pattern in every text."""
    return {"normalizer": {
        "type": "Replace", "pattern": {"Regex": pattern}, "content": content}}


CONFIG_FAULTS = [
    ({"model_type": "clip"}, "'clip'.*as llava or qwen3_vl are"),
    ({"text_config": {"num_hidden_layers": 1}},
     r"layers\.1\.\S+ is not in the model"),
    ({"text_config": {"num_hidden_layers": 9}},
     r"layers\.4\.\S+ is missing"),
    ({"text_config": {"vocab_size": 390}},
     r"lm_head.weight is \(\d+, \d+\) .*\(390, \d+\)"),
    ({"text_config": {"model_type": "mistral", "sliding_window": 64}},
     "the model's sliding window"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
     "bitsandbytes"),
    ({"image_token_index": 5, "image_token_id": 5},
     "<image> is 4, .*image token 5"),
]
PROCESSOR_FAULTS = [
    ({"image_processor": {"crop_size": {"height": 64, "width": 64}}},
     "64 places for 144"),
    ({"image_processor": {"do_center_crop": False}},  # fits square pictures only
     "192 places for 144"),
]
TOKENIZER_FAULTS = [
    ('{"version": "1.0", "model": {"type": "New"}}', "tokenizer.json"),
    (replacing("What|Where", ""), "two questions become the same prompt"),
    ({"normalizer": {"type": "Prepend", "prepend": ""}},  # tokenizers panics
     "out of bounds"),
]
FOREVER = "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2
TEMPLATE_FAULTS = [
    (None, "no chat template"),
    ("{% for m in messages %}{{ m['content'] }}{% endfor %}",
     "(text fails|0 places)"),
    (TEMPLATE.replace("content['text']", "''"),
     "two questions become the same prompt"),
    (FOREVER, "not end"),
]
WEIGHT_FAULTS = [
    ({"language_model.lm_head.weight": math.nan}, "--dtype float32"),
    ({"vision_tower.vision_model.pre_layrnorm.weight": math.inf},
     "--dtype float32"),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:0",
     "git lfs pull"),
]
FAULTS_OF_FILES = {
    "config.json": CONFIG_FAULTS,
    "processor_config.json": PROCESSOR_FAULTS,
    "tokenizer.json": TOKENIZER_FAULTS,
    "chat_template.jinja": TEMPLATE_FAULTS,
    "model.safetensors": WEIGHT_FAULTS,
    "adapter_config.json": [("{}", "LoRA")],
}
FAULTY_FOLDERS = [
    (file, content, words)
    for file, faults in FAULTS_OF_FILES.items()
    for content, words in faults]


@pytest.mark.parametrize("file, content, words", FAULTY_FOLDERS)
def test_a_faulty_model_is_refused_in_one_line_that_names_it(
        file, content, words, tmp_path, monkeypatch):
    def three_seconds(seconds, what):
        return files.time_limit(3, what)

    monkeypatch.setattr("model.time_limit", three_seconds)
    folder = changed(tmp_path, file, content)
    complaint(f"^{re.escape(str(folder))}.*{words}", load, folder)


@pytest.mark.parametrize("file, content", [
    ("tokenizer_config.json", {"pad_token": None}),
    ("tokenizer_config.json", {"eos_token": None}),
    ("config.json", {"attn_implementation": "flash_attention_2"}),
    ("chat_template.jinja", "{{ bos_token }}" + TEMPLATE),  # the tokenizer writes it, too
    ("chat_template.json", json.dumps({"chat_template": TEMPLATE})),
    ("tokenizer_config.json", {"chat_template": TEMPLATE}),
    ("config.json", EVIL),
    ("processor_config.json", EVIL),
    ("tokenizer_config.json", EVIL),
])
def test_other_ways_to_write_the_same_model_are_read_and_no_code_is_run(
        file, content, tmp_path, vlm, monkeypatch):
    folder = changed(tmp_path, file, content)
    if file.endswith(".json") and "chat_template" in content:
        (folder / "chat_template.jinja").unlink()
    trace = tmp_path / "code_was_run"
    leave_a_trace = f"open({str(trace)!r}, 'w')"
    (folder / "evil.py").write_text(f"{leave_a_trace}\nclass Evil:\n    pass\n")

    def yes(*question):
        return "y"

    monkeypatch.setattr("builtins.input", yes)
    assert prompts_and_answers(load(folder)) == prompts_and_answers(vlm)
    assert not trace.exists()


def test_a_model_in_memory_works_with_and_without_its_processor(vlm):
    stock_model = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(TINY)
    wrapped = load(stock_model, processor=processor)
    assert wrapped.model is stock_model
    assert not any(p.requires_grad for p in stock_model.parameters())
    expected = prompts_and_answers(vlm)
    assert prompts_and_answers(wrapped) == expected
    assert prompts_and_answers(load(stock_model)) == expected, "its processor is found, too"

    stock_model.name_or_path = ""
    complaint("no such model folder", load, stock_model)
    wrapped.processor.tokenizer.add_tokens(["zebra"])
    complaint("get both of one model", wrapped.inputs, SCENES[:1], ["Is it a zebra?"])


def test_features_that_are_no_numbers_are_refused(backbone):
    vlm, inputs, X = backbone
    first = torch.tensor([0])
    broken = X.index_fill(1, first, math.nan)
    assert vlm.loss(inputs, broken).isnan()
    complaint("--dtype float32", vlm.generate, inputs, broken)


def test_a_question_that_no_prompt_can_hold_is_refused(backbone):
    vlm, *_ = backbone
    with_a_place = f"Is {vlm.processor.image_token} red?"
    for text, words in ((with_a_place, "stands for the picture"), ("\ud83d!", "half a char")):
        complaint(words, vlm.inputs, SCENES[:1], [text])
        complaint(f"line 7 .*{words}", vlm.check_text, text, "line 7")


def test_a_question_longer_than_the_context_is_refused(backbone, monkeypatch):
    vlm, *_ = backbone
    fits, longer = "é" * 10, "é" * 11
    prompt = vlm.inputs(SCENES[:1], [fits])["input_ids"]
    monkeypatch.setattr(vlm, "context", prompt.shape[1])
    complaint("shorten", vlm.inputs, SCENES[:1], [longer])
    if vlm.tokens is None:  # then check_text does not know how long the picture is
        text = vlm.processor.tokenizer(fits).input_ids
        monkeypatch.setattr(vlm, "context", vlm.chat_tokens + len(text))
    vlm.check_text(fits, "line 7")
    complaint("line 7 is longer", vlm.check_text, longer, "line 7")


class OnePlaceFewer:
    """A processor that forgets one of the picture's places."""

    def __init__(self, processor, image_id):
        self.processor = processor
        self.image_id = image_id

    def __getattr__(self, name):
        return getattr(self.processor, name)

    def __call__(self, *args, **options):
        inputs = self.processor(*args, **options)
        places = inputs["input_ids"] == self.image_id
        row, column = places.nonzero()[0]
        inputs["input_ids"][row, column] = 5
        return inputs


def test_a_processor_that_forgets_a_place_is_refused(backbone, monkeypatch):
    vlm, *_ = backbone
    forgetful = OnePlaceFewer(vlm.processor, vlm.image_id)
    monkeypatch.setattr(vlm, "processor", forgetful)
    trial = one_line("the model", "a trial")(vlm.trial)
    complaint("the model: (.* places for|.* cannot read|a trial fails)", trial)


@pytest.mark.parametrize("ends", [0, [], [0, 7]])
def test_the_tokenizers_end_of_text_counts_beside_the_models(ends, vlm, tmp_path):
    folder = changed(tmp_path, "generation_config.json", {"eos_token_id": ends})
    changed_vlm = load(folder)
    _, answers = prompts_and_answers(changed_vlm)
    _, expected = prompts_and_answers(vlm)
    assert answers == expected
    named = ends if isinstance(ends, list) else [ends]
    assert set(changed_vlm.model.generation_config.eos_token_id) == {*named, 2}


def test_a_caption_is_one_space_away_from_its_prompt(vlm, tmp_path):
    """Also where the prompt ends in a space of its own."""
    ends_in_a_space = TEMPLATE.replace("ASSISTANT:", "ASSISTANT: ")
    folder = changed(tmp_path, "chat_template.jinja", ends_in_a_space)
    for model in (vlm, load(folder)):
        for ids in model.inputs(SCENES, QUESTIONS, CAPTIONS)["input_ids"]:
            _, caption = model.processor.tokenizer.decode(ids).split("ASSISTANT:")
            assert re.match(r" \w", caption)


def test_the_models_of_this_repository_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("data/shapes/llava") == TINY
    (tmp_path / "data/shapes/llava").mkdir(parents=True)
    assert find("data/shapes/llava").resolve() != TINY, "what is here comes first"


def test_each_answer_ends_where_the_context_ends(vlm, monkeypatch):
    """A shorter question leaves more room."""
    inputs = vlm.inputs(SCENES, QUESTIONS)
    X = vlm.encode(inputs)
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", [0])
    lengths = inputs["attention_mask"].sum(1).tolist()
    context = max(lengths) + 2
    rooms = [context - length for length in lengths]
    assert min(rooms) == 2 < max(rooms) < 50
    expected = []
    for i, room in enumerate(rooms):
        alone = vlm.inputs([SCENES[i]], [QUESTIONS[i]])
        expected += vlm.generate(alone, X[i:i + 1], max_new_tokens=room)
    monkeypatch.setattr(vlm, "context", context)
    assert vlm.generate(inputs, X, max_new_tokens=50) == expected


def add_mean_pixel(vlm):
    """A feature that reaches the LLM by another way than the visual tokens."""
    pixels = None

    def remember_pixels(module, args, options):
        nonlocal pixels
        pixels = options.get("pixel_values")

    def add(module, args, hidden):
        if pixels is None:
            return hidden
        return hidden + pixels.mean()

    vlm.model.register_forward_pre_hook(remember_pixels, with_kwargs=True)
    vlm.decoder.layers[1].register_forward_hook(add)


def count_positions_by_slot(vlm):
    def count(module, args, options):
        hidden, positions = [*args, *options.values()][:2]
        slots = torch.arange(hidden.shape[1])
        return (hidden, slots.expand_as(positions)), {}

    vlm.decoder.rotary_emb.register_forward_pre_hook(count, with_kwargs=True)


def add_previous_token(vlm):
    """A convolution that the config does not declare."""
    def convolve(module, args, hidden):
        previous = F.pad(hidden, (0, 0, 1, 0))[:, :-1]
        return hidden + previous

    for layer in vlm.decoder.layers:
        layer.register_forward_hook(convolve)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_5_vl", "gemma3"])
def test_the_self_check_finds_a_model_that_the_method_does_not_fit(name, dtype, tmp_path):
    save_tiny(name, tmp_path)
    load(tmp_path, dtype=dtype).self_check()
    faults = [(add_mean_pixel, "not the stock model")]
    if name != "gemma3":  # which has a rotary embedding for each kind of layer
        faults.append((count_positions_by_slot, "not masking"))
    if dtype == torch.float32:  # else the convolution drowns in rounding
        faults.append((add_previous_token, "not masking"))
    for plant, words in faults:
        vlm = load(tmp_path, dtype=dtype)
        plant(vlm)
        complaint(words, vlm.self_check)


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "qwen3_5"])
def test_any_class_is_trained_and_resumed_from_the_command_line(name, tmp_path, tiny, monkeypatch):
    folder = tmp_path / "model"
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    save_tiny(name, folder)
    train_for_three_steps = functools.partial(
        tiny, "--model", folder, "--keep", 5, "--steps", 3, "--batch", 2)

    def run_whole():
        train_for_three_steps("--out", whole)

    def run_stopped():
        train_for_three_steps("--out", stopped)

    def resume():
        train_for_three_steps("--resume", "--out", stopped)

    assert in_a_process(run_whole) == 0
    with monkeypatch.context() as patch:
        signal_on_call(patch, signal.SIGTERM, torch.nn.utils, "clip_grad_norm_", 2)
        assert in_a_process(run_stopped) == 143
    assert in_a_process(resume) == 0
    expected = load_file(whole / "scorer.safetensors")
    resumed = load_file(stopped / "scorer.safetensors")
    for key in expected:
        assert resumed[key].equal(expected[key])
    assert log_of(stopped) == log_of(whole)


def test_places_of_each_picture_are_compared_with_its_own_tokens(tmp_path, monkeypatch):
    """Two wrong counts whose sum is right: one picture has a place too many, one too few."""
    save_tiny("llava_next", tmp_path)
    vlm = load(tmp_path)
    vlm.inputs(SCENES, QUESTIONS)
    processor_class = type(vlm.processor)
    right_places = processor_class.replace_image_token
    errors = iter([1, -1, 0])

    def wrong_places(self, *args, **options):
        places = right_places(self, *args, **options)
        if not places:
            return places
        return self.image_token * (places.count("<") + next(errors))

    monkeypatch.setattr(processor_class, "replace_image_token", wrong_places)
    complaint("places for", vlm.inputs, SCENES, QUESTIONS)


def test_model_and_processor_must_cut_pictures_into_the_same_tiles(tmp_path):
    save_tiny("llava_next", tmp_path)
    file = tmp_path / "preprocessor_config.json"
    fields = json.loads(file.read_text())
    fields["image_grid_pinpoints"] = GRID[:3]
    file.write_text(json.dumps(fields))
    complaint("image_grid_pinpoints differ", load, tmp_path)


# --- pictures and files ---------------------------------------------------------------------------

BLACK, GREY, WHITE = (0, 0, 0), (128, 128, 128), (255, 255, 255)


@pytest.mark.parametrize("white, kind, suffix", [
    (65535, "H", ".png"), (65535, "H", ".tif"),
    (4095, "H", ".tif"), (2 ** 24, "i", ".tif"),
    (1, "f", ".tif"), (255, "f", ".tif"),
])
def test_grey_of_any_depth_fills_the_range(white, kind, suffix, tmp_path):
    levels = [0, white / 2, white]
    if kind != "f":
        levels = [int(level) for level in levels]
    samples = struct.pack(f"<3{kind}", *levels)
    mode = {"H": "I;16", "i": "I", "f": "F"}[kind]
    path = tmp_path / f"deep{suffix}"
    Image.frombytes(mode, (3, 1), samples).save(path)
    grey = read_image(path).convert("L").tobytes()
    assert list(grey) == pytest.approx([0, 127.5, 255], abs=1)


def test_what_is_transparent_is_white(tmp_path):
    alpha = Image.new("L", (8, 8))
    alpha.paste(255, (2, 2, 6, 6))
    black_square = Image.new("RGBA", (8, 8))  # on a black ground that is transparent
    black_square.putalpha(alpha)
    path = tmp_path / "logo.png"
    black_square.save(path)
    assert sorted(read_image(path).getcolors()) == [(16, BLACK), (48, WHITE)]


def png_chunk(kind, content, checksum=True):
    crc = 0
    if checksum:
        crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png(depth, color_type, row, *chunks, checksum=True):
    """The bytes of a PNG of two pixels, with these chunks before its row."""
    header = struct.pack(">IIBBBBB", 2, 1, depth, color_type, 0, 0, 0)
    no_filter = b"\0"
    parts = [
        png_chunk(b"IHDR", header), *chunks,
        png_chunk(b"IDAT", zlib.compress(no_filter + row), checksum),
        png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


GREY_TYPE, COLOR_TYPE = 0, 2


@pytest.mark.parametrize("depth, color_type, row, clear", [
    (1, GREY_TYPE, b"\x40", b"\0\1"),
    (2, GREY_TYPE, b"\x10", b"\0\1"),
    (4, GREY_TYPE, b"\x07", b"\0\7"),
    (8, GREY_TYPE, b"\0\7", b"\0\7"),
    (16, GREY_TYPE, b"\0\0\1\7", b"\1\7"),
    (8, COLOR_TYPE, 3 * b"\0" + 3 * b"\7", 3 * b"\0\7"),
    (16, COLOR_TYPE, 6 * b"\0" + 3 * b"\7\1", 3 * b"\7\1"),
])
def test_the_colour_that_stands_for_transparent_is_white_at_any_depth(
        depth, color_type, row, clear, tmp_path):
    """The second of two pixels has it, beside a black one."""
    path = tmp_path / "clear.png"
    path.write_bytes(png(depth, color_type, row, png_chunk(b"tRNS", clear)))
    assert read_image(path).tobytes() == bytes(BLACK + WHITE)


def test_a_picture_all_of_which_is_transparent_is_white(tmp_path):
    path = tmp_path / "clear.png"
    path.write_bytes(png(4, GREY_TYPE, b"\x77", png_chunk(b"tRNS", b"\0\7")))
    assert read_image(path).tobytes() == bytes(WHITE + WHITE)


@pytest.mark.parametrize("kind, head", [
    (b"zTXt", b"note\0\0"),
    (b"iTXt", b"note\0\1\0\0\0"),
    (b"iCCP", b"note\0\0"),
])
def test_a_long_comment_hides_no_picture(kind, head, tmp_path):
    path = tmp_path / "note.png"
    long_text = zlib.compress(3_000_000 * b"x")
    path.write_bytes(png(8, GREY_TYPE, b"\0\7", png_chunk(kind, head + long_text)))
    assert read_image(path).tobytes() == b"\0\0\0\7\7\7"


@pytest.mark.parametrize("color, expected", [((200, 10, 20), (200, 10, 20)), (BLACK, WHITE)])
def test_an_alpha_channel_of_zeros_hides_no_colours(color, expected, tmp_path):
    path = tmp_path / "screen.tga"
    Image.new("RGBA", (4, 4), (*color, 0)).save(path)
    assert read_image(path).getcolors() == [(16, expected)]


ORIENTATION, RESOLUTION = 0x0112, 0x011a  # tags of EXIF


def test_a_picture_is_upright_in_all_orientations(tmp_path):
    path = tmp_path / "turned.png"
    picture = read_image(PICTURE).crop((0, 0, 96, 48))
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[ORIENTATION] = orientation
        picture.save(path, exif=exif)
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
        assert read_image(path).tobytes() == upright.tobytes()


def test_a_picture_is_upright_even_if_other_metadata_is_broken(tmp_path):
    path = tmp_path / "broken.jpg"
    picture = read_image(PICTURE).crop((0, 0, 96, 48))
    turned_right = struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0)
    text_for_a_number = struct.pack("<HHI4s", RESOLUTION, 2, 4, b"72\0\0")
    header = b"Exif\0\0II*\0\x08\0\0\0\2\0"  # two fields follow
    picture.save(path, exif=header + turned_right + text_for_a_number + 4 * b"\0")
    assert read_image(path).size == (48, 96)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\n"


@pytest.mark.parametrize("name, content, words", [
    ("truncated.jpg", PICTURE.read_bytes()[:1500], "truncated.*once more"),
    ("empty.jpg", b"", "none of JPEG"),
    ("eps.jpg", EPS, "none of JPEG"),
    ("big.pbm", b"P4 10000 10000\n", "smaller than 89 megapixels"),
    ("bomb.pbm", b"P4 99999 99999\n", "megapixels"),
    ("thin.pbm", b"P4 30000 1\n" + 3750 * b"\0", "1:200"),
    ("pointer.jpg", LFS_POINTER, "git lfs pull"),
    ("sum.png", png(8, GREY_TYPE, b"\0\7", checksum=False), "checksum.*IDAT"),
])
def test_bad_images_are_named_with_a_cure_that_fits(name, content, words, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    complaint(f"{name}: cannot be read as an image .*{words}", read_image, path)


def test_a_missing_image_is_named(tmp_path):
    words = "gone.jpg: cannot be read as an image .*No such file"
    complaint(words, read_image, tmp_path / "gone.jpg")


def test_a_jpeg_of_too_many_pixels_is_decoded_at_a_fraction(tmp_path, monkeypatch):
    """With a limit of 3,000 pixels in place of 89 million: 96 x 96 are three times as many."""
    whole = read_image(PICTURE)
    whole.save(tmp_path / "whole.png")
    monkeypatch.setattr(pictures, "PIXELS", 3000)
    half = read_image(PICTURE)
    assert half.size == (48, 48)
    expected = whole.resize(half.size, Image.Resampling.BOX).tobytes()
    differences = [abs(a - b) for a, b in zip(half.tobytes(), expected, strict=True)]
    assert sum(differences) / len(differences) < 4
    complaint("96 x 96 pixels.*make it smaller", read_image, tmp_path / "whole.png")


# The first token has no place. The next four are the quarters of a picture, the last is all of it.
QUARTERS = torch.tensor([
    (0, 0, 0, 0),
    (0, 0, 1, 1), (1, 0, 2, 1),
    (0, 1, 1, 2), (1, 1, 2, 2),
    (0, 0, 2, 2)]) / 2


def test_patches_in_a_frame_are_as_bright_as_their_alpha():
    alpha = torch.tensor([1, 1, 0.5, 0, 0.2, 0.1])
    black = Image.new("RGB", (40, 20))
    frame = pictures.frame(black, QUARTERS, alpha)
    middles = (5, 5), (25, 5), (5, 15), (25, 15)
    levels = [frame.getpixel(middle)[0] for middle in middles]
    # of two alphas in one place the higher one counts
    expected = [204 * (1 - highest) for highest in (1, 0.5, 0.1, 0.2)]
    assert levels == pytest.approx(expected, abs=2)


def test_sheets_show_the_highest_scores_in_red_and_the_lowest_in_blue(monkeypatch):
    """Of the quarters number 1 scores highest, 2 is kept, and 4 scores lowest."""
    def lay_out(words, panels, side):
        texts.extend(words)
        return lay_out_panels(words, panels, side)

    lay_out_panels, texts = pictures.lay_out, []
    monkeypatch.setattr(pictures, "lay_out", lay_out)
    scores = torch.tensor([0.0, 5, 1, 2, -1])
    keep = torch.tensor([2])
    X = torch.tensor([[9.0, 9], [1, 0], [1, 1], [1, 1], [0, 1]])  # 1 and 4 are nothing alike
    grey = Image.new("RGB", (50, 50), GREY)
    sheet = pictures.sheet(grey, QUARTERS[:5], scores, keep, X, "Why?", "ab", side=100)

    def quarters_of(panel):
        """The colours of quarters 1, 2 and 4."""
        left, top = 110 * panel, sheet.height - 140
        places = (35, 25), (85, 25), (85, 75)
        return [sheet.getpixel((left + x, top + y)) for x, y in places]

    first, second, fourth = quarters_of(0)  # what was kept
    assert min(first) > 200
    assert second == GREY
    assert fourth == first

    first, second, fourth = quarters_of(1)  # scores
    red, _, blue = first
    assert red > blue + 50
    assert second == GREY
    red, _, blue = fourth
    assert blue > red + 50

    first, second, fourth = quarters_of(2)  # cosine similarities of numbers 1 and 4
    assert (first, second, fourth) == (pictures.HEAT[2], pictures.HEAT[0], pictures.HEAT[2])
    assert texts == ["What is kept: 1 of 5 visual tokens", "Question: Why?",
                    "Answer by all tokens: a", "Answer by the kept tokens: b"]


def test_what_the_model_sees_is_the_middle_of_a_picture(vlm):
    wide = Image.new("RGB", (288, 96), "red")
    wide.paste(read_image(PICTURE), (96, 0))
    seen = pictures.seen_by_model(vlm, vlm.inputs([wide], ["?"]), wide)
    middle = read_image(PICTURE).tobytes()
    differences = [abs(a - b) for a, b in zip(seen.tobytes(), middle, strict=True)]
    assert max(differences) <= 1


def test_writing_follows_links_and_replaces_nothing_but_files(tmp_path):
    link, target = tmp_path / "link.json", tmp_path / "real.json"
    link.symlink_to(target.name)
    files.write(link, files.rounded({"a": [1.23456789, math.nan]}))
    assert link.is_symlink()
    assert json.loads(target.read_text()) == {"a": [1.2346, None]}

    (tmp_path / "folder.json").mkdir()
    too_long = 300 * "n" + ".json"
    for name in ("folder.json", "no/such/folder.json", too_long):
        complaint("cannot be written", files.write, tmp_path / name, {})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["folder.json", "link.json", "real.json"]


FILL_THE_DISK = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); print(1)"


@pytest.mark.parametrize("code, exit_code, output, lines_of_errors", [
    ("print('café')", 0, b"caf\\xe9\n", 0),
    ("raise files.InputError('é ' * 999)", 2, b"", 1),
    (FILL_THE_DISK, 2, b"", 1),
])
def test_a_script_ends_with_one_line_and_its_code_on_any_terminal(
        code, exit_code, output, lines_of_errors):
    script = f"from common import files\ndef main():\n    {code}\nfiles.cli(main)"
    ascii_terminal = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=ascii_terminal, capture_output=True)
    assert process.returncode == exit_code
    assert process.stdout == output
    assert process.stderr.count(b"\n") == lines_of_errors


@pytest.fixture
def kept_output(monkeypatch):
    """files.cli() leaves the output of the tests themselves open."""
    def do_nothing():
        pass

    monkeypatch.setattr(files, "forget_output", do_nothing)


def raising(error):
    def main():
        raise error
    return main


def too_large_a_tensor():
    torch.empty(10 ** 15)


def too_large_a_buffer():
    bytearray(10 ** 15)


killed_worker = raising(RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."))
lost_connection = raising(RuntimeError("gloo: Connection closed by peer [::1]:9"))
full_disk = raising(OSError(28, "No space left on device"))


@pytest.mark.parametrize("main, cure", [
    (too_large_a_tensor, "fewer images at a time"),
    (too_large_a_buffer, "fewer images at a time"),
    (killed_worker, "--workers 0"),
    (lost_connection, "lost each other.*--resume"),
    (full_disk, "No space left on device; check"),
])
def test_what_a_system_refuses_is_one_line_with_its_cure(main, cure, kept_output, capsys):
    with pytest.raises(SystemExit) as e:
        files.cli(main)
    assert e.value.code == 2
    assert re.fullmatch(f"error: .+{cure}.*\n", capsys.readouterr().err)


def test_a_mistake_in_the_code_is_not_hidden(kept_output):
    with pytest.raises(RuntimeError, match="a mistake"):
        files.cli(raising(RuntimeError("a mistake")))


def test_free_memory_is_what_linux_says():
    free, source = memory.system_memory()
    report = Path("/proc/meminfo").read_text()
    kilobytes = re.search(r"^MemAvailable: +(\d+) kB", report, re.M)[1]
    assert free == pytest.approx(1024 * int(kilobytes), rel=0.2)
    assert "Linux" in source


def test_free_memory_of_a_gpu_is_what_cuda_says_of_that_one(monkeypatch):
    """It is shared with no other process: each has a GPU of its own."""
    free_and_total = {"cuda:0": (10, 80), "cuda:1": (30, 80)}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: free_and_total[device])
    assert memory.free("cuda:1", world=2) == (30, "as CUDA says")


@pytest.fixture
def not_linux(tmp_path, monkeypatch):
    """No /proc, and no programs but those in tmp_path."""
    def no_such_file(*args):
        raise FileNotFoundError

    monkeypatch.setattr(memory, "open", no_such_file, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def test_free_memory_is_a_guess_on_any_other_system(not_linux):
    free, source = memory.system_memory()
    assert free == 4e9
    assert "--at-once" in source


VM_STAT = """#!/bin/sh
echo 'Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               100.
Pages active:                            5000.
Pages inactive:                            20.
Pages speculative:                          3.
"Translation faults":                 123456.'"""


def test_free_memory_is_what_macos_says(not_linux, tmp_path):
    program = tmp_path / "vm_stat"
    program.write_text(VM_STAT)
    program.chmod(0o755)
    assert memory.system_memory() == (123 * 16384, "as macOS says")


def test_without_fcntl_nothing_is_locked_and_all_else_works(tmp_path, monkeypatch):
    path = tmp_path / "a"
    with open(path, "w") as file, open(path) as other:
        files.lock(file, "a")
        complaint("a: another run", files.lock, other, "a")
        monkeypatch.setitem(sys.modules, "fcntl", None)
        files.lock(other, "a")


@pytest.fixture
def locked_folder():
    """A folder where nobody but root may write; not in tmp_path, which others may not enter."""
    folder = Path(tempfile.mkdtemp())
    old_answers = folder / "old.jsonl"
    old_answers.write_text("{}")
    unreadable = folder / "unreadable.jsonl"
    unreadable.write_text("{}")
    unreadable.chmod(0)
    (folder / "hidden").mkdir()
    (folder / "hidden").chmod(0o600)
    pruner_folder(folder)
    (folder / "scorer.safetensors").chmod(0)
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_missing_permissions_are_named_before_any_work(locked_folder):
    """As a user who is not root."""
    new, old = locked_folder / "new.jsonl", locked_folder / "old.jsonl"
    unreadable = locked_folder / "unreadable.jsonl"
    nobody = 65534

    def attempts():
        if os.getuid() == 0:
            os.setuid(nobody)
        place = "--answers", new, unreadable, (".jsonl",)
        complaint("no file may be made", files.check_place, *place)
        complaint("cannot be written", files.write, new, [])
        shapes.FOLDER = locked_folder  # of a checkout that somebody else owns
        complaint("train/00000.jpg.*allow writing there", shapes.prepare, {"train": 1})
        complaint("cannot be written", questions.answer_file, old, [], {"model": ""}, None)
        run_folder = locked_folder / "run"
        complaint("--out .* cannot be written", running.Run, run_folder, {}, Processes("cpu"))
        complaint("Permission denied", questions.read_questions, unreadable)
        complaint("Permission denied", coco_files.read_coco, unreadable)
        complaint("Permission denied.*permissions", read_image, unreadable)
        complaint("Permission denied", pruner.load_pruner, locked_folder)
        checkpoint = locked_folder / "scorer.safetensors"
        complaint("Permission denied", running.read_checkpoint, checkpoint)
        hidden = locked_folder / "hidden"
        complaint("no picture in it may be opened", coco_files.check_present,
                  {hidden / "a.jpg": "a"}, [hidden])

    assert in_a_process(attempts) == 0


# --- question files, captions, pruners, infer.py --------------------------------------------------

def question(**changes):
    row = {"question_id": 1, "image": "00000.jpg", "text": "What color is the star?"}
    return row | changes


def json_lines(rows):
    lines = [json.dumps(row).encode() for row in rows]
    return b"\n".join(lines)


def read_rows(path, content, need=("question_id", "image", "text")):
    """Write this content, bytes, to a question file and read its rows."""
    path.write_bytes(content)
    return questions.read_questions(path, PICTURES, need)


@pytest.mark.parametrize("layout", ["lines", "windows", "list"])
def test_question_files_may_be_lines_or_a_list(layout, tmp_path):
    rows = [question(), question(question_id=2, category=3, label=["green", "lime"])]
    content = json_lines(rows)
    if layout == "windows":  # a byte order mark, carriage returns and a blank line
        content = b"\xef\xbb\xbf" + content.replace(b"\n", b"\n  \n") + b" \r\n"
    elif layout == "list":
        content = json.dumps(rows).encode()
    first, second = read_rows(tmp_path / "q.jsonl", content)
    assert first["image"] == PICTURE
    assert first["category"] == "all"
    assert second["image"] == PICTURE
    assert second["label"] == ["green", "lime"]
    assert second["category"] == "3"
    number = "3" if layout == "windows" else "2"
    assert second["where"].endswith(number)


def test_a_picture_may_lie_beside_the_question_file(tmp_path):
    picture = tmp_path / "beside.jpg"
    picture.symlink_to(EXAMPLES[1])
    content = json_lines([question(image="beside.jpg")])
    [row] = read_rows(tmp_path / "q.jsonl", content)
    assert row["image"] == picture


@pytest.mark.parametrize("content, words", [
    (b"3", "has no"),
    (b"\n", "no q"),
    (b"[" * 200_000, "cannot be read"),
    (b'\n{"text": ' + 5000 * b"x", "line 2: cannot"),
    (json.dumps(question(text=500 * "x")).encode("utf-16"), "UTF-8"),
    (b'[{"image": null, "conversations": []}]', "scienceqa_img"),
    (b'{"image": "00000.jpg", "text": "?"}', "has no question_id"),
])
def test_a_file_that_holds_no_questions_is_named(content, words, tmp_path):
    complaint(f"q.jsonl: .*{words}", read_rows, tmp_path / "q.jsonl", content)


@pytest.mark.parametrize("changes, words", [
    ({"image": None}, "line 1: has no image"),
    ({"image": 42}, "one file"),
    ({"image": "/9j/" + 4000 * "A"}, "line 1: .*one file"),
    ({"image": "../llava/config.json"}, "one file name"),
    ({"image": 300 * "n"}, "no file .nnn.*--images"),
    ({"image": "\ud83d.jpg"}, "no file"),
    ({"text": 3}, "text must be a string"),
    ({"label": {"a": 1}}, "label"),
    ({"label": True}, "label"),
    ({"label": ["yes", True]}, "label"),
])
def test_a_wrong_field_of_a_question_is_named(changes, words, tmp_path):
    content = json_lines([question(**changes)])
    complaint(f"q.jsonl: .*{words}", read_rows, tmp_path / "q.jsonl", content)


@pytest.mark.parametrize("first, second, words", [
    ({}, {"image": ["a.jpg", "b.jpg"]}, "line 2: .*one file name"),
    ({}, {"image": "gone.jpg"}, "line 2: no file .gone.jpg. .*1 of 2 .*fetch"),
    ({"label": 1}, {"label": "0"}, "line 1: label 1 .*yes or no"),
])
def test_the_line_of_a_wrong_question_is_named(first, second, words, tmp_path):
    content = json_lines([question(**first), question(**second)])
    complaint(f"q.jsonl: .*{words}", read_rows, tmp_path / "q.jsonl", content)


def test_a_missing_label_is_named_where_labels_are_needed(tmp_path):
    path = tmp_path / "q.jsonl"
    content = json_lines([question(label="a"), question()])
    complaint("line 2: has no label", read_rows, path, content, ("image", "text", "label"))
    content = json_lines(2 * [question(label=math.nan)])
    need = ("question_id", "image", "text", "label")
    complaint("q.jsonl: .*no label", read_rows, path, content, need)


@pytest.mark.parametrize("answer, label", [
    ("Green.", ["green", "lime"]),
    ("lime", ["green", "Lime."]),
    ("3", 3),
    (" red", "Red"),
    ("B", "b"),
    ("(B)", "B"),
    ("B. red", "B"),
    ("b) red", ["A", "B"]),
    ("[B]", "B"),
])
def test_an_answer_is_right_whatever_its_case_and_punctuation(answer, label):
    assert questions.is_right(answer, label, yes_no=False)
    assert not questions.is_right("blue", label, yes_no=False)


@pytest.mark.parametrize("answer", ["A red one", "apple", "Answer: A"])
def test_a_word_that_begins_with_the_letter_is_not_the_letter(answer):
    assert not questions.is_right(answer, "A", yes_no=False)


def test_popes_figures_are_those_counted_by_hand():
    """3 of 4 questions whose label is yes are answered yes, and 2 of 6 whose label is no. Only the
    first sentence counts, and capitals do. The last question has no label."""
    to_yes = ["Yes", "yes.", "Yes, a cat. No dog.", "No"]
    to_no = ["no", "There is not", "No, none.", "No. Yes", "NO", "none"]
    labels = 4 * ["yes"] + 6 * ["no"] + [None]
    rows = [question(label=label, category="all") for label in labels]
    figures = questions.score(rows, [*to_yes, *to_no, "?"])
    by_hand = {"accuracy": 0.7, "precision": 0.6, "recall": 0.75, "f1": 2 / 3, "yes": 0.5}
    assert figures == {"all": pytest.approx(by_hand)}


@pytest.fixture
def preloaded(vlm, monkeypatch):
    """infer.py takes the model that is in memory, whatever --model is."""
    monkeypatch.setattr(infer, "load", lambda *_: vlm)


@pytest.fixture
def answer(tmp_path, preloaded):
    """answer(path, …): infer.py answers six questions, two at a time, into that file."""
    six = [question(question_id=i, text=QUESTIONS[i % 3]) for i in range(6)]
    source = tmp_path / "q.jsonl"
    files.write(source, six)
    options = ["--questions", source, "--images", PICTURES, *SHIPPED, "--batch", 2, "--answers"]
    return functools.partial(run, infer.main, *options)


def test_a_killed_question_file_continues_where_it_stopped(
        answer, vlm, tmp_path, capsys, monkeypatch):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    answer(whole)
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [row["question_id"] for row in rows] == list(range(6))
    assert rows[0]["metadata"]["keep"] == "16"

    with monkeypatch.context() as patch:
        signal_on_call(patch, signal.SIGKILL, vlm, "generate", 3)
        exit_code = in_a_process(functools.partial(answer, path))
    assert exit_code == -signal.SIGKILL
    left_behind = path.read_bytes()
    for cut in (0, 1, 30, 700):  # the fourth line whole, or cut off anywhere
        end = len(left_behind) - cut
        path.write_bytes(left_behind[:end])
        complete_lines = path.read_bytes().count(b"\n")
        capsys.readouterr()
        answer(path)
        assert path.read_bytes() == whole.read_bytes()
        assert f"{complete_lines} of 6 answers are" in capsys.readouterr().err
    assert complete_lines == 1


def test_answers_replace_no_other_file(answer, tmp_path):
    real, link, note = (tmp_path / f"{name}.jsonl" for name in ("real", "link", "note"))
    link.symlink_to("real.jsonl")
    answer(link)
    assert link.is_symlink()
    assert real.read_text().count("\n") == 6

    first_line = real.read_bytes().partition(b"\n")[0]
    without_text = json.loads(first_line)
    del without_text["text"]
    contents = [
        b"a note\n",
        b"a note",
        b"{",
        b'{"question_id": 0',
        b"[" * 200_000,
        (tmp_path / "q.jsonl").read_bytes(),
        json.dumps(question()).encode(),
        json.dumps(without_text).encode() + b"\n",
        first_line + b"\na note",
    ]
    for content in contents:
        note.write_bytes(content)
        complaint("not an answer file", answer, note)
        assert note.read_bytes() == content


def test_answers_do_not_replace_the_question_file(answer, tmp_path):
    source = tmp_path / "q.jsonl"
    content = source.read_bytes()
    hard, soft = tmp_path / "hard.jsonl", tmp_path / "soft.jsonl"
    hard.hardlink_to(source)
    soft.symlink_to("q.jsonl")
    for path in (hard, soft, source):
        complaint("question file|file that is read|not an answer file", answer, path)
    assert source.read_bytes() == content
    too_long = tmp_path / (300 * "n" + ".jsonl")
    complaint("too long", answer, too_long)


def test_answers_of_two_different_runs_do_not_mix(answer, tmp_path, monkeypatch):
    path = tmp_path / "answers.jsonl"
    answer(path)
    whole = path.read_bytes()
    complaint(r"keep 16 \(now 20\)", answer, path, "--keep", 20)
    shutil.copy(EXAMPLES[1], tmp_path / PICTURE.name)
    complaint("other questions or pictures", answer, path, "--images", tmp_path)
    with open(path) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        complaint("another run is writing", answer, path, "--overwrite")

    other = load(TINY)
    weight = other.model.lm_head.weight.view(-1)
    weight[5 * (len(weight) // 64)] += 1
    monkeypatch.setattr(infer, "load", lambda *_: other)
    complaint("weights", answer, path)
    assert path.read_bytes() == whole
    answer(path, "--overwrite")
    overwritten = path.read_bytes()
    assert overwritten != whole
    too_long = question(text="red " * 2000)
    files.write(tmp_path / "q.jsonl", [too_long])
    complaint("q.jsonl: line 1", answer, path, "--overwrite")
    assert path.read_bytes() == overwritten


def test_links_to_pictures_are_followed(tmp_path):
    links = [tmp_path / path.name for path in EXAMPLES]
    for link, path in zip(links, EXAMPLES):
        link.symlink_to(path)
    source = captions_file(tmp_path, "annotations", {"id": None})
    captions = coco_files.read_coco(source)
    assert captions == {link: [f"Caption{i * ' red'}."] for i, link in enumerate(links)}


def test_held_out_images_are_drawn_at_random():
    pairs = {f"{i}.jpg": [f"{i}"] for i in range(100)}
    training, held_out = coco_files.split(pairs, 0)
    _, other = coco_files.split(pairs, 1)
    assert len(held_out) == 5
    assert len(training) == 95
    assert dict(training + held_out) == pairs
    assert held_out != training[-5:]
    assert held_out != other
    _, held_out = coco_files.split(dict.fromkeys(range(8000), ["?"]), 0)
    assert len(held_out) == 200, "at most"


@pytest.mark.parametrize("field, changes, words", [
    ("images", {"id": None}, "00001.jpg.*id of its own"),
    ("images", {"id": 0}, "00001.jpg.*id of its own"),
    ("images", {"file_name": "../a.jpg"}, "one file name"),
    ("images", {"file_name": str(PICTURE)}, "one file name"),
    ("annotations", {"id": 0}, "id 0 twice"),
    ("annotations", {"image_id": 99}, "id 1: image_id 99 .*drop it"),
    ("annotations", {"image_id": "0001"}, "id 1: .*'0001' .*both alike"),
    ("annotations", {"image_id": []}, "numbers or text"),
    ("annotations", {"caption": " "}, "id 1: caption"),
    ("annotations", {"caption": None}, "id 1: caption"),
])
def test_a_wrong_field_of_a_captions_file_is_named(field, changes, words, tmp_path):
    path = captions_file(tmp_path, field, changes)
    complaint(f"coco.json: .*{words}", coco_files.read_coco, path, PICTURES)


def read_captions_file(path):
    """The JSON of a captions file, which begins with a byte order mark."""
    text = path.read_text(encoding="utf-8-sig")
    return json.loads(text)


@pytest.mark.parametrize("name", [300 * "n", "\ud83d.jpg", "gone.jpg"])
def test_of_a_hundred_pictures_one_may_be_absent(name, tmp_path, capsys):
    path = captions_file(tmp_path, "images", {"file_name": name})
    pictures = list(coco_files.read_coco(path, PICTURES))
    assert pictures[1].name == name
    assert "1 of 6 are absent: others stand" in capsys.readouterr().err

    content = read_captions_file(path)
    content["images"][2]["file_name"] = "too.jpg"
    path.write_text(json.dumps(content))
    complaint("2 of 6 are absent: fetch", coco_files.read_coco, path, PICTURES)
    complaint("6 of 6 .*--images", coco_files.read_coco, path, tmp_path)


def test_of_thirty_pictures_two_may_not_be_absent(tmp_path):
    content = read_captions_file(captions_file(tmp_path))
    content["images"] = [dict(id=i, file_name=f"{i}.jpg") for i in range(30)]
    content["annotations"] = [dict(id=i, image_id=i, caption="?") for i in range(30)]
    for i in range(28):
        (tmp_path / f"{i}.jpg").symlink_to(PICTURE)
    (tmp_path / "coco.json").write_text(json.dumps(content))
    complaint("2 of 30 are absent: fetch", coco_files.read_coco, tmp_path / "coco.json")


def test_two_names_of_one_picture_are_one(tmp_path):
    path = captions_file(tmp_path, "images", {"file_name": "./00000.jpg"})
    captions = coco_files.read_coco(path, PICTURES)
    assert captions[PICTURE] == ["Caption.", "Caption red."]


def test_a_file_of_coco_without_captions_is_named(tmp_path):
    path = captions_file(tmp_path)
    content = read_captions_file(path)
    for row in content["annotations"]:
        row["bbox"] = [row.pop("caption")]
    path.write_text(json.dumps(content))
    complaint("no caption; .*captions_train2014.json", coco_files.read_coco, path, PICTURES)
    gone = tmp_path / "gone.json"
    complaint("gone.json: .*No such file", coco_files.read_coco, gone)


def pairs_with_an_unreadable_picture(folder):
    """Seven (path, captions), of which the first cannot be read."""
    unreadable = folder / "bad.jpg"
    unreadable.write_bytes(b"")
    pairs = [(unreadable, ["bad"])]
    for path in EXAMPLES:
        pairs.append((path, [path.name, "other"]))
    return pairs


def test_a_sample_depends_on_seed_and_number_alone(tmp_path):
    pairs = pairs_with_an_unreadable_picture(tmp_path)
    data = coco_files.Captions(pairs, 0)
    again = coco_files.Captions(pairs, 0)
    samples = [data[g] for g in range(21)]
    for g in (20, 3, 9):
        assert again[g] == samples[g]

    pictures = [picture.tobytes() for _, picture, _, _ in samples]
    epochs = [pictures[:7], pictures[7:14], pictures[14:]]
    assert epochs[0] != epochs[1]
    for epoch in epochs:  # another picture stands for the unreadable one
        assert len(set(epoch)) == 6
    captions = {caption for _, _, caption, _ in samples}
    assert len(captions) > 4
    assert "other" in captions, "the second one of a picture, too"
    skipped = [path for sample in samples for path in sample[3]]
    assert len(skipped) == 3


def test_samples_without_a_seed_stay_in_order(tmp_path):
    pairs = pairs_with_an_unreadable_picture(tmp_path)
    data = coco_files.Captions(pairs)
    _, _, caption, skipped = data[0]
    assert caption == PICTURE.name
    assert skipped == [str(tmp_path / "bad.jpg")]
    assert data[3][2] == EXAMPLES[2].name


def pruner_folder(folder, tensors={}, changes={}):
    """A folder with a random pruner; None in place of a tensor or a setting leaves it out."""
    settings = {"model": str(TINY), "width": 64, "tokens": 144, "keep": 16, "choose": "top"}
    settings |= changes
    settings = {name: value for name, value in settings.items() if value is not None}
    files.write(folder / "pruner.json", settings)
    weights = Scorer(64).state_dict() | tensors
    weights = {name: t.clone() for name, t in weights.items() if t is not None}
    save_file(weights, folder / "scorer.safetensors")
    return folder


@pytest.mark.parametrize("name, tensor", [
    ("head.weight", None),
    ("more", torch.ones(1)),
    ("norm.weight", torch.ones(65)),
    ("norm.bias", torch.full((64,), math.nan)),
    ("norm.bias", torch.zeros(64, dtype=torch.complex64)),
    ("norm.bias", torch.zeros(64, dtype=torch.long)),
    ("norm.bias", torch.full((64,), 1e300, dtype=torch.float64)),
])
def test_a_bad_tensor_of_a_pruner_is_named(name, tensor, tmp_path):
    folder = pruner_folder(tmp_path, {name: tensor})
    complaint(name, pruner.load_pruner, folder)


@pytest.mark.parametrize("words, changes", [
    ("not a trained", {"width": 10 ** 9}),  # squared it would take 4 exabytes
    ("not a trained", {"width": 65}),
    ("no keep", {"keep": None}),
    ("not a budget", {"keep": "some"}),
    ("not a trained", {"thresholds": {"shares": [0.1, 1]}}),
])
def test_a_bad_setting_of_a_pruner_is_named_before_memory_is_taken(words, changes, tmp_path):
    folder = pruner_folder(tmp_path, changes=changes)
    complaint(words, pruner.load_pruner, folder)


@pytest.mark.parametrize("words, shares, values", [
    ("equally many numbers", [0.1, 1], [1.0, math.nan]),
    ("equally many numbers", [0.1, 0.5, 1], [1.0, 0.0]),
    ("must rise", [0.1, 1], [-1.0, 2.0]),
    ("must rise", [1, 0.1], [2.0, -1.0]),
    ("must rise", [0.1, 1], [0.5, 0.5]),
    ("must rise", [0.5, 0.5], [2.0, -1.0]),
    ("must rise", [5, 100], [2.0, -1.0]),
    ("not a trained", ["a", "b"], [2.0, -1.0]),
])
def test_a_bad_table_of_thresholds_is_named(words, shares, values, tmp_path):
    table = {"shares": shares, "values": values}
    folder = pruner_folder(tmp_path, changes={"thresholds": table})
    complaint(words, pruner.load_pruner, folder)


@pytest.mark.parametrize("field, accepted", [
    ("model", ["text"]),
    ("width", []),
    ("tokens", [7, 10 ** 400]),
    ("keep", [7]),
    ("choose", []),
    ("thresholds", []),
])
def test_any_json_type_in_a_field_of_a_pruner_is_refused_or_accepted(field, accepted, tmp_path):
    numbers = [True, 7, -1.5, 10 ** 400]
    others = ["text", [], [[1]], {}, {"shares": 3, "values": 3}]
    for value in numbers + others:
        folder = pruner_folder(tmp_path, changes={field: value})
        if value in accepted:
            pruner.load_pruner(folder)
        else:
            complaint("its pruner.json and", pruner.load_pruner, folder)


@pytest.mark.parametrize("content", ["[]", "3", "null", "{", 9999 * "["])
def test_any_other_json_in_place_of_a_pruner_is_refused(content, tmp_path):
    folder = pruner_folder(tmp_path)
    (folder / "pruner.json").write_text(content)
    complaint("its pruner.json and", pruner.load_pruner, folder)


def test_a_pruners_name_that_is_too_long_is_refused(tmp_path):
    complaint("not a trained", pruner.load_pruner, tmp_path / (300 * "n"))


def test_a_threshold_keeps_what_lies_above_it():
    scores = torch.randn(7, 40) ** 3
    padded = F.pad(scores, (0, 5), value=-torch.inf)
    z = standardised(padded)  # (B, N + 5)
    for total in (7 * 5, 7 * 12, 1, 7 * 40):
        T = threshold(z.flatten(), total)
        assert (z > T).sum() == total
        keep = select(z, count_above(z, T))  # (B, K), padded with -1 on the left
        for row, kept in zip(z, keep):
            above = (row > T).nonzero().flatten().tolist()  # in their order
            if not above:  # at least one is kept
                above = [row.argmax().item()]
            padding = [-1] * (len(kept) - len(above))
            assert kept.tolist() == padding + above


@pytest.fixture
def random_z():
    """Standardised scores of 50 images of 144 tokens."""
    scores = torch.randn(50, 144)
    return standardised(scores)


def quantiles_of(z):
    """The settings of a pruner with a table of thresholds; padding must not count in it."""
    padding = torch.full((9,), -torch.inf)
    table = quantiles(torch.cat([z.flatten(), padding]))
    return {"tokens": 144, "thresholds": table}


def test_a_table_of_thresholds_keeps_the_budget_on_average(random_z):
    settings = quantiles_of(random_z)
    shares = settings["thresholds"]["shares"]
    assert shares[0] == 1 / 7200
    assert shares[-1] == 1
    budgets = [("~16", 16), ("~11.1%", 16), ("~1", 1), ("~100", 100), ("~144", 144)]
    for text, K in budgets:
        T = pruner.threshold_of(Budget.parse(text), settings, 144)
        kept = (random_z > T).sum() / 50
        assert kept == pytest.approx(K, rel=0.02)


def test_a_budget_outside_the_table_of_thresholds_is_refused(random_z):
    def refused(words, text, settings, N):
        complaint(words, pruner.threshold_of, Budget.parse(text), settings, N)

    short = {"tokens": 144, "thresholds": {"shares": [0.05, 0.5], "values": [2.0, 0.0]}}
    refused("5.00% to 50.00%", "~7", short, 144)
    refused("stay within", "~73", short, 144)
    whole = quantiles_of(random_z)
    refused("144 visual tokens.*576", "~16", whole, 576)
    refused("differ in their number", "~16", whole, None)
    refused("no thresholds", "~16", {}, 144)


def test_a_trained_table_of_thresholds_holds_on_its_own_pictures(backbone):
    vlm, inputs, X = backbone
    scorer = Scorer(vlm.width)
    N = real(inputs, X).sum().item()
    for ranking in pruner.RANKINGS:
        table = pruner.thresholds(vlm, scorer, ranking, [inputs, inputs])
        assert table["images"] == 6
        settings = {"choose": ranking, "keep": "~30%", "thresholds": table, "tokens": vlm.tokens}
        choose, _ = pruner.chooser(vlm, scorer, settings)
        keep = choose(X.float(), inputs)
        kept = (keep >= 0).sum()
        assert abs(kept - 0.3 * N) <= max(2, 0.02 * N)


@pytest.fixture
def shipped_pruner():
    """(scorer, settings) of the pruner that ships, with a table of two thresholds."""
    scorer, settings = pruner.load_pruner(ROOT / "data/shapes/pruner")
    table = {"shares": [0, 1], "values": [1.0, -2.0]}
    return scorer, {**settings, "keep": "~16", "choose": "top", "thresholds": table}


def test_the_chooser_keeps_what_its_record_says(vlm, features, shipped_pruner):
    def check(keep, record, **options):
        choose, found = pruner.chooser(vlm, scorer, settings, **options)
        assert choose(X, {}).equal(keep)
        assert found == record

    scorer, settings = shipped_pruner
    X = features[:3].float()
    scores = scorer(X)
    T = 1 - 3 * 16 / 144  # between the table's two thresholds
    above = select(scores, count_above(standardised(scores), T))
    check(above, {"keep": "~16", "choose": "top"})
    check(above, {"threshold": T, "choose": "top"}, T=T)

    nine = Budget(9)
    highest = select(scores, 9)
    check(highest, {"keep": "9", "choose": "top"}, budget=nine)
    spread = select(distinct(scores, X), 9)
    check(spread, {"keep": "9", "choose": "distinct"}, budget=nine, choose="distinct")
    covering = criteria.coverage(X, 9)
    check(covering, {"keep": "9", "choose": "coverage"}, budget=nine, choose="coverage")
    choose_all, _ = pruner.chooser(vlm, scorer, settings, Budget(144))
    assert choose_all(X, {}) is None


def test_the_chooser_refuses_what_it_cannot_keep(vlm, features, shipped_pruner):
    def refused(words, **options):
        complaint(words, pruner.chooser, vlm, scorer, settings, **options)

    def scores_of_nan(X, valid):
        return torch.full(X.shape[:2], math.nan)

    scorer, settings = shipped_pruner
    choose, _ = pruner.chooser(vlm, scores_of_nan, settings)
    complaint("are NaN", choose, features[:3].float(), {})
    refused("145: .*has 144", budget=Budget(145))
    refused("for --choose top", choose="distinct")
    refused("need the thresholds of a trained", choose="DPP")
    refused("need the thresholds", choose="DPP", T=1.0)


def save_scenes(folder):
    """The paths of the three scenes, written as pictures."""
    paths = []
    for i, scene in enumerate(SCENES):
        path = folder / f"{i}.png"
        scene.save(path)
        paths.append(path)
    return paths


def ask(vlm, rows, choose, **options):
    """{row number: answer} of infer.ask."""
    answers = {}
    for part in infer.ask(vlm, rows, choose, **options):
        answers.update(part)
    return answers


def keep_all(X, inputs):
    return None


@pytest.mark.parametrize("choose", [some, keep_all])
def test_asking_many_is_asking_one_by_one_and_reads_an_image_once(
        backbone, choose, tmp_path, monkeypatch):
    def record(inputs):
        encoded.extend(inputs["input_ids"])
        return encode(inputs)

    vlm, batch, X = backbone
    scorer = Scorer(vlm.width).double()
    z = standardised(scorer(X, batch.get("valid")))  # (B, N)
    encode, encoded = vlm.encode, []
    monkeypatch.setattr(vlm, "encode", record)
    paths = save_scenes(tmp_path)
    # the longest first, since like lengths are asked together
    rows = [question(image=paths[i % 3], text=QUESTIONS[2 - i // 2]) for i in range(6)]
    answers = ask(vlm, rows, choose, batch=4, max_new_tokens=5)
    assert len(encoded) == 3
    assert len(answers) == 6

    lengths = real(batch, X).sum(1).tolist()
    for i, row in enumerate(rows):
        picture = read_image(row["image"])
        inputs = vlm.inputs([picture], [row["text"]])
        x = encode(inputs)  # (1, N, d)
        N = lengths[i % 3]
        close(x[0], X[i % 3, :N], atol=1e-9)
        close(standardised(scorer(x))[0], z[i % 3, :N], atol=1e-6)
        assert not X[i % 3, N:].any()
        assert z[i % 3, N:].isneginf().all()
        [alone] = vlm.generate(inputs, x, choose(x, inputs), 5)
        assert alone == answers[i]


def test_every_backbone_chooses_without_a_pruner_from_each_picture_alone(backbone):
    vlm, inputs, X = backbone
    N = real(inputs, X).sum(1)
    K = Budget(share=0.3).of(N)
    settings = {"keep": "30%", "choose": "diversity"}
    names = set(criteria.criteria(vlm)) - {"pooling"}
    everywhere = {"diversity", "coverage", "DPP", "norm", "random"}
    assert everywhere <= names <= set(criteria.UNTRAINED)
    alone = [vlm.inputs([scene], QUESTIONS[:1]) for scene in SCENES]
    for name in sorted(names):
        choose, record = pruner.chooser(vlm, None, settings, choose=name)
        assert record == {"keep": "30%", "choose": name}
        keep = choose(X, inputs)
        kept = keep >= 0
        assert kept.sum(1).equal(K)
        for i, one in enumerate(alone):
            x = X[i:i + 1, :N[i]]
            [indices] = choose(x, one).tolist()
            assert indices == keep[i, kept[i]].tolist(), name
    for name in set(criteria.UNTRAINED) - names:
        words = f"{name}: .*choose by .*coverage"
        complaint(words, pruner.chooser, vlm, None, settings, choose=name)


def test_every_backbone_answers_without_a_pruner(backbone, tmp_path):
    vlm, _, _ = backbone
    settings = {"keep": "30%", "choose": "diversity"}
    choose, _ = pruner.chooser(vlm, None, settings)
    paths = save_scenes(tmp_path)
    rows = [question(image=path, text=QUESTIONS[0]) for path in paths]
    answers = ask(vlm, rows, choose, max_new_tokens=3)
    for i, scene in enumerate(SCENES):
        inputs = vlm.inputs([scene], QUESTIONS[:1])
        x = vlm.encode(inputs)
        [alone] = vlm.generate(inputs, x, choose(x, inputs), 3)
        assert alone == answers[i]


@pytest.fixture
def model_names(vlm, monkeypatch):
    """The names by which infer.py loads models, a list that grows; each is the tiny one."""
    def load_tiny_one(name, *options):
        names.append(name)
        return vlm

    names = []
    monkeypatch.setattr(infer, "load", load_tiny_one)
    return names


def infer_once(*options):
    run(infer.main, PICTURE, QUESTIONS[0], "--device", "cpu", *options)


def test_a_model_gets_its_own_pruner_or_none(model_names, tmp_path, monkeypatch, capsys):
    def messages(*options):
        infer_once(*options)
        return capsys.readouterr().err

    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(tmp_path)
    scorer, _ = pruner.load_pruner(ROOT / "data/shapes/pruner")
    changes = {"model": "other/model", "finished": False, "width": 128}
    pruner_folder(out, scorer.state_dict(), changes)
    assert "pruner data/shapes/pruner (it ships" in messages()
    pruner_folder(out, scorer.state_dict(), changes | {"finished": True})

    assert f"pruner {out} (your training)" in messages()
    assert model_names.pop() == "other/model"
    assert "pruner data/shapes/pruner (it ships" in messages("--model", TINY)
    assert model_names.pop() == str(TINY)
    warning = "warning: this pruner was trained for other/model"
    assert warning in messages("--model", TINY, "--pruner", out)
    no_pruner = "no pruner: diversity chooses, until one is trained"
    assert no_pruner in messages("--model", "a/third")
    assert no_pruner in messages("--pruner", "none", "--model", TINY)
    line = messages("--choose", "DPP", "--model", "a/third")
    assert line == "model a/third, no pruner: DPP chooses\n"
    complaint("--model: is empty", messages, "--model", "")


def test_a_pruner_for_features_of_another_width_is_refused(model_names, tmp_path):
    narrow = pruner_folder(tmp_path)
    words = "trained for features 64 wide, but .*llava has 128; give"
    complaint(words, infer_once, "--model", TINY, "--pruner", narrow)


def test_a_run_without_a_pruner_takes_no_settings_from_one(model_names, monkeypatch, capsys):
    def nine(folder):
        return scorer, {**settings, "keep": "9"}

    scorer, settings = pruner.load_pruner(ROOT / "data/shapes/pruner")
    monkeypatch.setattr(infer, "load_pruner", nine)
    infer_once("--pruner", "none")
    assert "kept 16 of 144" in capsys.readouterr().out, "11.1 %"


def test_what_needs_a_pruner_is_refused_without_one(model_names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = ("--model", "a/third")
    none = ("--pruner", "none")
    complaint("top: needs a pruner", infer_once, *none, "--choose", "top")
    complaint("distinct: needs a pruner", infer_once, *other, "--choose", "distinct")
    words = "need the thresholds of a trained"
    complaint(words, infer_once, "--choose", "norm", "--keep", "~16")
    complaint(words, infer_once, *none, "--threshold", "1")


def test_a_choice_without_thresholds_is_refused_before_the_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(infer, "load", None)
    shipped = ("--pruner", ROOT / "data/shapes/pruner")
    complaint("need the thresholds", infer_once, *shipped, "--choose", "DPP", "--keep", "~16")
    complaint("need the thresholds", infer_once, *shipped, "--choose", "DPP", "--threshold", "1")
    complaint("for --choose distinct", infer_once, *shipped, "--choose", "top", "--keep", "~16")
    on_scenes = (accuracy.main, "--questions", drawn(tmp_path), *shipped)
    complaint("need the thresholds", run, *on_scenes, "--choose", "norm", "--keep", "9", "~16")
    complaint("not a budget", run, *on_scenes, "--keep", "9", "nine")


def test_the_scorer_runs_in_half_precision_on_a_gpu_alone(monkeypatch):
    def dtype_of_the_scorer():
        _, scorer, *_ = infer.load_pruned(args)
        return scorer.head.weight.dtype

    args = SimpleNamespace(pruner=None, model=None, choose=None, device="cpu", dtype="bfloat16")
    frozen = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16)
    vlm = SimpleNamespace(processor=True, width=128, model=frozen)
    monkeypatch.setattr(infer, "load", lambda *_: vlm)
    assert dtype_of_the_scorer() == torch.float32
    frozen.device = torch.device("meta")  # any but the CPU
    assert dtype_of_the_scorer() == torch.bfloat16


@pytest.mark.parametrize("keep", [None, torch.tensor([[0, 2, 5]])])
def test_the_cost_of_reading_a_prompt_is_the_textbooks(vlm, keep):
    inputs = vlm.inputs(SCENES[:1], QUESTIONS[:1])
    X = vlm.encode(inputs)
    L = inputs["input_ids"].shape[1]
    if keep is not None:
        L = L - 144 + 3
    layers, D, F, V = 4, 160, 432, 399
    cache_bytes = 2 * layers * L * D * 4  # keys and values, in float32
    maps = L * (4 * D * D + 3 * D * F)  # q, k, v, the output; three of the MLP
    attention = 2 * L * L * D  # Q·Kᵀ and A·V
    flops = 2 * (layers * (maps + attention) + D * V)  # and the last token's logits
    measured = infer.prefill_cost(vlm, inputs, X, keep)
    # RoPE's angles are a small product, too, in some versions of transformers
    assert measured == (cache_bytes, pytest.approx(flops, rel=1e-4))


def test_in_every_backbone_a_pruned_prompt_costs_less_to_read(backbone):
    """Also where some layers are recurrent, and have no keys."""
    vlm, inputs, X = backbone
    pruned = infer.prefill_cost(vlm, inputs, X, some(X, inputs))
    full = infer.prefill_cost(vlm, inputs, X)
    for few, all_tokens in zip(pruned, full, strict=True):
        assert 0 < few < all_tokens


def test_with_all_tokens_infer_answers_as_the_stock_model(vlm, capsys):
    inputs = vlm.inputs([read_image(PICTURE)], [QUESTIONS[1]])
    prompt = inputs["input_ids"].shape[1]
    [ids] = vlm.model.generate(**inputs, max_new_tokens=8)
    text = vlm.processor.decode(ids[prompt:], skip_special_tokens=True)
    run(infer.main, PICTURE, QUESTIONS[1], *SHIPPED, "--keep", "all")
    first_line = capsys.readouterr().out.splitlines()[0]
    assert first_line == text.strip()


def test_a_picture_from_stdin_is_pruned_measured_and_drawn(vlm, tmp_path, capsys, monkeypatch):
    drawing = tmp_path / "kept.png"
    with open(PICTURE) as picture:
        monkeypatch.setattr(sys, "stdin", picture)
        run(infer.main, "-", QUESTIONS[0], *SHIPPED, "--show", drawing, "--json")
    out, err = capsys.readouterr()
    *_, summary, record = out.splitlines()

    a_token = 5 * 2 * 2 * 64 * 4  # bytes: layers, keys and values, heads, channels, float32
    L = vlm.inputs(SCENES[:1], QUESTIONS[:1])["input_ids"].shape[1]
    pruned, full = (L - 128) * a_token, L * a_token
    cache = f"KV cache {pruned / 1e6:.2f} MB instead of {full / 1e6:.2f}"
    flops, ms = "(0.0.) GFLOP instead of (0.4.)", r"(\d+) ms with the choice instead of (\d+)"
    printed = re.fullmatch(f"reading the prompt: {flops}, {ms}, {cache}", summary)
    record = json.loads(record)
    measured = [f"{count / 1e9:.2f}" for count in record["prefill_flops"]]
    assert printed.groups() == (*measured, *(f"{time:.0f}" for time in record["prefill_ms"]))
    assert len(record["kept"]) == 16
    assert record["cache_bytes"] == [pruned, full]
    assert Image.open(drawing).width == 1240
    [line] = err.splitlines()
    assert "model data/shapes/llava, pruner" in line


@pytest.mark.parametrize("T", [0.0, 1.0])
def test_a_threshold_of_the_command_line_keeps_what_ranks_above_it(T, vlm, preloaded, capsys):
    options = "--pruner", ROOT / "data/shapes/pruner", "--device", "cpu", "--threshold", T
    run(infer.main, PICTURE, QUESTIONS[0], *options, "--json")
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    X = vlm.encode(vlm.inputs([read_image(PICTURE)], ["?"]))
    scorer, _ = pruner.load_pruner(ROOT / "data/shapes/pruner")
    above = distinct(scorer(X), X)[0] > T
    assert record["kept"] == above.nonzero().flatten().tolist()


@pytest.mark.parametrize("choose", pruner.RANKINGS)
def test_the_answer_the_sheet_and_the_times_are_by_the_kept_tokens_and_by_all(
        choose, vlm, preloaded, tmp_path, capsys, monkeypatch):
    def generate(inputs, X, keep, *_):
        return ["by all" if keep is None else f"by {keep.shape[1]}"]

    def milliseconds(f):
        before = len(choices)
        answer, = f()
        timed.append((answer, len(choices) - before))
        return {"by all": 34, "by 16": 12}[answer]

    def select_spy(ranking, K):
        choices.append(K)
        return select(ranking, K)

    def sheet(picture, boxes, scores, keep, X, question, answers):
        shown.extend([keep.tolist(), answers])
        return picture

    shown, choices, timed = [], [], []
    X = vlm.encode(vlm.inputs([read_image(PICTURE)], ["?"]))
    scorer, _ = pruner.load_pruner(ROOT / "data/shapes/pruner")
    monkeypatch.setattr(pruner, "select", select_spy)
    expected = select(pruner.RANKINGS[choose](scorer(X), X), 16)
    monkeypatch.setattr(vlm, "generate", generate)
    for replacement in (milliseconds, sheet):
        monkeypatch.setattr(infer, replacement.__name__, replacement)
    options = *SHIPPED, "--choose", choose, "--show", tmp_path / "kept.png"
    run(infer.main, PICTURE, QUESTIONS[0], *options)
    answer, *_, summary = capsys.readouterr().out.splitlines()
    assert answer == "by 16"
    assert shown == [expected[0].tolist(), ("by all", "by 16")]
    assert ", 12 ms with the choice instead of 34, " in summary
    assert timed == [("by 16", 1), ("by all", 0)], "the choice is in the time"


def test_a_first_slow_try_does_not_count():
    seconds = iter([0.2, 0])
    assert infer.milliseconds(lambda: time.sleep(next(seconds))) < 100


def test_show_replaces_neither_the_photo_nor_pictures_of_others(preloaded, tmp_path):
    def show(name, *options):
        run(infer.main, photo, QUESTIONS[0], *SHIPPED, "--show", tmp_path / name, *options)

    photo, other = tmp_path / "photo.jpg", tmp_path / "other.png"
    shutil.copy(PICTURE, photo)
    SCENES[0].save(other)
    (tmp_path / "hard.jpg").hardlink_to(photo)
    (tmp_path / "soft.jpg").symlink_to(photo)
    for name in ("photo.jpg", "hard.jpg", "soft.jpg"):
        complaint("is the file that is read", show, name, "--overwrite")
    assert photo.read_bytes() == PICTURE.read_bytes()
    complaint("was not drawn by infer.py", show, "other.png")
    assert Image.open(other).size == SCENES[0].size

    for _ in range(2):  # the second run replaces what the first has drawn
        show("kept.png")
        show("kept.jpg", "--choose", "CLS")
    show("other.png", "--overwrite")
    drawn_size = Image.open(tmp_path / "kept.png").size
    assert Image.open(other).size == drawn_size


def test_answers_and_measurements_replace_nothing_that_is_read(preloaded, tmp_path):
    source, answers = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    files.write(source, [question()])
    answers.hardlink_to(source)
    options = ("--questions", source, "--answers", answers, "--overwrite")
    complaint("is the file that is read", run, infer.main, *options)

    note = tmp_path / "q.json"
    note.write_text("[]")
    args = SimpleNamespace(json=note)
    complaint("holds no measurements", tables.check, args)


def test_a_place_that_cannot_be_written_is_named_before_any_work(tmp_path, monkeypatch):
    def show(path):
        run(infer.main, PICTURE, QUESTIONS[0], "--show", path)

    def answer(path):
        run(infer.main, "--questions", tmp_path / "q.jsonl", "--answers", path)

    monkeypatch.setattr(infer, "load", None)  # no model is loaded
    (tmp_path / "folder.png").mkdir()
    too_long = 300 * "n"
    for name in ("none/a", too_long, "folder"):
        complaint("cannot be written", show, tmp_path / f"{name}.png")
    for name in ("none/a", too_long):
        complaint("cannot be written", answer, tmp_path / f"{name}.jsonl")
    options = (PICTURE, QUESTIONS[0], "--pruner", tmp_path / too_long)
    complaint("not a trained pruner", run, infer.main, *options)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    complaint("cannot be written", show, tmp_path / "a.png")


def test_a_chat_answers_as_single_runs_do_and_outlives_a_bad_question(capsys, monkeypatch):
    alone = []
    for text in QUESTIONS:
        run(infer.main, PICTURE, text, *SHIPPED)
        first_line = capsys.readouterr().out.splitlines()[0]
        alone.append(first_line)

    first, *others = [text.encode() for text in QUESTIONS]
    lines = [first, b"", b"Is <image> red?", b"Is it \xff?", *others]
    keyboard = io.BytesIO(b"\n".join(lines))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(keyboard, encoding="utf-8"))
    run(infer.main, PICTURE, *SHIPPED)
    out, err = capsys.readouterr()
    summary, *answers = out.splitlines()
    assert answers == alone
    assert summary == "kept 16 of 144 visual tokens"
    assert err.count("error: ") == 2
    assert "<image>" in err
    assert "half a character" in err.splitlines()[-1]


# --- criteria, accuracy, speed --------------------------------------------------------------------

@pytest.mark.parametrize("N", [144, 145])
def test_the_uniform_grid_keeps_exactly_k_patches(N):
    X = torch.randn(2, N, 5)
    for K in range(1, N + 1):
        keep = criteria.uniform_grid(X, K)
        assert keep.shape == (2, K)
        assert (keep.diff(dim=1) > 0).all()
        assert keep.max() < N
        if K <= 144:
            assert keep.min() >= N - 144, "the class token is no patch"


@pytest.mark.parametrize("N", [144, 145])
def test_average_pooling_puts_the_mean_of_each_cell_on_the_uniform_grid(N):
    X = torch.randn(2, N, 5)
    class_tokens = N - 144
    centres = (1, 4, 7, 10)
    by_hand = [class_tokens + 12 * y + x for y in centres for x in centres]
    pooled, keep = criteria.average_pooling(X, 16)
    assert keep[0].tolist() == by_hand
    assert keep.equal(criteria.uniform_grid(X, 16))
    patches = X[1, class_tokens:].view(12, 12, -1)
    mean = patches[3:6, 6:9].mean((0, 1))  # row 1, column 2 of 4 x 4
    close(pooled[1, keep[1, 6]], mean, atol=1e-6)

    pooled, keep = criteria.average_pooling(X, 8)  # 2 x 4 cells
    assert keep[0].tolist() == [class_tokens + 12 * y + x for y in (3, 9) for x in centres]
    mean = patches[6:, 6:9].mean((0, 1))
    close(pooled[1, keep[1, 6]], mean, atol=1e-6)


def test_cls_attention_is_that_of_the_stock_encoder(vlm):
    inputs = vlm.inputs(SCENES, QUESTIONS)
    stock = AutoModelForImageTextToText.from_pretrained(
        TINY, dtype="float32", attn_implementation="eager")
    tower = stock.model.vision_tower
    layers = tower(inputs["pixel_values"], output_attentions=True).attentions
    heads = layers[-2]  # (B, heads, 1 + N, 1 + N)
    attention = heads.mean(1)[:, 0]  # (B, 1 + N)
    found = criteria.cls_attention(vlm, inputs)
    close(found, attention[:, 1:], atol=1e-5, rtol=1e-3)

    stock.config.vision_feature_select_strategy = "full"
    full = Llava(stock, None, "full")
    close(criteria.cls_attention(full, inputs), attention, atol=1e-5, rtol=1e-3)


def test_where_images_differ_in_tokens_each_is_chosen_from_alone():
    X = torch.randn(2, 30, 8)
    N = torch.tensor([30, 20])
    K = torch.tensor([6, 4])
    inputs = {"valid": torch.arange(30) < N[:, None]}
    ways = criteria.criteria(SimpleNamespace(tokens=None))
    assert set(ways) == {"random", "norm", "diversity", "DPP", "coverage"}
    for name, choose in ways.items():
        keep = choose(X, inputs, K)
        assert (keep >= 0).sum(1).equal(K)
        assert (keep < N[:, None]).all()
        assert (keep[1, :2] == -1).all()
        if name != "random":
            [alone] = choose(X[1:, :20], {}, 4)
            assert keep[1, 2:].equal(alone), name
    covered = ways["coverage"](X, inputs, K)[0]
    assert covered.equal(criteria.coverage(X[:1], 6)[0])


def drawn(folder):
    """A question file: six scenes with five questions each."""
    rows = []
    for i in range(6):
        name = f"{i}.png"
        image, objects = shapes.draw_scene(f"test-{i}")
        files.write(folder / name, image)
        for kind, text, label in shapes.questions(objects, random.Random(i)):
            row = dict(image=name, text=text, label=label, category=kind)
            row["question_id"] = len(rows)
            rows.append(row)
    files.write(folder / "test.jsonl", rows)
    return folder / "test.jsonl"


def measured_and_printed(folder, options, capsys):
    """{row: {kind: accuracy}} as eval.accuracy measures it, and {kind: percent} as infer.py prints
    it, of the drawn scenes under the same options."""
    common = ("--questions", drawn(folder), "--device", "cpu", *options)
    table, answers = folder / "accuracy.json", folder / "answers.jsonl"
    run(accuracy.main, *common, "--seeds", 1, "--json", table)
    capsys.readouterr()
    run(infer.main, *common, "--answers", answers)
    out = capsys.readouterr().out
    printed = dict(re.findall(r"^(\w+) +([\d.]+)$", out, re.M))
    return json.loads(table.read_text())["accuracy"], printed


@pytest.mark.parametrize("options, name", [
    ((*SHIPPED, "--keep", "16"), "scorer 16"),
    ((*SHIPPED, "--keep", "~16"), "scorer ~16"),
    (("--choose", "norm", "--keep", "16"), "norm 16"),
])
def test_accuracy_is_that_of_what_infer_answers(options, name, tmp_path, capsys):
    measured, printed = measured_and_printed(tmp_path, options, capsys)
    for row in {"all 144", name} - {"norm 16"}:  # what the model and the pruner have learned
        assert sum(measured[row].values()) > 0.95 * 5, row
    for kind, share in measured[name].items():
        assert f"{100 * share:.1f}" == printed[kind]
    first_line = (tmp_path / "answers.jsonl").read_text().splitlines()[0]
    with_pruner = name.startswith("scorer")
    assert (json.loads(first_line)["metadata"]["pruner"] != "none") == with_pruner


def test_a_question_with_a_placeholder_is_refused_by_accuracy(tmp_path):
    source = tmp_path / "bad.jsonl"
    files.write(source, [question(text="Is <image> red?", label="no")])
    options = ("--questions", source, "--images", PICTURES, "--choose", "norm", "--device", "cpu")
    complaint("bad.jsonl: line 1 has <image>", run, accuracy.main, *options)


def test_random_draws_once_for_each_image_and_seed(vlm, tmp_path, monkeypatch):
    def generate(inputs, X, keep, **options):
        choices.append(keep)
        return ["two"] * len(keep)

    choices = []
    monkeypatch.setattr(vlm, "generate", generate)
    ways = accuracy.free_choices(vlm, Budget(16), 3, others=False)
    rows = accuracy.read_questions(drawn(tmp_path))
    right, counts = accuracy.right_or_wrong(vlm, rows, ways)
    first, second, *others = choices
    assert len(others) == 2  # three seeds of random, and uniform
    assert not first.equal(second)
    assert first[0].equal(first[4])  # two questions on one image
    assert not first[0].equal(first[5]), "the next image has a draw of its own"
    assert set(counts["random 16"]) == {16}
    assert len(right["uniform 16"]) == 30


def test_questions_are_taken_in_parts_that_tear_no_picture_apart():
    """Two at a time, of the pictures a, b, c, d and c again."""
    rows = [dict(image=image) for image in "aaabbcdc"]
    parts = accuracy.whole_pictures(rows, 2)
    assert ["".join(row["image"] for row in part) for part in parts] == ["aaa", "bb", "cd", "c"]


@pytest.mark.parametrize("tokens, at_once", [(576, 50), (288, 100), (None, 8)])
def test_the_more_tokens_a_picture_has_the_fewer_are_asked_about_at_once(
        tokens, at_once, monkeypatch):
    def inputs(pictures, texts):
        sizes.append(len(texts))
        return {}

    def encode(views):
        return torch.zeros(sizes[-1], 4, 1)

    def generate(prompts, X, keep, **options):
        return ["no"] * len(X)

    sizes = []
    monkeypatch.setattr(accuracy, "read_image", lambda *_: None)
    vlm = SimpleNamespace(tokens=tokens, processor=SimpleNamespace(image_processor=None),
                          inputs=inputs, encode=encode, generate=generate)
    rows = [dict(image=i, text="?", label="no") for i in range(at_once + 1)]
    right, _ = accuracy.right_or_wrong(vlm, rows, {"all": [keep_all]})
    assert sizes[::2] == [at_once, 1], "pictures"
    assert sizes[1::2] == [at_once, 1], "questions"
    assert right["all"] == [1] * (at_once + 1)


def test_each_choice_keeps_its_own_tokens_and_a_way_is_the_mean_of_its_choices(
        tmp_path, monkeypatch):
    """Two questions about the first picture and one about the second; -1 stands for no token."""
    class Answers:
        tokens, processor = 9, SimpleNamespace(image_processor=None)

        def inputs(self, pictures, texts):
            return {}

        def encode(self, inputs):
            return torch.arange(2.0).view(2, 1, 1).expand(2, 9, 4)  # 0 and 1, the picture's number

        def generate(self, inputs, X, keep, **options):
            seen.append((X[:, 0, 0].tolist(), None if keep is None else keep.tolist()))
            if keep is None:
                return 3 * ["right"]
            return ["right" if few else "wrong" for few in (keep < 0).any(1)]

    few = torch.tensor([[-1, 3], [1, 2]])
    ways = {"all": [keep_all], "two": [lambda X, inputs: few, lambda X, inputs: few.flip(0)]}
    paths, seen = save_scenes(tmp_path)[:2], []
    labels = "right", "wrong", "right"
    rows = [dict(image=paths[i // 2], text="?", label=label) for i, label in enumerate(labels)]
    right, kept = accuracy.right_or_wrong(Answers(), rows, ways)
    assert seen == [
        ([0, 0, 1], None),
        ([0, 0, 1], [[-1, 3], [-1, 3], [1, 2]]),
        ([0, 0, 1], [[1, 2], [1, 2], [-1, 3]]),
    ]
    assert right == {"all": [1, 0, 1], "two": [0.5, 0.5, 0.5]}
    rows = [row | {"label": "yes"} for row in rows]  # right has no "no" in it, which is a yes
    assert accuracy.right_or_wrong(Answers(), rows, ways)[0]["all"] == [1, 1, 1]
    assert kept == {"all": [9, 9, 9], "two": [1.5, 1.5, 1.5]}


def test_the_rows_of_the_table_choose_by_their_names(vlm, features, shipped_pruner, monkeypatch):
    def right_or_wrong(vlm, rows, ways):
        choices.update(ways)
        return {way: [1.0] for way in ways}, {way: [9] for way in ways}

    choices, rows = {}, [dict(image=0, category="a")]
    monkeypatch.setattr(accuracy, "right_or_wrong", right_or_wrong)
    scorer, settings = shipped_pruner
    accuracy.accuracy_table(vlm, scorer, settings, rows, [Budget(9)], seeds=1, others=True)
    X = features[:3].float()
    scores = scorer(X)
    highest, spread = select(scores, 9), select(distinct(scores, X), 9)
    for way, keep in {
        "scorer 9": highest,  # as this pruner was trained
        "scorer, distinct 9": spread,
        "norm 9": criteria.feature_norm(X, 9),
        "coverage 9": criteria.coverage(X, 9),
        "blind": torch.full((3, 1), -1),
    }.items():
        choose, = choices[way]
        assert choose(X, {}).equal(keep), way
    assert not highest.equal(spread)
    choose, = choices["all 144"]
    assert choose(X, {}) is None


def test_retention_is_a_mean_of_ratios():
    full = {"a": 1.0, "b": 0.5}
    pruned = {"a": 0.5, "b": 0.5}
    assert accuracy.retention(pruned, full) == 75  # of means it would be 66.7

    full = {"a": 0.5, "b": 0.0}  # b: what the full model never gets right has no ratio
    assert accuracy.retention({"a": 0.25, "b": 0.0}, full) == 50
    assert accuracy.retention({"a": 0.25, "b": 0.5}, full) == 50


def test_the_interval_of_retention_is_over_images():
    """400 images with five questions each, which succeed or fail together."""
    rows = []
    for image in range(400):
        rows += [dict(image=image, category=category) for category in "abcde"]
    full = [1.0] * 2000
    assert accuracy.bootstrap(full, full, rows) == (100, 100)

    pruned = [1.0] * 1600 + [0.0] * 400
    half_width = 100 * 1.96 * (0.8 * 0.2 / 400) ** 0.5  # binomial
    interval = accuracy.bootstrap(pruned, full, rows)
    assert interval == pytest.approx((80 - half_width, 80 + half_width), abs=0.5)


def test_each_row_of_the_table_has_its_own_interval_and_ratios(vlm, monkeypatch, capsys):
    """400 pictures with two questions each, a and b. The full model answers every a and half of
    the b right. With 16 random tokens it answers four fifths of the a (those of the first pictures)
    and half of the b: the ratio is (80 % + 100 %) / 2; of means it would be 86.7 %."""
    rows = []
    for image in range(400):
        rows += [dict(image=image, category=category) for category in "ab"]
    full = [1.0, 0.0, 1.0, 1.0] * 200
    pruned = list(full)
    pruned[640::2] = [0.0] * 80

    def right_or_wrong(vlm, rows, ways):
        right = {name: full for name in ways}
        right["random 16"] = pruned
        return right, {name: [144 if name == "all 144" else 16] * 800 for name in ways}

    monkeypatch.setattr(accuracy, "right_or_wrong", right_or_wrong)
    settings = {"choose": "diversity", "keep": "16"}
    table = accuracy.accuracy_table(vlm, None, settings, rows, [Budget(16)])
    assert table["random 16"] == {"a": 0.8, "b": 0.5}
    assert table["all 144"] == {"a": 1.0, "b": 0.5}
    assert {"diversity 16", "uniform 16", "blind"} <= set(table)
    assert not any("scorer" in name for name in table)

    printed = {}
    for line in capsys.readouterr().out.splitlines():
        name = line.split("  ")[0].strip()
        printed[name] = line.split()
    assert printed["all 144"][-2:] == ["100.0", "100.0–100.0"]
    _, _, kept, *_, ratio, interval = printed["random 16"]
    assert kept == "16.0"
    assert ratio == "90.0"
    low, high = map(float, interval.split("–"))
    half_width = 100 * 1.96 * (0.8 * 0.2 / 400) ** 0.5 / 2  # binomial; the b's ratio is always 1
    assert (low, high) == pytest.approx((90 - half_width, 90 + half_width), abs=0.3)


def test_what_all_tokens_never_answer_right_is_named_as_left_out(vlm, monkeypatch, capsys):
    def right_or_wrong(vlm, rows, ways):
        return {name: [1.0, 0.0] for name in ways}, {name: [16, 16] for name in ways}

    monkeypatch.setattr(accuracy, "right_or_wrong", right_or_wrong)
    rows = [dict(image=0, category=category) for category in "ab"]
    settings = {"choose": "diversity", "keep": "16"}
    accuracy.accuracy_table(vlm, None, settings, rows, [Budget(16)])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "left out of the retention, since all tokens answer none of it right: b"


def test_what_is_no_training_cannot_be_drawn(tmp_path):
    from results import draw
    for content in ("", "[]", "{}", '{"step": 0}'):
        (tmp_path / "log.jsonl").write_text(content)
        complaint("--run .*: its files are not", run, draw.main, "losses", "--run", tmp_path)


def test_a_report_names_a_broken_file_and_is_made_of_the_others(tmp_path):
    from results import study
    arguments = (study.main, "report", "--to", tmp_path)
    for path in (ROOT / "results").glob("*.json"):
        shutil.copy(path, tmp_path)
    broken = tmp_path / "accuracy.json"
    for content in ("{", "[]", "{}", '{"accuracy": {}}', '{"accuracy": 3}'):
        broken.write_text(content)
        complaint("accuracy.json: holds no", run, *arguments)
    assert not (tmp_path / "RESULTS.md").exists()
    broken.unlink()
    run(*arguments)
    assert "not measured" in (tmp_path / "RESULTS.md").read_text()
    (tmp_path / "objects.json").write_text("my own")
    complaint("^--to .*objects.json: is there", run, study.main, "objects", "--to", tmp_path)


@pytest.mark.parametrize("name", [
    "eval.accuracy", "eval.lmms", "eval.serve", "results.study", "results.draw"])
def test_a_script_in_a_folder_says_how_to_start_it(name):
    script = ROOT / (name.replace(".", "/") + ".py")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"python -m {name}" in result.stderr


class FakeClock:
    """In place of the module time: it moves only when a part of a model spends time."""
    now = 0.0  # seconds

    def perf_counter(self):
        return self.now

    def spend(self, ms):
        self.now += ms / 1000


class Output(dict):
    logits = torch.zeros(1, 1, 5)


class ModelOfKnownTimes:
    READING = {1: 10, 200: 100, 80: 40}  # ms by how many tokens are read at once
    prepared = staticmethod(contextlib.nullcontext)

    def __init__(self, clock, L, choosing):
        self.clock, self.L, self.choosing = clock, L, choosing

    def encode(self, inputs):
        self.clock.spend(20)

    def choose(self, X):
        self.clock.spend(self.choosing)

    def embed(self, inputs, X, keep):
        self.clock.spend(1)
        ones = torch.ones(1, self.L, dtype=torch.long)
        return {"inputs_embeds": ones, "attention_mask": ones, "position_ids": ones}

    def model(self, inputs_embeds=None, input_ids=None, **options):
        tokens = inputs_embeds if input_ids is None else input_ids
        self.clock.spend(self.READING[tokens.shape[1]])
        return Output({infer.CACHE: None})


def test_stages_answers_and_ratios_of_bench_by_hand(monkeypatch):
    def answering(L, choosing):
        model = ModelOfKnownTimes(clock, L, choosing)
        return functools.partial(bench.answer_once, model, model.choose, {}, [1, 8, 32])

    def medians(row):
        return {stage: times["median"] for stage, times in found[row].items()}

    clock = FakeClock()
    monkeypatch.setattr(bench, "time", clock)
    rows = {"all": answering(200, 0), "few": answering(80, 3)}
    found = bench.in_turn(rows, 3, "cpu")
    assert medians("all") == pytest.approx({
        "encode": 20,
        "choose": 0,
        "project": 1,
        "prefill": 100,
        "first": 20 + 1 + 100,
        "decode": 10,
        "answer 1": 121,
        "answer 8": 121 + 7 * 10,
        "answer 32": 121 + 31 * 10,
    })
    assert medians("few") == pytest.approx({
        "encode": 20,
        "choose": 3,
        "project": 1,
        "prefill": 40,
        "first": 20 + 3 + 1 + 40,
        "decode": 10,
        "answer 1": 64,
        "answer 8": 64 + 7 * 10,
        "answer 32": 64 + 31 * 10,
    })
    assert bench.compared(found["few"], found["all"]) == pytest.approx({
        "prefill ×": 2.5,
        "first ×": 121 / 64,
        "decode ×": 1,
        "answer 1 ×": 121 / 64,
        "answer 8 ×": 191 / 134,
        "answer 32 ×": 431 / 374,
        "choose / prefill": 0.075,
    })


def test_medians_and_percentiles_are_of_the_passes_after_two_warm_up():
    """Eleven passes: 1 to 10 ms, and one of 1,000 ms, which would move a mean."""
    ms = iter([5000, 4000, 1000, 7, 2, 9, 4, 6, 3, 8, 5, 10, 1])
    found = bench.in_turn({"row": lambda clock: {"prefill": next(ms)}}, 11, "cpu")
    assert found == {"row": {"prefill": {"median": 6, "p10": 2, "p90": 10}}}


def test_a_gpus_clock_is_read_when_the_gpu_is_through(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.ms = next(ms)

        def elapsed_time(self, end):
            assert waited, "an event that is still to come has no time"
            return end.ms - self.ms

    ms, waited = iter([5, 25, 125]), []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    clock = bench.Clock("cuda")
    clock.mark("encode")
    clock.mark("prefill")
    assert clock.read() == {"start": 0, "encode": 20, "prefill": 120}


def gradients(*modules):
    """Copies of the gradients of all parameters; they are set to zero."""
    copies = []
    for module in modules:
        copies += [p.grad.clone() for p in module.parameters()]
        module.zero_grad()
    return copies


def test_the_training_step_of_bench_is_that_of_train_and_its_share_by_hand(vlm):
    at = {"start": 0, "encoder": 20, "scorer": 24, "soft top-K": 25, "gate": 26, "denoiser": 28,
          "LLM": 108, "our backward": 112}
    marks = ["start"]
    clock = SimpleNamespace(mark=marks.append, read=at.copy)
    scorer, denoiser = Scorer(128), Denoiser(128)
    inputs = vlm.inputs(SCENES, QUESTIONS, CAPTIONS)
    mean, L = whitening(vlm.encode(inputs))

    torch.manual_seed(1)
    times = bench.train_once(vlm, scorer, denoiser, mean, L, inputs, 16, clock)
    ours = gradients(scorer, denoiser)
    assert marks == list(at)
    assert times["our share"] == pytest.approx(12 / 100)

    torch.manual_seed(1)
    noise = torch.randn(3, 144, 128)
    loss, _ = train.forward(
        vlm, scorer, denoiser, (mean, L), inputs, noise, Budget(16), 0.5)
    loss.backward()
    close(ours, gradients(scorer, denoiser), atol=1e-7)


def test_bench_chooses_by_the_class_tokens_attention_in_the_layer_of_the_features(
        vlm, monkeypatch):
    def spy(vlm, inputs, hidden):
        chosen_by.append(criteria.cls_attention(vlm, inputs, hidden))
        return chosen_by[0]

    chosen_by, inputs = [], vlm.inputs(SCENES, QUESTIONS)
    monkeypatch.setattr(bench, "cls_attention", spy)
    times = bench.choose_once(vlm, Scorer(128), inputs, 9, bench.Clock("cpu"))
    assert {"CLS", "pooling", "scorer, distinct", "scorer, top"} <= set(times)
    close(chosen_by[0], criteria.cls_attention(vlm, inputs), atol=1e-6)


def test_bench_has_a_row_for_each_way_batch_and_count(tmp_path, capsys):
    path = tmp_path / "speed.json"
    counts = "--keep 36 --batch 1 2 --words 3 4 --training 2 --repeats 1 --graphs".split()
    run(bench.main, "--model", TINY, "--device", "cpu", *counts, "--json", path)
    rows = json.loads(path.read_text())["speed"]["rows"]
    answers, choosing, training = rows[:8], rows[8:10], rows[10]
    assert len(rows) == 11

    found = [(row["batch"], row["tokens"], row["way"]) for row in answers]
    assert found == list(itertools.product((1, 2), (144, 36), ("eager", "graphs")))
    for row in answers:
        for stage in ("encode", "prefill", "first", "decode", "answer 3", "answer 4"):
            assert row[stage]["median"] > 0
    assert rows[4]["TFLOPs"] == pytest.approx(2 * rows[0]["TFLOPs"], rel=1e-4)
    ratio = rows[0]["prefill"]["median"] / rows[2]["prefill"]["median"]  # all and 36 tokens, eager
    assert rows[2]["prefill ×"] == pytest.approx(ratio, rel=1e-3)

    names = set("random norm diversity DPP coverage uniform pooling CLS".split())
    names |= {"scorer, top", "scorer, distinct"}
    for row in choosing:
        assert row["way"] == "choosing"
        assert names < row.keys()
    assert training["way"] == "training"
    assert training["our share"]["median"] > 0
    assert "choosing alone" in capsys.readouterr().out


def test_flops_are_counted_of_pictures_and_text_where_nothing_runs(tmp_path, monkeypatch):
    """A picture of 672 x 672 has 42 x 42 tokens of this tiny Qwen, and half of them stay."""
    monkeypatch.setitem(architectures.RANDOM, "tiny", TINY_CONFIGS["qwen2_5_vl"])
    path = tmp_path / "flops.json"
    run(bench.main, "--model", "random:tiny", "--device", "meta", "--keep", "50%", "--json", path)
    rows = json.loads(path.read_text())["speed"]["rows"]
    assert [row["tokens"] for row in rows] == [1764, 882]
    tiny_vlm = load("random:tiny")
    inputs = tiny_vlm.dummy_inputs(1, 95)
    X = tiny_vlm.encode(inputs)
    for row in rows:
        keep = torch.arange(row["tokens"])[None]
        _, flops = infer.prefill_cost(tiny_vlm, inputs, X, keep)  # this one computes
        assert row["TFLOPs"] == pytest.approx(flops / 1e12, rel=1e-4)


def test_calls_are_counted_but_not_views():
    with Calls() as every, bench.Calls() as calls:
        x = torch.ones(3).view(3, 1).expand(3, 4)
        (x + x).t()
    assert calls.calls == 2  # ones and +
    assert every.count == 5


def test_launches_are_counted_where_there_is_no_gpu(capsys):
    run(bench.main, "--count", "--keep", "11.1%", "--words", 2)
    lines = capsys.readouterr().out.splitlines()
    rows = [re.split(r"  +", line) for line in lines if line.startswith(("576 ", "64 "))]
    all_eager, all_graphs, eager, graphs = rows
    assert all_eager[4] == all_graphs[4] == "0", "nothing is to be chosen of all tokens"
    for column in (6, 8):  # prefill, one further token
        assert int(eager[column]) > 1000
        assert int(graphs[column]) < 10


# --- CUDA graphs, emulated: calls of torch in place of kernels ------------------------------------

class Tape(TorchDispatchMode):
    """Stands for a CUDA graph, which repeats its kernels on the same memory but never the Python
    between them. What a tape repeats is calls of torch."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        options = kwargs or {}
        result = function(*args, **options)
        self.calls.append((function, args, options, result))
        return result

    def replay(self):
        for function, args, options, result in self.calls:
            again = function(*args, **options)
            for old, new in zip(tree_leaves(result), tree_leaves(again)):
                if not torch.is_tensor(old):
                    continue
                same_memory = old.data_ptr() == new.data_ptr()
                if not same_memory:  # neither a view nor in place
                    old.copy_(new)


class Taped(Graphed):
    device = "cpu"

    def record(self, static):
        for _ in range(2):
            self.fn(*static)
        with Tape() as tape:
            results = self.fn(*static)
        return tape.replay, results


class Refused(Taped):
    """A GPU on which nothing can be recorded."""

    def record(self, static):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")


class Stale(Taped):
    """A replay that computes nothing: the results stay those of the recording."""

    def record(self, static):
        def replay():
            pass

        return replay, self.fn(*static)


def endless(vlm, monkeypatch):
    """Answers go on, since short ones would hide a wrong cache: no token ends them."""
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", VOCAB + 99)


def check_answers_by_graphs(fast, inputs, X, keep, monkeypatch):
    vlm = fast.vlm
    assert fast.generate(inputs, X, keep) == vlm.generate(inputs, X, keep)
    with monkeypatch.context() as patch:
        endless(vlm, patch)
        assert fast.answer(inputs, X, keep, 24) == vlm.generate(inputs, X, keep, 24)


def visible_slots(fast, inputs, X, monkeypatch):
    """(B, L, slots) bool: which slots of the cache each token of the prompt sees."""
    def next_token(slot, seen, **inputs):
        return seen

    with monkeypatch.context() as patch:
        patch.setattr(fast, "_next", next_token)
        visible, *_ = fast._read(**fast.vlm.embed(inputs, X))
    return visible


def shapes_of(graphed):
    """The shapes of the tensors of each recorded graph."""
    for tensors in graphed.recorded:
        yield [shape for shape, _ in tensors]


@pytest.mark.parametrize("batch", [1, 4])
def test_answers_by_graphs_are_those_without(batch, vlm, tmp_path, monkeypatch):
    scorer, settings = pruner.load_pruner(ROOT / "data/shapes/pruner")
    fast = Graphs(vlm, 256, Taped)
    choose, _ = pruner.chooser(fast, scorer, settings, Budget(16))
    choose_without, _ = pruner.chooser(vlm, scorer, settings, Budget(16))
    rows = questions.read_questions(drawn(tmp_path))[::7][:4]
    encoded = []
    for start in range(0, 4, batch):
        part = rows[start:start + batch]
        pictures = [read_image(row["image"]) for row in part]
        texts = [row["text"] for row in part]
        inputs = vlm.inputs(pictures, texts)
        X = fast.encode(inputs)
        encoded.append((X, vlm.encode(inputs)))

        keep = choose(X, inputs)
        assert keep.equal(choose_without(X, inputs))
        check_answers_by_graphs(fast, inputs, X, None, monkeypatch)
        check_answers_by_graphs(fast, inputs, X, keep, monkeypatch)
        if batch > 1:
            uneven = some(X, inputs)  # another number of tokens in each row
            check_answers_by_graphs(fast, inputs, X, uneven, monkeypatch)
    assert fast.on
    assert fast.compared
    assert len(fast.go_on.recorded) == 1
    assert len(fast.begin.recorded) <= 6
    for _, (_, kept), (_, length), _ in shapes_of(fast.begin):
        assert (length - 144 + kept) % 32 == 0, "few lengths, few graphs"
    for by_graph, without in encoded:
        assert by_graph.equal(without), "the next picture must not overwrite it"
    visible = visible_slots(fast, inputs, X, monkeypatch)
    assert visible.any(-1).all(), "no row of attention may see nothing, padding neither"


def test_answers_by_graphs_are_those_without_in_every_class(backbone, monkeypatch):
    """Graphs go off where a language model needs more than embeddings or has layers without full
    attention, recurrent ones for instance."""
    vlm, _, _ = backbone
    endless(vlm, monkeypatch)
    fast = Graphs(vlm, 256, Taped)
    for scene, text in zip(SCENES, QUESTIONS):
        inputs = vlm.inputs([scene], [text])
        X = fast.encode(inputs)
        for keep in (None, some(X, inputs)):
            assert fast.generate(inputs, X, keep, 24) == vlm.generate(inputs, X, keep, 24)
    model_type = vlm.model.config.model_type
    if model_type in ("qwen3_vl", "qwen3_5", "gemma3", "paligemma"):
        assert not fast.on
    else:
        assert fast.on
        assert fast.compared
        assert len(fast.go_on.recorded) == 1


def first_question(vlm):
    """(inputs, X) of the first scene."""
    inputs = vlm.inputs(SCENES[:1], QUESTIONS[:1])
    return inputs, vlm.encode(inputs)


@pytest.mark.parametrize("kind, words", [
    (Refused, "operation not permitted when"),
    (Stale, "the first answer"),
])
def test_without_working_graphs_answers_are_eager_after_one_line(
        kind, words, vlm, capsys, monkeypatch):
    endless(vlm, monkeypatch)
    inputs, X = first_question(vlm)
    fast = Graphs(vlm, 256, kind)
    for most in (1, 12):
        assert fast.generate(inputs, X, None, most) == vlm.generate(inputs, X, None, most)
    assert fast.encode(inputs).equal(X)
    assert not fast.on
    [line] = capsys.readouterr().err.splitlines()
    assert words in line


def test_an_answer_too_long_for_the_cache_is_not_recorded(vlm, monkeypatch):
    endless(vlm, monkeypatch)
    inputs, X = first_question(vlm)
    fast = Graphs(vlm, 256, Refused)
    fast.generate(inputs, X, None, 200)
    assert fast.on


@torch.no_grad()
def test_with_and_without_graphs_features_that_are_no_numbers_are_refused(vlm, monkeypatch):
    endless(vlm, monkeypatch)
    inputs, X = first_question(vlm)
    broken = X * math.nan
    for fast in (Graphs(vlm, 256, Taped), Graphs(vlm)):
        complaint("finite", fast.generate, inputs, broken)


class Captured(TorchDispatchMode):
    """Refuses what a capture refuses: to wait for the GPU, and numbers that come from the CPU. The
    meta device stands for the GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.__name__
        for call_that_waits in ("_local_scalar_dense", "nonzero", "lift_fresh"):
            assert call_that_waits not in name
        if "index_put" in name:
            value = args[2]
            assert value.dim() > 0, "a number, as in t[rows, j] = 4.0"
        for leaf in tree_leaves((args, kwargs, result)):
            if torch.is_tensor(leaf):
                assert leaf.device.type == "meta", name
        return result


def graphs_on_meta():
    """Graphs of a tiny LLaVA, with a cache as its first, unrecorded calls would set it up."""
    config = AutoConfig.for_model(**LLAVA)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    graphs = Graphs(Llava(model, None, "meta"), 64)
    cache = StaticCache(model.config.get_text_config(), max_cache_len=64)
    cache.early_initialization(2, 2, 16, torch.float32, torch.device("meta"))
    graphs.caches[2] = cache
    return graphs


def mistakes(ranking, rows):
    """Functions that cannot be recorded."""
    def write_a_number():
        ranking[rows, rows] = 4.0

    def add_a_tensor_of_the_cpu():
        return ranking + torch.as_tensor([1.0])

    def index_by_a_mask():
        return ranking[ranking > 0]

    def copy_a_list():
        return torch.tensor([1.0], device="meta")

    return write_a_number, add_a_tensor_of_the_cpu, index_by_a_mask, copy_a_list


@torch.no_grad()
def test_what_is_recorded_neither_waits_nor_copies_from_the_cpu(monkeypatch):
    graphs = graphs_on_meta()
    with torch.device("meta"):
        scorer = Scorer(48)
    inputs = graphs.vlm.dummy_inputs(2, 9)
    ids = inputs["input_ids"]
    mask = inputs["attention_mask"]
    monkeypatch.setattr(torch, "tensor", None)  # a copy from the CPU that the mode does not see
    with Captured():
        X = graphs.vlm.encode(inputs)
        ranking = distinct(scorer(X), X)
        keep = ranking.topk(5).indices
        token, start, position = graphs._begin(X, keep, ids, mask)
        graphs._go_on(token, graphs.slots[:1], start, position + 1)
        for choose in (criteria.max_min_diversity, criteria.coverage, criteria.dpp):
            assert choose(X, 5).shape == (2, 5)
        for mistake in mistakes(ranking, start):
            with pytest.raises((AssertionError, RuntimeError, TypeError)):
                mistake()


def texts_of(path):
    """The answers in a file, in its order."""
    lines = path.read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_infer_answers_the_same_with_graphs(tmp_path, capsys):
    source = drawn(tmp_path)
    path = tmp_path / "answers.jsonl"
    many = ("--questions", source, "--answers", path, "--overwrite", "--batch", 4)
    printed = []
    written = []
    for options in (SHIPPED, (*SHIPPED, "--graphs")):
        run(infer.main, PICTURE, QUESTIONS[1], *options)
        run(infer.main, *many, *options)
        first_line = capsys.readouterr().out.splitlines()[0]
        printed.append(first_line)
        written.append(texts_of(path))
    assert printed[0] == printed[1]
    assert written[0] == written[1]


# --- lmms-eval and vLLM, where they are installed -------------------------------------------------

LMMS_TASK = """
task: drawn
dataset_path: json
dataset_kwargs:
  data_files:
    test: FOLDER/test.jsonl
  cache_dir: FOLDER/cache
test_split: test
output_type: generate_until
doc_to_visual: !function pictures.of
doc_to_text: "<image>{{text}}"
doc_to_target: label
generation_kwargs:
  max_new_tokens: 128
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
LMMS_PICTURES = """
from PIL import Image

def of(document):
    return [Image.open("FOLDER/" + document["image"])]
"""


@pytest.fixture
def lmms_module(monkeypatch):
    """eval.lmms on a stand-in for lmms-eval, which need not be installed."""
    for name in ("", ".api", ".api.model", ".models", ".models.registry_v2", ".tasks", ".utils"):
        monkeypatch.setitem(sys.modules, "lmms_eval" + name, mock.MagicMock())
    sys.modules["lmms_eval.api.model"].lmms = type("lmms", (), {})
    monkeypatch.delitem(sys.modules, "eval.lmms", raising=False)
    yield importlib.import_module("eval.lmms")
    sys.modules.pop("eval.lmms")


def pruned_for_benchmarks(lmms_module, documents):
    """The model as lmms-eval uses it; each document is a list of pictures."""
    model = lmms_module.Pruned(
        keep="16", batch_size="4", pruner=ROOT / "data/shapes/pruner", device="cpu")
    model.task_dict = {"task": {"test": documents}}
    return model


def benchmark_request(number, text, **options):
    """A question about the document of this number, as lmms-eval asks it."""
    def pictures_of(document):
        return document

    arguments = (text, options, pictures_of, number, "task", "test")
    return SimpleNamespace(args=arguments, task_name="task")


def test_benchmarks_are_answered_in_their_order_whatever_the_batches(lmms_module):
    documents = [[SCENES[i % 3].convert("RGBA")] for i in range(12)]
    model = pruned_for_benchmarks(lmms_module, documents)
    vlm = model.vlm
    texts = [QUESTIONS[i // 2 % 3] for i in range(12)]
    limits = [None, 3, 128, 3, 1, None, 1, 3, 3, 3, 128, 1]
    requests = []
    for i, limit in enumerate(limits):
        requests.append(benchmark_request(i, f"<image>\n{texts[i]}", max_new_tokens=limit))

    batches = [part for part, _ in model.batches(requests)]
    assert sorted(itertools.chain(*batches)) == list(range(12))
    assert max(len(part) for part in batches) == 4

    results = model.generate_until(requests)
    assert len(results) == 12
    for i, (answer, counts) in enumerate(results):
        inputs = vlm.inputs([SCENES[i % 3]], [texts[i]])
        X = vlm.encode(inputs)
        keep = model.choose(X, inputs)
        [alone] = vlm.generate(inputs, X, keep, limits[i] or 128)
        assert answer == alone
        assert counts["input_tokens"] == inputs["input_ids"].shape[1] - 144 + 16
        written = vlm.processor.tokenizer(answer, add_special_tokens=False)
        assert counts["output_tokens"] == len(written.input_ids)


def test_a_benchmarks_picture_is_read_as_infer_reads_it(lmms_module):
    transparent = Image.new("RGBA", (2, 1))
    model = pruned_for_benchmarks(lmms_module, [[transparent]])
    picture, _ = model.question(benchmark_request(0, "?"))
    assert picture.getcolors() == [(2, WHITE)]


def test_benchmarks_that_are_not_greedy_and_about_one_picture_are_refused(lmms_module):
    one_picture = [SCENES[0].convert("RGBA")]
    two_pictures = [SCENES[0], SCENES[1]]
    model = pruned_for_benchmarks(lmms_module, [one_picture, two_pictures, []])
    requests = [
        benchmark_request(0, "?", temperature=0.5),
        benchmark_request(0, "?", num_beams=3),
        benchmark_request(1, "?"),
        benchmark_request(2, "?"),
    ]
    for request in requests:
        words = r"task, document \d: .*one picture, and greedy"
        complaint(words, model.generate_until, [request])
    complaint("likelihoods", model.loglikelihood, [benchmark_request(0, "?")])


def test_benchmarks_are_answered_without_a_pruner_too(lmms_module, vlm):
    model = lmms_module.Pruned(keep="9", choose="diversity", device="cpu")
    inputs = vlm.inputs(SCENES[:1], ["?"])
    X = vlm.encode(inputs)
    assert model.choose(X, inputs).equal(criteria.max_min_diversity(X, 9))


def test_lmms_eval_gets_the_answers_of_infer(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("lmms_eval")
    from eval.lmms import Pruned, TaskManager, evaluator
    path = tmp_path / "answers.jsonl"
    run(infer.main, "--questions", drawn(tmp_path), "--answers", path, *SHIPPED)

    task_files = {"drawn.yaml": LMMS_TASK, "pictures.py": LMMS_PICTURES}
    for name, content in task_files.items():
        (tmp_path / name).write_text(content.replace("FOLDER", str(tmp_path)))
    model = Pruned.create_from_arg_string(
        f"pruner={ROOT}/data/shapes/pruner,keep=16,device=cpu,batch_size=7")
    manager = TaskManager(include_path=str(tmp_path))
    results = evaluator.simple_evaluate(model=model, tasks=["drawn"], task_manager=manager)
    samples = results["samples"]["drawn"]
    samples.sort(key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in samples] == texts_of(path)
    for sample in samples:
        words = sample["token_counts"][0]["input_tokens"] - 16
        assert 5 < words < 60


class Engine:
    """The parts of vLLM's own classes that the plugin calls, here without arithmetic."""

    def embed_multimodal(self, X):
        return X

    def embed_input_ids(self, input_ids, Z, is_multimodal):
        return Z

    def forward(self, input_ids, positions):
        return positions

    def _parse_and_validate_image_input(self, X):
        return X

    def _process_image_pixels(self, X):
        return X

    def multi_modal_projector(self, X):
        return X + 0.5


FULL_PROMPT = [1, 1, 1] + 15 * [VOCAB] + [1, 1] + 8 * [VOCAB] + [1, 1]  # with two pictures
KEPT_BY_COUNT = {3: [0, 7, 14], 5: [1, 2, 5, 6, 7]}  # of the first picture and of the second


def tokens_that_stay(visual):
    """(L,) bool: what a pruned prompt keeps of the full one, whose visual tokens are marked."""
    places = visual.nonzero().flatten()  # of the 15 + 8 visual tokens
    first, second = KEPT_BY_COUNT.values()
    kept = first + [15 + i for i in second]
    stays = ~visual
    stays[places[kept]] = True
    return stays


def full_positions(kind, grids):
    """Positions (…, L) of the full prompt in the stock model; grids: rows, columns of tokens."""
    if kind == "llava":
        return torch.arange(len(FULL_PROMPT))
    config = AutoConfig.for_model(**TINY_CONFIGS[kind])
    with torch.device("meta"):
        stock_model = AutoModelForImageTextToText.from_config(config)
    ids = torch.tensor([FULL_PROMPT])
    visual = ids == VOCAB
    patches = [[1, 2 * rows, 2 * columns] for rows, columns in grids]
    positions, _ = stock_model.model.get_rope_index(
        ids, visual.int(), torch.tensor(patches), attention_mask=torch.ones(ids.shape))
    return positions[:, 0]  # (3, L)


def pruned_engine(mixin, monkeypatch):
    """A model on the second of two GPUs. It would choose other tokens than the first, whose choice
    counts."""
    def choose(X, K):
        return torch.arange(K)

    def broadcast(choice, source):
        return torch.tensor(KEPT_BY_COUNT[len(choice)])

    group = SimpleNamespace(broadcast=broadcast)
    parallel_state = SimpleNamespace(get_tp_group=lambda: group)
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", parallel_state)
    engine_class = type("Model", (mixin, Engine), {})
    model = engine_class.__new__(engine_class)  # without __init__, which needs vLLM
    model.choose = choose
    model.steps = torch.zeros(3, 9, dtype=torch.long)
    model.places = torch.zeros(3, 9, dtype=torch.long)
    return model


def picture_in_a_prompt(offset, grid):
    """As vLLM describes it to a model."""
    return SimpleNamespace(
        mm_position=SimpleNamespace(offset=offset),
        data={"grid": SimpleNamespace(data=grid)})


def check_in_chunks(model, Z, visual, begins, expected):
    """Positions must be right, too, when the prompt is read in chunks, here of four tokens."""
    number = visual.cumsum(0) - 1  # of a visual token among those kept
    for start in range(0, len(visual), 4):
        chunk = slice(start, start + 4)
        is_visual = visual[chunk]
        ids = torch.ones(len(is_visual))
        part = Z[number[chunk][is_visual]]
        [embeddings] = model.embed_input_ids(ids, [part], is_multimodal=is_visual)
        assert embeddings.equal(part[:, :1])
        positions = model.forward(None, begins[:, chunk])
        assert positions.equal(expected[..., chunk])


@pytest.mark.parametrize("kind, mixin, grids", [
    ("llava", serve.PrunedLlava, [(1, 15), (1, 8)]),
    ("qwen2_5_vl", serve.Pruned, [(3, 5), (4, 2)]),
])
def test_in_an_engine_kept_tokens_stand_where_they_stood(kind, mixin, grids, monkeypatch):
    visual = torch.tensor(FULL_PROMPT) == VOCAB
    stays = tokens_that_stay(visual)
    L = stays.sum().item()
    positions = full_positions(kind, grids)

    model = pruned_engine(mixin, monkeypatch)
    first = torch.arange(15.0)[:, None]
    second = torch.arange(100.0, 108.0)[:, None]
    grid = torch.tensor([[3, *grids[0]], [5, *grids[1]]])
    Z = torch.cat(model.embed_multimodal(grid=grid, X=[first, second]))  # (8, 1 + 4)
    projected = 0.5 if kind == "llava" else 0.0
    assert (Z[:, 0] - projected).tolist() == [0, 7, 14, 101, 102, 105, 106, 107]

    # their order must not matter
    pictures = [picture_in_a_prompt(8, grid[1]), picture_in_a_prompt(3, grid[0])]
    begins, ahead = model.get_mrope_input_positions([1] * L, pictures)
    assert ahead == positions.max() + 1 - L  # a further token's position, less its number
    check_in_chunks(model, Z, visual[stays], begins, positions[..., stays])


@pytest.mark.parametrize("choose", ["distinct", "top", "coverage"])
def test_an_engine_chooses_as_infer_does(choose, vlm, features):
    X = features[:3].float()
    scorer, settings = pruner.load_pruner(ROOT / "data/shapes/pruner")
    config = AutoConfig.from_pretrained(TINY)
    config.choose, config.pruner = choose, None
    if choose in pruner.RANKINGS:
        config.pruner = settings["folder"]
    choice, _ = pruner.chooser(vlm, scorer, settings, Budget(9), choose=choose)
    in_an_engine = serve.load_choice(config)
    for x, keep in zip(X, choice(X, {})):
        assert in_an_engine(x, 9).equal(keep)


@pytest.mark.parametrize("kind", [
    "llava", "llava, full", "llava, SigLIP", "qwen2_5_vl", "qwen3_vl"])
def test_an_engine_knows_width_and_number_of_tokens_as_the_model_does(kind):
    config = copy.deepcopy(TINY_CONFIGS[kind])
    if kind == "llava, full":
        config["vision_feature_layer"] = -2  # vLLM takes one layer
    config = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    vlm = (Llava if kind.startswith("llava") else VLM)(model, None, kind)
    assert serve.width_of(config) == vlm.width
    assert serve.tokens_of(config) == vlm.tokens


def test_a_prompt_gets_as_many_places_as_its_picture_keeps(monkeypatch):
    processing = SimpleNamespace(PromptReplacement=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm.multimodal.processing", processing)
    processor = serve.PrunedProcessor()
    processor.info = SimpleNamespace(get_hf_config=lambda: SimpleNamespace(image_token_id=7))
    grids = torch.tensor([[2, 1, 9], [3, 4, 5]])
    items = [{"grid": SimpleNamespace(data=grid)} for grid in grids]
    update, = processor._get_prompt_updates(None, {}, {"image": items})
    assert update.target == [7]
    assert [update.replacement(i) for i in range(2)] == [2 * [7], 3 * [7]]


def test_a_served_model_has_rows_for_positions_beyond_its_context_and_pictures_alone(monkeypatch):
    """An answer may begin behind the context by as many positions as tokens were dropped."""
    class Engine:
        def __init__(self, vllm_config, prefix):
            rows.append(text.max_position_embeddings)

        def get_encoder_cudagraph_config(self):
            return SimpleNamespace(modalities=["image"])

        def get_supported_mm_limits(self):
            return {"image": 1, "video": 3}

    rows, text = [], SimpleNamespace(max_position_embeddings=1024)
    config = SimpleNamespace(get_text_config=lambda: text)
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config, max_model_len=512),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64))
    monkeypatch.setattr(serve, "refuse", lambda vllm_config: None)
    monkeypatch.setattr(serve, "load_choice", lambda config: None)
    model = type("Model", (serve.Pruned, Engine), {})(vllm_config=vllm_config)
    assert rows == [1024 + 512]
    assert text.max_position_embeddings == 1024
    assert model.get_encoder_cudagraph_config().modalities == []
    info = type("Info", (serve.PrunedInfo, Engine), {"__init__": lambda self: None})()
    assert info.get_supported_mm_limits() == {"image": None, "video": 0}


@pytest.mark.parametrize("flag, part, field, value", [
    ("--pipeline-parallel-size", "parallel_config", "pipeline_parallel_size", 2),
    ("--enable-dbo", "parallel_config", "enable_dbo", True),
    ("--enable-mm-embeds", "multimodal_config", "enable_mm_embeds", True),
    ("--video-pruning-rate", "multimodal_config", "is_multimodal_pruning_enabled", lambda: True),
])
def test_flags_that_would_lose_the_places_of_tokens_are_refused(flag, part, field, value):
    parallel = SimpleNamespace(pipeline_parallel_size=1, enable_dbo=False)
    pictures = SimpleNamespace(enable_mm_embeds=False, is_multimodal_pruning_enabled=lambda: False)
    model = SimpleNamespace(multimodal_config=pictures)
    config = SimpleNamespace(parallel_config=parallel, model_config=model)
    serve.refuse(config)
    setattr({"parallel_config": parallel, "multimodal_config": pictures}[part], field, value)
    with pytest.raises(ValueError, match=f"{flag}: "):
        serve.refuse(config)


class EngineProcessor:
    """The parts of vLLM's own processors that the plugin calls; what comes in goes out."""

    def _apply_hf_processor_main(self, data, options):
        assert options == {"size": 3}, "what is not the plugin's goes on to vLLM"
        return dict(data)

    def apply(self, inputs, timing_ctx):
        return inputs


def pruned_processor(kind):
    """The processor of a server that was started with --keep 16."""
    if kind == "llava":
        config = AutoConfig.from_pretrained(TINY)
    else:
        config = AutoConfig.for_model(**TINY_CONFIGS[kind])
    config.keep = "16"
    bases = (serve.PrunedProcessor, EngineProcessor)
    processor = type("Processor", bases, {"further": {}})()
    processor.info = SimpleNamespace(get_hf_config=lambda: config)
    return processor


TWO_PICTURES = {"image_grid_thw": torch.tensor([[1, 6, 10], [1, 4, 4]])}  # 15 and 4 tokens


@pytest.mark.parametrize("kind, data, keep, grids", [
    ("qwen2_5_vl", TWO_PICTURES, "20%", [[3, 3, 5], [1, 2, 2]]),
    ("qwen2_5_vl", TWO_PICTURES, None, [[15, 3, 5], [4, 2, 2]]),
    ("llava", {"pixel_values": [0, 0]}, 9, [[9, 1, 144], [9, 1, 144]]),
    ("llava", {"pixel_values": [0]}, None, [[16, 1, 144]]),
])
def test_an_engine_lays_out_the_budget_of_the_request(kind, data, keep, grids):
    processor = pruned_processor(kind)
    options = {"size": 3}
    if keep is not None:
        options["keep"] = keep
    layout = processor._apply_hf_processor_main(data, options)
    assert layout["grid"].tolist() == grids
    assert processor._apply_hf_processor_main({}, options) == {}


def test_an_engine_keeps_no_more_tokens_than_a_picture_has():
    processor = pruned_processor("llava")
    with pytest.raises(ValueError, match="144"):
        processor._apply_hf_processor_main({"pixel_values": [0]}, {"keep": 145})


def test_an_engine_takes_no_more_positions_than_the_model_has():
    processor = pruned_processor("llava")
    grid = SimpleNamespace(data=torch.tensor([16, 2, 144]))  # the longer side counts
    longest = [1] * (1024 - 2 * (144 - 16))  # the full prompt has 1024 positions
    too_long = longest + [1]
    for item in ({"grid": grid}, None):  # the second time vLLM has the picture in its cache
        pictures = {"mm_hashes": {"image": ["a", "a"]}, "mm_kwargs": {"image": [item, item]}}
        processor.apply({**pictures, "prompt_token_ids": longest}, None)
        with pytest.raises(ValueError, match="1025 positions.* 1024"):
            processor.apply({**pictures, "prompt_token_ids": too_long}, None)


def test_rows_and_columns_survive_half_precision():
    columns = 2500
    places = torch.arange(0, 4_000_000, 997)
    rows_and_columns = [(places // columns).tolist(), (places % columns).tolist()]
    digits = serve.to_digits(places, columns)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = digits.to(dtype)
        assert serve.from_digits(rounded).tolist() == rows_and_columns


SERVE_PRUNED = (TINY, "--pruner", ROOT / "data/shapes/pruner")
SERVE_UNTRAINED = (TINY, "--keep", 16)


@pytest.mark.parametrize("words, argv", [
    ("no budget on average", (*SERVE_PRUNED, "--keep", "~16")),
    ("144 visual tokens", (*SERVE_PRUNED, "--keep", 145)),
    ("with a pruner.*distinct, top", (*SERVE_PRUNED, "--choose", "DPP")),
    ("without a pruner.*uniform", (TINY, "--choose", "top")),
    ("together", (*SERVE_UNTRAINED, "--questions", "q.jsonl")),
    ("--keep '0' is not a budget", (TINY, "--keep", 0)),
    ("^model '': no such", ("",)),
    ("--hf-overrides", (*SERVE_UNTRAINED, "--hf-overrides={}")),
])
def test_flags_that_cannot_be_served_are_refused(words, argv):
    complaint(words, run, serve.main, *argv)


def test_question_files_that_cannot_be_served_are_refused(tmp_path):
    source = tmp_path / "q.jsonl"
    files.write(source, [question()])
    argv = (*SERVE_UNTRAINED, "--questions", source, "--answers")
    complaint("1 or more", run, serve.main, *argv, tmp_path / "a.jsonl", "--batch", 0)
    complaint("file that is read", run, serve.main, *argv, source, "--overwrite")


def test_models_that_cannot_be_served_are_refused(tmp_path):
    def refused(words, changes):
        files.write(tmp_path / "config.json", {**config, **changes})
        complaint(words, run, serve.main, tmp_path, "--pruner", ROOT / "data/shapes/pruner")

    config = json.loads((TINY / "config.json").read_text())
    wider = {**config["vision_config"], "hidden_size": 256}
    refused("is of type llava_next", {"model_type": "llava_next"})
    refused("features 128 wide", {"vision_config": wider})


def test_all_other_flags_of_serve_are_vllms(monkeypatch):
    def command():
        [entry] = [e for e in entry_points(group="vllm.general_plugins") if e.name == "diffprune"]
        plugins.append(entry.load())
        command_lines.append(sys.argv)
        search_paths.append(os.environ["PYTHONPATH"].split(os.pathsep))

    plugins = []
    command_lines = []
    search_paths = []
    vllm_command = SimpleNamespace(main=SimpleNamespace(main=command))
    monkeypatch.setitem(sys.modules, "vllm.entrypoints.cli", vllm_command)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv("PYTHONPATH", "")
    choice = ("--choose", "DPP", "--keep", "25%")
    run(serve.main, TINY, "--port", 8000, *choice, "--max-model-len=512")

    assert plugins == [serve.register]
    [search_path] = search_paths
    assert search_path[1] == str(ROOT)
    [argv] = command_lines
    assert argv[:4] == ["vllm", "serve", str(TINY), "--hf-overrides"]
    assert argv[5:] == ["--port", "8000", "--max-model-len=512"]
    assert json.loads(argv[4]) == {
        "architectures": ["LlavaPruned"],
        "pruner": None,
        "choose": "DPP",
        "keep": "25%",
        "mrope_section": [1, 1, 1],
    }


class Echo:
    """An engine that answers each prompt with the prompt itself."""

    def __init__(self):
        self.requests = []  # (token ids, new tokens at most)

    def generate(self, prompts, limits, use_tqdm):
        outputs = []
        for prompt, limit in zip(prompts, limits):
            ids = prompt["prompt_token_ids"]
            self.requests.append((ids, limit.max_tokens))
            completion = SimpleNamespace(token_ids=ids)
            outputs.append(SimpleNamespace(outputs=[completion]))
        return outputs


def test_an_engine_is_asked_as_infer_asks_and_its_answers_keep_their_order(
        vlm, tmp_path, monkeypatch):
    vllm = SimpleNamespace(SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    rows = questions.read_questions(drawn(tmp_path))
    echo = Echo()
    parts = list(serve.answers(echo, rows, vlm.processor, vlm.model.config, 7, 900))
    assert [len(part) for part in parts] == [7, 7, 7, 7, 2]
    answers = list(itertools.chain(*parts))
    for (i, answer), row, request in zip(answers, rows, echo.requests, strict=True):
        assert rows[i] is row
        assert row["text"] in answer
        assert "<s>" not in answer
        assert "<image>" not in answer
        prompt = vlm.inputs([SCENES[0]], [row["text"]])["input_ids"]
        full = prompt[0].tolist()
        at = full.index(vlm.image_id)
        one_place = full[:at] + full[at + 143:]  # vLLM lays out the others
        assert request == (one_place, min(900, vlm.context - len(full)))


@pytest.mark.parametrize("text", ["a <image>", "star " * 900, "\ud800"])
def test_an_engine_refuses_a_text_that_is_no_question(text, vlm):
    row = {"text": text, "where": "q.jsonl: line 1"}
    complaint("^q.jsonl: line 1: ", serve.prompt_of, row, vlm.processor, vlm.model.config, 9)


def test_a_faulty_question_is_found_before_the_engine_starts(vlm, tmp_path, monkeypatch):
    vllm = SimpleNamespace(SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(serve, "start", None)
    source = tmp_path / "bad.jsonl"
    files.write(source, [question(), question(text="a <image>")])
    args = SimpleNamespace(questions=source, images=PICTURES, model=TINY, max_new_tokens=9)
    complaint(
        "bad.jsonl: line 2: ",
        serve.answer_questions, args, TINY, vlm.model.config, {}, [])


# vLLM's own part: a server for each family, asked over HTTP as anybody would ask it, against stock
# transformers.

QWEN_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
SERVED_VISION = {**QWEN_EYE, "out_hidden_size": 128}
SERVED_TEXT = {
    **LLAMA,
    "vocab_size": VOCAB + 4,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "head_dim": 32,  # vLLM's kernels for CPUs take no smaller heads
    "max_position_embeddings": 2048,
}
SERVED = {  # beside the LLaVA that ships
    "qwen2_5_vl": dict(
        vision_config={
            **SERVED_VISION,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        text_config={
            **SERVED_TEXT,
            "model_type": "qwen2_5_vl_text",
            "rope_parameters": {**MROPE, "mrope_section": [4, 6, 6]},
        },
    ),
    "qwen3_vl": dict(
        vision_config={
            **SERVED_VISION,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 64,
        },
        text_config={
            **SERVED_TEXT,
            "model_type": "qwen3_vl_text",
            "rope_parameters": {
                **MROPE,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
    ),
}


def random_weights(model):
    """Larger weights than usual, so that a wrong token shows in the answer."""
    for name, p in model.named_parameters():
        is_matrix = p.dim() > 1
        if is_matrix or name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.2)
    return model


def save_random_pruner(width, model, folder):
    folder.mkdir()
    files.write(folder / "pruner.json", {
        "model": str(model),
        "width": width,
        "tokens": None,
        "keep": "33%",
        "choose": "distinct",
    })
    scorer = random_weights(Scorer(width))
    files.write(folder / "scorer.safetensors", scorer.state_dict())


def save_qwen_processor(folder):
    special = list(QWEN_TOKENS.values())
    image_token = special[0]
    # without image_token= vLLM would take LLaVA's
    tokenizer = AutoTokenizer.from_pretrained(TINY, image_token=image_token)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = TEMPLATE.replace("<image>", image_token)
    tokenizer.save_pretrained(folder)
    sizes = dict(shortest_edge=256, longest_edge=9216)
    Qwen2VLImageProcessorPil(patch_size=8, size=sizes).save_pretrained(folder)


def model_and_pruner(kind, folder):
    """The folders of a tiny model and of its pruner: the LLaVA that ships, or a random Qwen."""
    if kind == "llava":
        return TINY, ROOT / "data/shapes/pruner"
    ids = {field: VOCAB + i for i, field in enumerate(QWEN_TOKENS)}
    config = AutoConfig.for_model(kind, **ids, **SERVED[kind], tie_word_embeddings=False)
    model = AutoModelForImageTextToText.from_config(config)
    random_weights(model).save_pretrained(folder)
    save_qwen_processor(folder)
    save_random_pruner(serve.width_of(config), folder, folder / "pruner")
    return folder, folder / "pruner"


class Stock:
    """The stock model, which reads full sequences in which the dropped tokens are masked."""

    def __init__(self, folder, trained):
        self.model = AutoModelForImageTextToText.from_pretrained(folder).float().eval()
        self.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.scorer, _ = pruner.load_pruner(trained)
        self.image_id = self.model.config.image_token_id

    def features(self, pixel_values, image_grid_thw=None):
        """X (1, N, d_v): LLaVA's before the projector, the Qwens' as they enter the LLM, with
        deepstack's levels beside them."""
        inner = self.model.model
        if image_grid_thw is None:
            outputs = inner.vision_tower(pixel_values, output_hidden_states=True)
            return outputs.hidden_states[-2][:, 1:]
        outputs = inner.visual(pixel_values, grid_thw=image_grid_thw, return_dict=True)
        levels = getattr(outputs, "deepstack_features", None) or []
        return torch.cat([outputs.pooler_output, *levels], -1)[None]

    def mask_of_picture(self, pixels, keep):
        """(N,): 1 for each token that the pruner keeps, 0 for the others."""
        X = self.features(**pixels)
        N = X.shape[1]
        K = Budget.parse(keep).of(N)
        [places] = select(distinct(self.scorer(X), X), K)
        return torch.zeros(N).index_fill(0, places, 1).long()

    def prompt(self, count, text):
        """Token ids of a question about so many pictures, each of them a single token."""
        content = [{"type": "image"}] * count + [{"type": "text", "text": text}]
        image_token = self.tokenizer.decode([self.image_id])
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=TEMPLATE.replace("<image>", image_token),
            add_generation_prompt=True,
            tokenize=False)
        return self.tokenizer(chat).input_ids

    def positions(self, ids, pixels):
        if "image_grid_thw" not in pixels:
            return torch.arange(ids.shape[1])[None]
        visual = ids == self.image_id
        positions, _ = self.model.model.get_rope_index(
            ids, visual.int(), pixels["image_grid_thw"], attention_mask=torch.ones_like(ids))
        return positions

    def inputs(self, pictures, text, keep):
        """The full sequence; its attention_mask hides the tokens that are dropped."""
        processed = [self.image_processor(p, return_tensors="pt") for p in pictures]
        masks = [self.mask_of_picture(pixels, keep) for pixels in processed]
        counts = (len(mask) for mask in masks)
        row = []
        for i in self.prompt(len(pictures), text):
            repeats = next(counts) if i == self.image_id else 1
            row += [i] * repeats
        ids = torch.tensor([row])
        visual = ids == self.image_id
        mask = torch.ones_like(ids).masked_scatter(visual, torch.cat(masks))
        pixels = {name: torch.cat([p[name] for p in processed]) for name in processed[0]}
        return {
            **pixels,
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": self.positions(ids, pixels),
        }

    @torch.no_grad()
    def answer(self, pictures, text, keep):
        """(token ids of the greedy answer, log-probabilities of the first)."""
        inputs = self.inputs(pictures, text, keep)
        answer = []
        first_scores = None
        while len(answer) < 8 and answer[-1:] != [2]:
            logits = self.model(**inputs, use_cache=False).logits
            scores = logits[0, -1].log_softmax(-1)
            if first_scores is None:
                first_scores = scores
            token = scores.argmax()
            if token == self.image_id:
                break  # random weights may choose it, and cannot read it again
            answer.append(token.item())
            inputs = followed_by(token, inputs)
        return answer, first_scores


def followed_by(token, inputs):
    """The inputs of the next step: the token, (), stands behind all others."""
    positions = inputs["position_ids"]
    position = positions.max() + 1
    position = position.expand_as(positions[..., :1])
    return {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], token.view(1, 1)], 1),
        "attention_mask": F.pad(inputs["attention_mask"], (0, 1), value=1),
        "position_ids": torch.cat([positions, position], -1),
    }


def data_url(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()


def png_url(picture):
    file = io.BytesIO()
    picture.save(file, "png")
    return data_url(file.getvalue())


def post(port, urls, text, **options):
    """(HTTP status, the server's reply or the message of its error)."""
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": text})
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 8,
        "add_special_tokens": True,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "logprobs": True,
        "top_logprobs": 5,
        **options,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["message"]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until_healthy(port, process, log):
    while True:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60)
            return
        except OSError:
            time.sleep(1)


@contextlib.contextmanager
def server(log, *argv):
    """The port of `python -m eval.serve` with these arguments, once it answers."""
    port = free_port()
    arguments = [str(argument) for argument in argv]
    command = [sys.executable, "-m", "eval.serve", *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENGINE_READY_TIMEOUT_S": "1800",
    }
    with open(log, "w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | settings,
            stdout=out, stderr=out, start_new_session=True)
    try:
        wait_until_healthy(port, process, log)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def replies_to(requests, port, keep=None):
    """(status, reply) of each request, (pictures, text): all at once, eight at a time."""
    def reply_to(request):
        pictures, text = request
        urls = [png_url(picture) for picture in pictures]
        return post(port, urls, text, **options)

    options = {}
    if keep:
        options["mm_processor_kwargs"] = {"keep": keep}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(reply_to, requests))


def check_replies(stock_model, requests, port, keep=None):
    """The answers are those of the stock model, and so are the first token's log-probabilities."""
    replies = replies_to(requests, port, keep)
    for request, (status, reply) in zip(requests, replies):
        assert status == 200, reply
        assert reply["usage"]["prompt_tokens"] < 512
        choice = reply["choices"][0]
        answer, first_scores = stock_model.answer(*request, keep or "11.1%")
        assert choice["token_ids"][:len(answer)] == answer
        first_token = choice["logprobs"]["content"][0]
        for best in first_token["top_logprobs"]:
            number = int(best["token"].split(":")[1])
            score = first_scores[number].item()
            assert best["logprob"] == pytest.approx(score, abs=1e-3)


def check_refusals(kind, picture, port):
    def refused(words, urls, **options):
        status, message = post(port, urls, "?", **options)
        assert status == 400
        assert words in message
        assert "\n" not in message

    def refused_budget(words, keep):
        refused(words, [url], mm_processor_kwargs={"keep": keep})

    url = png_url(picture)
    refused_budget("no budget on average", "~10")
    refused_budget("is not a budget", "lots")
    refused_budget("is not a budget", 0)
    refused("Failed to load image", [data_url(b"no picture")])
    if kind == "llava":
        refused("1024", 8 * [url])  # 8 x 144 positions
        refused_budget("144 visual tokens", 145)


SERVER_FLAGS = (
    "--keep", "11.1%",
    "--served-model-name", "tiny",
    "--dtype", "float32",
    "--enforce-eager",
    "--max-model-len", 512,
    "--max-num-batched-tokens", 512,
    "--block-size", 32,
    "--trust-request-mm-kwargs",
)


@pytest.mark.parametrize("kind, flags", [
    ("llava", ()),
    ("qwen2_5_vl", ("--tensor-parallel-size", 2)),
    ("qwen3_vl", ("--long-prefill-token-threshold", 7)),
])
def test_vllm_answers_as_the_stock_model_with_dropped_tokens_masked(kind, flags, tmp_path):
    pytest.importorskip("vllm")
    folder, trained = model_and_pruner(kind, tmp_path)
    stock_model = Stock(folder, trained)
    pictures = []
    for i in range(20):
        scene, _ = shapes.draw_scene(f"test-{i}")
        pictures.append(scene.resize(SIZES[i % 3]))
    about_one = [([pictures[i // 3]], QUESTIONS[i % 3]) for i in range(60)]
    about_two = []
    for i in range(12):
        pair = [pictures[i], pictures[(7 * i + 3) % 20]]
        about_two.append((pair, QUESTIONS[i % 3]))

    argv = (folder, "--pruner", trained, *SERVER_FLAGS, *flags)
    with server(tmp_path / "log", *argv) as port:
        check_replies(stock_model, about_one, port)
        check_replies(stock_model, about_one[:30], port)  # from the caches
        for keep in ("50%", "1", "all", "10"):  # of the same pictures
            check_replies(stock_model, about_one[:9], port, keep)
        check_replies(stock_model, about_two, port)
        check_replies(stock_model, about_two[:6], port, "10")
        check_refusals(kind, pictures[0], port)
        check_replies(stock_model, about_one[:3], port)  # a refusal changes nothing


@pytest.mark.parametrize("keep", ["16", "all"])
def test_vllm_gives_the_answers_of_infer(keep, tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    choice = ("--pruner", ROOT / "data/shapes/pruner", "--keep", keep)
    common = (*choice, "--questions", drawn(tmp_path), "--answers")
    by_infer = tmp_path / "infer.jsonl"
    by_vllm = tmp_path / "vllm.jsonl"
    run(infer.main, *common, by_infer, "--device", "cpu")
    run(serve.main, TINY, *common, by_vllm, "--dtype", "float32", "--enforce-eager")
    assert texts_of(by_vllm) == texts_of(by_infer)
    assert len(texts_of(by_infer)) == 30


# --- results --------------------------------------------------------------------------------------

def test_the_page_of_results_is_what_the_report_makes_of_the_measurements(tmp_path):
    for path in (ROOT / "results").glob("*.json"):
        shutil.copy(path, tmp_path)
    report.report(tmp_path, ROOT / "results/template.md")
    assert (tmp_path / "RESULTS.md").read_text() == (ROOT / "results/RESULTS.md").read_text()


def test_the_report_takes_retention_against_all_tokens_and_names_the_winner():
    """By hand: 16 random tokens keep 0.5 / 1 and 0.3 / 0.5, which is 55 % on average."""
    measured = {
        "all 144": {"a": 1.0, "b": 0.5},
        "random 16": {"a": 0.5, "b": 0.3},
        "diversity 16": {"a": 0.8, "b": 0.4},
        "scorer 16": {"a": 0.9, "b": 0.45},
        "norm 8": {"a": 0.7, "b": 0.35},
        "scorer 8": {"a": 0.7004, "b": 0.35},  # 70.02, which one does not see
    }
    table, verdicts = report.accuracy(measured)
    *_, random_row, diversity_row, scorer_row, _, _ = table.splitlines()
    assert random_row == "| random 16 | 50.0 | 30.0 | 55.0 |"
    assert scorer_row == "| scorer 16 | 90.0 | 45.0 | 90.0 |"
    wins = "The scorer wins at 16: it keeps 90.0 %, and diversity 80.0 %."
    assert verdicts == f"{wins} The scorer does **not** win at 8: it keeps 70.0 %, and norm 70.0 %."


def test_the_report_takes_numbers_from_their_columns():
    losses = {"ours": {"loss": [0.25, 0.5], "seeds": 2.0}}
    table, = report.study({"tables": {"t": losses}, "digits": {"t": 2}})
    assert table.splitlines()[-1] == "| ours | 0.38 (0.25–0.50) | 2.00 |"


def test_the_chart_of_accuracy_shows_retention_by_tokens(monkeypatch):
    def read_json(path, cure):
        return {"accuracy": {
            "all 144": {"a": 1.0, "b": 0.5},
            "scorer 8": {"a": 0.5, "b": 0.5},
            "scorer 16": {"a": 1.0, "b": 0.4},
            "scorer ~16": {"a": 0.9, "b": 0.4},
            "blind": {"a": 0.1, "b": 0.1},
        }}

    def line_chart(series, *labels, **options):
        return series

    monkeypatch.setattr(draw, "read_json", read_json)
    monkeypatch.setattr(draw, "line_chart", line_chart)
    assert draw.accuracy() == {"scorer": [(16, 90.0), (8, 75.0)]}


def test_a_chart_has_more_at_the_top_and_on_the_right_and_stretches_its_axes():
    """Only the first part of each line is seen where the other colours are not."""
    series = {"a": [(1, 1), (10, 1)], "b": [(1, 100), (10, 100)], "c": [(1, 10), (10, 10)]}
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    chart = charts.line_chart(
        series, "x", "y", [1, 10], [1, 100], colors, warp_x=math.log, warp_y=math.log)
    heights = []
    for color in colors:
        column = [chart.getpixel((200, y)) for y in range(chart.height)]
        heights.append(sum(y * (pixel == color) for y, pixel in enumerate(column))
                       / column.count(color))
    bottom, top, middle = heights
    assert top < middle < bottom
    assert middle == pytest.approx((top + bottom) / 2, abs=2), "10 is halfway to 100 in logarithms"


def test_the_losses_of_a_training_are_drawn_under_their_names(tmp_path, monkeypatch):
    def line_chart(series, *labels, **options):
        drawn_lines.update(series)
        return SCENES[0]

    drawn_lines = {}
    rows = [{"step": 0, "deployed_loss": 2.0, "soft_loss": 3.0, "full_loss": 0.5},
            {"step": 8, "deployed_loss": 1.0, "soft_loss": 1.5, "full_loss": 0.5}]
    files.write(tmp_path / "log.jsonl", rows)
    monkeypatch.setattr(draw, "line_chart", line_chart)
    draw.losses(tmp_path)
    assert drawn_lines == {
        "deployed_loss 1.000": [(0, 2.0), (8, 1.0)],
        "soft_loss 1.500": [(0, 3.0), (8, 1.5)],
        "full_loss 0.500": [(0, 0.5), (8, 0.5)],
    }


def test_a_training_is_drawn_with_each_pictures_own_alpha(tmp_path):
    """Of the first picture nothing gets through, of the second all."""
    watched = [str(path) for path in EXAMPLES[:2]]
    frames = [{"step": step, "tau": 0.5, "alpha": [144 * [0.0], 144 * [1.0]]} for step in range(5)]
    files.write(tmp_path / "watched.json", {"images": watched, "frames": frames})
    files.write(tmp_path / "pruner.json", {"model": str(TINY)})
    draw.training(tmp_path)
    with Image.open(tmp_path / "training.gif") as drawing:
        moment = drawing.convert("RGB")
        bars = []
        for number in range(3):  # every second frame, and the bar under it
            drawing.seek(number)
            pixels = [drawing.convert("RGB").getpixel((x, 167)) for x in (20, 180, 190, 360)]
            bars.append([red > green + 100 for red, green, _ in pixels])
    assert bars == [4 * [False], [True, True, False, False], 4 * [True]]
    for i, (path, least, most) in enumerate(((EXAMPLES[0], 40, 255), (EXAMPLES[1], 0, 15))):
        place = moment.crop((10 + 122 * i, 10, 122 + 122 * i, 122))
        picture = read_image(path).resize(place.size)
        differences = [abs(a - b) for a, b in zip(place.tobytes(), picture.tobytes())]
        assert least < sum(differences) / len(differences) < most


def test_the_rule_of_the_test_bed_by_hand(vlm, monkeypatch):
    """All are right with all tokens. What keeps 87 % is 0.1 points above LLaVA's random choice."""
    shares = {"random": 0.87, "diversity": 0.9, "CLS": 0.88, "pooling": 0.5}

    def right_or_wrong(vlm, rows, ways):
        right = {}
        for name in ways:
            share = shares.get(name.split()[0], 1.0)
            right[name] = [1.0] * round(100 * share) + [0.0] * round(100 - 100 * share)
        return right, None

    monkeypatch.setattr(study, "right_or_wrong", right_or_wrong)
    monkeypatch.setattr(study, "embedded", lambda split: 100 * [{"category": "a"}])
    result = study.fidelity(SimpleNamespace(device="cpu", seeds=1))
    rule = {part: row["holds"] for part, row in result["tables"]["rule"].items()}
    yes, no = "yes", "**no**"
    assert rule == {
        "diversity at 16 below 98.5": yes,
        "random at 48 within 3 points of 97.3": no,
        "random at 32 within 3 points of 93.6": no,
        "random at 16 within 3 points of 86.9": yes,
        "diversity at 48 within 3 points of 99.6": no,
        "diversity at 32 within 3 points of 99.2": no,
        "diversity at 16 within 3 points of 97.3": no,
        "CLS above random at 16": yes,
        "pooling above random at 16": no,
        "a with all tokens at least 99": yes,
    }
    table = result["tables"]["retention, %, validation questions"]
    assert table["random"]["16"] == "87.0 (LLaVA 86.9)"
    assert table["random"]["8"] == "87.0"


def test_each_factor_of_the_ranking_is_deployed_with_each_seeds_scorer(
        vlm, features, monkeypatch):
    """What is kept stands for its retention: the sum of the numbers of the tokens."""
    X = features[:2].float()
    scorers = {(name, seed): Scorer(128) for name in ("ours", "papers") for seed in range(2)}

    def retained(vlm, rows, ways):
        return {way: choose(X, None).sum().item() for way, choose in ways.items()}

    def scenes_and_labels(vlm, split):
        return X, torch.full((2, 144), 2)

    for replacement in (retained, scenes_and_labels):
        monkeypatch.setattr(study, replacement.__name__, replacement)
    monkeypatch.setattr(study, "trained", lambda *_: {way: way for way in scorers})
    monkeypatch.setattr(study, "load_pruner", lambda way: (scorers[way], None))
    monkeypatch.setattr(study, "embedded", lambda split: [])
    result = study.ranking(SimpleNamespace(device="cpu", seeds=2))
    table, = result["tables"].values()
    for row, name, c in (("trained through d, c = 4; deployed with c = 3", "ours", 3),
                         ("trained as the papers do; deployed by the scores alone", "papers", 0)):
        for K in (32, 4):
            kept = [select(distinct(scorers[name, seed](X), X, c), K) for seed in range(2)]
            assert table[row][str(K)] == [keep.sum().item() for keep in kept]
        assert table[row]["on objects at 16"] == [100, 100]


def test_retention_in_a_study_is_against_all_tokens(vlm, tmp_path):
    rows = questions.read_questions(drawn(tmp_path))[:5]
    kept = study.retained(vlm, rows, {"blind": lambda X, inputs: torch.tensor([[-1]])})
    assert kept["blind"] < 80


def test_the_served_model_has_llavas_number_of_tokens_and_a_larger_llm(tmp_path):
    serving.larger_model(tmp_path)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    layer = 4 * 1024 ** 2 + 3 * 1024 * 2752 + 2 * 1024  # attention, MLP, two norms
    assert sum(p.numel() for p in model.get_decoder().layers.parameters()) == 8 * layer
    inputs = AutoProcessor.from_pretrained(tmp_path)(images=SCENES[0], text="<image>?")
    assert torch.tensor(inputs["input_ids"]).eq(model.config.image_token_id).sum() == 576
    side = model.config.vision_config.image_size
    assert torch.as_tensor(inputs["pixel_values"][0]).shape == (3, side, side)


def test_the_servers_warm_up_does_not_count(monkeypatch):
    """64 tokens take 1 s, all take 4 s, and what comes first 100 s more."""
    clock, budgets = FakeClock(), []

    def generate(prompts, limits, use_tqdm):
        keep = prompts[0]["mm_processor_kwargs"]["keep"]
        clock.spend({"all": 4000, "64": 1000}[keep] + 100_000 * (keep not in budgets))
        budgets.append(keep)
        pictures.extend(prompt["multi_modal_data"]["image"].tobytes() for prompt in prompts)
        assert len(prompts) == 16
        assert (limits.max_tokens, limits.ignore_eos) == (32, True), "all answers are as long"

    pictures = []
    monkeypatch.setattr(serving, "time", clock)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    times = serving.throughput(SimpleNamespace(generate=generate), 2)
    assert times == {"all": pytest.approx([4, 4]), "64": pytest.approx([1, 1])}
    assert len(set(pictures)) == 2 * 3 * 16, "none is in a cache"
    assert serving.table({"all": [4, 3, 9], "64": [1, 1, 2]})["tables"] == {
        "visual tokens of a picture": {
            "576": {"16 answers, s": "4.00 [3.00–9.00]", "faster": "1.00×"},
            "64": {"16 answers, s": "1.00 [1.00–2.00]", "faster": "4.00×"},
        }}


def test_six_scenes_are_drawn_with_the_answers_by_all_and_by_the_kept_tokens(monkeypatch):
    def generate(inputs, X, keep=None):
        return ["one" if keep is None else "two"]

    def label(draw, x, y, text, *_):
        texts.append(text)

    texts, (tiny_vlm, _) = [], draw.tiny()
    monkeypatch.setattr(tiny_vlm, "generate", generate)
    monkeypatch.setattr(draw, "label", label)
    draw.kept()
    assert texts.count("all 144: one") == texts.count("these 16: two") == 6


def test_the_curves_of_the_soft_top_k_become_steep(monkeypatch):
    def line_chart(series, *labels, **options):
        return series

    monkeypatch.setattr(draw, "line_chart", line_chart)
    series = draw.soft_top_k_curves()
    *soft, hard = [dict(points) for points in series.values()]
    at_eight = [alpha[8] for alpha in soft]
    assert at_eight == sorted(at_eight) and at_eight[0] < 0.7 and at_eight[-1] > 0.99
    for alpha in soft:
        assert sum(alpha.values()) == pytest.approx(16, abs=1e-3)


def test_the_gates_picture_shows_the_strongest_components_in_their_own_deviations(monkeypatch):
    """Where alpha is 1 a channel of 128 ± 55 is a component's mean ± its deviation."""
    deviations = torch.arange(1.0, 129)
    X = draw.example(0).X[0]  # (144, 128)
    monkeypatch.setattr(draw, "draw_scene", lambda seed: (SCENES[0], None))
    monkeypatch.setattr(draw, "whitening", lambda X: (torch.ones(128), deviations.diag()))
    image = draw.gate()
    strongest = (128 + 55 * (X[:, -3:] - 1) / deviations[-3:]).clamp(0, 255)
    for token in (0, 70, 143):
        row, column = divmod(token, 12)
        middle = 250 + int(17.5 * (column + 0.5)), 10 + int(17.5 * (row + 0.5))
        assert image.getpixel(middle) == pytest.approx(strongest[token].tolist(), abs=1)


def test_gumbel_draws_hard_tokens_by_the_softmax_and_has_the_soft_ones_gradient():
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0])
    alpha = study.gumbel_top_k(scores.expand(20_000, 4), 1, 0.5)
    hard = alpha.round()
    close(alpha, hard, atol=1e-6)
    assert hard.unique().tolist() == [0, 1]
    assert (hard.sum(1) == 1).all()
    close(hard.mean(0), scores.softmax(0), atol=0.02)
    scores = torch.randn(3, 9, requires_grad=True)
    weights = torch.randn(9)
    torch.manual_seed(1)
    slope, = torch.autograd.grad((study.gumbel_top_k(scores, 4, 0.5) @ weights).sum(), scores)
    torch.manual_seed(1)
    noisy = scores - (-torch.rand(3, 9).log()).log()
    expected, = torch.autograd.grad((soft_top_k(noisy, 4, 0.5) @ weights).sum(), scores)
    close(slope, expected, atol=1e-6)


def test_the_other_ablations_scale_tokens_and_let_them_see_each_other():
    X, alpha = torch.ones(1, 2, 3), torch.tensor([[0.25, 1.0]])
    scaled = study.scale_gate(X, alpha, None, None)
    assert scaled.tolist() == [[[0.25] * 3, [1.0] * 3]]
    assert isinstance(study.global_denoiser(16).block.attn, Attention)


def test_each_seed_of_a_variant_is_trained_its_own_way(vlm, tmp_path, monkeypatch):
    trained = []

    def train_spy(options, parts):
        options.out.mkdir(exist_ok=True)
        assert options.steps == args.steps
        trained.append((options.out.name, options.seed, options.choose, options.keep.count, parts))

    monkeypatch.setattr(study, "train", train_spy)
    args = SimpleNamespace(seeds=2, ablated=1, device="cpu", dtype=None, runs=tmp_path)
    for args.steps in (3, 3, 4):  # what was made the same way is not trained again
        folders = study.trained(args, vlm, study.VARIANTS)
    variants = {name: parts for name, (_, parts) in study.VARIANTS.items()}
    assert trained == 2 * [
        ("ours-0", 0, "distinct", 16, train.Parts()), ("ours-1", 1, "distinct", 16, train.Parts()),
        ("papers-0", 0, "top", 16, train.Parts()), ("papers-1", 1, "top", 16, train.Parts()),
        ("Gumbel-0", 0, "distinct", 16, variants["Gumbel"]),
        ("scale-gate-0", 0, "distinct", 16, variants["scale gate"]),
        ("global-denoiser-0", 0, "distinct", 16, variants["global denoiser"]),
    ]
    assert folders["papers", 1] == tmp_path / "papers-1"


def test_the_table_of_ablations_has_each_seeds_own_numbers(vlm, tmp_path, monkeypatch):
    """Retention is made up: 90, plus the seed, and half as much by the other choice."""
    folders = {(name, seed): tmp_path / f"{name}-{seed}"
               for name in study.VARIANTS for seed in range(2)}
    for (name, seed), folder in folders.items():
        folder.mkdir()
        row = {"hardness": 0.9, "soft_loss": 0.5 + seed, "deployed_loss": 0.3}
        files.write(folder / "log.jsonl", [row | {"soft_loss": 9.0}, row])

    def load_pruner(folder):
        trained_by = "top" if folder.name.startswith("papers") else "distinct"
        return Scorer(16), {"choose": trained_by}

    def retained(vlm, rows, ways):
        return {way: (90 + way[1]) / (1 + (way[2] == "top")) for way in ways}

    def chooser(*_, choose):
        return None, None

    for replacement in (load_pruner, retained, chooser):
        monkeypatch.setattr(study, replacement.__name__, replacement)
    monkeypatch.setattr(study, "trained", lambda *_: folders)
    monkeypatch.setattr(study, "embedded", lambda split: [])
    result = study.ablations(SimpleNamespace(device="cpu", keep=["16", "~16"]))
    table = result["tables"]["retention, %, test questions"]
    assert table["ours, by distinct"] == {"16": [90, 91], "~16": [90, 91]}
    assert table["Gumbel, by top"] == {"16": [45, 45.5], "~16": "–"}
    assert table["papers, by top"] == {"16": [45, 45.5], "~16": [45, 45.5]}
    assert result["tables"]["at the last step"]["ours"] == {
        "hardness": [0.9, 0.9],
        "soft loss": [0.5, 1.5],
        "deployed loss": [0.3, 0.3],
        "soft - deployed": pytest.approx([0.2, 1.2]),
    }


def test_what_kept_tokens_lie_on_is_counted_by_hand(monkeypatch):
    """The encoder's longest tokens, which the norm keeps first, are made the objects."""
    def scenes_and_labels(vlm, split):
        X = torch.randn(2, 144, 128)
        order = X.norm(dim=-1).argsort(dim=1, descending=True)
        lies_on = torch.zeros(2, 144, dtype=torch.int).scatter(1, order[:, :24], 1)
        return X, lies_on.scatter(1, order[:, :12], 2)

    monkeypatch.setattr(study, "scenes_and_labels", scenes_and_labels)
    table = study.objects(SimpleNamespace(device="cpu"))["tables"]["kept tokens, %"]
    shares = {way: list(row.values()) for way, row in table.items()}
    assert list(table["all"]) == ["on objects", "on strangers", "on background"]
    assert shares["all"] == pytest.approx([100 / 12, 100 / 12, 1000 / 12])
    assert shares["norm 16"] == pytest.approx([75, 25, 0])
    assert shares["norm 4"] == pytest.approx([100, 0, 0])


def test_closing_up_positions_costs_most_where_a_place_is_asked_for(tmp_path, monkeypatch):
    rows = questions.read_questions(drawn(tmp_path))
    monkeypatch.setattr(study, "embedded", lambda split: rows)
    result = study.positions(SimpleNamespace(device="cpu"))
    table, = result["tables"].values()
    original, closed = table["scorer, original"], table["scorer, closed up"]
    assert original["where"] == 100
    assert closed["where"] < 75


# --- the README -----------------------------------------------------------------------------------

def without_indentation(text):
    lines = [line.strip() for line in text.splitlines()]
    return "\n" + "\n".join(lines) + "\n"


def test_readme_snippets_stand_in_the_code_or_run(capsys):
    code = []
    for name in ("throttler", "denoiser", "train", "model", "infer"):
        source = (ROOT / f"{name}.py").read_text()
        code.append(without_indentation(source))
    *method, program = sorted(SNIPPETS, key=lambda snippet: "import" in snippet)
    assert len(method) >= 5
    for snippet in method:
        lines = without_indentation(snippet)
        assert any(lines in source for source in code), f"not in the code:\n{snippet}"
    exec(program, {})
    assert capsys.readouterr().out.startswith("['")


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\(([\w./-]+)\)", README)
    table_of_files = re.findall(r"^\| `([\w./]+)` \|", README, re.M)
    for path in links + table_of_files:
        assert (ROOT / path).exists(), path


def test_readme_table_is_what_was_measured():
    table = json.loads((ROOT / "results/accuracy.json").read_text())["accuracy"]
    full = table["all 144"]
    retention = {}
    for name, by_category in table.items():
        retention[name] = f"{accuracy.retention(by_category, full):.1f}"
    names = "random norm pooling uniform CLS DPP diversity coverage".split()
    names += ["papers", "scorer, top", "scorer"]
    ablations = json.loads((ROOT / "results/ablations.json").read_text())["ablations"]["tables"]
    for K, seeds in ablations["retention, %, test questions"]["papers, by top"].items():
        retention[f"papers {K}"] = f"{tables.mean(seeds):.1f}"
    measured = []
    for name in names:
        row = [retention[f"{name} {K}"] for K in (32, 16, 8, 4)]
        measured.append(tuple(row))

    number = r" \*{0,2}(\d+\.\d)\*{0,2} \|"
    printed = re.findall(rf"^\| [^|]+ \|{4 * number}$", README, re.M)
    assert printed == measured


def test_readme_says_how_many_pictures_a_card_holds_as_the_plan_counts_them():
    found = {}
    for name in ("llava-1.5-7b", "qwen2.5-vl-7b", "qwen3-vl-8b"):
        vlm = load("random:" + name, "meta", torch.bfloat16)
        with torch.device("meta"):
            modules = torch.nn.ModuleList([Scorer(vlm.width), Denoiser(vlm.width)])
        learned = sum(p.numel() for p in modules.parameters())
        frozen = memory.of_a_step(vlm, learned, 1)["frozen"]
        cards = [gigabytes * 1e9 - frozen for gigabytes in (24, 48, 80)]
        counts = [memory.images_that_fit(vlm, learned, free, recompute=True) for free in cards]
        found[name] = " | ".join(map(str, counts))
    assert f"| LLaVA-1.5-7B | {found['llava-1.5-7b']} |" in README
    assert f"| Qwen2.5-VL-7B, 2,880 tokens a picture | {found['qwen2.5-vl-7b']} |" in README
    assert f"| Qwen3-VL-8B, 2,880 tokens a picture | {found['qwen3-vl-8b']} |" in README


def test_random_architectures_have_weights_of_the_usual_size_and_pictures_of_any(monkeypatch):
    """A tiny Qwen in place of a true one: tokens of 16 x 16 pixels."""
    monkeypatch.setitem(architectures.RANDOM, "tiny", TINY_CONFIGS["qwen2_5_vl"])
    tiny_vlm = load("random:tiny")
    for name, p in tiny_vlm.model.named_parameters():
        if p.dim() > 1:
            assert p.std() == pytest.approx(0.02, rel=0.15), name
        else:
            assert p.unique().tolist() == [0.0 if name.endswith("bias") else 1.0], name
    inputs = tiny_vlm.dummy_inputs(2, 9, image_size=(64, 96))  # height, width
    assert tiny_vlm.encode(inputs).shape == (2, 24, 64)
    close(tiny_vlm.boxes(inputs)[0], torch.tensor([0, 0, 1 / 6, 1 / 4]), atol=1e-6)


@pytest.mark.parametrize("name, parameters, N, width", [
    ("qwen2.5-vl-7b", 8292166656, 576, 3584),
    ("qwen3-vl-8b", 8767123696, 441, 4 * 4096),
    ("llava-next-7b", 7063431168, 576 + 48 * 49, 4096),
    ("llava-1.5-7b", 7063427072, 576, 1024),
])
def test_random_architectures_have_the_published_sizes(name, parameters, N, width):
    vlm = load("random:" + name, "meta", torch.bfloat16)
    assert sum(p.numel() for p in vlm.model.parameters()) == parameters
    assert vlm.dummy_inputs(2, 95)["input_ids"].shape == (2, N + 95)
    assert vlm.width == width


def test_readme_counts_the_flops_of_llava_right():
    vlm = load("random:llava-1.5-7b", "meta", torch.bfloat16)
    L = vlm.dummy_inputs(1, 95)["input_ids"].shape[1]
    flops = bench.prefill_flops(vlm, [L, L - 576 + 64])
    full, pruned = (count / 1e12 for count in flops.values())
    sentence = (
        f"{full:.3f} T for 576 visual tokens and {pruned:.3f} T for 64, "
        f"{full / pruned:.2f} times")
    text = (ROOT / "eval/README.md").read_text()
    assert sentence in " ".join(text.split())
