"""
Each claim of the method against something that cannot share our bug. Run: python -m pytest -q test_all.py

Oracles: a bisection for the soft top-K, finite differences for every gradient, attention with a mask for the denoiser,
simulation against closed forms for the gate, stock transformers and the full model with masked tokens for deployment.
"""
import base64
import copy
import hashlib
import io
import json
import math
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import textwrap
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, CLIPImageProcessorPil,
                          LlavaForConditionalGeneration, LlavaNextImageProcessorPil, LlavaNextProcessor, LlavaProcessor,
                          Qwen2VLImageProcessorPil)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import bench
import infer
import model
import train
from assets import draw
from data import files, questions
from data.shapes import prepare as shapes
from data.shapes import study
from denoiser import Denoiser, DiagonalAttention
from model import InputError, cli, load, read_image
from throttler import (Attention, Scorer, count_above, select, soft_top_k, standardised, threshold, vp_gate,
                       whitening)

ROOT = Path(__file__).resolve().parent
TINY = ROOT / "data/shapes/llava"
EXAMPLES = sorted((ROOT / "data/shapes/examples").glob("*.jpg"))
SHIPPED = ("--pruner", ROOT / "data/shapes/pruner", "--device", "cpu")
QUESTIONS = ["Where is the star?", "How many shapes are there?", "Is there a red circle, or some other thing?"]


@pytest.fixture(scope="module")
def vlm():
    """The tiny LLaVA in float64, so that equalities can be tested to rounding (Llama's own norm rounds to float32)."""
    vlm = load(TINY, dtype=torch.float64)
    for name, norm in [(n, m) for n, m in vlm.model.named_modules() if isinstance(m, LlamaRMSNorm)]:
        exact = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=torch.float64).requires_grad_(False)
        exact.load_state_dict(norm.state_dict())
        vlm.model.set_submodule(name, exact)
    return vlm


@pytest.fixture(scope="module")
def scene(vlm):
    """Three pictures, three questions of different lengths (so rows are padded), and their features."""
    inputs = vlm.inputs([read_image(p) for p in EXAMPLES[:3]], QUESTIONS)
    return inputs, vlm.encode(inputs)


# --- soft top-K -----------------------------------------------------------------------------------------------------

def laplace_cdf(x):
    return torch.where(x < 0, 0.5 * x.clamp(max=0).exp(), 1 - 0.5 * (-x).clamp(max=0).exp())


def bisection(scores, K, tau):
    """The same alpha by halving an interval 200 times, in float64."""
    x = scores.double() / tau
    finite = x[x.isfinite()]
    low, high = finite.min() - 60, finite.max() + 60
    for _ in range(200):
        b = (low + high) / 2
        low, high = (b, high) if laplace_cdf(x - b).sum() > K else (low, b)
    return laplace_cdf(x - b), b


@pytest.mark.parametrize("tau", [2.0, 0.3, 0.1, 0.01])
@pytest.mark.parametrize("N", [1, 2, 7, 144, 576, 2880])
def test_soft_top_k_is_the_bisection(N, tau):
    g = torch.Generator().manual_seed(N)
    noise = torch.randn(N, generator=g, dtype=torch.float64)
    for scores in (noise, 0 * noise, 1e4 * noise, noise.round(), noise.sign() * 1e4, torch.linspace(-1e4, 1e4, N).double()):
        for K in {N / 3, max(1, N // 9), N - 0.5, 0.01 * N}:
            alpha = soft_top_k(scores, K, tau)
            assert abs(alpha.sum() - K) <= 1e-6 * K and alpha.min() >= 0 and alpha.max() <= 1
            torch.testing.assert_close(alpha, bisection(scores, K, tau)[0], atol=1e-7, rtol=1e-6)
            order = scores.argsort()
            assert (alpha[order].diff() >= -1e-12).all(), "not monotone in the score"
            torch.testing.assert_close(soft_top_k(scores + 3.0, K, tau), alpha, atol=1e-7, rtol=0)


def test_soft_top_k_limits_padding_and_types():
    s = torch.tensor([2.0, -1.0, 0.5, 7.0, 0.5], dtype=torch.float64)
    assert (soft_top_k(s, 0) == 0).all() and (soft_top_k(s, 5) == 1).all()
    padded = torch.cat([s, torch.full((3,), -torch.inf, dtype=torch.float64)]).requires_grad_()
    for K in (0, 1, 2.5, 4.999, 5):
        alpha = soft_top_k(padded, K, 0.5)
        assert (alpha[5:] == 0).all() and alpha[:5].detach().equal(soft_top_k(s, K, 0.5))
        gradient, = torch.autograd.grad((alpha * torch.arange(8)).sum(), padded)
        assert gradient.isfinite().all() and (gradient[5:] == 0).all()
    batch = torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(0))
    one_by_one = torch.stack([soft_top_k(row, 7, 0.2) for row in batch.flatten(0, 1)]).view_as(batch)
    torch.testing.assert_close(soft_top_k(batch, 7, 0.2), one_by_one, atol=1e-7, rtol=0)
    for dtype in (torch.float16, torch.bfloat16):
        alpha = soft_top_k(batch.to(dtype), 7, 0.2)
        assert alpha.dtype == dtype
        torch.testing.assert_close(alpha, soft_top_k(batch.to(dtype).double(), 7, 0.2).to(dtype), atol=0, rtol=0)
    for K in (-1, 51, math.nan):
        with pytest.raises(ValueError):
            soft_top_k(batch, K)


@pytest.mark.parametrize("tau", [2.0, 0.5, 0.1])
def test_soft_top_k_gradient(tau):
    s = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: soft_top_k(s, 3.0, tau), s)
    jacobian = torch.autograd.functional.jacobian(lambda s: soft_top_k(s, 3.0, tau), s[0])  # ∂α_i/∂s_j
    assert jacobian.sum(0).abs().max() < 1e-12, "the budget must not change: Σ_i ∂α_i/∂s_j = 0"

    def fixed_point(s):  # one Newton step from the bisection's b carries its derivative
        x, b = s / tau, bisection(s.detach(), 3.0, tau)[1]
        slope = 0.5 * (-(x.detach() - b).abs()).exp().sum()
        return laplace_cdf(x - (b + (laplace_cdf(x - b).sum() - 3.0) / slope))
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(fixed_point, s[0]), atol=1e-9, rtol=1e-7)


def test_soft_top_k_gradient_is_finite_at_extremes():
    for scores in (torch.zeros(2880), 1e4 * torch.randn(2880), torch.tensor([1e4, 1e4, -1e4])):
        scores.requires_grad_()
        for K in (0, 1, 2, len(scores)):
            gradient, = torch.autograd.grad((soft_top_k(scores, K, 0.1) * torch.randn(len(scores))).sum(), scores)
            assert gradient.isfinite().all()


def test_alpha_becomes_the_selection_as_tau_falls():
    scores = torch.randn(5, 144, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    chosen = torch.zeros_like(scores).scatter(1, select(scores, 16), 1.0)
    gaps = [(soft_top_k(scores, 16, tau) - chosen).abs().max().item() for tau in (1.0, 0.1, 1e-2, 1e-3, 1e-5)]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-6
    keep = select(scores, 16)
    assert (keep.diff(dim=1) > 0).all() and keep.equal(scores.argsort(descending=True)[:, :16].sort().values)
    for K in (0, 145):
        with pytest.raises(ValueError):
            select(scores, K)


# --- the noise gate -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def features(vlm):
    """(images, 144, 128) of a real encoder: far from normalised, and of low rank."""
    images = [shapes.draw_scene(f"test-gate-{i}")[0] for i in range(200)]
    return vlm.encode(vlm.inputs(images, ["?"] * len(images)))


def covariance(X):
    X = X.flatten(0, -2)
    return (X - X.mean(0)).T @ (X - X.mean(0)) / len(X)


def test_gate_preserves_mean_and_covariance(features):
    X, (mean, L) = features, (t.double() for t in whitening(features))
    C = covariance(X)
    eigenvalues = torch.linalg.eigvalsh(C)
    assert eigenvalues.sum() ** 2 / eigenvalues.square().sum() < 32, "these features should be of low effective rank"
    torch.testing.assert_close(L @ L.T, C, atol=1e-6 * C.diagonal().max().item(), rtol=1e-4)
    torch.manual_seed(0)
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        gated = vp_gate(X, torch.full(X.shape[:2], share, dtype=X.dtype), mean, L)
        # 28,800 tokens: a sampling error of about 1/√28800 = 0.6 % of the scale in each entry
        assert (covariance(gated) - C).norm() / C.norm() < 0.03
        assert (gated.mean((0, 1)) - mean).norm() / C.trace().sqrt() < 0.02
        if share == 0:
            signal, rest = (X - mean).flatten(0, 1), (gated - mean).flatten(0, 1)
            cosine = (signal * rest).sum() / (signal.norm() * rest.norm())
            assert abs(cosine) < 0.02, "something of the token is left at alpha = 0"
    assert vp_gate(X, torch.ones(X.shape[:2]), mean, L).equal(X), "alpha = 1 must return X bit for bit"


def test_gate_survives_degenerate_features():
    torch.manual_seed(0)
    low_rank = torch.randn(40, 3) @ torch.randn(3, 16)
    constant_channel = torch.randn(100, 16)
    constant_channel[:, 5] = 2.5
    for X in (low_rank, constant_channel, torch.randn(4, 16), torch.ones(10, 16)):
        mean, L = whitening(X)
        assert mean.isfinite().all() and L.isfinite().all()
        assert vp_gate(X[None], torch.rand(1, len(X)), mean, L).isfinite().all()


def test_gate_gradient_is_finite_at_both_ends():
    torch.manual_seed(0)
    X, (mean, L) = torch.randn(1, 6, 8), whitening(torch.randn(500, 8))
    alpha = torch.tensor([[0.0, 1e-30, 1e-13, 0.5, 1 - 1e-7, 1.0]], requires_grad=True)
    gradient, = torch.autograd.grad(vp_gate(X, alpha, mean, L).square().sum(), alpha)
    assert gradient.isfinite().all() and gradient[0, 3] != 0


def test_channel_noise_leaks_and_whitened_noise_does_not(features):
    """The best linear reconstruction of x from x̃ explains a share alpha of the variance with whitened noise, far more
    with independent noise of equal variance in each channel: tr(α·C·(α·C + (1-α)·D)⁻¹·C) / tr C, D = diag C."""
    X, C, a = features.flatten(0, 1), covariance(features), 0.11
    mean, L = (t.double() for t in whitening(features))
    torch.manual_seed(0)

    def explained(noise_factor):
        gated = vp_gate(X[None], torch.full((1, len(X)), a, dtype=X.dtype), mean, noise_factor)[0] - mean
        fit = gated @ torch.linalg.lstsq(gated, X - mean).solution
        return 1 - ((X - mean - fit).square().sum() / (X - mean).square().sum()).item()

    D = C.diagonal().diag()
    closed = (a * C @ torch.linalg.solve(a * C + (1 - a) * D, C)).trace().item() / C.trace().item()
    assert abs(explained(L) - a) < 0.02
    assert abs(explained(D.sqrt()) - closed) < 0.02 and closed > 3 * a


# --- the denoiser ---------------------------------------------------------------------------------------------------

def test_diagonal_attention_is_attention_with_an_identity_mask():
    torch.manual_seed(0)
    x, layer = torch.randn(2, 11, 128), DiagonalAttention(128)
    q, k, v = torch.randn(2, 2, 11, 64), torch.randn(2, 2, 11, 64), layer.value(x).view(2, 11, 2, 64).transpose(1, 2)
    masked = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.eye(11, dtype=torch.bool))
    torch.testing.assert_close(layer(x), layer.out(masked.transpose(1, 2).flatten(2)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("diagonal", [True, False])
def test_denoiser_repairs_each_token_from_itself_alone(diagonal):
    torch.manual_seed(0)
    denoiser = Denoiser(16, diagonal)
    assert denoiser(torch.ones(1, 2, 16)).equal(torch.ones(1, 2, 16)), "it starts as the identity"
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.3)
    J = torch.autograd.functional.jacobian(lambda x: denoiser(x[None])[0], torch.randn(5, 16)).abs().sum((1, 3))  # (5, 5)
    off_diagonal = J[~torch.eye(5, dtype=torch.bool)]
    assert (off_diagonal == 0).all() if diagonal else (off_diagonal > 0).all()


def test_attention_is_torchs_own():
    torch.manual_seed(0)
    ours, stock = Attention(128), torch.nn.MultiheadAttention(128, 2, batch_first=True)
    stock.load_state_dict({"in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
                           "out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias})
    x = torch.randn(2, 9, 128)
    torch.testing.assert_close(ours(x), stock(x, x, x)[0], atol=1e-6, rtol=1e-5)


# --- the frozen VLM: what is deployed -------------------------------------------------------------------------------

def test_keep_all_is_the_stock_model(vlm, scene):
    inputs, X = scene
    ours = vlm.model.generate(**vlm.embed(inputs, X), max_new_tokens=8, output_logits=True, return_dict_in_generate=True)
    stock = vlm.model.generate(**inputs, max_new_tokens=8, output_logits=True, return_dict_in_generate=True)
    assert ours.sequences.equal(stock.sequences[:, inputs["input_ids"].shape[1]:])
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(stock.logits), atol=1e-9, rtol=0)
    everything = torch.arange(vlm.tokens).expand(3, -1)
    torch.testing.assert_close(vlm.embed(inputs, X, everything)["inputs_embeds"], vlm.embed(inputs, X)["inputs_embeds"])


def logits_of(vlm, sequence):
    """Logits of the prefill's last state and of each of eight decoded tokens, (8, B, V)."""
    out = vlm.model.generate(**sequence, max_new_tokens=8, min_new_tokens=8, output_logits=True, return_dict_in_generate=True)
    return torch.stack(out.logits)


def test_pruning_is_the_full_model_with_pruned_tokens_masked(vlm, scene):
    inputs, X = scene
    keep = select(torch.randn(3, vlm.tokens, generator=torch.Generator().manual_seed(0)), 16)
    pruned, full = vlm.embed(inputs, X, keep), vlm.embed(inputs, X)
    assert pruned["inputs_embeds"].shape[1] == full["inputs_embeds"].shape[1] - vlm.tokens + 16
    chosen = torch.zeros(3, vlm.tokens, dtype=torch.long).scatter(1, keep, 1)
    masked = full["attention_mask"].masked_scatter(inputs["input_ids"] == vlm.image_id, chosen)
    oracle = logits_of(vlm, {**full, "attention_mask": masked})
    torch.testing.assert_close(logits_of(vlm, pruned), oracle, atol=1e-9, rtol=0)
    # a deliberate mistake must be seen: positions closed up
    closed = (pruned["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    assert (logits_of(vlm, {**pruned, "position_ids": closed}) - oracle).abs().max() > 1e-3


def test_batched_answers_are_those_of_one_by_one(vlm, scene):
    inputs, X = scene
    keep = select(X.norm(dim=-1), 16)
    batched = vlm.generate(inputs, X, keep, max_new_tokens=8)
    alone = [vlm.generate(vlm.inputs([read_image(p)], [q]), X[i:i + 1], keep[i:i + 1], max_new_tokens=8)[0]
             for i, (p, q) in enumerate(zip(EXAMPLES, QUESTIONS))]
    assert batched == alone


def test_loss_is_the_stock_loss(vlm, scene):
    images = [read_image(p) for p in EXAMPLES[:3]]
    captions = ["One shape.", "Two shapes: a red circle at the top left and so on.", "É"]  # any text can be encoded
    inputs = vlm.inputs(images, [train.PROMPT] * 3, captions)
    told = [vlm.processor.tokenizer.decode(row[row != -100]).strip() for row in inputs["labels"]]
    assert told == [c + "</s>" for c in captions]
    torch.testing.assert_close(vlm.loss(inputs, vlm.encode(inputs)), vlm.model(**inputs).loss.double(), atol=2e-6, rtol=0)


def test_presence_at_0_and_1_is_the_deployed_cut(vlm, scene):
    """log alpha in the attention: alpha of ones and zeros gives the loss of the tokens kept and dropped."""
    inputs = vlm.inputs([read_image(p) for p in EXAMPLES[:3]], [train.PROMPT] * 3, ["One shape.", "Two.", "Three shapes: a"])
    X = vlm.encode(inputs)
    keep = select(torch.randn(3, vlm.tokens, generator=torch.Generator().manual_seed(2)), 16)
    alpha = torch.zeros(3, vlm.tokens, dtype=X.dtype).scatter(1, keep, 1.0)
    torch.testing.assert_close(vlm.loss(inputs, X, alpha=alpha), vlm.loss(inputs, X, keep), atol=1e-5, rtol=0)
    torch.testing.assert_close(vlm.loss(inputs, X, alpha=torch.ones_like(alpha)), vlm.loss(inputs, X), atol=1e-9, rtol=0)


# --- the whole path -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("presence", [True, False])
def test_scorer_gradient_is_finite_differences_through_everything(vlm, presence):
    torch.manual_seed(0)
    scorer, denoiser = Scorer(vlm.width).double(), Denoiser(vlm.width).double()
    torch.nn.init.normal_(denoiser.block.mlp[-1].weight, std=0.02)
    inputs = vlm.inputs([read_image(p) for p in EXAMPLES[:2]], [train.PROMPT] * 2, ["Two shapes: a red", "One"])
    X = vlm.encode(inputs)
    mean, L = (t.double() for t in whitening(X))
    noise = torch.randn_like(X)

    def loss():
        alpha = soft_top_k(scorer(X), 16, 0.5)
        X_bar = denoiser(vp_gate(X, alpha, mean, L, noise))
        return vlm.loss(inputs, X_bar, alpha=alpha if presence else None)

    loss().backward()
    for weight in (scorer.head.weight, scorer.blocks[0].attn.qkv.weight, denoiser.block.attn.value.weight,
                   scorer.blocks[1].mlp[0].bias):
        direction = torch.randn_like(weight) / weight.numel() ** 0.5
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * 1e-5 * direction
                sides.append(loss().item())
                weight -= sign * 1e-5 * direction
        numeric = (sides[0] - sides[1]) / 2e-5
        assert (weight.grad * direction).sum().item() == pytest.approx(numeric, rel=1e-4, abs=1e-9)
    assert all(p.grad is None and not p.requires_grad for p in vlm.model.parameters()) and not vlm.model.training


def parts_of(recipe):
    return {name: train.RECIPES[recipe][name] for name in ("standardise", "presence")}


@pytest.mark.parametrize("gate", ["vp", "scale", "gumbel"])
@pytest.mark.parametrize("recipe", ["ours", "papers"])
def test_every_gate_and_recipe_sends_a_gradient_to_the_scorer(vlm, gate, recipe):
    torch.manual_seed(0)
    scorer, denoiser = Scorer(vlm.width), Denoiser(vlm.width)
    inputs = vlm.inputs([read_image(p) for p in EXAMPLES[:2]], [train.PROMPT] * 2, ["Two shapes: a red", "One"])
    statistics = whitening(vlm.encode(inputs))
    loss, alpha = train.training_loss(vlm, scorer, denoiser, statistics, inputs, 16, 0.5, gate, **parts_of(recipe))
    loss.backward()
    torch.testing.assert_close(alpha.detach().sum(1), torch.full((2,), 16.0))
    assert (gate == "gumbel") == bool(((alpha - alpha.round()).abs() < 1e-5).all()), "only Gumbel's choice is hard"
    assert all(p.grad.isfinite().all() for p in scorer.parameters()) and scorer.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("recipe", ["ours", "papers"])
def test_a_step_costs_twice_the_forward(recipe):
    """No gradient of frozen weights, logits at the caption only; and the memory plan against what autograd keeps."""
    vlm, captions = load(TINY), ["Two shapes: a red", "One"]
    inputs = vlm.inputs([read_image(p) for p in EXAMPLES[:2]], [train.PROMPT] * 2, captions)
    X = vlm.encode(inputs)
    scorer, denoiser, statistics = Scorer(vlm.width), Denoiser(vlm.width), whitening(X)
    learned = [*scorer.parameters(), *denoiser.parameters()]
    fixed, kept = {p.untyped_storage().data_ptr() for p in (*vlm.model.parameters(), *learned)}, {}

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t  # holds it, so that no two have one address
        return t

    def flops(f):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the one that is always counted
            f()
        return counter.get_total_flops()

    def step():
        train.training_loss(vlm, scorer, denoiser, statistics, inputs, 16, 0.5, **parts_of(recipe))[0].backward()

    with torch.no_grad():
        encoder, forward = flops(lambda: vlm.encode(inputs)), flops(lambda: vlm.loss(inputs, X))
        pruner = flops(lambda: denoiser(vp_gate(X, scorer(X).sigmoid(), *statistics)))
        all_logits = flops(lambda: vlm.model.lm_head(torch.zeros(*inputs["input_ids"].shape, 160)))
        assert flops(lambda: vlm.model(**inputs)) - encoder - forward > 0.8 * all_logits
    assert flops(step) <= 2.2 * forward + encoder + 3 * pruner  # only the pruner's own weights get a gradient
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        step()
    kept = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in fixed)
    planned = float(re.search(r"about ([\d.]+) GB", vlm.memory_plan(len(learned), 2))[1]) * 1e9
    assert 0.6 * planned < kept < 1.2 * planned


def test_gradient_checkpointing_changes_nothing(vlm):
    """Also with gaps in the positions, which transformers takes for packed sequences where there is no mask."""
    inputs = vlm.inputs([read_image(EXAMPLES[0])], [train.PROMPT], ["Two shapes: a red"])
    X, llm = vlm.encode(inputs), vlm.model.model.language_model
    keep = select(torch.randn(1, vlm.tokens, generator=torch.Generator().manual_seed(0)), 16)
    alpha = torch.rand(1, vlm.tokens, generator=torch.Generator().manual_seed(0), dtype=X.dtype)

    def results():
        for arguments in ({}, {"keep": keep}, {"alpha": alpha}):
            x = X.clone().requires_grad_()
            loss = vlm.loss(inputs, x, **arguments)
            yield from (loss, *torch.autograd.grad(loss, x))

    plain = list(results())
    recomputed = []
    hook = llm.layers[0].mlp.register_forward_pre_hook(lambda *_: recomputed.append(1))
    try:
        vlm.recompute()
        for ours, theirs in zip(results(), plain):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)
        assert len(recomputed) == 6, "it must run twice for each loss"
        sequence = vlm.embed(inputs, X, keep)
        del sequence["labels"], sequence["attention_mask"]
        ones = torch.ones_like(sequence["position_ids"])
        trap, sound = llm(**sequence, use_cache=False), llm(**sequence, attention_mask=ones, use_cache=False)
        assert (trap.last_hidden_state - sound.last_hidden_state).abs().max() > 1e-3, "the trap is gone: then this test shows nothing"
    finally:
        hook.remove()
        vlm.model.eval()  # which turns it off


# --- the embedded default -------------------------------------------------------------------------------------------

def test_stock_transformers_loads_the_tiny_llava():
    model, processor = LlavaForConditionalGeneration.from_pretrained(TINY), AutoProcessor.from_pretrained(TINY)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == "USER: <image>\nWhat is it? ASSISTANT:"
    assert model.config.vision_feature_layer == -2 and (96 // model.config.vision_config.patch_size) ** 2 == 144
    text = "A dog's “café” 日本, 100 %"
    assert processor.tokenizer.decode(processor.tokenizer(text, add_special_tokens=False).input_ids) == text
    assert sum(f.stat().st_size for f in TINY.iterdir()) < 6e6


def test_scenes_are_unambiguous_and_splits_disjoint():
    seen = set()
    for split in ("train", "test", "pretrain"):
        for i in range(40):
            image, objects = shapes.draw_scene(f"{split}-{i}")
            seen.add(image.tobytes())
            assert len({o["shape"] for o in objects}) == len({o["color"] for o in objects}) == len(objects)
            answers = {kind: label for kind, _, label in shapes.questions(objects, shapes.random.Random(i))}
            assert answers["count"] == shapes.NUMBERS[len(objects)]
    assert len(seen) == 120


def test_scorer_reads_whitened_tokens(features):
    """Scorer.whiten: unit variance in every direction that is not floored, less in the others, and no NaN."""
    scorer = Scorer(128)
    assert torch.equal(scorer.map, torch.eye(128)) and not scorer.mean.any(), "as in the papers until told otherwise"
    mean, L = whitening(features)
    scorer.whiten(mean, L)
    variance = torch.linalg.eigvalsh(covariance((features.float() - scorer.mean) @ scorer.map))
    strong = (torch.linalg.eigvalsh(covariance(features)) > 0.1 * covariance(features).trace() / 128).sum()
    assert 4 < strong < 100 and (variance[-strong:] - 1).abs().max() < 1e-2 and variance[:-strong].max() < 1
    scorer.whiten(*whitening(torch.ones(10, 128)))
    assert scorer(torch.ones(1, 5, 128)).isfinite().all()


def test_a_range_of_budgets_is_drawn_from_log_uniformly():
    assert [train.drawn("8:32", u) for u in (0, 0.5, 1)] == [8, 16, 32] and train.drawn("16", 0.3) == "16"
    assert [train.drawn("5%:20%", u) for u in (0, 0.5, 1)] == ["5%", "10%", "20%"]
    for bad in ("32:8", "0:4", "8:inf", "8:20%", "a:b"):
        with pytest.raises(InputError):
            train.drawn(bad, 0.5)


def test_a_pooled_budget_is_one_soft_top_k_over_the_batch():
    torch.manual_seed(0)
    B, N, K = 5, 30, 4
    scores, valid = torch.randn(B, N, dtype=torch.float64), torch.arange(N) < torch.tensor([[30], [30], [12], [5], [3]])
    pool, total = train.pooled(scores, K, "batch")
    alpha = soft_top_k(pool, total, 0.3).view(B, N)
    torch.testing.assert_close(alpha.flatten(), bisection(scores.flatten(), B * K, 0.3)[0], atol=1e-9, rtol=0)
    assert abs(alpha.sum() - B * K) < 1e-9 and alpha.sum(1).std() > 0.3, "images share the budget unequally"
    K = torch.tensor([9, 3, 3, 3, 2])  # where images have budgets of their own, padding gets nothing
    padded = scores.masked_fill(~valid, -torch.inf)
    pool, total = train.pooled(padded, K, "batch")
    alpha = soft_top_k(pool, total, 0.3).view(B, N)
    assert abs(alpha.sum() - 20) < 1e-9 and (alpha[~valid] == 0).all()
    assert train.pooled(scores, K, "image")[0] is scores


def test_training_pools_the_budget(vlm, scene):
    vlm, inputs = load(TINY), vlm.inputs([read_image(p) for p in EXAMPLES[:3]], [train.PROMPT] * 3, ["One shape."] * 3)
    inputs["pixel_values"] = inputs["pixel_values"].float()
    X = vlm.encode(inputs)
    graph = (vlm, Scorer(128), torch.nn.Identity(), whitening(X))
    for budget, spread in (("image", False), ("batch", True)):
        _, alpha = train.training_loss(*graph, inputs, 16, 0.5, budget=budget)
        assert abs(alpha.sum().item() - 48) < 1e-3 and ((alpha.sum(1) - 16).abs().max().item() > 1e-2) == spread


def test_a_threshold_keeps_what_lies_above_it():
    torch.manual_seed(0)
    z = standardised(torch.randn(7, 40) ** 3)
    for total in (7 * 5, 7 * 12, 1, 7 * 40):
        T = threshold(z, total)
        assert (z > T).sum() == total
        keep = select(z, count_above(z, T))
        for row, kept in zip(z, keep):
            above = (row > T).nonzero().flatten().tolist()  # in their original order
            assert kept[kept >= 0].tolist() == (above or [row.argmax().item()]), "at least one"
    assert count_above(z, 100.0).tolist() == [1] * 7
    ragged = torch.cat([z, torch.full((7, 9), -torch.inf)], 1)  # padding
    assert threshold(ragged, 35) == threshold(z, 35) and math.isfinite(threshold(ragged, 7 * 40))


def test_calibrated_thresholds_reproduce_their_means(vlm):
    scorer, _ = infer.load_pruner(ROOT / "data/shapes/pruner")
    inputs = [vlm.inputs([read_image(p) for p in EXAMPLES[i:i + 2]], ["?"] * 2) for i in (0, 2, 4)]
    vlm32 = SimpleNamespace(tokens=vlm.tokens, encode=lambda i: vlm.encode(i).float(), budget=vlm.budget)
    found = train.calibrate(vlm32, scorer, [(None, i, 0) for i in inputs], 16)
    assert list(found) == ["8", "12", "16", "24", "32", "48"]
    z = torch.cat([standardised(scorer(vlm.encode(i).float())) for i in inputs])
    for K, entry in found.items():
        counts = count_above(z, entry["threshold"]).tolist()
        assert sum(counts) == 6 * int(K) == round(6 * entry["mean"]), "no image of these keeps nothing"
        assert min(counts) <= entry["p10"] <= entry["mean"] <= entry["p90"] <= max(counts)
    assert list(train.calibrate(vlm32, scorer, [(None, inputs[0], 0)], "40%")) == ["20%", "30%", "40%", "60%", "80%"]


def test_different_counts_are_left_padded_and_agree_with_one_by_one(vlm, scene):
    inputs, X = scene
    keep = select(X.norm(dim=-1), torch.tensor([3, 40, 17]))
    assert keep.shape == (3, 40) and (keep >= 0).sum(1).tolist() == [3, 40, 17]
    logits = logits_of(vlm, vlm.embed(inputs, X, keep))
    answers = vlm.generate(inputs, X, keep, max_new_tokens=8)
    for i, (path, question) in enumerate(zip(EXAMPLES, QUESTIONS)):
        alone, mine = vlm.inputs([read_image(path)], [question]), keep[i][keep[i] >= 0][None]
        own = logits_of(vlm, vlm.embed(alone, X[i:i + 1], mine))[:, 0]  # (8, V): prefill and decoding
        torch.testing.assert_close(logits[:, i], own, atol=1e-9, rtol=0)
        assert answers[i] == vlm.generate(alone, X[i:i + 1], mine, max_new_tokens=8)[0]


def test_threshold_from_the_command_line(tmp_path, coco, capsys):
    out = tmp_path / "out"
    assert tiny(coco, out, "--budget", "batch") == 0
    assert (err := capsys.readouterr().err) and "Traceback" not in err
    settings = json.loads((out / "pruner.json").read_text())
    assert settings["settings"]["budget"] == "batch" and list(settings["thresholds"])[0] == "10"
    assert settings["keep"] == "~20", "a pooled pruner is deployed by its threshold"
    ask = (EXAMPLES[0], "How many shapes are there?", "--pruner", out, "--device", "cpu", "--json")
    told = lambda: json.loads(capsys.readouterr().out.splitlines()[-1])
    T = settings["thresholds"]["20"]["threshold"]
    assert run(infer.main, *ask, "--keep", "~20") == 0 == run(infer.main, *ask, "--threshold", T)
    said = capsys.readouterr().out.splitlines()
    first, second = (json.loads(said[i]) for i in (2, 5))
    vlm = load(TINY)
    z = standardised(infer.load_pruner(out)[0](vlm.encode(vlm.inputs([read_image(EXAMPLES[0])], ["?"]))))
    assert first["kept"] == second["kept"] == (z[0] > T).nonzero().flatten().tolist()
    assert run(infer.main, *ask, "--threshold", 1e6) == 0 and told()["kept"] == [z[0].argmax().item()]
    answers = tmp_path / "a.jsonl"
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(
        {"question_id": i, "image": p.name, "text": "How many shapes are there?"}) + "\n" for i, p in enumerate(EXAMPLES)))
    assert run(infer.main, "--questions", tmp_path / "q.jsonl", "--images", EXAMPLES[0].parent, "--answers", answers,
               *ask[2:6], "--threshold", T) == 0
    row = json.loads(answers.read_text().splitlines()[0])
    assert row["text"] == first["answer"] and row["metadata"]["threshold"] == T and "keep" not in row["metadata"]
    capsys.readouterr()
    for wrong, cure in ((("--keep", "~17"), "~10, ~15, ~20"), (("--keep", "5", "--threshold", "1"), "give one"),
                        (("--keep", "~"), "~10, ~15, ~20"), (("--threshold", "nan"), "finite")):
        assert run(infer.main, *ask, *wrong) == 2
        assert cure in (err := capsys.readouterr().err.splitlines())[-1] and err[-1].startswith("error: ")
    for bad in (math.nan, None, "1.6", 10 ** 400):
        settings["thresholds"]["20"]["threshold"] = bad
        (out / "pruner.json").write_text(json.dumps(settings))
        assert run(infer.main, *ask, "--keep", "~20") == 2 and (err := capsys.readouterr().err).startswith("error: "), bad
    del settings["thresholds"]
    (out / "pruner.json").write_text(json.dumps(settings))
    assert run(infer.main, *ask, "--keep", "~20") == 2 and "no thresholds" in capsys.readouterr().err
    settings |= {"thresholds": {"20": {"threshold": 1.0}}, "tokens": 576}
    (out / "pruner.json").write_text(json.dumps(settings))
    assert run(infer.main, *ask, "--keep", "~20") == 2 and "576" in capsys.readouterr().err
    assert tiny(coco, out, "--budget", "batch", "--accumulate", 2, "--resume") == 2
    assert "--accumulate times processes 2" in capsys.readouterr().err
    assert tiny(coco, tmp_path / "one", "--budget", "batch", "--accumulate", 4) == 2 and "raise --batch" in capsys.readouterr().err
    assert tiny(coco, tmp_path / "one", "--budget", "batch", "--no-standardise") == 2 and "common scale" in capsys.readouterr().err


def test_uniform_grid_keeps_exactly_k():
    X = torch.zeros(2, 144, 1)
    assert bench.uniform_grid(X, 16)[0].tolist() == [12 * y + x for y in (1, 4, 7, 10) for x in (1, 4, 7, 10)]
    for K in range(1, 145):
        keep = bench.uniform_grid(X, K)
        assert keep.shape == (2, K) and (keep.diff(dim=1) > 0).all() and keep.max() < 144


def test_what_others_choose_by(vlm, scene):
    """DivPrune's greedy choice, pooling and the class token's attention, each against its plain definition."""
    inputs, X = scene
    far = 1 - F.cosine_similarity(X[0][:, None], X[0][None], dim=-1)
    far.fill_diagonal_(torch.inf)
    kept = [far.amin(1).argmax().item()]
    while len(kept) < 9:
        rest = [i for i in range(144) if i not in kept]
        kept.append(max(rest, key=lambda i: min(far[i, j].item() for j in kept)))
    assert bench.max_min_diversity(X, 9)[0].tolist() == sorted(kept)
    pooled, keep = bench.average_pooling(X, 16)
    cell = X[1].view(12, 12, -1)[3:6, 6:9].mean((0, 1))  # row 1, column 2 of 4 x 4
    torch.testing.assert_close(pooled[1, keep[1, 6]], cell.float().to(X.dtype), atol=1e-5, rtol=1e-5)
    assert keep[0].tolist() == bench.uniform_grid(X, 16)[0].tolist()
    stock = LlavaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float64, attn_implementation="eager")
    maps = stock.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    torch.testing.assert_close(bench.cls_attention(vlm, inputs).double(), maps[-2].mean(1)[:, 0, 1:], atol=1e-6, rtol=1e-4)


def test_bench_counts_and_measures(tmp_path, capsys):
    config = AutoConfig.for_model(**{"model_type": "llava"})  # LLaVA-1.5-7B
    counted = bench.prefill_flops(SimpleNamespace(model=SimpleNamespace(config=config)), 671)
    assert counted / 1e12 == pytest.approx(8.927, abs=1e-3), "METHOD: 576 + 95 tokens"
    assert run(bench.main, "speed", "--model", TINY, "--repeats", 1, "--keep", 36, "--json", tmp_path / "speed.json",
               "--device", "cpu") == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measured == json.loads((tmp_path / "speed.json").read_text())
    rows = measured["speed"]["rows"]
    assert rows["keep 36"]["cache_bytes"] / rows["all 144"]["cache_bytes"] == pytest.approx((36 + 95 + 1) / (144 + 95 + 1))
    assert rows["keep 36"]["tflops"] < 0.6 * rows["all 144"]["tflops"]
    assert all(rows[name][stage]["median"] > 0 for name in rows for stage in ("encode", "project", "prefill", "decode"))


def test_bench_budgets_compares_at_equal_counts(monkeypatch, capsys):
    """With the shipped pruner in every role: top-K keeps K; at K = 16 the threshold keeps about as many."""
    monkeypatch.setattr(study, "train_variants", lambda args, variants: {(v, 0): ROOT / "data/shapes/pruner" for v in variants})
    monkeypatch.setattr(study, "read_questions", lambda path, real=study.read_questions: real(path)[:100])
    table = study.budgets(SimpleNamespace(device="cpu", seeds=1, steps=None))
    assert set(table["retention"]) == {"image, top-K", "image, threshold", "batch, top-K",
                                       "batch, threshold", *(f"only {K}, top-K" for K in (8, 16, 32, 48))}
    for way, at in table["retention"].items():
        for K, cell in at.items():
            assert cell["kept"][0] == pytest.approx(int(K), rel=0 if "top-K" in way else 0.2), (way, K)
    assert list(table["retention"]["only 32, top-K"]) == ["32"]
    assert table["retention"]["image, top-K"]["48"]["retention"][0] > table["retention"]["image, top-K"]["8"]["retention"][0]
    kept = table["by_shapes"]["image"]
    assert kept["one"] == table["by_shapes"]["batch"]["one"] and kept["one"]["p10"] <= kept["one"]["mean"] <= kept["one"]["p90"]
    assert "by number of shapes" in capsys.readouterr().out


def test_bench_trains_again_when_flags_defaults_or_type_differ(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(study.subprocess, "run", lambda command, **_: trained.append(command[-1]) or SimpleNamespace(returncode=0))
    args = SimpleNamespace(steps=3, seeds=1, runs=tmp_path, device="cpu", dtype="float32", jobs=1)
    again = lambda flag="image", **new: study.train_variants(SimpleNamespace(**{**vars(args), **new}), {"a, b": ["--budget", flag]})
    assert again() == again() == {("a, b", 0): tmp_path / "a-b-0"} and trained == ["image"]
    again("batch")
    again("batch", dtype="bfloat16")
    again("batch", dtype="bfloat16", steps=4)
    assert trained == ["image", "batch", "batch", "batch"]
    monkeypatch.setitem(train.SHAPES, "lr", 1.0)
    again("batch", dtype="bfloat16", steps=4)
    assert len(trained) == 5


def test_accuracy_by_a_threshold_below_every_score_is_that_of_all_tokens():
    rows = bench.read_questions(shapes.prepare() / "questions.jsonl")[:50]
    scorer, settings = infer.load_pruner(ROOT / "data/shapes/pruner")
    settings["thresholds"]["1"] = {"threshold": -1e6}
    table = bench.accuracy_table(load(TINY), scorer, settings, rows, ["~1", 1])
    assert list(table) == ["all 144", "scorer ~1", "random 1", "uniform 1", "scorer 1"]
    assert table["scorer ~1"] == table["all 144"] != table["random 1"] != table["scorer 1"]


def test_ceiling_chooses_better_than_chance(monkeypatch):
    """Ten pictures, ten steps: five questions share a choice, and it suits captions and answers better than chance."""
    monkeypatch.setattr(study, "read_questions", lambda path, real=study.read_questions: real(path)[:50])
    kept = {}

    def answer(vlm, rows, choices):
        if "captions" in choices:
            pictures, drawn = [read_image(row["image"]) for row in rows], torch.Generator().manual_seed(0)
            told = [shapes.caption(shapes.draw_scene(f"test-{i // 5}")[1], random.Random(i)) for i in range(50)]
            X = vlm.encode(vlm.inputs(pictures, ["?"] * 50))
            kept.update({name: choose(X, {}) for name, choose in choices.items()})
            kept["chance"] = select(torch.rand(50, 144, generator=drawn), 16)
            for texts, names in ((([row["text"] for row in rows], [row["label"] for row in rows]), ["answers"]),
                                 (([train.PROMPT] * 50, told), ["captions", "scorer, these 50"])):
                with torch.no_grad():
                    inputs = vlm.inputs(pictures, *texts)
                    loss = {name: vlm.loss(inputs, X, kept[name]).item() for name in ("chance", *names)}
                assert max(loss[name] for name in names) < 0.8 * loss["chance"], loss
        else:  # the pruner on what it was trained on
            assert len(rows) == 1500 and {row["image"].parent.name for row in rows} == {"train"}
        return {name: {"all": [True] * 50} for name in choices}
    monkeypatch.setattr(study, "right_or_wrong", answer)
    study.ceiling(SimpleNamespace(device="cpu", keep=None, steps=10))
    assert kept["all"] is None
    for name in ("captions", "answers", "scorer", "scorer, these 50"):
        assert kept[name].shape == (50, 16) and (kept[name].view(10, 5, 16) == kept[name].view(10, 5, 16)[:, :1]).all()


def test_bench_accuracy_from_the_command_line(tmp_path, capsys):
    """The scorer's row is what infer.py answers, for a threshold too; the other rows keep as many."""
    path, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    path.write_text("".join((shapes.prepare() / "questions.jsonl").read_text().splitlines(True)[:50]))
    some = ("--questions", path, "--images", shapes.HERE, *SHIPPED)
    assert run(bench.main, "accuracy", "--keep", "~4", "8", *some) == 2
    assert "give one of these" in capsys.readouterr().err.splitlines()[-1]
    assert run(bench.main, "accuracy", "--keep", "~8", "12", *some) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"]
    others = ("random", "uniform", "norm", "diversity", "pooling", "CLS")
    assert list(measured) == ["all 144", "scorer ~8", *(f"{name} 8" for name in others),
                              "scorer 12", *(f"{name} 12" for name in others)]
    assert run(infer.main, "--answers", answers, "--keep", "~8", *some) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert measured["scorer ~8"] == {kind: figures[kind]["accuracy"] for kind in measured["scorer ~8"]}


def test_bench_accuracy_where_pictures_vary_in_tokens(folder, monkeypatch):
    vlm, kept = load(folder), {}
    if vlm.tokens is not None:
        return
    rows = [dict(image=image, text=QUESTIONS[i], label="?", category="all") for i, image in enumerate(EXAMPLES[:3])]
    images = {path: shapes.draw_scene(f"test-{i}")[0].resize(SHAPES[i]) for i, path in enumerate(EXAMPLES[:3])}
    monkeypatch.setattr(bench, "read_image", images.get)
    generate = vlm.generate
    monkeypatch.setattr(vlm, "generate", lambda inputs, X, keep, **options: kept.setdefault(len(kept), (inputs, keep)) and
                        generate(inputs, X, keep, **options))
    table = bench.accuracy_table(vlm, Scorer(vlm.width).eval(), {}, rows, ["25%"], seeds=2)
    assert list(table) == ["all", "scorer 25%", "random 25%"] and kept.pop(0)[1] is None and len(kept) == 3
    for inputs, keep in kept.values():
        N = inputs["valid"].sum(1)
        assert ((keep >= 0).sum(1) == (N / 4).round()).all() and (keep < N[:, None]).all(), "no padding"
    assert not kept[2][1].equal(kept[3][1]), "each seed draws for itself"


def test_bootstrap_is_a_binomial_interval():
    full = {"a": [1.0] * 400, "b": [1.0] * 100}
    assert bench.bootstrap(full, full) == (100, 100)
    low, high = bench.bootstrap({"a": [1.0] * 320 + [0.0] * 80, "b": full["b"]}, full)
    assert (low, high) == pytest.approx((90 - 1.96, 90 + 1.96), abs=0.3), "half of 80 ± 1.96 · 100 · √(0.8 · 0.2 / 400)"


def test_ablations_are_judged_by_the_deployed_path(monkeypatch):
    """With the shipped pruner as every run, the table says what infer.py keeps at its top K."""
    monkeypatch.setattr(study, "train_variants", lambda args, wanted: {(v, s): ROOT / "data/shapes/pruner" for v in wanted
                                                                       for s in (0, 1)})
    monkeypatch.setattr(study, "read_questions", lambda path, real=study.read_questions: real(path)[:50])
    table = study.ablations(SimpleNamespace(device="cpu", keep=["8"], seeds=2, variants=["papers"]))
    scorer, settings = infer.load_pruner(ROOT / "data/shapes/pruner")
    rows = study.read_questions(shapes.prepare() / "questions.jsonl")
    answered = bench.accuracy_table(load(TINY), scorer, settings, rows, [8])
    assert table["papers"]["retention"] == {8: [bench.retention(answered["scorer 8"], answered["all 144"])] * 2}
    end = settings["curve"][-1]
    assert {k: table["papers"][k] for k in train.LOSSES} == {k: end[k] for k in train.LOSSES} and end["hard_loss"] > 0


def test_the_pictures_show_what_infer_keeps(capsys):
    assert run(infer.main, EXAMPLES[0], "What color is the star?", "--json", *SHIPPED) == 0
    assert draw.shipped(EXAMPLES[0])[3][0].tolist() == json.loads(capsys.readouterr().out.splitlines()[-1])["kept"]


def test_the_closing_table_is_of_what_infer_deploys(tmp_path, coco, capsys):
    path = tmp_path / "questions.jsonl"
    rows = map(json.loads, (shapes.prepare() / "questions.jsonl").read_text().splitlines()[:40])
    path.write_text("".join(json.dumps({**row, "image": str(shapes.HERE / row["image"])}) + "\n" for row in rows))
    for budget, keep in (("batch", "~20"), ("image", 20)):
        assert tiny(coco, tmp_path / budget, "--budget", budget, "--questions", path) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["keep"] == keep and {"retention_random", "retention_uniform", "accuracy_full"} < set(result)
        assert list(result["by_category"]) == ["all 144", f"scorer {keep}", "random 20", "uniform 20"]
        assert run(infer.main, "--questions", path, "--answers", tmp_path / f"{budget}.jsonl", "--pruner", tmp_path / budget,
                   "--device", "cpu") == 0
        figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
        assert result["by_category"][f"scorer {keep}"] == {
            kind: figures[kind]["accuracy"] for kind in result["by_category"]["all 144"]}


def test_the_shipped_pruner_beats_random_and_uniform():
    rows = [dict(image=shapes.HERE / row["image"], **{k: row[k] for k in ("text", "label", "category")})
            for row in map(json.loads, (shapes.prepare() / "questions.jsonl").read_text().splitlines())][:500]
    scorer, settings = infer.load_pruner(ROOT / "data/shapes/pruner")
    table = bench.accuracy_table(load(TINY), scorer, settings, rows, [16])
    kept = {name: bench.retention(by_category, table["all 144"]) for name, by_category in table.items()}
    assert min(table["all 144"].values()) >= 0.97
    assert kept["scorer 16"] > 92 and kept["scorer 16"] > kept["uniform 16"] + 1 > kept["random 16"] + 1
    assert kept["random 16"] < 85


# --- the command line -----------------------------------------------------------------------------------------------

@pytest.fixture
def coco(tmp_path):
    """A COCO captions file of the six example scenes, as a dictionary and a path."""
    content = {"images": [dict(id=i, file_name=p.name, height=96, width=96) for i, p in enumerate(EXAMPLES)],
               "annotations": [dict(id=i, image_id=i, caption="Two shapes.") for i in range(len(EXAMPLES))]}
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(content))
    return content, path


def run(main, *argv):
    """main() under these arguments; the exit code."""
    old, sys.argv = sys.argv, [main.__module__, *map(str, argv)]
    try:
        cli(main)
        return 0
    except SystemExit as e:
        return e.code
    finally:
        sys.argv = old


def fingerprint(model):
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).hexdigest()


def test_train_then_infer(tmp_path, coco, capsys, monkeypatch):
    frozen = []
    real_load = train.load
    monkeypatch.setattr(train, "load", lambda *a: frozen.append(real_load(*a)) or frozen[-1])
    out = tmp_path / "out"
    assert run(train.main, "--data", coco[1], "--images", EXAMPLES[0].parent, "--model", TINY, "--steps", 3, "--batch", 4,
               "--keep", 20, "--out", out, "--device", "cpu") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["keep"] == 20
    assert fingerprint(frozen[0].model) == fingerprint(load(TINY).model), "the VLM must not change"
    settings = json.loads((out / "pruner.json").read_text())
    assert settings["model"] == "data/shapes/llava" and settings["keep"] == 20 and settings["curve"][-1]["step"] == 2
    question = (EXAMPLES[0], "How many shapes are there?", "--pruner", out, "--json", "--device", "cpu")
    assert run(infer.main, *question, "--show", tmp_path / "kept.png") == 0
    said, err = capsys.readouterr()
    result = json.loads(said.splitlines()[-1])
    assert len(result["kept"]) == 20 and result["kept"] == sorted(result["kept"]) and result["tokens"] == 144
    assert "data/shapes/llava" in err.splitlines()[0] and Image.open(tmp_path / "kept.png").size[0] > 1000
    assert run(infer.main, *question, "--keep", "all") == 0
    stock = load(TINY)
    inputs = stock.inputs([read_image(EXAMPLES[0])], [question[1]])
    ids = stock.model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1]:]
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])["answer"]
    assert answer == stock.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


# --- a run that is stopped, split or disturbed ----------------------------------------------------------------------

def tiny(coco, out, *argv):
    """A run of six steps on the example scenes; the exit code."""
    return run(train.main, "--data", coco[1], "--images", EXAMPLES[0].parent, "--model", TINY, "--keep", "10:40", "--steps", 6,
               "--batch", 4, "--recipe", "ours", "--budget", "image", "--eval-every", 2, "--save-every", 1, "--device", "cpu", "--out", out,
               *argv)


def in_a_process(f):
    """f() in a forked process with one thread; its exit code, or minus the signal that killed it."""
    child = os.fork()
    if not child:
        code = 99
        try:
            torch.set_num_threads(1)
            code = f()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def later(f, calls, then):
    """f, which calls then() instead when it has been called so many times."""
    count = []

    def wrapped(*a, **kw):
        count.append(1)
        return then(*a, **kw) if len(count) == calls else f(*a, **kw)
    return wrapped


def log_of(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "waiting")} for row in rows]


def test_killed_three_times_it_ends_as_if_it_had_not_been(tmp_path, coco, monkeypatch):
    assert in_a_process(lambda: tiny(coco, tmp_path / "whole")) == 0
    kills = sorted(random.sample(range(1, 6), 3))  # the steps at which it dies
    real, fsync = train.with_noise, os.fsync
    for i, step in enumerate(kills):
        in_a_write, reached = i == 1, []

        def die_in_the_step(graph, g, inputs, seed):
            reached.extend([1] * (g[0] == 4 * step))
            return real(graph, g, inputs, seed) if in_a_write or not reached else os.kill(os.getpid(), signal.SIGKILL)

        with monkeypatch.context() as patch:
            patch.setattr(train, "with_noise", die_in_the_step)
            patch.setattr(os, "fsync", lambda f: os.kill(os.getpid(), signal.SIGKILL) if reached else fsync(f))
            code = in_a_process(lambda: tiny(coco, tmp_path / "killed", *["--resume"] * (i > 0)))
            assert code == -signal.SIGKILL, kills
    assert in_a_process(lambda: tiny(coco, tmp_path / "killed", "--resume", "--workers", 1)) == 0
    for name in ("scorer", "denoiser", "checkpoint"):
        whole, killed = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "killed"))
        assert whole.keys() == killed.keys() and all(whole[k].equal(killed[k]) for k in whole), (name, kills)
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "killed") and len(log_of(tmp_path / "whole")) == 4


def test_processes_and_accumulation_are_the_whole_batch(tmp_path, coco):
    """Two processes, and four parts one by one: the gradients (Adam's moments) of the whole batch, to rounding."""
    argv = ["--data", coco[1], "--images", EXAMPLES[0].parent, "--model", TINY, "--steps", 2, "--batch", 4,
            "--keep", 20, "--eval-every", 1, "--device", "cpu", "--out"]
    for i, annotation in enumerate(coco[0]["annotations"]):
        annotation["caption"] = "Shapes:" + " red" * 3 * i  # parts of different word counts
    coco[1].write_text(json.dumps(coco[0]))
    two = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                            ROOT / "train.py", *map(str, argv), tmp_path / "two"],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run(train.main, *argv, tmp_path / "one") == run(train.main, *argv, tmp_path / "four", "--accumulate", 4) == 0
    out, err = two.communicate()
    assert two.returncode == 0 and len(out.splitlines()) == 2, err
    assert "Traceback" not in err and "arning" not in err.replace("warning: hardness", "") and err.count("keep 20") == 1, "one process speaks"
    one = load_file(tmp_path / "one/checkpoint.safetensors")
    for other in ("two", "four"):
        moments = load_file(tmp_path / other / "checkpoint.safetensors")
        scale = max(v.abs().max() for k, v in one.items() if "exp_avg_sq" not in k and "adam" in k and "step" not in k)
        for k in one:
            if k.endswith("exp_avg"):
                assert (one[k] - moments[k]).abs().max() < 1e-4 * scale, (other, k)
        for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / other)):
            assert a == pytest.approx(b, rel=2e-4)


def test_signals_end_a_run_after_the_step(tmp_path, coco, monkeypatch, capsys):
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with monkeypatch.context() as patch:
            words = train.words_in
            patch.setattr(train, "words_in", later(words, 2 + 1, lambda i: os.kill(os.getpid(), number) or words(i)))
            assert tiny(coco, tmp_path / "out", "--overwrite", "--save-every", 100) == code
        assert "--resume" in capsys.readouterr().err.splitlines()[-1]
        assert files.read_checkpoint(tmp_path / "out/checkpoint.safetensors")[1]["step"] == 2
    assert tiny(coco, tmp_path / "out", "--resume") == 0


def test_a_run_is_not_lost(tmp_path, coco, monkeypatch, capsys):
    """Not to another run, other settings, a full disk, or a loss that is no number."""
    out = tmp_path / "out"
    error = lambda: capsys.readouterr().err.splitlines()[-1]
    assert tiny(coco, out, "--resume") == 2 and "--resume" in error()
    assert tiny(coco, out, "--steps", 1) == 0
    state = {f.name: f.read_bytes() for f in out.iterdir()}
    assert tiny(coco, out) == 2 and "--overwrite" in error()
    for flag, value in (("--keep", 19), ("--seed", 1), ("--batch", 5), ("--model", ROOT / "assets"), ("--lr", 1),
                        ("--recipe", "papers")):  # which also sets flags that the user never gave
        assert tiny(coco, out, "--steps", 1, "--resume", flag, value) == 2 and error().startswith(f"error: {flag}")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no file may become larger: a full disk, nearly
    try:
        assert tiny(coco, out, "--overwrite") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "checkpoint.safetensors: cannot be written" in error()
    assert {f.name: f.read_bytes() for f in out.iterdir()} == state
    (out / "checkpoint.safetensors").write_bytes(state["checkpoint.safetensors"][:-9])
    assert tiny(coco, out, "--resume", "--steps", 1) == 2 and "checkpoint.safetensors" in error()
    assert tiny(coco, out, "--overwrite", "--lr", 1e30) == 2 and "step 0: the losses on held-out captions" in error()
    words = train.words_in  # called in every step, and in two evaluations before the fourth
    monkeypatch.setattr(train, "words_in", later(words, 6, lambda inputs: words(inputs) * math.nan))
    assert tiny(coco, out, "--overwrite", "--save-every", 2, "--steps", 20) == 2
    message = error()
    assert "step 3: the loss is nan" in message and "before step 2" in message
    assert files.read_checkpoint(out / "checkpoint.safetensors")[1]["step"] == 2


@pytest.mark.parametrize("budget", ["image", "batch"])
def test_with_our_recipe_a_hard_alpha_is_deployment_and_without_presence_it_is_not(tmp_path, coco, budget):
    """The training graph at tau -> 0, noise and all, against the path in use, which shares none of it."""
    gap = {}
    for name, flags in (("ours", []), ("absent", ["--no-presence"]), ("papers", ["--recipe", "papers"])):
        assert tiny(coco, tmp_path / name, *flags, "--budget", budget, "--steps", 2) == 0
        gap[name] = [abs(row["hard_loss"] - row["deployed_loss"]) for row in log_of(tmp_path / name)]
    assert max(gap["ours"]) < 2e-5 and min(gap["absent"]) > 1e-2 and min(gap["papers"]) > 1e-2
    settings = json.loads((tmp_path / "papers/pruner.json").read_text())["settings"]
    assert settings["standardise"] == (budget == "batch"), "a pool needs a common scale, by either recipe"


def test_each_part_of_our_recipe_can_be_left_out(tmp_path, coco):
    mapped = lambda out: load_file(out / "scorer.safetensors")["map"]
    for part in ("whiten", "standardise", "presence"):
        assert tiny(coco, tmp_path / part, f"--no-{part}", "--steps", 1) == 0
        settings = json.loads((tmp_path / part / "pruner.json").read_text())["settings"]
        assert {p: settings[p] for p in ("whiten", "standardise", "presence")} == {
            p: p != part for p in ("whiten", "standardise", "presence")}
        assert mapped(tmp_path / part).equal(torch.eye(128)) == (part == "whiten")
    assert tiny(coco, tmp_path / "ours", "--steps", 1) == 0
    losses = {log_of(tmp_path / run)[0]["soft_loss"] for run in ("ours", "whiten", "standardise", "presence")}
    assert len(losses) == 4, "each changes what is trained"


def test_gumbel_draws_the_same_tokens_for_soft_and_hard(tmp_path, coco):
    assert tiny(coco, tmp_path, "--gate", "gumbel", "--denoiser", "none", "--steps", 2) == 0
    assert all(row["soft_loss"] == row["hard_loss"] for row in log_of(tmp_path)), "only tau, which moves no choice, differs"


def test_a_pool_that_keeps_all_needs_no_threshold(tmp_path, coco):
    for keep in ("all", "144"):
        assert tiny(coco, tmp_path, "--budget", "batch", "--keep", keep, "--steps", 1, "--overwrite") == 0
        assert json.loads((tmp_path / "pruner.json").read_text())["keep"] == 144


def test_a_pool_of_nan_has_no_threshold():
    assert math.isnan(threshold(torch.full((2, 9), math.nan), 4)), "so that train.py can say that it diverged"


def test_early_stopping_keeps_the_best(tmp_path, coco, monkeypatch, capsys):
    losses, at = iter([9.0, 1.0, 2.0, 0.5, 3.0, 3.5]), []
    monkeypatch.setattr(train, "held_out_losses",
                        lambda graph, *_: at.append(graph[1].head.weight.clone()) or dict(full=0.1, soft=1.0, hard=1.5, deployed=next(losses)))
    assert tiny(coco, tmp_path, "--steps", 20, "--anneal", 0.2, "--eval-every", 2, "--patience", 2) == 0
    out, err = capsys.readouterr()
    assert "stopped before step 11" in err and json.loads(out.splitlines()[-1])["step"] == 6
    assert infer.load_pruner(tmp_path)[0].head.weight.equal(at[3]) and infer.load_pruner(tmp_path)[1]["best_step"] == 6
    log = log_of(tmp_path)
    assert [row["step"] for row in log] == [0, 2, 4, 6, 8, 10] and [row["deployed_loss"] for row in log][-1] == 3.5
    assert {"tau", "lr", "loss", "full_loss", "soft_loss", "hard_loss", "hardness"} < log[0].keys() and log[0]["tau"] == 1
    colors = {color for _, color in Image.open(tmp_path / "curve.png").convert("RGB").getcolors(10 ** 6)}
    assert {(255, 0, 0), (0, 128, 0), (0, 0, 255)} <= colors
    files.loss_chart([dict(step=0, soft_loss=1.0, deployed_loss=2.0), log[-1]])  # a run from before hard and full were logged
    annealing = [dict(step=s, deployed_loss=x) for s, x in ((0, 1), (1, 2))]
    assert train.best_of(annealing, settled=2)["step"] == 1, "a low loss does not count yet"


def test_an_unreadable_image_is_skipped_and_two_of_six_stop_the_run(tmp_path, coco, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for p in EXAMPLES:
        (images / p.name).write_bytes(p.read_bytes())
    good, words = EXAMPLES[1].read_bytes(), [images / EXAMPLES[i].name for i in (1, 3)]
    words[0].write_bytes(good[:len(good) // 2])
    argv = ["--images", images, "--steps", 1, "--batch", 5, "--workers", 2, "--overwrite"]
    assert tiny(coco, tmp_path / "out", *argv) == 0
    err = capsys.readouterr().err
    assert f"unreadable images, 1, each replaced by the next: {words[0]}" in err
    words[1].write_bytes(b"")
    assert tiny(coco, tmp_path / "out", *argv) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "2 of 5" in err and str(words[0]) in err and str(words[1]) in err
    assert files.read_checkpoint(tmp_path / "out/checkpoint.safetensors")[1]["step"] == 1


def test_half_precision_runs_to_the_end(tmp_path, coco):
    assert tiny(coco, tmp_path / "full", "--steps", 2) == 0
    for dtype in ("bfloat16", "float16"):
        out = tmp_path / dtype
        assert tiny(coco, out, "--dtype", dtype, "--steps", 2, "--checkpointing", "--accumulate", 2) == 0
        assert all(t.dtype == torch.float32 for t in load_file(out / "checkpoint.safetensors").values())
        for half, full in zip(log_of(out), log_of(tmp_path / "full")):
            assert half["deployed_loss"] == pytest.approx(full["deployed_loss"], rel=0.03)
            assert half["loss"] == pytest.approx(full["loss"], rel=0.2)  # other noise: L is unique up to a rotation


# --- bad input ------------------------------------------------------------------------------------------------------

def test_odd_images_work(tmp_path, vlm):
    picture = read_image(EXAMPLES[0])
    rotated = Image.Exif()
    rotated[0x0112] = 6
    grey = picture.convert("L").tobytes()
    grey16 = Image.frombytes("I;16", (96, 96), struct.pack(f"<{len(grey)}H", *(257 * v for v in grey)))
    palette = picture.quantize(16)
    odd = {"cmyk.jpg": picture.convert("CMYK"), "palette.png": palette, "grey16.png": grey16, "grey16.tif": grey16,
           "one.png": Image.new("RGB", (1, 1), "red"), "strip.png": Image.new("RGB", (4000, 10), "red"),
           "column.png": Image.new("1", (1, 50)), "alpha.png": picture.convert("RGBA")}
    for name, image in odd.items():
        image.save(tmp_path / name, **({"transparency": bytes(range(16))} if name == "palette.png" else {}))
    picture.crop((0, 0, 96, 48)).save(tmp_path / "turned.jpg", exif=rotated)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = {p.name: read_image(p) for p in sorted(tmp_path.iterdir())}
        inputs = vlm.inputs(list(images.values()), ["?"] * len(images))
    assert inputs["pixel_values"].shape == (len(odd) + 1, 3, 96, 96) and inputs["pixel_values"].isfinite().all()
    assert images["turned.jpg"].size == (48, 96)
    for name, of, error in (("cmyk.jpg", picture, 3), ("palette.png", palette, 0), ("alpha.png", picture, 0)):
        difference = [abs(a - b) for a, b in zip(images[name].tobytes(), of.convert("RGB").tobytes())]
        assert sum(difference) / len(difference) <= error, name
    for name in ("grey16.png", "grey16.tif"):
        assert images[name].convert("L").tobytes() == grey


def test_bad_images_are_named(tmp_path):
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    png = lambda side: (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
                        + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    good = EXAMPLES[0].read_bytes()
    for name, content in (("truncated.jpg", good[:len(good) // 2]), ("empty.jpg", b""), ("text.png", b"no picture"),
                          ("bomb.png", png(20_000)), ("large.png", png(10_000))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: cannot be read as an image") as e, warnings.catch_warnings():
            warnings.simplefilter("error")
            read_image(tmp_path / name)
        assert "\n" not in str(e.value) and ("bomb" in str(e.value)) == (name in ("bomb.png", "large.png"))


def test_bad_tensors_are_named(tmp_path):
    write = lambda tensors: save_file(tensors, tmp_path / "scorer.safetensors")
    files.write(tmp_path / "pruner.json", {"model": str(TINY), "width": 64, "keep": 16})
    good = {k: v.clone() for k, v in Scorer(64).state_dict().items()}
    for change, words in ((lambda t: t.pop("head.weight"), "head.weight"),
                          (lambda t: t.update(more=torch.ones(1)), "more"),
                          (lambda t: t.update({"norm.weight": torch.ones(65)}), "norm.weight"),
                          (lambda t: t["norm.bias"].fill_(math.nan), "norm.bias")):
        tensors = {k: v.clone() for k, v in good.items()}
        change(tensors)
        write(tensors)
        with pytest.raises(InputError, match=re.escape(words)) as e:
            infer.load_pruner(tmp_path)
        assert "scorer.safetensors" in str(e.value) and "\n" not in str(e.value)
    (tmp_path / "scorer.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="scorer.safetensors"):
        infer.load_pruner(tmp_path)


BAD_TRAINING = {  # what is wrong: (change to the COCO file, arguments, words that the message must hold)
    "no file": (None, ["--data", "nowhere.json"], "nowhere.json"),
    "no annotations": (lambda c: c.pop("annotations"), [], "annotations"),
    "no images": (lambda c: c.update(images=[]), [], "images"),
    "unknown image id": (lambda c: c["annotations"][0].update(image_id=99), [], "image_id"),
    "image not there": (lambda c: c["images"][0].update(file_name="gone.jpg"), [], "gone.jpg"),
    "not UTF-8": ("Zwei Würfel".encode("latin-1"), [], "UTF-8"),
    "deep": (b"[" * 200_000, [], "JSON"),
    "huge but wrong": (json.dumps([{"id": i} for i in range(200_000)]).encode(), [], "images"),
    "rows of the wrong kind": (lambda c: c.update(images=list(range(9))), [], "images"),
    "duplicate image id": (lambda c: c["images"][1].update(id=0), [], "id 0 twice"),
    "duplicate annotation id": (lambda c: c["annotations"][1].update(id=0), [], "id 0 twice"),
    "no caption": (lambda c: c["annotations"][3].update(caption=" "), [], "id 3: caption"),
    "a number as caption": (lambda c: c["annotations"][3].update(caption=3), [], "id 3: caption"),
    "long caption": (lambda c: c["annotations"][2].update(caption="red " * 2000), [], "00002.jpg"),
    "image token": (lambda c: c["annotations"][2].update(caption="an <image> here"), [], "<image>"),
    "out of the folder": (lambda c: c["images"][0].update(file_name="../llava/config.json"), [], "../llava/"),
    "absolute path": (lambda c: c["images"][0].update(file_name="/etc/hosts"), [], "/etc/hosts"),
    "one image": (lambda c: c.update(annotations=c["annotations"][:1]), [], "two"),
    "K = 0": (None, ["--keep", 0], "--keep"),
    "K > N": (None, ["--keep", 145], "144"),
    "no such model": (None, ["--model", "./no/such/folder"], "no/such/folder"),
    "steps": (None, ["--steps", 0], "--steps"),
    "no end of tau": (None, ["--tau-start", "inf"], "--tau-start inf"),
    "out is a file": (None, ["--out", ROOT / "LICENSE"], "--out"),
    "batch in too many parts": (None, ["--batch", 2, "--accumulate", 3], "--accumulate"),
    "patience": (None, ["--patience", -1], "--patience"),
    "holds a run": (None, ["--out", ROOT / "data/shapes/pruner"], "--overwrite"),
    "no questions": (None, ["--questions", "none.jsonl"], "none.jsonl"),
}


@pytest.mark.parametrize("what", BAD_TRAINING)
def test_bad_training_input(what, tmp_path, coco, capsys):
    change, arguments, words = BAD_TRAINING[what]
    content, path = coco
    if isinstance(change, bytes):
        path.write_bytes(change)
    elif change:
        change(content)
        path.write_text(json.dumps(content))
    out = tmp_path / "out"
    out.mkdir()
    (out / "pruner.json").write_text("mine")
    argv = ["--data", path, "--images", EXAMPLES[0].parent, "--model", TINY, "--steps", 1, "--out", out,
            *(["--overwrite"] if what != "holds a run" else []), *arguments]
    assert run(train.main, *argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert [f.name for f in out.iterdir()] == ["pruner.json"] and (out / "pruner.json").read_text() == "mine"


def test_bad_inference_input(tmp_path, capsys):
    text, other = tmp_path / "note.jpg", tmp_path / "other"
    text.write_text("no picture")
    other.mkdir()
    files.write(other / "scorer.safetensors", Scorer(64).state_dict())
    files.write(other / "pruner.json", {"model": str(TINY), "width": 64, "keep": 16})
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text('{"model_type": "bert"}')
    good = EXAMPLES[0]
    for argv, words in (([tmp_path / "gone.jpg"], "gone.jpg"), ([text], "note.jpg"), ([good, "--keep", 0], "--keep"),
                        ([good, "--keep", 145], "144"), ([good, "--keep", "some"], "--keep"),
                        ([good, "--pruner", tmp_path], "pruner.json"), ([good, "--pruner", other], "64 wide"),
                        ([good, "--model", bare], "bert"), ([good, "--model", tmp_path / "none"], "none"), ([good, "--show", tmp_path / "no" / "k.png"], "--show"),
                        ([good, "--device", "cuda:77"], "--device")):
        assert run(infer.main, argv[0], "Where is it?", "--device", "cpu", *argv[1:]) == 2, argv
        err = capsys.readouterr().err.splitlines()
        assert err[-1].startswith("error: ") and words in err[-1] and len(err) <= 2, argv


@pytest.mark.parametrize("file", ["throttler.py", "denoiser.py"])
def test_demonstrations_print_what_their_docstrings_say(file):
    done = subprocess.run([sys.executable, ROOT / file], capture_output=True, text=True)
    example = re.search(rf"    \$ python {file}\n((?:    .*\n)+)", (ROOT / file).read_text()).group(1)
    assert textwrap.dedent(example) == done.stdout and done.stderr == "" and done.returncode == 0


@pytest.mark.parametrize("file", ["train.py", "infer.py", "bench.py"])
def test_help(file):
    done = subprocess.run([sys.executable, ROOT / file, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) > 5 and done.stderr == ""


# --- question files and chat ----------------------------------------------------------------------------------------

@pytest.fixture
def asked(tmp_path):
    """A question file about the six example scenes, as rows and a path: repeated ids, prompts of three lengths."""
    rows = [dict(question_id=i // 2, image=EXAMPLES[i // 3].name, text=QUESTIONS[i % 3], label="yes" if i % 3 else "no",
                 category=f"kind {i % 2}") for i in range(3 * len(EXAMPLES))]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows, path


def test_question_file_in_order_and_as_one_by_one(asked, tmp_path, capsys, monkeypatch):
    rows, path = asked
    stock, (scorer, settings) = load(TINY), infer.load_pruner(ROOT / "data/shapes/pruner")
    T, encoded = settings["thresholds"]["16"]["threshold"], []
    monkeypatch.setattr(infer, "load", lambda *a: stock)
    encode = stock.encode
    monkeypatch.setattr(stock, "encode", lambda inputs: encoded.append(len(inputs["pixel_values"])) or encode(inputs))
    argv = ["--questions", path, "--images", EXAMPLES[0].parent, "--answers", tmp_path / "a.jsonl", "--device", "cpu",
            "--pruner", ROOT / "data/shapes/pruner"]
    assert run(infer.main, *argv, "--batch", 5) == 0
    assert sum(encoded) == len(EXAMPLES), "an image is encoded once, whatever is asked about it"
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [(a["question_id"], a["prompt"]) for a in answers] == [(r["question_id"], r["text"]) for r in rows]
    assert all(a.keys() == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"} for a in answers)
    assert len({a["answer_id"] for a in answers}) == len(rows) and answers[0]["metadata"]["threshold"] == T
    for row, answer in zip(rows, answers):
        inputs = stock.inputs([read_image(EXAMPLES[0].parent / row["image"])], [row["text"]])
        X = stock.encode(inputs)
        keep = select(scorer(X), count_above(standardised(scorer(X)), T))
        assert stock.generate(inputs, X, keep)[0] == answer["text"]
    assert told["figures"].keys() == {"kind 0", "kind 1", "all"} and told["figures"]["all"].keys() == {
        "accuracy", "precision", "recall", "f1", "yes"}
    # other settings, a file of another kind: refused and untouched, unless --overwrite
    before = (tmp_path / "a.jsonl").read_bytes()
    assert run(infer.main, *argv, "--keep", 20) == 2 and (tmp_path / "a.jsonl").read_bytes() == before
    assert "other settings" in capsys.readouterr().err.splitlines()[-1]
    assert run(infer.main, *argv, "--keep", 20, "--overwrite") == 0 and (tmp_path / "a.jsonl").read_bytes() != before
    before = path.read_bytes()
    assert run(infer.main, *argv, "--answers", path) == 2 and path.read_bytes() == before


def test_a_killed_question_file_goes_on_where_it_stopped(tmp_path):
    rows = [dict(question_id=i, text="?" * i) for i in range(12)]
    count = []

    def answer(left, kill_after=None):  # longest first, in batches of three
        order = list(range(len(left)))[::-1]
        for n, part in enumerate(order[at:at + 3] for at in range(0, len(left), 3)):
            if n == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            count.append(len(part))
            yield [(j, f"answer {left[j]['question_id']}") for j in part]

    def go(path, settings={"model": "m"}, **kw):
        return questions.answer_file(path, rows, settings, lambda left: answer(left, **kw))

    whole = go(tmp_path / "whole.jsonl")
    assert whole == [f"answer {i}" for i in range(12)]
    path, final = tmp_path / "killed.jsonl", (tmp_path / "whole.jsonl").read_bytes()
    child = os.fork()
    if not child:
        go(path, kill_after=2)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    left_behind = path.read_bytes()
    assert left_behind.count(b"\n") == 6 and b"answer 0" not in left_behind
    for cut in (0, 1, 30, 400):  # the sixth line whole, or cut off anywhere
        path.write_bytes(left_behind[:len(left_behind) - cut])
        count.clear()
        assert go(path) == whole and path.read_bytes() == final
        assert sum(count) == 12 - left_behind[:len(left_behind) - cut].count(b"\n")
    count.clear()
    assert go(path) == whole and path.read_bytes() == final and not count, "nothing is asked twice"
    with pytest.raises(InputError, match="other settings"):
        go(path, {"model": "another"})
    note = tmp_path / "note.txt"
    for text in ("a note", "a note\n", '{"a": 1}\n', ""):
        note.write_text(text)
        if text:
            with pytest.raises(InputError, match="no answer file"):
                go(note)
        assert note.read_text() == text


def test_pope_figures():
    """Counted by hand: 3 of 4 yes said yes, 2 of 6 no said yes. Only the first sentence counts, and capitals do."""
    said = ["Yes", "yes.", "Yes, a cat. No dog.", "No", "no", "There is not", "No, none.", "No. Yes", "NO", "none"]
    labels = ["yes"] * 4 + ["no"] * 6
    f = questions.figures(said, labels, yes_no=True)
    assert f == pytest.approx({"accuracy": 0.7, "precision": 0.6, "recall": 0.75, "f1": 2 / 3, "yes": 0.5})
    assert questions.figures(["no"], ["yes"], yes_no=True) == dict(accuracy=0, precision=0, recall=0, f1=0, yes=0)
    assert questions.figures(["Red.", "blue"], ["red", "green"]) == {"accuracy": 0.5}


def test_science_qa_and_mmbench_are_read_as_llava_does(tmp_path):
    picture = base64.b64encode(EXAMPLES[0].read_bytes()).decode()
    for name, suffix in (("mmbench_dev.tsv", questions.LETTER), ("mmbench_dev_cn.tsv", questions.LETTER_CN)):
        (tmp_path / name).write_text("index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\n"
                                     f'7\t"Which ""one""?"\tnan\tred\tblue\t\tx\tB\tcolour\t{picture}\n'
                                     f"8\tWhere?\tLook.\ta\tb\tc\td\t\tplace\t{picture}\n")
        first, second = questions.read_questions(tmp_path / name, need=("question_id", "image", "text"))
        assert first["text"] == 'Which "one"?\nA. red\nB. blue' + suffix and first["label"] == "B"
        assert second["text"] == "Look.\nWhere?\nA. a\nB. b\nC. c\nD. d" + suffix and "label" not in second
        assert second["question_id"] == 8 and second["image"] == EXAMPLES[0].read_bytes()
        assert suffix.strip() in (ROOT / "README.md").read_text()
    (tmp_path / "sqa.json").write_text(json.dumps([
        {"id": "4", "image": EXAMPLES[0].name, "conversations": [{"value": "<image>\nWhich?\nA. x\nB. y"}]},
        {"id": "5", "conversations": [{"value": "No picture?"}]}]))
    row, = questions.read_questions(tmp_path / "sqa.json", EXAMPLES[0].parent, need=("question_id", "image", "text"))
    assert row["text"] == "Which?\nA. x\nB. y" + questions.LETTER and row["prompt"] == "<image>\n" + row["text"]
    stock = load(TINY)
    assert all(text for part in infer.ask(stock, [first, second, row], lambda X, inputs: None) for _, text in part)


@pytest.mark.parametrize("K", [16, 144])
def test_the_images_cache_changes_nothing(vlm, scene, K):
    X = scene[1][:1]
    keep = select(X.norm(dim=-1), K) if K < 144 else None
    cache = infer.image_cache(vlm, vlm.inputs([read_image(EXAMPLES[0])], ["Another?"]), X, keep)
    for question in QUESTIONS:
        sequence = vlm.embed(vlm.inputs([read_image(EXAMPLES[0])], [question]), X, keep)
        assert K < cache.get_seq_length() < sequence["inputs_embeds"].shape[1]
        cached = {**sequence, infer.CACHE: copy.deepcopy(cache)}
        torch.testing.assert_close(logits_of(vlm, cached), logits_of(vlm, sequence), atol=1e-9, rtol=0)


def test_chat_answers_are_those_of_single_runs(capsys, monkeypatch):
    stock = load(TINY)
    monkeypatch.setattr(infer, "load", lambda *a: stock)
    alone = []
    for question in QUESTIONS:
        assert run(infer.main, EXAMPLES[0], question, *SHIPPED) == 0
        alone.append(capsys.readouterr().out.splitlines()[0])
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([QUESTIONS[0], "", *QUESTIONS[1:]])))  # and then its end
    assert run(infer.main, EXAMPLES[0], *SHIPPED) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.lstrip("> ") for line in said[0:6:2]] == alone
    assert all("ms if the image were read again" in line for line in said[1:6:2])


def test_picture_from_standard_input_or_the_web(capsys, monkeypatch):
    monkeypatch.setattr(infer, "load", lambda *a: load(TINY))
    assert run(infer.main, EXAMPLES[0], QUESTIONS[0], *SHIPPED) == 0
    answer = capsys.readouterr().out.splitlines()[0]
    monkeypatch.setattr(sys, "stdin", open(EXAMPLES[0]))
    assert run(infer.main, "-", QUESTIONS[0], *SHIPPED) == 0
    assert capsys.readouterr().out.splitlines()[0] == answer
    for argv, words in ((["-"], "standard input"), (["https://a.org/b.jpg", "What?"], "https://a.org/b.jpg"),
                        ([], "picture"), (["--questions", "q.jsonl"], "--answers"),
                        ([EXAMPLES[0], "--questions", "q", "--answers", "a"], "picture")):
        assert run(infer.main, *argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and words in err


# --- the three backbones --------------------------------------------------------------------------------------------

LLAMA = dict(model_type="llama", vocab_size=394, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, pad_token_id=3, bos_token_id=1, eos_token_id=2)
CLIP = dict(model_type="clip_vision_model", hidden_size=48, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=4, image_size=32, patch_size=8)
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
TINY_CONFIGS = {
    "llava": dict(model_type="llava", text_config=LLAMA, vision_config=CLIP, image_token_index=4),
    "llava, full": dict(model_type="llava", text_config=LLAMA, vision_config=CLIP, image_token_index=4,
                        vision_feature_select_strategy="full", vision_feature_layer=[-2, 1]),
    "llava, SigLIP": dict(model_type="llava", text_config=LLAMA, vision_config=SIGLIP, image_token_index=4,
                          vision_feature_select_strategy="full", vision_feature_layer=-1),
    "llava_next": dict(model_type="llava_next", text_config=LLAMA, vision_config=CLIP, image_token_index=4,
                       image_grid_pinpoints=[[32, 64], [64, 32], [64, 64], [96, 32]]),
    "qwen2_5_vl": dict(
        model_type="qwen2_5_vl", image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8,
        vision_config=dict(depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, patch_size=8,
                           window_size=32, fullatt_block_indexes=[1]),
        text_config={**LLAMA, "model_type": "qwen2_5_vl_text", "vocab_size": 395, "rope_parameters": dict(
            rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])}),
}
SHAPES = [(96, 96), (150, 40), (48, 130)]  # width, height: mixed in one batch
QWEN_CHAT = ("{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<|image_pad|>{% else %}"
             "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}\nassistant\n{% endif %}")


@pytest.fixture(scope="module", params=TINY_CONFIGS)
def folder(request, tmp_path_factory):
    """A folder with a tiny random model of each class, its own processor, and the embedded default's tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = TINY_CONFIGS[request.param]
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
    for p in model.parameters():  # larger than the usual start, so that every token tells
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    if config["model_type"] == "qwen2_5_vl":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|image_pad|>"]})
        tokenizer.chat_template = QWEN_CHAT
        content = json.loads((path / "config.json").read_text())
        content["image_token_id"] = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        (path / "config.json").write_text(json.dumps(content))
        size = dict(shortest_edge=16 * 16, longest_edge=96 * 96)
        Qwen2VLImageProcessorPil(patch_size=8, size=size).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path
    kind, images = (LlavaNextProcessor, LlavaNextImageProcessorPil) if config["model_type"] == "llava_next" else (
        LlavaProcessor, CLIPImageProcessorPil)
    grid = {"image_grid_pinpoints": config["image_grid_pinpoints"]} if "image_grid_pinpoints" in config else {}
    kind(images(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32), **grid), tokenizer, patch_size=8,
         chat_template=tokenizer.chat_template).save_pretrained(path)
    return path


def exact(vlm):
    """In float64: the stock RMS norms round to float32 inside."""
    for name, norm in [(n, m) for n, m in vlm.model.named_modules() if type(m).__name__.endswith("RMSNorm")]:
        double = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=torch.float64).requires_grad_(False)
        double.load_state_dict(norm.state_dict())
        vlm.model.set_submodule(name, double)
    return vlm


@pytest.fixture(scope="module")
def backbone(folder):
    """(vlm in float64, inputs with captions, X): three pictures of different shapes in one batch."""
    vlm = exact(load(folder, dtype=torch.float64))
    images = [shapes.draw_scene(f"test-{i}")[0].resize(size) for i, size in enumerate(SHAPES)]
    inputs = vlm.inputs(images, QUESTIONS, ["One shape.", "Two.", "Three shapes: a red"])
    return vlm, inputs, vlm.encode(inputs)


def stock(vlm, inputs):
    """The same, as the stock model takes it."""
    ours = ("valid", "newline", "patches", "grid", "position_ids")
    extra = {"mm_token_type_ids": (inputs["input_ids"] == vlm.image_id).int()} if "image_grid_thw" in inputs else {}
    return {k: v for k, v in inputs.items() if k not in ours} | extra


def test_backbone_keep_all_is_the_stock_model(backbone):
    vlm, inputs, X = backbone
    valid = inputs.get("valid")
    assert X.shape[2] == vlm.width and (valid is None) == (vlm.tokens is not None)
    everything = torch.arange(X.shape[1]).expand(len(X), -1)
    if valid is not None:
        assert (X[~valid] == 0).all() and valid.all(1).any() and not valid.all()
        everything = everything.masked_fill(~valid, -1).sort(1).values
    plain = stock(vlm, inputs)
    features = vlm.model.model.get_image_features(
        **{k: plain[k] for k in ("pixel_values", "image_sizes", "image_grid_thw") if k in plain}).pooler_output
    for i, fed in enumerate(features):  # in raster order, what the stock model feeds its LLM, newline tokens aside
        mine = vlm.project(X)[i] if valid is None else vlm.project(X)[i, valid[i]]
        if "newline" in inputs:
            fed = fed[~inputs["newline"][i, inputs["input_ids"][i] == vlm.image_id]]
        torch.testing.assert_close(mine, fed, atol=1e-9, rtol=0)
    options = dict(max_new_tokens=6, min_new_tokens=6, output_logits=True, return_dict_in_generate=True)
    reference = vlm.model.generate(**plain, **options)
    real = inputs["attention_mask"].bool()
    # called without position ids, LLaVA would count the padding too, and rotate by other angles in float32
    logits = vlm.model(**plain, **({} if "grid" in inputs else {"position_ids": vlm.positions(inputs)})).logits[real]
    for keep in (None, everything):
        ours = vlm.model.generate(**vlm.embed(inputs, X, keep), **options)
        assert ours.sequences.equal(reference.sequences[:, real.shape[1]:])
        torch.testing.assert_close(torch.stack(ours.logits), torch.stack(reference.logits), atol=1e-8, rtol=0)
        sequence = {k: v for k, v in vlm.embed(inputs, X, keep).items() if k != "labels"}
        torch.testing.assert_close(vlm.model(**sequence).logits[real], logits, atol=1e-8, rtol=0)
    torch.testing.assert_close(vlm.loss(inputs, X), vlm.model(**plain).loss.double(), atol=2e-6, rtol=0)


def test_backbone_pruned_is_the_full_model_masked(backbone):
    vlm, inputs, X = backbone
    valid = inputs.get("valid")
    K = torch.tensor([4, 9, 6]) if valid is None else vlm.budget("30%", X, valid)  # one budget for each image
    scores = torch.rand(X.shape[:2], generator=torch.Generator().manual_seed(0))
    keep = select(scores if valid is None else scores.masked_fill(~valid, -torch.inf), K)
    assert (keep >= 0).sum(1).equal(K) and K.unique().numel() > 1 and K.max() == keep.shape[1]
    pruned, full = vlm.embed(inputs, X, keep), vlm.embed(inputs, X)
    assert pruned["inputs_embeds"].shape[1] < full["inputs_embeds"].shape[1]
    assert pruned["position_ids"].ndim == (3 if "grid" in inputs else 2)
    chosen = torch.zeros(len(X), X.shape[1] + 1, dtype=torch.long).scatter(1, keep + 1, 1)[:, 1:]
    mask, visual = full["attention_mask"].clone(), vlm.visual(inputs)
    for row in range(len(X)):
        mask[row, visual[row]] = chosen[row] if valid is None else chosen[row, valid[row]]
    assert mask.sum(1).equal(pruned["attention_mask"].sum(1))
    oracle = logits_of(vlm, {**full, "attention_mask": mask})
    vlm.model.generate(**stock(vlm, inputs), max_new_tokens=2)  # leaves rope_deltas behind, which must not matter
    torch.testing.assert_close(logits_of(vlm, pruned), oracle, atol=1e-8, rtol=0)
    assert (logits_of(vlm, full) - oracle).abs().max() > 1e-3, "the dropped tokens should matter"
    # presence: alpha of ones and zeros gives the loss of the tokens kept and dropped
    alpha = chosen.to(X.dtype).requires_grad_()
    loss = vlm.loss(inputs, X, alpha=alpha)
    torch.testing.assert_close(loss, vlm.loss(inputs, X, keep), atol=1e-6, rtol=0)
    ones = torch.ones_like(alpha)
    torch.testing.assert_close(vlm.loss(inputs, X, alpha=ones), vlm.loss(inputs, X), atol=1e-8, rtol=0)
    # and one by one is what the batch is
    for i in range(len(X)):
        image = shapes.draw_scene(f"test-{i}")[0].resize(SHAPES[i])
        alone = vlm.inputs([image], [QUESTIONS[i]])
        x = vlm.encode(alone)
        assert "valid" not in alone
        torch.testing.assert_close(x[0], X[i] if valid is None else X[i, valid[i]], atol=1e-9, rtol=0)
        assert valid is None or vlm.budget("30%", x) == K[i]


def test_backbone_sends_gradients_to_the_scorer(backbone):
    vlm, inputs, X = backbone
    torch.manual_seed(0)
    scorer, denoiser, statistics = Scorer(vlm.width), Denoiser(vlm.width), whitening(X)
    for recipe in ("ours", "papers"):
        scorer.zero_grad()
        loss, alpha = train.training_loss(vlm, scorer, denoiser, statistics, inputs, "30%", 0.5, **parts_of(recipe))
        loss.backward()
        K = torch.as_tensor(vlm.budget("30%", X, inputs.get("valid"))).expand(len(X))
        torch.testing.assert_close(alpha.detach().sum(1), K.float())
        assert "valid" not in inputs or (alpha[~inputs["valid"]] == 0).all()
        assert all(p.grad.isfinite().all() for p in scorer.parameters()) and scorer.head.weight.grad.abs().sum() > 0


def test_backbone_from_the_command_line(folder, tmp_path, capsys):
    pictures = [shapes.draw_scene(f"test-{i}")[0].resize(size) for i, size in enumerate(2 * SHAPES)]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    (tmp_path / "coco.json").write_text(json.dumps({
        "images": [dict(id=i, file_name=f"{i}.png") for i in range(6)],
        "annotations": [dict(id=i, image_id=i, caption="Two shapes.") for i in range(6)]}))
    common = ("--device", "cpu", "--dtype", "float32")
    out = tmp_path / "out"
    training = ("--data", tmp_path / "coco.json", "--model", folder, "--steps", 2, "--batch", 3, "--recipe", "ours")
    assert run(train.main, *training, "--budget", "image", "--keep", "25%", "--out", out, *common) == 0
    assert json.loads((out / "pruner.json").read_text())["curve"][-1]["step"] == 1
    capsys.readouterr()
    question = (tmp_path / "1.png", "How many?", "--pruner", out, "--json", "--max-new-tokens", 5, *common)
    assert run(infer.main, *question) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(said["kept"]) == max(1, round(0.25 * said["tokens"])) and said["kept"] == sorted(set(said["kept"]))
    assert run(infer.main, *question, "--keep", "all") == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    vlm = load(folder)
    inputs = vlm.inputs([read_image(tmp_path / "1.png")], ["How many?"])
    ids = vlm.model.generate(**stock(vlm, inputs), max_new_tokens=5)[:, inputs["input_ids"].shape[1]:]
    assert said["answer"] == vlm.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert len(said["kept"]) == said["tokens"] == int(vlm.visual(inputs).sum())
    if vlm.tokens is None:
        assert run(infer.main, *question, "--show", tmp_path / "kept.png") == 2 and "--show" in capsys.readouterr().err


def test_budgets(vlm):
    for keep, K in ((16, 16), ("16", 16), ("all", 144), ("11.1%", 16), ("100%", 144), ("0.1%", 1)):
        assert vlm.budget(keep) == vlm.budget(keep, torch.zeros(2, 144, 1)) == K
    for keep in (0, 145, "", "%", "0%", "101%", "-3", "1.5", "nan%", "1e1%", "²"):
        with pytest.raises(InputError, match="--keep"):
            vlm.budget(keep)
    varying, valid = copy.copy(vlm), torch.arange(30) < torch.tensor([[30], [9], [2]])
    varying.tokens = None
    for keep, K in (("10%", [3, 1, 1]), ("all", [30, 9, 2]), (12, [12, 9, 2])):
        assert varying.budget(keep, valid, valid).tolist() == K and varying.budget(keep) == keep


def test_rows_with_budgets_of_their_own():
    torch.manual_seed(0)
    scores, valid = torch.randn(4, 30, dtype=torch.float64), torch.arange(30) < torch.tensor([[30], [30], [12], [5]])
    scores, K = scores.masked_fill(~valid, -torch.inf), torch.tensor([7, 20, 12, 1])
    alpha, keep = soft_top_k(scores, K, 0.3), select(scores, K)
    assert keep.shape == (4, 20)
    for row in range(4):
        n = valid[row].sum()
        torch.testing.assert_close(alpha[row, :n], soft_top_k(scores[row, :n], K[row].item(), 0.3), atol=1e-12, rtol=0)
        assert (alpha[row, n:] == 0).all()
        assert keep[row].tolist() == [-1] * (20 - K[row]) + select(scores[row:row + 1, :n], K[row].item())[0].tolist()
    assert (select(scores, 15) >= 0).sum(1).tolist() == [15, 15, 12, 5], "padding is never selected"
    assert torch.autograd.gradcheck(lambda s: soft_top_k(s.masked_fill(~valid, -torch.inf), K, 0.5), scores.masked_fill(
        ~valid, 0).requires_grad_())
    for wrong in (torch.tensor([7, 31, 1, 1]), torch.tensor([1, 1, 13, 1]), torch.tensor([-1, 1, 1, 1])):
        with pytest.raises(ValueError):
            soft_top_k(scores, wrong)
        with pytest.raises(ValueError):
            select(scores, wrong)


def test_scorer_does_not_see_padding():
    torch.manual_seed(0)
    scorer, rows = Scorer(64), [torch.randn(n, 64) for n in (9, 20, 1)]
    X = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    valid = torch.arange(20) < torch.tensor([[9], [20], [1]])
    X[~valid] = 1e3
    scores = scorer(X, valid)
    for row, x in enumerate(rows):
        torch.testing.assert_close(scores[row, :len(x)], scorer(x[None])[0], atol=1e-5, rtol=0)
        assert scores[row, len(x):].isneginf().all()
    standard = standardised(scores, valid)
    torch.testing.assert_close(standard[0, :9], standardised(scorer(rows[0][None]))[0], atol=1e-4, rtol=0)
    standard[valid].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in scorer.parameters())


def test_random_architectures(monkeypatch):
    """The true shapes, on the meta device; and shrunken ones that run."""
    sizes = {"llava-1.5-7b": 7063427072, "llava-next-7b": 7063431168, "qwen2.5-vl-3b": 3754622976,
             "qwen2.5-vl-7b": 8292166656}
    for name, parameters in sizes.items():
        vlm = load("random:" + name, "meta", torch.bfloat16)
        assert sum(p.numel() for p in vlm.model.parameters()) == parameters
        assert {p.dtype for p in vlm.model.parameters()} == {torch.bfloat16} and vlm.model.device.type == "meta"
        inputs = vlm.dummy_inputs(2, 95, (140, 84) if "qwen" in name else None)
        X = vlm.encode(inputs)
        N = {"llava-1.5-7b": 576, "llava-next-7b": 576 + 48 * 48}.get(name, 5 * 3)
        assert X.shape == (2, N, vlm.width) and X.device.type == "meta"
        sequence = vlm.embed(inputs, X, torch.zeros(2, 9, dtype=torch.long, device="meta"))
        assert sequence["inputs_embeds"].shape[1] == 95 + 9 + (48 if "next" in name else 0)
    for name, config in TINY_CONFIGS.items():
        monkeypatch.setitem(model.RANDOM, name, config)
        vlm = load("random:" + name, dtype=torch.bfloat16)
        inputs = vlm.dummy_inputs(2, 9, (64, 96))
        X = vlm.encode(inputs)
        logits = vlm.model(**vlm.embed(inputs, X, select(torch.rand(X.shape[:2]), 5)), logits_to_keep=1).logits
        assert X.isfinite().all() and logits.isfinite().all() and logits.std() > 0 and logits.dtype == torch.bfloat16
    with pytest.raises(InputError, match="random:llava-1.5-7b"):
        load("random:gpt")


def test_an_unknown_backbone_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(InputError, match="'blip'.*llava, llava_next, qwen2_5_vl"):
        load(tmp_path)
    for change, words in ((dict(vision_config={**SIGLIP, "model_type": "pixtral"}), "vision tower"),
                          (dict(model_type="llava_next", vision_feature_select_strategy="full"), "class token")):
        config = AutoConfig.for_model(**{**TINY_CONFIGS["llava"], **change})
        with pytest.raises(InputError, match=words):
            model.BACKBONES[config.model_type](AutoModelForImageTextToText.from_config(config), None, "this one")


# --- the README -----------------------------------------------------------------------------------------------------

def test_readme_counts_backbones_right():
    readme = (ROOT / "README.md").read_text()
    for name, N, K in (("LLaVA-1.5-7B", 576, 64), ("LLaVA-NeXT-7B", 2880, 320), ("Qwen2.5-VL-3B", 576, 64), ("Qwen2.5-VL-7B", 576, 64)):
        vlm = load(f"random:{name.lower()}", "meta", torch.bfloat16)
        L = vlm.dummy_inputs(1, 95)["input_ids"].shape[1]
        full, pruned = (bench.prefill_flops(vlm, length) / 1e12 for length in (L, L - N + K))
        assert f"| {name} | {N} | {K} | {full:.3f} | {pruned:.3f} | {full / pruned:.2f}× |" in readme


def test_readme_has_not_drifted():
    readme = (ROOT / "README.md").read_text()
    for name, lines in re.findall(r"\| `([\w./]+\.py)` \| (\d+) \|", readme):
        assert len((ROOT / name).read_text().splitlines()) == int(lines), f"{name}: the README says {lines} lines"
    assert len(re.findall(r"\| `[\w./]+\.py` \| \d+ \|", readme)) == 11
    lines = lambda text: "\n".join(line.strip() for line in text.splitlines()) + "\n"  # without the indentation
    code = [lines((ROOT / name).read_text()) for name in
            ("throttler.py", "denoiser.py", "model.py", "train.py", "infer.py", "bench.py")]
    snippets = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert len(snippets) >= 6
    for snippet in snippets:  # line after line, as it stands in one file
        assert any("\n" + lines(snippet) in text for text in code), f"not in the code:\n{snippet}"
    for path in re.findall(r"\]\(([\w./-]+)\)", readme):
        assert (ROOT / path).exists(), path
    pictures = (ROOT / "assets/draw.py").read_text().split("PICTURES = ")[1]
    drawn = {f"{name}.png" for name in re.findall(r'"(\w+)": \w+', pictures)}
    shown = set(re.findall(r"\(assets/(\w+\.png)\)", readme))
    assert drawn == shown == {p.name for p in (ROOT / "assets").glob("*.png")}
    assert all((ROOT / "assets" / name).stat().st_size < 300_000 for name in drawn)
    section = readme.split("## What our measurements say")[1].split("## LLaVA-1.5-7B")[0].splitlines()
    rows = [line for line, next in zip(section, section[1:]) if line.startswith("| ") and not next.startswith("|---")]
    assert rows == list(draw.tables()), "what train.py and bench.py measured, and nothing else"
    full = json.loads((ROOT / "assets/ablations_full.json").read_text())["ablations"]
    assert "400 steps took {:.0f} s and {:.0f} s".format(full["ours"]["seconds"], full["papers"]["seconds"]) in readme
