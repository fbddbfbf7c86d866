"""
Each claim of the method against something that cannot share our bug. Run: python -m pytest -q test_all.py

Oracles: a bisection for the soft top-K, finite differences for every gradient, attention with a mask for the denoiser,
simulation against closed forms for the gate, stock transformers and the full model with masked tokens for deployment.
"""
import argparse
import ast
import copy
import hashlib
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, CLIPImageProcessorPil,
                          LlavaForConditionalGeneration, LlavaNextImageProcessorPil, LlavaNextProcessor, LlavaProcessor,
                          Qwen2VLImageProcessorPil)

import bench
import infer
import train
from data import coco as coco_files
from data import files, pictures, pruner, questions
from data import run as running
from data.budget import Budget, count_above, hardness_of, quantiles, threshold
from data.files import InputError, cli, read_image
from data.processes import Processes
from data.shapes import prepare as shapes
from data.weights import one_line
from denoiser import Denoiser, DiagonalAttention
from eval import accuracy, criteria
from model import Llava, load
from results import study
from throttler import (Attention, Scorer, select, select_diverse, soft_top_k, standardised,
                       vp_gate, whitening)

ROOT = Path(__file__).resolve().parent
TINY = ROOT / "data/shapes/llava"
EXAMPLES = sorted((ROOT / "data/shapes/examples").glob("*.jpg"))
FLOORS = [("throttler", "data"), ("model", "denoiser"), ("infer",), ("eval",), ("train", "bench"), ("results",)]
TEMPLATE = (TINY / "chat_template.jinja").read_text()
QUESTIONS = ["Where is the star?", "How many shapes are there?", "Is there a red circle, or some other thing?"]
CAPTIONS = ["One shape.", "Two.", "Three shapes: a red"]
VOCAB = json.loads((TINY / "config.json").read_text())["text_config"]["vocab_size"]
LLAMA = dict(model_type="llama", vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, pad_token_id=3, bos_token_id=1, eos_token_id=2)
CLIP = dict(model_type="clip_vision_model", hidden_size=48, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=4, image_size=32, patch_size=8)
LLAVA = dict(model_type="llava", text_config=LLAMA, vision_config=CLIP, image_token_index=4)
SIGLIP = dict(vision_config={**CLIP, "model_type": "siglip_vision_model"}, vision_feature_layer=-1)
GRID = [[32, 64], [64, 32], [64, 64], [96, 32]]
MROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
TINY_CONFIGS = {
    "llava": LLAVA,
    "llava, full": {**LLAVA, "vision_feature_select_strategy": "full", "vision_feature_layer": [-2, 1]},
    "llava, SigLIP": {**LLAVA, **SIGLIP, "vision_feature_select_strategy": "full"},
    "llava_next": {**LLAVA, "model_type": "llava_next", "image_grid_pinpoints": GRID},
    "qwen2_5_vl": dict(
        model_type="qwen2_5_vl", image_token_id=VOCAB, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8,
        vision_config=dict(depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, patch_size=8,
                           window_size=32, fullatt_block_indexes=[1]),
        text_config={**LLAMA, "model_type": "qwen2_5_vl_text", "vocab_size": VOCAB + 1, "rope_parameters": MROPE}),
}
SIZES = [(96, 96), (150, 40), (48, 130)]  # width, height: mixed in one batch
PICTURE = EXAMPLES[0]
SHIPPED = ("--pruner", ROOT / "data/shapes/pruner", "--keep", 16, "--device", "cpu")
BOXES = torch.tensor([(0, 0, 0, 0), (0, 0, 1, 1), (1, 0, 2, 1), (0, 1, 1, 2), (1, 1, 2, 2), (0, 0, 2, 2)]) / 2


@pytest.fixture(scope="module")
def vlm():
    return load(TINY)


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
    line = torch.linspace(-1e4, 1e4, N).double()
    for scores in (noise, 0 * noise, 1e4 * noise, noise.round(), noise.sign() * 1e4, line):
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
    return vlm.encode(vlm.inputs(images, ["?"] * len(images))).double()


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
    J = torch.autograd.functional.jacobian(lambda x: denoiser(x[None])[0], torch.randn(5, 16))
    J = J.abs().sum((1, 3))  # (5, 5)
    off_diagonal = J[~torch.eye(5, dtype=torch.bool)]
    assert (off_diagonal == 0).all() if diagonal else (off_diagonal > 0).all()


def test_attention_is_torchs_own():
    torch.manual_seed(0)
    ours, stock = Attention(128), torch.nn.MultiheadAttention(128, 2, batch_first=True)
    stock.load_state_dict({"in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
                           "out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias})
    x = torch.randn(2, 9, 128)
    torch.testing.assert_close(ours(x), stock(x, x, x)[0], atol=1e-6, rtol=1e-5)


# --- budgets and choices ----------------------------------------------------------------------------------------------

def test_budgets_are_parsed_once_and_count():
    for text, N, K in (("16", 144, 16), ("16", 9, 9), ("11.1%", 576, 64), ("11.1%", 144, 16), ("all", 144, 144),
                       ("~16", 144, 16), ("0.1%", 144, 1), ("100%", 7, 7)):
        budget = Budget.parse(text)
        assert budget.of(N) == K and budget.of(torch.tensor([N, N])).tolist() == [K, K]
        assert Budget.parse(str(budget)) == budget
    assert Budget.parse("~16").average and str(Budget.parse("~16").exact) == "16" and Budget.parse("all").everything
    assert str(Budget.parse("16").times(0.5)) == "8" and str(Budget.parse("20%").times(10)) == "all"
    for bad in ("0", "-1", "1.5", "", "~", "~all", "101%", "0%", "8:32", "x", "1e3", "nan%", "٣"):
        with pytest.raises(ValueError, match="is no budget"):
            Budget.parse(bad)


def test_rows_with_counts_of_their_own_and_padding():
    torch.manual_seed(0)
    scores, K = torch.randn(3, 12), torch.tensor([2, 5, 3])
    scores[2, 4:] = -torch.inf
    for keep in (select(scores, K), select_diverse(scores, torch.randn(3, 12, 8), K)):
        assert keep.shape == (3, 5) and (keep >= 0).sum(1).tolist() == [2, 5, 3]
        assert (keep[2][keep[2] >= 0] < 4).all(), "padding is never kept"
        assert all(row.tolist() == sorted(row.tolist()) for row in keep), "ascending, -1 at the left"


def test_diverse_choice_is_the_greedy_loop_written_out():
    torch.manual_seed(0)
    scores, X = torch.randn(4, 20), torch.randn(4, 20, 6)
    for row in range(4):
        z = (scores[row] - scores[row].mean()) / (scores[row].var(correction=0) + 1e-5).sqrt()
        kept = [scores[row].argmax().item()]
        while len(kept) < 7:
            value = {}
            for i in set(range(20)) - set(kept):
                distances = [1 - F.cosine_similarity(X[row, i], X[row, j], dim=0).item() for j in kept]
                value[i] = math.exp(z[i] / 2) * min(distances)
            kept.append(max(value, key=value.get))
        assert select_diverse(scores, X, 7)[row].tolist() == sorted(kept)
    twins = torch.ones(1, 6, 3)
    assert select_diverse(torch.randn(1, 6), twins, 4).unique().numel() == 4, "no token twice, even if all are alike"


def test_a_threshold_keeps_what_lies_above_it():
    torch.manual_seed(0)
    z = standardised(torch.randn(7, 40) ** 3)
    for total in (7 * 5, 7 * 12, 1, 7 * 40):
        T = threshold(z.flatten(), total)
        assert (z > T).sum() == total
        keep = select(z, count_above(z, T))
        for row, kept in zip(z, keep):
            above = (row > T).nonzero().flatten().tolist()  # in their original order
            assert kept[kept >= 0].tolist() == (above or [row.argmax().item()]), "at least one"
    table = quantiles(torch.cat([z.flatten(), torch.full((9,), -torch.inf)]))  # padding does not count
    assert table["shares"][0] == 1 / 280 and table["shares"][-1] == 1
    for share, T in zip(table["shares"], table["values"]):
        assert (z > T).double().mean().item() == pytest.approx(share)


def test_hardness_is_the_mean_of_the_largest_weights():
    alpha = torch.tensor([[0.9, 0.1, 0.6, 0.4], [1.0, 0.0, 1.0, 0.0]])
    assert hardness_of(alpha, 2).tolist() == pytest.approx([0.75, 1.0])
    assert hardness_of(alpha, torch.tensor([1, 4])).tolist() == pytest.approx([0.9, 0.5])


def test_scorer_reads_whitened_tokens(features):
    """Scorer.whiten: unit variance in every direction that is not floored, less in the others, and no NaN."""
    scorer = Scorer(128)
    assert torch.equal(scorer.map, torch.eye(128)) and not scorer.mean.any(), "as in the papers until told otherwise"
    mean, L = whitening(features)
    scorer.whiten(mean, L)
    variance = torch.linalg.eigvalsh(covariance((features.float() - scorer.mean) @ scorer.map))
    strong = (torch.linalg.eigvalsh(covariance(features)) > 0.1 * covariance(features).trace() / 128).sum()
    assert 4 < strong < 100 and (variance[-strong:] - 1).abs().max() < 1e-2 and variance[:-strong].max() < 1.01
    scorer.whiten(*whitening(torch.ones(10, 128)))
    assert scorer(torch.ones(1, 5, 128)).isfinite().all()


def test_scorer_does_not_see_padding():
    torch.manual_seed(0)
    scorer, X = Scorer(128), torch.randn(1, 9, 128)
    padded, valid = F.pad(X, (0, 0, 0, 4), value=7.0), torch.arange(13)[None] < 9
    scores = scorer(padded, valid)
    torch.testing.assert_close(scores[:, :9], scorer(X), atol=1e-5, rtol=1e-5)
    assert scores[:, 9:].isneginf().all() and standardised(scores)[:, 9:].isneginf().all()
    torch.testing.assert_close(standardised(scores)[:, :9], standardised(scorer(X)), atol=1e-4, rtol=1e-4)


# --- the training graph -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", train.RECIPES)
def test_scorer_gradient_is_finite_differences_through_everything(backbone, name, monkeypatch):
    """train.forward itself, in float64, noise held fixed."""
    torch.manual_seed(0)
    (vlm, inputs, X), recipe = backbone, train.RECIPES[name]
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    scorer, denoiser = Scorer(vlm.width).double(), Denoiser(vlm.width).double()
    torch.nn.init.normal_(denoiser.block.mlp[-1].weight, std=0.02)
    statistics, noise = [t.double() for t in whitening(X)], torch.randn_like(X)

    def loss():
        return train.forward(vlm, scorer, denoiser, statistics, inputs, noise, Budget(5), 0.5, recipe)[0]

    loss().backward()
    for weight in (scorer.head.weight, scorer.blocks[0].attn.qkv.weight, denoiser.block.attn.value.weight):
        direction = torch.randn_like(weight) / weight.numel() ** 0.5
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * 1e-5 * direction
                sides.append(loss().item())
                weight -= sign * 1e-5 * direction
        numeric = (sides[0] - sides[1]) / 2e-5
        assert (weight.grad * direction).sum().item() == pytest.approx(numeric, rel=1e-3, abs=1e-8)
    assert all(p.grad is None and not p.requires_grad for p in vlm.model.parameters()) and not vlm.model.training


def test_a_step_costs_twice_the_forward(backbone):
    """No gradient of frozen weights, and logits at the caption only."""
    vlm, inputs, X = backbone
    scorer, denoiser, noise = Scorer(vlm.width), Denoiser(vlm.width), torch.randn(X.shape)
    graph = (vlm, scorer, denoiser, whitening(X.float()))

    def flops(f):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the one that is always counted
            f()
        return counter.get_total_flops()

    with torch.no_grad():
        encoder, forward = flops(lambda: vlm.encode(inputs)), flops(lambda: vlm.loss(inputs, X))
        pruner = flops(lambda: denoiser(vp_gate(X.float(), scorer(X.float()).sigmoid(), *graph[3])))
    step = flops(lambda: train.forward(*graph, inputs, noise, Budget(5), 0.5, train.RECIPES["papers"])[0].backward())
    assert step <= 2.2 * forward + encoder + 3.1 * pruner  # only the pruner's own weights get a gradient


def test_held_out_losses_lead_from_all_tokens_to_the_deployed_ones(backbone):
    """Full and deployed by the stock model, whose mask hides what is dropped; soft and hard by the gate written out."""
    torch.manual_seed(0)
    vlm, inputs, X = backbone
    valid = inputs.get("valid", torch.ones(X.shape[:2], dtype=torch.bool))
    scores = torch.randn(X.shape[:2]).masked_fill(~valid, -torch.inf)
    statistics, noise = whitening(X.float()), torch.randn(X.shape)
    graph = vlm, lambda X, valid: scores, torch.nn.Identity(), statistics
    losses = train.held_out_losses(graph, [(inputs, noise)], Budget(5), 0.7, train.RECIPES["ours"], Processes("cpu"))
    kept, sequence = scores >= scores.topk(5).values[:, -1:], vlm.embed(inputs, X)  # (B, N)
    assert losses["full_loss"] == pytest.approx(vlm.model(**sequence).loss.item(), abs=1e-4)
    sequence["attention_mask"] = sequence["attention_mask"].masked_scatter(vlm.visual(inputs), kept[valid].long())
    assert losses["deployed_loss"] == pytest.approx(vlm.model(**sequence).loss.item(), abs=1e-4)
    alpha = soft_top_k(standardised(scores), 5, 0.7)
    for name, weights in (("soft_loss", alpha), ("hard_loss", kept.float())):
        gated = vp_gate(X.float(), weights, *statistics, noise)
        assert losses[name] == pytest.approx(vlm.loss(inputs, gated).item(), abs=1e-4)
    assert max(losses.values()) - min(losses.values()) > 1e-2 and losses["full_loss"] != losses["deployed_loss"]


@pytest.mark.parametrize("name, unchanged", [("ours", True), ("papers", False)])
def test_only_raw_scores_can_undo_the_annealing_by_shrinking(backbone, name, unchanged):
    vlm, inputs, X = backbone
    scores, statistics = torch.linspace(-2, 2, X.shape[1]).repeat(len(X), 1), whitening(X.float())
    alphas = [train.forward(vlm, lambda X, valid: scale * scores, torch.nn.Identity(), statistics, inputs,
                            torch.zeros(X.shape), Budget(5), 0.5, train.RECIPES[name])[1] for scale in (1, 0.1)]
    assert torch.allclose(*alphas, atol=1e-2) == unchanged


def test_papers_recipe_is_the_papers_to_the_letter():
    papers = train.RECIPES["papers"]
    assert (papers.whiten, papers.standardise, papers.spread, papers.choose) == (False, False, 1.0, "top")
    assert papers.top_k is soft_top_k and papers.gate is vp_gate and isinstance(papers.denoiser(16), Denoiser)
    taus = [papers.tau(t) for t in (0, 0.125, 0.25, 0.375, 0.5, 1)]
    exact = [0.1 + 1.9 * (1 + math.cos(math.pi * 2 * t)) / 2 for t in (0, 0.125, 0.25, 0.375, 0.5)] + [0.1]
    assert taus == pytest.approx(exact) and taus[1] != pytest.approx(2.0 - 1.9 / 4), "a cosine is no line"


# --- the embedded default ---------------------------------------------------------------------------------------------

def test_scenes_are_unambiguous_and_splits_disjoint():
    seen = set()
    for split in ("train", "validation", "test", "pretrain"):
        for i in range(30):
            image, objects = shapes.draw_scene(f"{split}-{i}")
            seen.add(image.tobytes())
            assert len({o["shape"] for o in objects}) == len({o["color"] for o in objects}) == len(objects)
            answers = {kind: label for kind, _, label in shapes.questions(objects, shapes.random.Random(i))}
            assert answers["count"] == shapes.NUMBERS[len(objects)]
            colors = image.load()
            for o in objects:  # the middle of every object has its colour: clutter lies behind
                pixel = colors[round(o["x"]), round(o["y"])]
                nearest = min(shapes.COLORS, key=lambda c: sum((a - b) ** 2 for a, b in zip(pixel, shapes.COLORS[c])))
                assert nearest == o["color"]
    assert len(seen) == 120


# --- a run that is stopped, split or disturbed ------------------------------------------------------------------------

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


def tiny(coco, out, *argv):
    """A run of six steps on the example scenes; the exit code."""
    return run(train.main, "--data", coco[1], "--images", EXAMPLES[0].parent, "--model", TINY, "--keep", "20",
               "--steps", 6, "--batch", 4, "--eval-every", 2, "--save-every", 1, "--workers", 0, "--device", "cpu",
               "--out", out, *argv)


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


def on_call(f, number, then):
    """f, which runs then() before its call of that number (from 1)."""
    calls = []

    def wrapped(*a, **kw):
        calls.append(1)
        if len(calls) == number:
            then()
        return f(*a, **kw)
    return wrapped


def log_of(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_three_times_it_ends_as_if_it_had_not_been(tmp_path, coco, monkeypatch):
    assert in_a_process(lambda: tiny(coco, tmp_path / "whole")) == 0
    for i, (where, name, call) in enumerate(((torch.nn.utils, "clip_grad_norm_", 2), (os, "fsync", 2),
                                             (train, "held_out_losses", 2))):  # in a step, a write, an evaluation
        with monkeypatch.context() as patch:
            patch.setattr(where, name, on_call(getattr(where, name), call, die))
            code = in_a_process(lambda: tiny(coco, tmp_path / "killed", *["--resume"] * (i > 0)))
            assert code == -signal.SIGKILL, name
    assert in_a_process(lambda: tiny(coco, tmp_path / "killed", "--resume", "--workers", 1)) == 0
    for name in ("scorer", "checkpoint"):
        whole, killed = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "killed"))
        assert whole.keys() == killed.keys() and all(whole[k].equal(killed[k]) for k in whole), name
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "killed") and len(log_of(tmp_path / "whole")) == 4


def test_processes_and_parts_are_the_whole_batch(tmp_path, coco):
    """Two processes, and four parts one by one: the gradients (Adam's moments) of the whole batch, to rounding."""
    for i, annotation in enumerate(coco[0]["annotations"]):
        annotation["caption"] = "Shapes:" + " red" * 3 * i  # parts of different word counts
    coco[1].write_text(json.dumps(coco[0]))
    argv = ["--data", coco[1], "--images", EXAMPLES[0].parent, "--model", TINY, "--steps", 2, "--batch", 4,
            "--keep", 20, "--eval-every", 1, "--workers", 0, "--device", "cpu", "--out"]
    two = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                            ROOT / "train.py", *map(str, argv), tmp_path / "two"],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run(train.main, *argv, tmp_path / "one") == run(train.main, *argv, tmp_path / "four", "--at-once", 1) == 0
    out, err = two.communicate()
    assert two.returncode == 0 and "Traceback" not in err and err.count("keep 20") == 1, err
    one = load_file(tmp_path / "one/checkpoint.safetensors")
    scale = max(v.abs().max() for k, v in one.items() if k.endswith("exp_avg"))
    for other in ("two", "four"):
        moments = load_file(tmp_path / other / "checkpoint.safetensors")
        for k in one:
            if k.endswith("exp_avg"):
                assert (one[k] - moments[k]).abs().max() < 1e-4 * scale, (other, k)
        for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / other)):
            assert a == pytest.approx(b, rel=2e-4)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_after_the_step(tmp_path, coco, monkeypatch, capsys, number, code):
    with monkeypatch.context() as patch:
        hit = on_call(torch.nn.utils.clip_grad_norm_, 2, lambda: os.kill(os.getpid(), number))
        patch.setattr(torch.nn.utils, "clip_grad_norm_", hit)
        assert tiny(coco, tmp_path, "--save-every", 100) == code
    assert "--resume" in capsys.readouterr().err.splitlines()[-1]
    assert running.read_checkpoint(tmp_path / "checkpoint.safetensors")[1]["step"] == 2
    assert tiny(coco, tmp_path, "--resume") == 0


def test_a_run_is_not_lost(tmp_path, coco, monkeypatch, capsys):
    """Not to another run, other settings, a full disk, or a loss that is no number."""
    def error():
        return capsys.readouterr().err.splitlines()[-1]

    assert tiny(coco, tmp_path, "--resume") == 2 and "--resume" in error()
    assert tiny(coco, tmp_path, "--steps", 1) == 0
    state = {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.name != "coco.json"}
    assert tiny(coco, tmp_path) == 2 and "--overwrite" in error()
    for flag, value in (("--keep", 19), ("--seed", 1), ("--batch", 5), ("--lr", 1), ("--recipe", "papers")):
        assert tiny(coco, tmp_path, "--steps", 1, "--resume", flag, value) == 2 and error().startswith(f"error: {flag}")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no file may become larger: a full disk, nearly
    try:
        assert tiny(coco, tmp_path, "--overwrite") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "checkpoint.safetensors: cannot be written" in error()
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.name != "coco.json"} == state
    (tmp_path / "checkpoint.safetensors").write_bytes(state["checkpoint.safetensors"][:-9])
    assert tiny(coco, tmp_path, "--resume", "--steps", 1) == 2 and "checkpoint.safetensors" in error()
    assert tiny(coco, tmp_path, "--overwrite", "--lr", 1e30) == 2 and "a loss or its gradient is" in error()


@pytest.mark.parametrize("argv, words", [
    (["--keep", 0], "--keep '0' is no budget"), (["--keep", 145], "145: .*144 visual tokens"),
    (["--keep", "~16"], "~16"),
    (["--steps", 0], "--steps 0"), (["--lr", "inf"], "--lr inf"), (["--seed", 2 ** 64], "--seed"),
    (["--workers", -1], "--workers"), (["--questions", "none.jsonl"], "none.jsonl"), (["--data", "no.json"], "no.json"),
    (["--model", "./no/such"], "no/such"), (["--out", ROOT / "LICENSE"], "--out"), (["--device", "meta"], "meta")])
def test_bad_training_arguments_are_one_line_and_leave_nothing(tmp_path, coco, capsys, argv, words):
    assert tiny(coco, tmp_path / "out", *argv) == 2
    err = capsys.readouterr().err
    assert re.match(f"error: .*{words}", err) and err.count("\n") == 1
    assert not (tmp_path / "out/checkpoint.safetensors").exists()


@pytest.mark.parametrize("environment, words", [
    ({"RANK": "0", "WORLD_SIZE": "2"}, "torchrun"), ({"RANK": "1", "WORLD_SIZE": "1"}, "torchrun"),
    ({"RANK": "a"}, "torchrun"), ({"RANK": "", "WORLD_SIZE": ""}, None)])
def test_an_environment_without_torchrun_is_said(monkeypatch, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if words is None:
        assert Processes("cpu").world == 1
    else:
        with pytest.raises(InputError, match=words):
            Processes("cpu")


def test_more_processes_than_images_are_refused(vlm):
    processes = Processes("cpu")
    assert processes.plan(vlm, 1000, batch=8, at_once=3) == (3, 3)
    processes.world = 9
    with pytest.raises(InputError, match="--batch 8"):
        processes.plan(vlm, 1000, batch=8)


def test_checkpoints_come_every_so_many_steps_and_at_the_end(tmp_path, coco, monkeypatch):
    saved, save = [], running.Run.save
    monkeypatch.setattr(running.Run, "save", lambda self, step: saved.append(step) or save(self, step))
    assert tiny(coco, tmp_path, "--save-every", 4) == 0 and saved == [0, 4, 6]


@pytest.mark.parametrize("name", train.RECIPES)
def test_only_our_scorer_reads_whitened_tokens(tmp_path, coco, name):
    assert tiny(coco, tmp_path, "--recipe", name, "--steps", 1) == 0
    assert load_file(tmp_path / "scorer.safetensors")["map"].equal(torch.eye(128)) == (name == "papers")


def test_a_second_run_on_one_folder_is_refused(tmp_path, coco, monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(train, "held_out_losses", on_call(train.held_out_losses, 1, lambda: codes.append(in_a_process(
        lambda: tiny(coco, tmp_path, "--overwrite")))))
    assert tiny(coco, tmp_path) == 0 and codes == [2]


def test_schedules_clipping_and_budgets_reach_the_optimizer(tmp_path, coco, monkeypatch):
    lrs, norms, budgets, tokens = [], [], [], []
    step, forward, whiten = torch.optim.AdamW.step, train.forward, train.whitening

    def spy(self):
        lrs.append(self.param_groups[0]["lr"])
        norms.append(torch.stack([p.grad.norm() for p in self.param_groups[0]["params"]]).norm().item())
        return step(self)

    def steep(vlm, scorer, denoiser, statistics, inputs, noise, K, tau, recipe):
        if torch.is_grad_enabled():
            budgets.append(K.count)
        loss, alpha = forward(vlm, scorer, denoiser, statistics, inputs, noise, K, tau, recipe)
        return 1e4 * loss, alpha

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    monkeypatch.setattr(train, "forward", steep)
    monkeypatch.setattr(train, "whitening", lambda X: tokens.append(len(X)) or whiten(X))
    assert tiny(coco, tmp_path, "--steps", 12, "--lr", 1e-4, "--eval-every", 20) == 0
    assert lrs == pytest.approx([1e-4 * (1 + math.cos(math.pi * i / 12)) / 2 for i in range(12)])
    assert norms == pytest.approx([1.0] * 12, rel=1e-3), "every gradient is longer than 1, and clipped to it"
    assert min(budgets) < 15 and max(budgets) > 27 and all(10 <= K <= 40 for K in budgets)
    assert abs(math.log(budgets[0] / 20) / math.log(2) - random.Random("0 budget 0").uniform(-1, 1)) < 0.1
    assert tokens == [5 * 32], "32 tokens of each training image"


def test_the_best_scorer_after_the_annealing_is_kept(tmp_path, coco, monkeypatch):
    losses, at = iter([0.1, 5.0, 4.0, 2.0, 3.0, 3.5]), []
    names = ("full_loss", "soft_loss", "hard_loss", "deployed_loss")
    monkeypatch.setattr(train, "held_out_losses", lambda graph, *_: at.append(graph[1].head.weight.clone()) or
                        dict.fromkeys(names, next(losses)))
    assert tiny(coco, tmp_path, "--steps", 10, "--eval-every", 2) == 0
    log = log_of(tmp_path)
    assert [row["step"] for row in log] == [0, 2, 4, 6, 8, 9] and log[-2]["tau"] == log[-1]["tau"] == 0.02
    scorer, settings = pruner.load_pruner(tmp_path)
    assert settings["best"]["step"] == 8 and scorer.head.weight.equal(at[4]), "the first, 0.1, was luck: tau was high"


def test_an_unreadable_image_is_skipped_and_two_of_six_stop_the_run(tmp_path, coco, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for p in EXAMPLES:
        (images / p.name).write_bytes(p.read_bytes())
    training, _ = coco_files.split(coco_files.read_coco(coco[1], images), 0)
    argv = ["--images", images, "--steps", 2, "--batch", 5, "--workers", 1, "--overwrite"]
    (first, _), (second, _) = training[1], training[3]
    first.write_bytes(first.read_bytes()[:500])
    assert tiny(coco, tmp_path / "out", *argv) == 0
    assert f"unreadable images, 1, each replaced by the next: {first}" in capsys.readouterr().err
    second.write_bytes(b"")
    assert tiny(coco, tmp_path / "out", *argv) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "2 of 5 images could not be read" in err and str(first) in err and str(second) in err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_to_the_end(tmp_path, coco, dtype):
    assert tiny(coco, tmp_path / "full", "--steps", 2) == 0
    assert tiny(coco, tmp_path / dtype, "--dtype", dtype, "--steps", 2, "--checkpointing", "--at-once", 2) == 0
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / dtype / "checkpoint.safetensors").values())
    for half, full in zip(log_of(tmp_path / dtype), log_of(tmp_path / "full")):
        assert half["deployed_loss"] == pytest.approx(full["deployed_loss"], rel=0.1)


def test_the_frozen_model_does_not_change(tmp_path, coco, monkeypatch):
    def fingerprint(vlm):
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in vlm.model.state_dict().values())).hexdigest()

    frozen = []
    monkeypatch.setattr(train, "load", lambda *a: frozen.append(load(*a)) or frozen[-1])
    assert tiny(coco, tmp_path, "--steps", 2) == 0
    assert fingerprint(frozen[0]) == fingerprint(load(TINY))


def test_every_import_goes_down():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    files = [p for name in floor for p in (sorted(ROOT.glob(f"{name}/**/*.py")) or [ROOT / f"{name}.py"])]
    assert len(files) > 20
    for path in files:
        mine = path.relative_to(ROOT).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else (
                [node.module] if isinstance(node, ast.ImportFrom) else [])
            for name in (n.split(".")[0] for n in names):
                if name in floor:
                    beside = name == mine or (mine, name) == ("data", "throttler")
                    assert floor[name] < floor[mine] or beside, (path, name)


def test_lines_are_short_and_files_small():
    limits = {"throttler.py": 240, "denoiser.py": 60, "model.py": 420, "train.py": 250, "infer.py": 260,
              "bench.py": 240, "eval/criteria.py": 140, "eval/accuracy.py": 170, "data/files.py": 110,
              "data/run.py": 170, "data/pictures.py": 130, "data/coco.py": 130, "data/questions.py": 147,
              "eval/serve.py": 80}
    for name, most in limits.items():
        lines = (ROOT / name).read_text().splitlines()
        assert len(lines) <= most, f"{name} has {len(lines)} lines"
        assert max(map(len, lines)) <= 120, name


def three_pictures():
    return [shapes.draw_scene(f"test-{i}")[0].resize(size) for i, size in enumerate(SIZES)]


@pytest.fixture(scope="module", params=TINY_CONFIGS)
def backbone(request, tmp_path_factory):
    """(vlm in float64, inputs with captions, X): a tiny random model of each class, three pictures in one batch."""
    folder, config = tmp_path_factory.mktemp("tiny"), TINY_CONFIGS[request.param]
    torch.manual_seed(0)
    stock = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
    for p in stock.parameters():  # larger than the usual start, so that every token tells
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    stock.save_pretrained(folder)
    tokenizer, sizes = AutoTokenizer.from_pretrained(TINY), dict(size={"shortest_edge": 32}, crop_size=32)
    if request.param == "qwen2_5_vl":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|image_pad|>"]})
        tokenizer.chat_template = TEMPLATE.replace("<image>", "<|image_pad|>")
        tokenizer.save_pretrained(folder)
        Qwen2VLImageProcessorPil(patch_size=8, size=dict(shortest_edge=256, longest_edge=9216)).save_pretrained(folder)
    elif request.param == "llava_next":
        images = LlavaNextImageProcessorPil(image_grid_pinpoints=GRID, **sizes)
        LlavaNextProcessor(images, tokenizer, patch_size=8, chat_template=TEMPLATE).save_pretrained(folder)
    else:
        images = CLIPImageProcessorPil(**sizes)
        LlavaProcessor(images, tokenizer, patch_size=8, chat_template=TEMPLATE).save_pretrained(folder)
    vlm = load(folder, dtype=torch.float64)
    for name, norm in [(n, m) for n, m in vlm.model.named_modules() if type(m).__name__.endswith("RMSNorm")]:
        double = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=torch.float64).requires_grad_(False)
        double.load_state_dict(norm.state_dict())
        vlm.model.set_submodule(name, double)  # the stock one rounds to float32 inside
    inputs = vlm.inputs(three_pictures(), QUESTIONS, CAPTIONS)
    return vlm, inputs, vlm.encode(inputs)


def stock(vlm, inputs):
    """The same, as the stock model takes it."""
    plain = {k: v for k, v in inputs.items() if k not in ("valid", "newline", "patches", "grid", "position_ids")}
    if "image_grid_thw" in inputs:
        plain["mm_token_type_ids"] = (inputs["input_ids"] == vlm.image_id).int()
    return plain


def logits_of(vlm, sequence):
    """Logits of the prefill's last state and of each of eight decoded tokens, (8, B, V)."""
    options = dict(max_new_tokens=8, min_new_tokens=8, output_logits=True, return_dict_in_generate=True)
    return torch.stack(vlm.model.generate(**sequence, **options).logits)


def some(inputs, X):
    """keep (B, K), at random: another number of tokens for each image."""
    scores = torch.rand(X.shape[:2], generator=torch.Generator().manual_seed(0))
    if "valid" in inputs:
        scores = scores.masked_fill(~inputs["valid"], -torch.inf)
    return select(scores, torch.tensor([4, 9, 6]))


@pytest.mark.parametrize("with_keep", [False, True])
def test_keep_all_is_the_stock_model(backbone, with_keep):
    vlm, inputs, X = backbone
    keep = torch.arange(X.shape[1]).expand(len(X), -1) if with_keep else None
    if with_keep and "valid" in inputs:
        keep = keep.masked_fill(~inputs["valid"], -1).sort(1).values
    plain = stock(vlm, inputs)
    torch.testing.assert_close(logits_of(vlm, vlm.embed(inputs, X, keep)), logits_of(vlm, plain), atol=1e-8, rtol=0)
    torch.testing.assert_close(vlm.loss(inputs, X, keep), vlm.model(**plain).loss.double(), atol=2e-6, rtol=0)


def test_pruning_is_the_full_model_with_pruned_tokens_masked(backbone):
    vlm, inputs, X = backbone
    keep, valid = some(inputs, X), inputs.get("valid", torch.ones(X.shape[:2], dtype=torch.bool))
    pruned, full = vlm.embed(inputs, X, keep), vlm.embed(inputs, X)
    assert pruned["inputs_embeds"].shape[1] < full["inputs_embeds"].shape[1]
    chosen = torch.zeros(len(X), X.shape[1] + 1, dtype=torch.long).scatter(1, keep + 1, 1)[:, 1:]  # (B, N)
    mask = full["attention_mask"].masked_scatter(vlm.visual(inputs), chosen[valid])
    oracle = logits_of(vlm, {**full, "attention_mask": mask})
    vlm.model.generate(**stock(vlm, inputs), max_new_tokens=2)  # leaves rope_deltas behind, which must not matter
    torch.testing.assert_close(logits_of(vlm, pruned), oracle, atol=1e-8, rtol=0)
    # a deliberate mistake must be seen: nothing dropped, or positions closed up
    assert (logits_of(vlm, full) - oracle).abs().max() > 1e-3
    closed = (pruned["attention_mask"].cumsum(-1) - 1).clamp_min(0).expand_as(pruned["position_ids"])
    assert (logits_of(vlm, {**pruned, "position_ids": closed}) - oracle).abs().max() > 1e-3


def test_a_batch_is_what_its_pictures_are_one_by_one(backbone):
    vlm, inputs, X = backbone
    keep = some(inputs, X)
    batched = vlm.generate(vlm.inputs(three_pictures(), QUESTIONS), X, keep, max_new_tokens=6)
    for i, picture in enumerate(three_pictures()):
        alone = vlm.inputs([picture], QUESTIONS[i:i + 1])
        x, mine = vlm.encode(alone), keep[i:i + 1, keep[i] >= 0]  # (1, N, d_v), (1, K)
        N = vlm.tokens or inputs["valid"][i].sum()
        assert x.shape == (1, N, vlm.width) and (X[i, N:] == 0).all()
        torch.testing.assert_close(x[0], X[i, :N], atol=1e-9, rtol=0)
        assert vlm.generate(alone, x, mine, max_new_tokens=6) == batched[i:i + 1]


def test_labels_are_the_caption_and_the_end_of_text(backbone):
    vlm, inputs, _ = backbone
    told = [vlm.processor.tokenizer.decode(row[row != -100]).strip() for row in inputs["labels"]]
    assert told == [caption + "</s>" for caption in CAPTIONS]


def test_gradient_checkpointing_changes_nothing(backbone):
    """Also with gaps in the positions, which transformers takes for packed sequences where there is no mask."""
    vlm, inputs, X = backbone
    x, results, calls = X.clone().requires_grad_(), [], []
    hook = vlm.model.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for start in (vlm.model.eval, vlm.recompute):
        start()
        for keep in (None, some(inputs, X)):
            loss = vlm.loss(inputs, x, keep)
            results.append((loss, *torch.autograd.grad(loss, x)))
    hook.remove()
    vlm.model.eval()  # which turns it off
    torch.testing.assert_close(results[2:], results[:2], atol=1e-12, rtol=1e-9)
    assert len(calls) == 2 + 4, "it must run twice for each loss"


def test_a_box_is_where_its_token_looks(backbone):
    """A picture that is white in one box only: of all patches of its view, that token's is the brightest."""
    vlm, first = backbone[0], int(backbone[0].tokens == 17)  # 17: with the class token of 'full'
    for width, height in SIZES[:1] if vlm.tokens else SIZES:  # LLaVA-1.5 crops to a square, and speaks of that
        dark = vlm.inputs([Image.new("RGB", (width, height))], ["?"])
        boxes, N = vlm.boxes(dark), vlm.encode(dark).shape[1]
        assert boxes.shape == (N, 4) and (boxes[:first] == 0).all() and (boxes[first:, 2:] > boxes[first:, :2]).all()
        for i in range(first, N, 5):
            picture = Image.new("RGB", (width, height))
            picture.paste("white", [round(share * side) for share, side in zip(boxes[i].tolist(), 2 * (width, height))])
            light, number = vlm.inputs([picture], ["?"])["pixel_values"] - dark["pixel_values"], i - first
            if "grid" in dark:
                light = light.view(N, -1).sum(1)
            else:  # (tiles, 3, 32, 32) -> (patches of all tiles,)
                light = light.unflatten(2, (4, 8)).unflatten(4, (4, 8)).sum((1, 3, 5)).flatten()
            if "patches" in dark:  # the whole picture comes first, then its tiles
                number = dark["patches"][0, i].item()
                light[slice(16, None) if number < 16 else slice(16)] = -1
            assert light.argmax() == number and light[number] > 0


@pytest.mark.parametrize("name, parameters, N, newlines", [
    ("llava-1.5-7b", 7063427072, 576, 0), ("llava-next-7b", 7063431168, 576 + 48 * 48, 48),
    ("qwen2.5-vl-3b", 3754622976, 24 * 24, 0), ("qwen2.5-vl-7b", 8292166656, 24 * 24, 0)])
def test_random_architectures_have_the_published_sizes(name, parameters, N, newlines):
    vlm = load("random:" + name, "meta", torch.bfloat16)
    assert sum(p.numel() for p in vlm.model.parameters()) == parameters
    assert {(p.dtype, p.device.type) for p in vlm.model.parameters()} == {(torch.bfloat16, "meta")}
    inputs = vlm.dummy_inputs(2, 95)
    X = vlm.encode(inputs)
    assert X.shape == (2, N, vlm.width)
    sequence = vlm.embed(inputs, X, torch.zeros(2, 9, dtype=torch.long, device="meta"))
    assert sequence["inputs_embeds"].shape[1] == 95 + 9 + newlines


def test_the_memory_plan_is_what_autograd_keeps():
    vlm = load(TINY)
    inputs = vlm.inputs(three_pictures(), QUESTIONS, CAPTIONS)
    X = vlm.encode(inputs)
    scorer, denoiser, statistics = Scorer(vlm.width), Denoiser(vlm.width), whitening(X)
    weights = [p for module in (vlm.model, scorer, denoiser) for p in module.parameters()]
    fixed, kept = {p.untyped_storage().data_ptr() for p in weights}, {}

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t  # holds it, so that no two have one address
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        X_tilde = vp_gate(X, soft_top_k(scorer(X), 16, 0.5), *statistics)
        vlm.loss(inputs, denoiser(X_tilde)).backward()
    bytes_kept = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in fixed)
    plan = vlm.memory(learned=1000, B=3)
    assert 0.6 * plan["activations"] < bytes_kept < 1.2 * plan["activations"]
    assert plan["frozen"] == 4 * sum(p.numel() for p in vlm.model.parameters()) and plan["learned"] == 16000


def test_as_many_images_are_taken_as_the_plan_allows():
    vlm, learned = load("random:llava-1.5-7b", "meta", torch.bfloat16), 41_000_000
    assert vlm.memory(learned, 32)["activations"] == pytest.approx(85e9, rel=0.05)
    for free, recompute in ((10e9, False), (34e9, False), (66e9, False), (10e9, True)):
        n = vlm.images_that_fit(learned, free, recompute)
        fits, not_more = (vlm.memory(0, B, recompute)["activations"] + 16 * learned for B in (n, n + 1))
        assert n > 0 and fits <= 0.9 * free < not_more
    assert vlm.images_that_fit(learned, 1e9) == 0


# --- model folders ----------------------------------------------------------------------------------------------------

def changed(folder, file, content):
    """A copy of the tiny LLaVA with one file replaced by a text, removed (None), or changed by a dict.

    A dict for weights has an end of tensors' names and a number to fill them with, or None to remove them.
    """
    path = shutil.copytree(TINY, folder / "model") / file
    if content is None:
        path.unlink()
    elif isinstance(content, str):
        path.write_text(content)
    elif path.suffix == ".json":
        old = json.loads(path.read_text())
        for key, value in content.items():
            old[key] = {**old[key], **value} if key in old and isinstance(value, dict) else value
        path.write_text(json.dumps(old))
    else:
        tensors = load_file(path)
        (end, value), = content.items()
        for name in [name for name in tensors if name.endswith(end)]:
            if value is None:
                del tensors[name]
            else:
                tensors[name].fill_(value)
        save_file(tensors, path, {"format": "pt"})
    return path.parent


@pytest.mark.parametrize("file, content, words", [
    ("model.safetensors", {"lm_head.weight": None}, "lm_head.weight is missing"),
    ("model.safetensors", {"lm_head.weight": math.nan}, "--dtype float32"),
    ("model.safetensors", {"pre_layrnorm.weight": math.inf}, "--dtype float32"),
    ("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    ("model.safetensors", "half a file", "reading the weights"),
    ("adapter_config.json", "{}", "LoRA"),
    ("config.json", "[]", "reading config.json"),
    ("config.json", {"model_type": "blip"}, "'blip'.*llava, llava_next, qwen2_5_vl"),
    ("config.json", {"text_config": {"num_hidden_layers": 1}}, r"layers\.1\.\S+ is not in the model"),
    ("config.json", {"text_config": {"vocab_size": 390}}, r"lm_head.weight is \(\d+, \d+\) .*\(390, \d+\)"),
    ("config.json", {"text_config": {"model_type": "mistral", "sliding_window": 64}}, "sliding"),
    ("config.json", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
    ("config.json", {"image_token_index": 5, "image_token_id": 5}, "<image> is 4, .*image token 5"),
    ("tokenizer.json", '{"version": "1.0", "model": {"type": "New"}}', "tokenizer.json"),
    ("processor_config.json", {"image_processor": {"crop_size": {"height": 64, "width": 64}}}, "grey picture.*64"),
    ("processor_config.json", {"image_processor": {"do_center_crop": False}}, "grey picture"),  # fits squares only
    ("chat_template.jinja", None, "no chat template"),
    ("chat_template.jinja", "{% for m in messages %}{{ m['content'] }}{% endfor %}", "<image> stands for the picture"),
])
def test_a_faulty_model_is_refused_in_one_line_that_names_it(file, content, words, tmp_path):
    folder = changed(tmp_path, file, content)
    with pytest.raises(InputError, match=words) as e:
        load(folder)
    assert str(e.value).startswith(str(folder)) and "\n" not in str(e.value) and len(str(e.value)) < 600


@pytest.mark.parametrize("file, content", [
    ("tokenizer_config.json", {"pad_token": None}),
    ("tokenizer_config.json", {"eos_token": None}),
    ("config.json", {"attn_implementation": "flash_attention_2"}),
    ("chat_template.jinja", "{{ bos_token }}" + TEMPLATE),  # which the tokenizer writes, too
    ("chat_template.json", json.dumps({"chat_template": TEMPLATE})),
    ("tokenizer_config.json", {"chat_template": TEMPLATE}),
])
def test_another_way_to_write_the_same_model_is_read(file, content, tmp_path):
    folder, said = changed(tmp_path, file, content), []
    if file.endswith(".json") and "chat_template" in content:
        (folder / "chat_template.jinja").unlink()
    for vlm in (load(folder), load(TINY)):
        inputs = vlm.inputs(three_pictures(), QUESTIONS)
        said.append((inputs["input_ids"].tolist(), vlm.generate(inputs, vlm.encode(inputs), max_new_tokens=8)))
    assert said[0] == said[1]


def test_nothing_in_a_model_folder_is_executed(tmp_path, monkeypatch):
    kinds = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
    code = {"auto_map": dict.fromkeys(kinds, "evil.Evil"), "processor_class": "Evil"}
    folder = changed(tmp_path, "evil.py", f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil:\n    pass\n")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | code))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_loaded_model_is_taken_with_its_processor():
    loaded = LlavaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
    ours, theirs = load(TINY), load(loaded, processor=AutoProcessor.from_pretrained(TINY))
    inputs = ours.inputs(three_pictures(), QUESTIONS)
    assert theirs.model is loaded and not any(p.requires_grad for p in loaded.parameters())
    assert theirs.generate(inputs, theirs.encode(inputs)) == ours.generate(inputs, ours.encode(inputs))
    with pytest.raises(InputError, match="processor="):
        load(loaded)


def test_a_device_that_cannot_answer_is_refused():
    for device, words in (("cuda:99", "cuda:99"), ("toaster", "--device cpu"), ("meta", "random:")):
        with pytest.raises(InputError, match=words):
            load(TINY, device)


def test_features_that_are_no_numbers_give_no_answer(backbone):
    vlm, inputs, X = backbone
    broken = X.index_fill(1, torch.tensor([0]), math.nan)
    assert vlm.loss(inputs, broken).isnan()
    with pytest.raises(InputError, match="--dtype float32"):
        vlm.generate(inputs, broken)


def test_a_text_is_checked_against_what_the_picture_leaves(backbone, monkeypatch):
    vlm, fits, longer = backbone[0], "é" * 10, "é" * 11
    inputs = vlm.inputs(three_pictures()[:1], [fits])
    monkeypatch.setattr(vlm, "context", inputs["input_ids"].shape[1])
    with pytest.raises(InputError, match="shorten"):
        vlm.inputs(three_pictures()[:1], [longer])
    if vlm.tokens is None:  # then check_text knows nothing of the picture
        monkeypatch.setattr(vlm, "context", (inputs["input_ids"] != vlm.image_id).sum().item())
    vlm.check_text(fits, "line 7")
    with pytest.raises(InputError, match="line 7 is longer"):
        vlm.check_text(longer, "line 7")


@pytest.mark.parametrize("text, words", [("Is {} red?", "stands for the picture"), ("\ud83d!", "half a character")])
def test_a_text_that_no_model_can_read_is_refused(text, words, backbone):
    vlm = backbone[0]
    with pytest.raises(InputError, match=f"line 7 .*{words}"):
        vlm.check_text(text.format(vlm.processor.image_token), "line 7")
    with pytest.raises(InputError, match=words):
        vlm.inputs(three_pictures()[:1], [text.format(vlm.processor.image_token)])


def test_tokens_beyond_the_embedding_are_refused():
    vlm = load(TINY)
    vlm.processor.tokenizer.add_tokens(["zebra"])
    with pytest.raises(InputError, match="get both of one model"):
        vlm.inputs(three_pictures()[:1], ["Is it a zebra?"])


def test_a_prompt_without_a_place_for_each_token_fails_its_trial(backbone, monkeypatch):
    vlm = backbone[0]
    if "grid" in backbone[1]:
        monkeypatch.setattr(vlm.processor.image_processor, "merge_size", 4)
    else:
        monkeypatch.setattr(vlm.processor, "patch_size", 4)
    with pytest.raises(InputError, match="the model: (.* places for|a trial fails)"), one_line("the model", "a trial"):
        vlm.trial()


# --- pictures and files -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("white, kind, suffix", [(65535, "H", ".png"), (65535, "H", ".tif"), (4095, "H", ".tif"),
                                                 (2 ** 24, "i", ".tif"), (1, "f", ".tif"), (255, "f", ".tif")])
def test_grey_of_any_depth_fills_the_range(tmp_path, white, kind, suffix):
    samples = struct.pack(f"<3{kind}", *(value if kind == "f" else int(value) for value in (0, white / 2, white)))
    Image.frombytes({"H": "I;16", "i": "I", "f": "F"}[kind], (3, 1), samples).save(tmp_path / f"deep{suffix}")
    assert list(read_image(tmp_path / f"deep{suffix}").convert("L").tobytes()) == pytest.approx([0, 127.5, 255], abs=1)


def test_what_is_transparent_is_white(tmp_path):
    """A black square on a transparent black ground."""
    square = Image.new("L", (8, 8))
    square.paste(255, (2, 2, 6, 6))
    for mode in ("RGBA", "LA"):
        image = Image.new(mode, (8, 8))
        image.putalpha(square)
        image.save(tmp_path / "logo.png")
        assert sorted(read_image(tmp_path / "logo.png").getcolors()) == [(16, (0, 0, 0)), (48, (255, 255, 255))]


def test_a_picture_is_upright_even_if_other_metadata_is_broken(tmp_path):
    picture, exif = read_image(EXAMPLES[0]).crop((0, 0, 96, 48)), Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        picture.save(tmp_path / "turned.png", exif=exif)
        with Image.open(tmp_path / "turned.png") as image:
            assert read_image(tmp_path / "turned.png").tobytes() == ImageOps.exif_transpose(image).tobytes()
    orientation, text = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0), struct.pack("<HHI4s", 0x011a, 2, 4, b"72\0\0")
    picture.save(tmp_path / "broken.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\2\0" + orientation + text + 4 * b"\0")
    assert read_image(tmp_path / "broken.jpg").size == (48, 96)


def test_bad_images_are_named(tmp_path):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    Image.new("1", (30_000, 1)).save(tmp_path / "thin.png")
    good, postscript = EXAMPLES[0].read_bytes(), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    for name, content, words in (
            ("truncated.jpg", good[:len(good) // 2], "truncated"), ("empty.jpg", b"", "cannot identify"),
            ("program.jpg", postscript, "cannot identify"), ("bomb.png", None, "bomb"), ("thin.png", None, "1:200")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: cannot be read as an image .*{words}"):
            read_image(tmp_path / name)


def test_a_frame_shows_each_patch_as_bright_as_its_alpha():
    picture = pictures.frame(Image.new("RGB", (40, 20)), BOXES, torch.tensor([1, 1, 0.5, 0, 0.2, 0.1]))
    levels = [picture.getpixel(at)[0] for at in ((5, 5), (25, 5), (5, 15), (25, 15))]
    assert levels == pytest.approx([204 * (1 - alpha) for alpha in (1, 0.5, 0.1, 0.2)], abs=2)


def test_a_sheet_shows_the_highest_in_red_and_the_lowest_in_blue():
    """Five tokens, the first without a place; number 1 is kept, number 4 scores lowest."""
    X, scores = torch.tensor([[9, 9], [1, 0], [1, 0], [0, 1], [2, 0.0]]), torch.tensor([0.0, 5, 1, 2, -1])
    grey = (128, 128, 128)
    image = Image.new("RGB", (50, 50), grey)
    sheet = pictures.sheet(image, BOXES[:5], scores, torch.tensor([1]), X, "Why?", "ab", side=100)
    kept, colored, matrix = ([sheet.getpixel((x + 110 * panel, sheet.height - 140 + y)) for x, y in
                              ((35, 25), (85, 25), (85, 75))] for panel in range(3))
    assert kept[0] == grey and min(kept[1]) > 200 and kept[2] == kept[1]
    assert colored[0][0] > colored[0][2] + 50 and colored[1] == grey and colored[2][2] > colored[2][0] + 50
    assert matrix == 3 * [pictures.HEAT[2]], "both have one direction"


def test_writing_follows_links_and_replaces_nothing_but_files(tmp_path):
    (tmp_path / "link.json").symlink_to("real.json")
    files.write(tmp_path / "link.json", files.rounded({"a": [1.23456789]}))
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "real.json").read_text()) == {"a": [1.2346]}
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("folder.json", "pipe.json", "no/such/folder.json", 300 * "n" + ".json"):
        with pytest.raises(InputError, match="cannot be written"):
            files.write(tmp_path / name, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.json", "link.json", "pipe.json", "real.json"]


@pytest.mark.parametrize("code, status, out", [
    ("print('café')", 0, b"caf\\xe9\n"), ("raise files.InputError('é ' * 999)", 2, b""),
    ("import time; print('a', flush=True); time.sleep(0.5); print('b' * 10**6)", 141, b"a\n")])
def test_odd_terminals_end_no_run_with_a_traceback(code, status, out):
    program = f"from data import files\ndef main():\n    {code}\nfiles.cli(main)"
    environment, pipe = {**os.environ, "PYTHONIOENCODING": "ascii"}, subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe)
    assert process.stdout.readline() == out
    process.stdout.close()  # the reader goes away
    assert process.stderr.read().count(b"\n") == (status == 2) and process.wait() == status


# --- question files, captions -----------------------------------------------------------------------------------------

def question(**changes):
    return {"question_id": 1, "image": "00000.jpg", "text": "What color is the star?", **changes}


def read(path, content, need=("question_id", "image", "text")):
    """The rows of a question file with this content: bytes, or rows."""
    text = content if isinstance(content, bytes) else "".join(json.dumps(row) + "\n" for row in content).encode()
    path.write_bytes(text)
    return questions.read_questions(path, EXAMPLES[0].parent, need)


def test_question_files_of_all_forms_are_read(tmp_path):
    rows, path = [question(), question(question_id=2, category=3, label=["green", "lime"])], tmp_path / "q.jsonl"
    first, second = [json.dumps(row).encode() for row in rows]
    for content in (rows, b"\xef\xbb\xbf" + first + b"\n  \n" + second + b" \r\n", json.dumps(rows).encode()):
        told = read(path, content)
        assert [row["image"] for row in told] == [EXAMPLES[0]] * 2 and told[0]["category"] == "all"
        assert told[1]["label"] == ["green", "lime"] and told[1]["category"] == "3" and told[1]["where"][-1] in "23"
    (tmp_path / "beside.jpg").symlink_to(EXAMPLES[1])
    assert read(path, [question(image="beside.jpg")])[0]["image"] == tmp_path / "beside.jpg"
    with pytest.raises(InputError, match="line 2: has no label"):
        read(path, [question(label="a"), question()], need=("image", "text", "label"))
    with pytest.raises(InputError, match="eval.lmms --tasks mmbench_en_dev"):
        read(tmp_path / "mmbench.tsv", b"index\tquestion\n")


@pytest.mark.parametrize("content, words", [
    ([question(), question(image=["a.jpg", "b.jpg"])], "line 2: .*one file name"), ([question(image=42)], "one file"),
    ([question(image=None)], "line 1: has no image"), ([question(image="/9j/" + 4000 * "A")], "line 1: .*one file"),
    ([question(image="../llava/config.json")], "one file name"), ([question(image=300 * "n")], "no file nnn.*--images"),
    ([question(image="\ud83d.jpg")], "no file"), ([question(text=3)], "text must be a string"), (b"3", "has no"),
    ([question(label={"a": 1})], "label"), ([{"image": "00000.jpg", "text": "?"}], "has no question_id"),
    (json.dumps(question(text=500 * "x")).encode("utf-16"), "UTF-8"), (b'\n{"text": ' + 5000 * b"x", "line 2: cannot"),
    (b"[" * 200_000, "cannot be read"), (b'[{"image": null, "conversations": []}]', "scienceqa_img"), (b"\n", "no q")])
def test_what_is_wrong_in_a_question_file_is_named_in_a_short_line(content, words, tmp_path):
    with pytest.raises(InputError, match=f"q.jsonl: .*{words}") as e:
        read(tmp_path / "q.jsonl", content)
    assert len(str(e.value)) < 500


def test_what_is_right_and_popes_figures(capsys):
    """Counted by hand: 3 of 4 yes said yes, 2 of 6 no said yes. Only the first sentence counts, and capitals do."""
    for answer, label in (("Green.", ["green", "lime"]), ("lime", ["green", "Lime."]), ("3", 3), (" red", "Red")):
        assert questions.is_right(answer, label, yes_no=False) and not questions.is_right("blue", label, yes_no=False)
    said = ["Yes", "yes.", "Yes, a cat. No dog.", "No", "no", "There is not", "No, none.", "No. Yes", "NO", "none", "?"]
    rows = [question(label="yes", category="all")] * 4 + [question(label="no", category="all")] * 6
    assert questions.score([*rows, question(category="all")], said) == {
        "all": pytest.approx({"accuracy": 0.7, "precision": 0.6, "recall": 0.75, "f1": 2 / 3, "yes": 0.5})}
    assert "10 of 11 questions have a label" in capsys.readouterr().out


def answers(left):
    """Answers as ask() yields them: the longest first, in batches of three."""
    for at in range(len(left) - 1, -1, -3):
        yield [(j, f"answer {left[j]['question_id']}") for j in range(at, max(-1, at - 3), -1)]


def test_a_killed_question_file_continues_where_it_stopped(tmp_path):
    rows, asked, path = [question(question_id=i) for i in range(12)], [], tmp_path / "killed.jsonl"

    def go(path, answer=answers):
        asked.clear()
        return questions.answer_file(path, rows, {"model": "m"}, lambda left: asked.extend(left) or answer(left))

    def killed(left):
        for n, part in enumerate(answers(left)):
            yield part if n < 2 else os.kill(os.getpid(), signal.SIGKILL)
    whole = go(tmp_path / "whole.jsonl")
    assert whole == [f"answer {i}" for i in range(12)]
    final, child = (tmp_path / "whole.jsonl").read_bytes(), os.fork()
    if not child:
        go(path, killed)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    left_behind = path.read_bytes()
    for cut in (0, 1, 30, 400):  # the sixth line whole, or cut off anywhere
        path.write_bytes(left_behind[:len(left_behind) - cut])
        there = path.read_bytes().count(b"\n")
        assert go(path) == whole and path.read_bytes() == final and len(asked) == 12 - there < 12


def test_answers_replace_nothing_else_and_two_runs_do_not_mix(tmp_path):
    rows, link = [question()], tmp_path / "link.jsonl"
    link.symlink_to("real.jsonl")

    def second(left):
        with pytest.raises(InputError, match="another run is writing"):
            questions.answer_file(tmp_path / "real.jsonl", rows, {"model": "m"}, answers, overwrite=True)
        return answers(left)
    questions.answer_file(link, rows, {"model": "m"}, second)
    assert link.is_symlink() and len((tmp_path / "real.jsonl").read_text().splitlines()) == 1
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "note.jsonl").write_text("a note\n")
    for name, words in (("pipe.jsonl", "no ordinary file"), ("no/a.jsonl", "cannot"), ("note.jsonl", "no answer file")):
        with pytest.raises(InputError, match=words):
            questions.answer_file(tmp_path / name, rows, {"model": "m"}, answers)
    assert (tmp_path / "note.jsonl").read_text() == "a note\n"


def read_captions(folder, field, changes):
    """A captions file of links to the six example scenes, after changes to the second image or annotation."""
    content = {"images": [dict(id=i, file_name=p.name) for i, p in enumerate(EXAMPLES)],
               "annotations": [dict(id=i, image_id=i, caption=f"Caption {i}.") for i in range(6)]}
    content[field][1].update(changes)
    for path in EXAMPLES:
        (folder / path.name).symlink_to(path)
    (folder / "coco.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    return coco_files.read_coco(folder / "coco.json")


def test_links_are_followed_and_held_out_images_are_drawn_at_random(tmp_path):
    read = read_captions(tmp_path, "annotations", {"id": None})
    assert read == {tmp_path / p.name: [f"Caption {i}."] for i, p in enumerate(EXAMPLES)}
    pairs = {f"{i}.jpg": [f"{i}"] for i in range(100)}
    training, held_out = coco_files.split(pairs, 0)
    assert len(held_out) == 5 and dict(training + held_out) == pairs
    assert (training, held_out) == coco_files.split(pairs, 0)
    assert held_out not in (list(pairs.items())[-5:], coco_files.split(pairs, 1)[1])


@pytest.mark.parametrize("field, changes, words", [
    ("images", {"id": None}, "00001.jpg.*id of its own"), ("images", {"id": 0}, "00001.jpg.*id of its own"),
    ("images", {"file_name": 300 * "n"}, "no file nnn"), ("images", {"file_name": "\ud83d.jpg"}, "no file"),
    ("images", {"file_name": "../a.jpg"}, "one file name"), ("images", {"file_name": str(PICTURE)}, "one file name"),
    ("annotations", {"id": 0}, "id 0 twice"), ("annotations", {"image_id": 99}, "id 1: image_id 99 .*drop it"),
    ("annotations", {"image_id": "1"}, "id 1: .*as numbers"), ("annotations", {"caption": " "}, "id 1: caption"),
    ("annotations", {"image_id": []}, "objects"), ("annotations", {"caption": None}, "id 1: caption")])
def test_what_is_wrong_in_a_captions_file_is_named(field, changes, words, tmp_path):
    with pytest.raises(InputError, match=f"coco.json: .*{words}") as e:
        read_captions(tmp_path, field, changes)
    assert len(str(e.value)) < 400


def test_a_sample_depends_on_seed_and_number_alone(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"")
    pairs = [(tmp_path / "bad.jpg", ["bad"]), *((path, [path.name, "other"]) for path in EXAMPLES)]
    data, again, ordered = coco_files.Captions(pairs, 0), coco_files.Captions(pairs, 0), coco_files.Captions(pairs)
    samples = [data[g] for g in range(21)]
    assert [again[g] for g in (20, 3, 9)] == [samples[g] for g in (20, 3, 9)]
    epochs = [[sample[1].tobytes() for sample in samples[at:at + 7]] for at in (0, 7, 14)]
    assert epochs[0] != epochs[1] and all(len(set(epoch)) == 6 for epoch in epochs)
    assert sum(len(sample[3]) for sample in samples) == 3 and len({sample[2] for sample in samples}) > 4
    assert ordered[0][2:] == (EXAMPLES[0].name, [str(tmp_path / "bad.jpg")]) and ordered[3][2] == EXAMPLES[2].name


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_the_processor_refuses_counts_as_unreadable(vlm, monkeypatch, workers):
    kind, refused = type(vlm.processor.image_processor), read_image(EXAMPLES[1]).tobytes()
    call = kind.__call__

    def picky(self, images, *a, **kw):
        if refused in [image.tobytes() for image in (images if isinstance(images, list) else [images])]:
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return call(self, images, *a, **kw)
    monkeypatch.setattr(kind, "__call__", picky)
    data, skipped = coco_files.Captions([(path, [path.name]) for path in EXAMPLES]), set()
    (g, inputs, n), (_, _, none) = coco_files.load_batches(vlm, data, [[0, 1], [2, 3]], "Describe.", workers, skipped)
    assert list(g) == [0, 1] and (n, none) == (1, 0) and skipped == {str(EXAMPLES[1])}
    told = vlm.processor.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    assert [text.split()[-1] for text in told] == ["00000.jpg", "00002.jpg"]
    with pytest.raises(InputError, match="^a question has <image> in it"):
        list(coco_files.load_batches(vlm, data, [[0]], "<image>", workers, skipped))


# --- a pruner, infer.py -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, tensors, changes", [
    ("head.weight", {"head.weight": None}, {}), ("more", {"more": torch.ones(1)}, {}),
    ("norm.weight", {"norm.weight": torch.ones(65)}, {}), ("norm.bias", {"norm.bias": torch.full((64,), math.nan)}, {}),
    ("no trained", {}, {"width": 10 ** 9}), ("no trained", {}, {"width": 65}), ("no trained", {}, {"width": "64"}),
    ("no keep", {}, {"keep": None}), ("no budget", {}, {"keep": "some"}), ("no trained", {}, {"thresholds": [1]}),
    ("no number", {}, {"thresholds": {"shares": [0.1, 1], "values": [1.0, math.nan]}})])
def test_bad_pruners_are_named_before_memory_is_taken(words, tensors, changes, tmp_path):
    settings = {"model": str(TINY), "width": 64, "tokens": 144, "keep": 16} | changes
    tensors = {name: t.clone() for name, t in (Scorer(64).state_dict() | tensors).items() if t is not None}
    save_file(tensors, tmp_path / "scorer.safetensors")
    files.write(tmp_path / "pruner.json", {name: value for name, value in settings.items() if value is not None})
    with pytest.raises(InputError, match=words):  # 10⁹ squared would take 4 exabytes
        pruner.load_pruner(tmp_path)


def test_a_budget_on_average_goes_by_the_table():
    z = standardised(torch.randn(50, 144, generator=torch.Generator().manual_seed(0)))
    whole = {"tokens": 144, "thresholds": quantiles(z)}
    for text, K in (("~16", 16), ("~11.1%", 16), ("~7", 7), ("~100", 100), ("~144", 144)):
        assert (z > pruner.threshold_of(Budget.parse(text), whole, 144)).sum() / 50 == pytest.approx(K, rel=0.02)
    short = {"tokens": 144, "thresholds": {"shares": [0.05, 0.5], "values": [2.0, 0.0]}}
    for settings, text, N, words in ((short, "~7", 144, "5.00% to 50.00%"), (short, "~73", 144, "stay within"),
                                     (whole, "~16", 576, "144 visual tokens.*576"), ({}, "~16", 144, "no thresholds")):
        with pytest.raises(InputError, match=words):
            pruner.threshold_of(Budget.parse(text), settings, N)


def test_the_chooser_keeps_what_it_says(vlm):
    scorer, settings = pruner.load_pruner(ROOT / "data/shapes/pruner")
    settings |= {"keep": "~16", "thresholds": {"shares": [0, 1], "values": [1.0, -2.0]}}
    X = vlm.encode(vlm.inputs([read_image(p) for p in EXAMPLES], ["?"] * 6))
    scores, T = scorer(X), 1 - 3 * 16 / 144
    above = select(scores, count_above(standardised(scores), T))
    for options, keep, goes_by in (
            ({}, above, {"keep": "~16"}), ({"T": T}, above, {"threshold": T}),
            ({"budget": Budget(9)}, select(scores, 9), {"keep": "9"}),
            ({"budget": Budget(9), "choose": "diverse"}, select_diverse(scores, X, 9), {"keep": "9"})):
        choose, told = pruner.chooser(vlm, scorer, settings, **options)
        assert choose(X, {}).equal(keep) and told == {**goes_by, "choose": options.get("choose", "top")}
    assert pruner.chooser(vlm, scorer, settings, Budget(144))[0](X, {}) is None
    with pytest.raises(InputError, match="no numbers"):
        pruner.chooser(vlm, lambda X, valid: scores * math.nan, settings)[0](X, {})


def test_asking_many_is_asking_one_by_one_and_reads_an_image_once(backbone, tmp_path, monkeypatch):
    vlm, encode, encoded = backbone[0], backbone[0].encode, []
    for i, picture in enumerate(three_pictures()):
        picture.save(tmp_path / f"{i}.png")
    rows = [question(image=tmp_path / f"{i % 3}.png", text=QUESTIONS[i // 2]) for i in range(6)]
    monkeypatch.setattr(vlm, "encode", lambda inputs: encoded.extend(inputs["input_ids"]) or encode(inputs))

    def longest(X, inputs):  # padding is zero
        return select(X.norm(dim=-1), 5)
    for choose in (longest, lambda X, inputs: None):
        encoded.clear()
        said = dict(pair for part in infer.ask(vlm, rows, choose, batch=4, max_new_tokens=5) for pair in part)
        assert len(encoded) == 3 and len(said) == 6
        for i, row in enumerate(rows):
            inputs = vlm.inputs([read_image(row["image"])], [row["text"]])
            X = encode(inputs)
            assert vlm.generate(inputs, X, choose(X, inputs), 5)[0] == said[i]


@pytest.mark.parametrize("K", [5, None])
def test_the_images_cache_changes_nothing(backbone, K):
    vlm, image = backbone[0], three_pictures()[1]
    X = vlm.encode(vlm.inputs([image], ["?"]))
    keep = None if K is None else select(X.norm(dim=-1), K)
    cache = infer.image_cache(vlm, vlm.inputs([image], ["Another?"]), X, keep)
    for text in QUESTIONS:
        sequence = vlm.embed(vlm.inputs([image], [text]), X, keep)
        cached = logits_of(vlm, {**sequence, infer.CACHE: copy.deepcopy(cache)})
        torch.testing.assert_close(cached, logits_of(vlm, sequence), atol=1e-9, rtol=0)
        assert 0 < cache.get_seq_length() < sequence["inputs_embeds"].shape[1]


def test_show_draws_the_kept_patch_in_its_place_on_every_backbone(backbone, tmp_path, capsys):
    """The last token is the patch at the bottom right, whether or not there are a class token, tiles or windows."""
    vlm, image = backbone[0], Image.new("RGB", three_pictures()[1].size)
    args = SimpleNamespace(image="a", question="?", max_new_tokens=4, show=tmp_path / "a.png", json=True)
    infer.answer_one(args, vlm, image, lambda X, inputs: torch.tensor([[X.shape[1] - 1]]), lambda X: X.norm(dim=-1))
    said, sheet = json.loads(capsys.readouterr().out.splitlines()[-1]), Image.open(args.show).convert("L")
    assert said["kept"] == [said["tokens"] - 1]
    seen = pictures.seen_by_model(vlm, vlm.inputs([image], ["?"]), image)
    kept = sheet.crop((10, 108, 410, 108 + round(400 * seen.height / seen.width)))
    assert kept.getpixel((kept.width - 2, int(0.9 * kept.height))) < 50
    assert sum(value < 50 for value in kept.tobytes()) < kept.width * kept.height / 8, "the others are pale"


def test_one_question_from_the_command_line(capsys, monkeypatch):
    """--keep all answers as the stock model does; the last line compares with all tokens."""
    stock = load(TINY)
    inputs = stock.inputs([read_image(EXAMPLES[0])], [QUESTIONS[1]])
    ids = stock.model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1]:]
    assert run(infer.main, EXAMPLES[0], QUESTIONS[1], *SHIPPED, "--keep", "all") == 0
    assert capsys.readouterr().out.splitlines()[0] == stock.processor.decode(ids, skip_special_tokens=True).strip()
    with open(EXAMPLES[0]) as picture:
        monkeypatch.setattr(sys, "stdin", picture)
        assert run(infer.main, "-", QUESTIONS[0], *SHIPPED) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"kept 16 of 144 tokens, prefill \d+ ms \(all tokens: \d+ ms\)", out.splitlines()[-1])
    assert err.count("\n") == 1 and "model data/shapes/llava, pruner" in err


@pytest.mark.parametrize("argv, words", [
    (["gone.jpg", "?"], "gone.jpg"), (["-"], "standard input"), ([], "picture"), (["--questions", "q"], "--answers"),
    ([PICTURE, "?", "--keep", 0], "--keep"), ([PICTURE, "?", "--keep", 145], "144"), ([PICTURE, " "], "empty"),
    ([PICTURE, "?", "--keep", 9, "--threshold", 1], "without --keep"), ([PICTURE, "?", "--pruner", "no"], "no:"),
    ([PICTURE, "--show", "k.png"], "--show"), ([PICTURE, "?", "--show", "no/k.png"], "--show no/k.png"),
    (["--questions", "q", "--answers", "a.json"], "ends in .jsonl"), ([PICTURE, "a <image>", "--keep", 9], "<image>")])
def test_bad_inference_input(argv, words, capsys):
    assert run(infer.main, *argv, "--device", "cpu") == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("error: ") and words in err[-1] and len(err) <= 2


def test_a_chat_answers_as_single_runs_do_and_outlives_a_bad_question(capsys, monkeypatch):
    alone = []
    for text in QUESTIONS:
        assert run(infer.main, EXAMPLES[0], text, *SHIPPED) == 0
        alone.append(capsys.readouterr().out.splitlines()[0])
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([QUESTIONS[0], "", "Is <image> red?", *QUESTIONS[1:]])))
    assert run(infer.main, EXAMPLES[0], *SHIPPED) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[::2] == alone and err.count("error: ") == 1 and "<image>" in err.splitlines()[-1]
    assert all("all 144 tokens, read again" in line for line in out.splitlines()[1::2])
    monkeypatch.setattr(sys, "stdin", None)  # closed
    assert run(infer.main, EXAMPLES[0], *SHIPPED) == 0 and not capsys.readouterr().out


def test_a_question_file_from_the_command_line(tmp_path, capsys, monkeypatch):
    """Answers are resumed only by the same model: one changed weight is another."""
    stock, path, answered = load(TINY), tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    monkeypatch.setattr(infer, "load", lambda *a: stock)
    read(path, [question(question_id=i, text=QUESTIONS[i % 3], category="popular") for i in range(6)])
    argv = ("--questions", path, "--images", PICTURE.parent, "--answers", answered, *SHIPPED)
    assert run(infer.main, *argv, "--json") == 0
    out, said = capsys.readouterr().out, [json.loads(line) for line in answered.read_text().splitlines()]
    assert f"--question-file {path} --result-file {answered}" in out and '"questions": 6' in out.splitlines()[-1]
    assert [row["question_id"] for row in said] == list(range(6)) and said[0]["metadata"]["keep"] == "16"
    assert run(infer.main, *argv, "--keep", 20) == 2 and "keep 16 (now 20)" in capsys.readouterr().err.splitlines()[-1]
    stock.model.lm_head.weight[0, 0] += 1
    assert run(infer.main, *argv) == 2 and "weights" in capsys.readouterr().err.splitlines()[-1]
    assert len(answered.read_text().splitlines()) == 6 and run(infer.main, *argv, "--overwrite") == 0
    read(path, [question(text="red " * 2000)])
    assert run(infer.main, *argv, "--overwrite") == 2 and "q.jsonl: line 1" in capsys.readouterr().err.splitlines()[-1]


def test_help_describes_every_flag_and_says_what_a_default_is(capsys):
    assert run(infer.main, "--help") == 0
    told = capsys.readouterr().out
    assert "question files:" in told and not re.search(r"\((?!default)[\w.]+\)$", told, re.M)
    assert not re.findall(r"^  --?[\w-]+( [A-Z]+)?$", told, re.M), "a flag without a description"


@pytest.fixture(scope="module")
def scene(vlm):
    """Three pictures and their features."""
    inputs = vlm.inputs([read_image(p) for p in EXAMPLES[:3]], ["?"] * 3)
    return inputs, vlm.encode(inputs)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A question file of six drawn scenes with five questions each, and a pruner with thresholds."""
    folder = tmp_path_factory.mktemp("asked")
    with open(folder / "test.jsonl", "w") as file:
        for i in range(6):
            image, objects = shapes.draw_scene(f"test-{i}")
            image.save(folder / f"{i}.png")
            for j, (kind, text, label) in enumerate(shapes.questions(objects, random.Random(i))):
                row = dict(question_id=5 * i + j, image=f"{i}.png", text=text, label=label, category=kind)
                file.write(json.dumps(row) + "\n")
    torch.manual_seed(0)
    width = load(TINY).width
    save_file(Scorer(width).state_dict(), folder / "scorer.safetensors")
    thresholds = {"images": 6, "shares": [0.01, 0.5, 1.0], "values": [2.3, 0.0, -3.0]}
    settings = {"model": str(TINY), "width": width, "tokens": 144, "keep": "16", "thresholds": thresholds}
    (folder / "pruner.json").write_text(json.dumps(settings))
    return folder


# --- criteria ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("N", [144, 145])
def test_the_uniform_grid_keeps_exactly_k_patches_and_a_class_token_last(N):
    X = torch.zeros(2, N, 1)
    sixteen = [12 * y + x + N - 144 for y in (1, 4, 7, 10) for x in (1, 4, 7, 10)]
    assert criteria.uniform_grid(X, 16)[0].tolist() == sixteen
    for K in range(1, N + 1):
        keep = criteria.uniform_grid(X, K)
        assert keep.shape == (2, K) and (keep.diff(dim=1) > 0).all() and keep.max() < N
        assert (keep.min() >= N - 144) or K > 144, "the class token is no patch"


def test_max_min_diversity_is_its_plain_definition(scene):
    _, X = scene
    far = 1 - F.cosine_similarity(X[0][:, None], X[0][None], dim=-1)
    far.fill_diagonal_(torch.inf)
    kept = [far.amin(1).argmax().item()]
    while len(kept) < 9:
        rest = [i for i in range(144) if i not in kept]
        kept.append(max(rest, key=lambda i: min(far[i, j].item() for j in kept)))
    assert criteria.max_min_diversity(X, 9)[0].tolist() == sorted(kept)


def test_the_fast_dpp_is_greedy_over_determinants():
    X = torch.randn(2, 20, 40, generator=torch.Generator().manual_seed(0))
    quality = torch.linspace(0.5, 2, 20).expand(2, -1)
    for b, keep in enumerate(criteria.dpp(X, 8, quality)):
        x = F.normalize(X[b].double(), dim=-1) * quality[b].double()[:, None]
        kept = []
        while len(kept) < 8:
            rest = [i for i in range(20) if i not in kept]
            kept.append(max(rest, key=lambda i: torch.logdet(x[kept + [i]] @ x[kept + [i]].T).item()))
        assert keep.tolist() == sorted(kept)


def test_a_dpp_beyond_the_rank_of_the_features_still_keeps_k_tokens():
    X = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0))
    keep = criteria.dpp(X, 20)
    assert keep.shape == (2, 20) and (keep.diff(dim=1) > 0).all()


@pytest.mark.parametrize("class_token", [0, 1])
def test_pooling_puts_each_cells_mean_at_its_centre(class_token):
    X = torch.randn(2, 144 + class_token, 5, generator=torch.Generator().manual_seed(0))
    pooled, keep = criteria.average_pooling(X, 16)
    cell = X[1, class_token:].view(12, 12, -1)[3:6, 6:9].mean((0, 1))  # row 1, column 2 of 4 x 4
    torch.testing.assert_close(pooled[1, keep[1, 6]], cell)
    assert keep.equal(criteria.uniform_grid(X, 16))
    assert criteria.pooled_grid(144, 48) == (6, 8) and criteria.pooled_grid(144, 31) is None


def test_cls_attention_is_that_of_the_stock_encoder(vlm, scene):
    inputs, _ = scene
    stock = LlavaForConditionalGeneration.from_pretrained(TINY, dtype="float32", attn_implementation="eager")
    stock = stock.model.vision_tower
    attention = stock(inputs["pixel_values"], output_attentions=True).attentions[-2].mean(1)[:, 0]  # (B, 1 + N)
    torch.testing.assert_close(criteria.cls_attention(vlm, inputs), attention[:, 1:], atol=1e-5, rtol=1e-3)
    full = load(TINY).model
    full.config.vision_feature_select_strategy = "full"
    with_class = criteria.cls_attention(Llava(full, None, "full"), inputs)
    torch.testing.assert_close(with_class, attention, atol=1e-5, rtol=1e-3)


def test_where_images_differ_in_tokens_each_is_chosen_from_alone():
    X, N = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([30, 20])
    inputs, K = {"valid": torch.arange(30) < N[:, None]}, torch.tensor([6, 4])
    ways = criteria.criteria(SimpleNamespace(tokens=None))
    assert set(ways) == {"random", "norm", "diversity", "DPP"}
    for name, choose in ways.items():
        keep = choose(X, inputs, K)
        assert ((keep >= 0).sum(1) == K).all() and (keep < N[:, None]).all() and (keep[1, :2] == -1).all()
        if name != "random":
            assert keep[1, 2:].equal(choose(X[1:, :20], {}, 4)[0]), name


# --- accuracy ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("budget", ["16", "~16"])
def test_the_scorers_row_is_what_infer_answers(asked, tmp_path, capsys, budget):
    some = ("--questions", asked / "test.jsonl", "--pruner", asked, "--device", "cpu", "--keep", budget)
    assert run(accuracy.main, *some, "--seeds", 1, "--json", tmp_path / "accuracy.json") == 0
    measured = json.loads((tmp_path / "accuracy.json").read_text())
    assert {"conditions", "command", "accuracy"} <= set(measured)
    assert list(measured["accuracy"]) == ["all 144", f"scorer {budget}", "random 16", "uniform 16", "blind"]
    capsys.readouterr()
    assert run(infer.main, *some, "--answers", tmp_path / "answers.jsonl") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    printed = {words[0]: words[1] for words in lines if len(words) == 2}
    for kind, share in measured["accuracy"][f"scorer {budget}"].items():
        assert f"{100 * share:.1f}" == printed[kind]


def test_random_is_the_mean_of_its_draws_and_blind_sees_nothing(vlm, asked, monkeypatch):
    rows = accuracy.read_questions(asked / "test.jsonl")
    kept = []
    def generate(inputs, X, keep, **_):
        kept.append(keep)
        return ["two"] * (len(keep) // 2) + ["no"] * (len(keep) - len(keep) // 2)

    monkeypatch.setattr(vlm, "generate", generate)
    ways = accuracy.free_choices(vlm, Budget(16), 3, others=False)
    right, counts = accuracy.right_or_wrong(vlm, rows, ways)
    assert len(kept) == 4 and not kept[0].equal(kept[1]) and kept[0][0].equal(kept[0][4]), "one draw for each image"
    assert set(counts["random 16"]) == {16} and len(right["uniform 16"]) == 30


def test_the_blind_answer_is_the_full_models_without_its_visual_tokens(vlm, scene):
    inputs, X = scene
    sequence = vlm.embed(inputs, X)
    sequence["attention_mask"] = sequence["attention_mask"] * ~vlm.visual(inputs)
    masked = vlm.model(**sequence).logits[:, -1]
    blind = vlm.model(**vlm.embed(inputs, X, torch.full((3, 1), -1))).logits[:, -1]
    torch.testing.assert_close(blind, masked, atol=1e-4, rtol=1e-4)


def test_a_category_of_which_the_full_model_gets_nothing_is_left_out():
    full = {"a": 0.5, "b": 0.0}
    assert accuracy.retention({"a": 0.25, "b": 0.0}, full) == accuracy.retention({"a": 0.25, "b": 0.5}, full) == 50


def test_the_interval_is_binomial_over_images_not_questions():
    rows = [dict(image=i // 5, category="abcde"[i % 5]) for i in range(2000)]  # 400 images with five questions each
    full, pruned = [1.0] * 2000, [float(i // 5 < 320) for i in range(2000)]  # an image's five succeed or fail together
    assert accuracy.bootstrap(full, full, rows) == (100, 100)
    half_width = 100 * 1.96 * (0.8 * 0.2 / 400) ** 0.5
    assert accuracy.bootstrap(pruned, full, rows) == pytest.approx((80 - half_width, 80 + half_width), abs=0.5)


# --- speed ------------------------------------------------------------------------------------------------------------

def test_flops_are_the_published_count_and_those_of_a_batch():
    vlm = SimpleNamespace(model=SimpleNamespace(config=AutoConfig.for_model("llava")))  # LLaVA-1.5-7B
    one, four = (bench.prefill_flops(vlm, batch, 671) for batch in (1, 4))
    assert one / 1e12 == pytest.approx(8.927, abs=1e-3) and four == 4 * one


def test_bench_times_every_stage_row_and_choice(tmp_path, capsys):
    assert run(bench.main, "speed", "--model", TINY, "--device", "cpu", "--repeats", 1, "--keep", 36, "--batch", 1, 2,
               "--words", 3, "--json", tmp_path / "speed.json") == 0
    made = json.loads((tmp_path / "speed.json").read_text())["speed"]
    assert list(made["rows"]) == [f"{row}, batch {B}" for B in (1, 2) for row in ("all 144", "keep 36")]
    for name, row in made["rows"].items():
        assert all(row[stage]["median"] > 0 for stage in ("encode", "project", "prefill", "first", "decode", "answer"))
        rate = 1000 * int(name[-1]) / row["answer"]["median"]
        assert row["images_per_second"]["answer"] == pytest.approx(rate, rel=1e-3)
    rows = made["rows"]
    cache = rows["keep 36, batch 1"]["cache_bytes"] / rows["all 144, batch 1"]["cache_bytes"]
    assert cache == pytest.approx((36 + 95) / (144 + 95))
    assert rows["all 144, batch 2"]["tflops"] == pytest.approx(2 * rows["all 144, batch 1"]["tflops"], rel=1e-4)
    named = {"scorer", "random", "norm", "diversity", "DPP", "uniform", "pooling", "CLS"}
    assert all(set(ways) == named for ways in made["choosing"].values()) and len(made["choosing"]) == 2
    assert "ms to choose" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["--repeats -1", "--batch 0", "--words 0", "--keep 0", "--keep 400",
                                   "--json /no/x.json"])
def test_wrong_arguments_of_bench_are_one_line(wrong, capsys):
    assert run(bench.main, "--model", TINY, "--device", "cpu", *wrong.split()) == 2
    assert capsys.readouterr().err.strip().count("\n") == 0


def test_a_failed_measurement_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "speed.json").write_text("old")
    monkeypatch.setattr(bench, "speed", lambda vlm, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(bench.main, "--model", TINY, "--device", "cpu", "--json", tmp_path / "speed.json")
    assert (tmp_path / "speed.json").read_text() == "old"


# --- studies ----------------------------------------------------------------------------------------------------------

def test_the_papers_alternatives_do_what_their_names_say():
    X, alpha = torch.randn(400, 50, 3), torch.full((400, 50), 0.3)
    L = torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.5]])
    X, mean = X @ L.T + 1, torch.ones(3)
    gates = (study.channel_gate, study.isotropic_gate)
    channel, isotropic = (gate(X, 0 * alpha, mean, L).flatten(0, 1) for gate in gates)
    torch.testing.assert_close(channel.T.cov(), (L @ L.T).diag().diag(), atol=0.1, rtol=0.05)
    torch.testing.assert_close(isotropic.T.cov(), torch.eye(3) * (L @ L.T).diag().mean(), atol=0.1, rtol=0.05)
    torch.testing.assert_close(study.scale_gate(X, alpha, mean, L), 0.3 * X)


def test_gumbel_samples_k_whole_tokens_with_the_soft_gradient():
    scores, weight = torch.randn(2, 12, requires_grad=True), torch.randn(2, 12)
    torch.manual_seed(0)
    alpha = study.gumbel_top_k(scores, 4, 0.5)
    assert alpha.sum(1).tolist() == pytest.approx([4, 4]) and ((alpha - alpha.round()).abs() < 1e-6).all()
    torch.manual_seed(0)
    noise = -(-torch.rand(2, 12).clamp_min(1e-20).log()).log()
    soft = soft_top_k(scores + noise, 4, 0.5)
    torch.testing.assert_close(*(torch.autograd.grad((a * weight).sum(), scores)[0] for a in (alpha, soft)))


def test_a_variant_is_trained_again_only_when_it_is_made_otherwise(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(study, "train", lambda args, recipe: args.out.mkdir(exist_ok=True) or made.append(recipe))
    args = argparse.Namespace(study="ablations", variants=["papers, Gumbel"], seeds=1, steps=3, runs=tmp_path,
                              device="cpu", dtype="float32")
    for steps, trainings in ((3, 1), (3, 1), (4, 2)):
        args.steps = steps
        assert study.trained(args) == {("papers, Gumbel", 0): tmp_path / "papers-Gumbel-0"}
        assert len(made) == trainings
    monkeypatch.setitem(study.VARIANTS["ablations"], "papers, Gumbel", study.PAPERS)
    study.trained(args)
    assert made[0].top_k is study.gumbel_top_k and made[2] is study.PAPERS


@pytest.fixture
def small(asked, monkeypatch):
    """The embedded default's questions, cut short, and a pruner with thresholds in the place of the one that ships."""
    monkeypatch.setattr(study, "prepare", lambda: asked)
    monkeypatch.setattr(study, "SHIPPED", asked)
    return argparse.Namespace(device="cpu", questions=asked / "test.jsonl", seeds=2, steps=3)


def test_coherence_is_the_mean_cosine_between_gradients():
    a, b = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.0])
    assert study.coherence([a, b]) == pytest.approx(0.5 ** 0.5)
    assert study.coherence([a, b, 5 * a]) == pytest.approx((2 * 0.5 ** 0.5 + 1) / 3)


def test_positions_closes_the_gaps_and_changes_nothing_else(small, monkeypatch):
    seen = []

    def answer(vlm, rows, ways):
        inputs = vlm.inputs([read_image(EXAMPLES[0])], ["?"])
        X = vlm.encode(inputs)
        seen.append(vlm.embed(inputs, X, ways["scorer"][0](X, inputs)))
        return {name: [1.0] * len(rows) for name in ways}, {}

    monkeypatch.setattr(study, "right_or_wrong", answer)
    study.positions(small)
    original, closed = seen
    assert closed["position_ids"][0].diff().eq(1).all() and not original["position_ids"][0].diff().eq(1).all()
    assert closed["inputs_embeds"].equal(original["inputs_embeds"])


def test_fidelity_holds_what_is_measured_against_the_written_rule(small, monkeypatch):
    real = {"random 48": 97.3, "random 32": 93.6, "random 16": 86.9, "diversity 48": 99.6, "diversity 32": 99.2,
            "diversity 16": 97.3, "CLS 16": 90.0, "pooling 16": 88.0, "all": 100.0}

    def answer(vlm, rows, ways):
        return {name: [real.get(name, 50.0) / 100] * len(rows) for name in ways}, {}

    monkeypatch.setattr(study, "right_or_wrong", answer)
    assert all(holds for *_, holds in study.fidelity(small)["rule"])
    for name, value in (("random 16", 80.0), ("diversity 16", 99.0), ("CLS 16", 80.0), ("all", 98.0)):
        monkeypatch.setitem(real, name, value)
        assert not all(holds for *_, holds in study.fidelity(small)["rule"]), name
        monkeypatch.undo()
        monkeypatch.setattr(study, "right_or_wrong", answer)


# --- lmms-eval, where it is installed ---------------------------------------------------------------------------------

LMMS_TASK = """task: drawn
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/test.jsonl}, cache_dir: FOLDER/cache}
test_split: test
output_type: generate_until
doc_to_text: "<image>{{text}}"
doc_to_target: label
doc_to_visual: !function pictures.of
generation_kwargs: {max_new_tokens: 128}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""


def lmms_task(folder, pictures=1):
    """A task of lmms-eval from six drawn scenes; each question has so many pictures."""
    rows = []
    for n in range(6):
        image, objects = shapes.draw_scene(f"lmms-{n}")
        files.write(folder / f"{n}.png", image)
        for _, text, label in shapes.questions(objects, random.Random(n)):
            rows.append(dict(question_id=len(rows), image=f"{n}.png", text=text, label=label))
    files.write(folder / "test.jsonl", rows)
    (folder / "pictures.py").write_text("from PIL import Image\n\n\ndef of(doc):\n"
                                        f"    return {pictures} * [Image.open('{folder}/' + doc['image'])]\n")
    (folder / "drawn.yaml").write_text(LMMS_TASK.replace("FOLDER", str(folder)))


def evaluated(folder, keep, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("lmms_eval")
    from eval.lmms import Pruned, TaskManager, evaluator
    model = Pruned.create_from_arg_string(f"pruner={ROOT}/data/shapes/pruner,keep={keep},device=cpu,batch_size=7")
    manager = TaskManager(include_path=str(folder))
    return evaluator.simple_evaluate(model=model, tasks=["drawn"], task_manager=manager)


@pytest.mark.parametrize("keep, kept", [("16", 16), ("all", 144)])
def test_lmms_eval_gets_the_answers_of_infer(tmp_path, keep, kept, monkeypatch):
    lmms_task(tmp_path)
    samples = sorted(evaluated(tmp_path, keep, monkeypatch)["samples"]["drawn"], key=lambda sample: sample["doc_id"])
    command = f"infer.py --questions {tmp_path}/test.jsonl --answers {tmp_path}/a.jsonl --keep {keep} --device cpu"
    subprocess.run([sys.executable, *command.split(), "--pruner", "data/shapes/pruner"], cwd=ROOT, check=True)
    answers = [json.loads(line)["text"] for line in open(tmp_path / "a.jsonl")]
    assert [sample["resps"][0][0] for sample in samples] == answers
    assert all(5 < sample["token_counts"][0]["input_tokens"] - kept < 60 for sample in samples)


def test_lmms_eval_names_the_document_without_its_one_picture(tmp_path, monkeypatch):
    lmms_task(tmp_path, pictures=2)
    with pytest.raises(InputError, match="drawn, document [0-9]+: 2 pictures"):
        evaluated(tmp_path, "16", monkeypatch)


# --- vLLM, where it is installed --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def served():
    pytest.importorskip("vllm")
    with pytest.MonkeyPatch.context() as patch:
        for setting in ("CPU_KVCACHE_SPACE=1", "ENABLE_V1_MULTIPROCESSING=0", "CPU_OMP_THREADS_BIND=nobind"):
            patch.setenv(*f"VLLM_{setting}".split("="))
        from eval.serve import Served
        (served := Served(str(TINY))).start(["--enforce-eager"])
        yield served


@pytest.mark.parametrize("keep", ["all", "48", "16", "~16"])
def test_vllm_gives_the_answers_of_infer_and_without_the_gaps_others(vlm, served, asked, keep, monkeypatch):
    def said(model):
        return dict(sum(infer.ask(model, rows, choose, batch=7), []))

    rows = questions.read_questions(asked / "test.jsonl")
    choose = pruner.chooser(vlm, *pruner.load_pruner(asked), Budget.parse(keep))[0]
    assert said(served) == said(vlm)
    monkeypatch.setattr("eval.serve.name_of", lambda Z, places, N: f"{Z.sum()}")
    assert (said(served) == said(vlm)) == (keep == "all")


def test_vllm_gets_llava_only_and_nothing_of_the_language_model_is_loaded(served, tmp_path):
    assert {name.split(".")[1] for name in served.model.state_dict()} == {"vision_tower", "multi_modal_projector"}
    with pytest.raises(InputError, match="llava_next, and only llava"):
        type(served)(str(changed(tmp_path, "config.json", {"model_type": "llava_next"})))


# --- the README -------------------------------------------------------------------------------------------------------

def test_readme_snippets_stand_in_the_code_and_its_links_lead_somewhere():
    def plain(text):
        return "\n" + "\n".join(line.strip() for line in text.splitlines()) + "\n"  # without the indentation

    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 260
    code = [plain((ROOT / f"{name}.py").read_text()) for name in ("throttler", "denoiser", "train", "model", "infer")]
    snippets = re.findall(r"```python\n(.*?)```", readme, re.S)
    method = [snippet for snippet in snippets if "import" not in snippet]
    assert len(method) >= 5
    for snippet in method:
        assert any(plain(snippet) in text for text in code), f"not in the code:\n{snippet}"
    for path in re.findall(r"\]\(([\w./-]+)\)", readme) + re.findall(r"^\| `([\w./]+)` \|", readme, re.M):
        assert (ROOT / path).exists(), path


def test_readme_table_is_what_was_measured():
    table = json.loads((ROOT / "results/accuracy.json").read_text())["accuracy"]
    kept = {name: f"{accuracy.retention(by, table['all 144']):.1f}" for name, by in table.items()}
    free = ["random", "norm", "pooling", "uniform", "CLS", "diversity", "DPP"]
    names = [*free, "scorer", "scorer, diverse", "scorer, DPP"]
    rows = re.findall(r"^\| [^|]+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", (ROOT / "README.md").read_text(), re.M)
    assert rows == [tuple(kept[f"{name} {K}"] for K in (32, 16, 8)) for name in names]


def test_readme_python_example_runs(capsys):
    program, = [s for s in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "import" in s]
    assert len(program.splitlines()) <= 15
    exec(program, {})
    assert capsys.readouterr().out.startswith("['")


def test_readme_counts_the_flops_of_llava_right():
    vlm = load("random:llava-1.5-7b", "meta", torch.bfloat16)
    L = vlm.dummy_inputs(1, 95)["input_ids"].shape[1]
    full, pruned = (bench.prefill_flops(vlm, 1, length) / 1e12 for length in (L, L - 576 + 64))
    assert f"{full:.3f} T for 576 visual tokens and {pruned:.3f} T for 64, {full / pruned:.2f} times" in re.sub(
        r"\s+", " ", (ROOT / "README.md").read_text())
