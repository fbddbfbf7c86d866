"""
Ways to choose tokens that learn nothing: for a VLM without a pruner, and what a learned choice has
to beat.

    keep = criteria(vlm)["diversity"](X, inputs, 16)     # (B, 16), ascending

    python infer.py photo.jpg "question" --model llava-hf/llava-1.5-7b-hf --choose diversity

None of them sees the question. X (B, N, d) are the visual tokens, K is how many to keep, 1 … N.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from throttler import select


# --- choices from places or lengths alone ---------------------------------------------------------

def random_tokens(X, K, generator=None):
    """Any K tokens, equally likely. With a generator each image has a draw of its own.

    Without one all images of N tokens have the same, so that a repeated run gives the same answers.
    """
    B, N, _ = X.shape  # images, visual tokens
    draws = B
    if generator is None:
        generator = torch.Generator(X.device).manual_seed(0)
        draws = 1
    lots = torch.rand(draws, N, generator=generator, device=X.device)
    return select(lots.expand(B, N), K)


def grid_of(N):
    """(side, first): N tokens are side x side patches behind `first` class tokens, none or one.

    Any other `first` means that they are not a square grid.
    """
    side = math.isqrt(N)
    return side, N - side * side


def uniform_grid(X, K):
    """The same K patches of every image, spread evenly: about √K rows of √K patches."""
    B, N, _ = X.shape  # images, visual tokens
    side, first = grid_of(N)
    if K > side * side:
        return torch.arange(N, device=X.device).expand(B, -1)  # the class token, too
    rows = max(1, round(math.sqrt(K)))
    keep = []
    for i in range(rows):
        y = int((i + 0.5) * side / rows)
        columns = K * (i + 1) // rows - K * i // rows  # patches in this row
        for j in range(columns):
            x = int((j + 0.5) * side / columns)
            keep.append(first + y * side + x)
    return torch.tensor(sorted(keep), device=X.device).expand(B, -1)  # (B, K)


def feature_norm(X, K):
    """The K tokens with the longest features."""
    return select(X.float().norm(dim=-1), K)


# --- greedy choices: one token after another, never waiting for the device ------------------------

def max_min_diversity(X, K):
    """DivPrune (arXiv 2503.02175): greedily the token that is least like those kept, by cosine."""
    B, N, _ = X.shape  # images, visual tokens
    x = F.normalize(X.float(), dim=-1)
    distance = 1 - x @ x.mT  # (B, N, N)
    itself = 9 * torch.eye(N, device=X.device)
    alone = (distance + itself).amin(-1)  # (B, N), distance to the nearest other token
    j = alone.argmax(-1, keepdim=True)  # (B, 1)
    keep = [j]
    nearest = torch.full_like(alone, torch.inf)  # (B, N), distance to the nearest kept token
    for _ in range(K - 1):
        nearest = nearest.minimum(row_of(distance, j))
        nearest = nearest.scatter(1, j, -1)  # never again
        j = nearest.argmax(-1, keepdim=True)
        keep.append(j)
    return torch.cat(keep, 1).sort(-1).values  # (B, K)


def coverage(X, K):
    """MMTok's idea (arXiv 2508.18264) without the question: greedily the token that raises most

        Σ_i max over kept j of cos⁺(x_i - x̄, x_j - x̄)

    x̄ is the mean over the image, cos⁺ = max(0, cos). So each token has a kept one that is like it.
    """
    B, N, _ = X.shape  # images, visual tokens
    x = X.float()
    x = F.normalize(x - x.mean(1, keepdim=True), dim=-1)
    alike = (x @ x.mT).clamp_min(0)  # (B, N, N), cos⁺
    covered = alike.new_zeros(B, N)  # the maximum above, so far
    chosen = alike.new_zeros(B, N)  # 1 for a kept token; no gain, a mean, is above 1
    keep = []
    for _ in range(K):
        gain = (alike - covered[:, :, None]).clamp_min(0).mean(1)  # (B, N), what j would add
        j = (gain - 2 * chosen).argmax(-1, keepdim=True)  # (B, 1)
        covered = covered.maximum(row_of(alike, j))
        chosen = chosen.scatter(1, j, 1)
        keep.append(j)
    return torch.cat(keep, 1).sort(-1).values  # (B, K)


def dpp(X, K):
    """The most probable K tokens of a determinantal point process, greedily.

    In its fast form (arXiv 1709.05135). The kernel is L_ij = cos(x_i, x_j), whose determinant is
    large for tokens that are unlike each other: CDPruner's (arXiv 2506.10967) without its part of
    the question.
    """
    B, N, _ = X.shape  # images, visual tokens
    x = F.normalize(X.float(), dim=-1)
    L = x @ x.mT  # (B, N, N)
    gain = L.new_ones(B, N)  # d²: by how much each would multiply the determinant
    c = L.new_zeros(B, K, N)  # the kept tokens' rows of the Cholesky factor
    keep = []
    for i in range(K):
        j = gain.argmax(-1, keepdim=True)  # (B, 1)
        d = gain.gather(1, j).clamp_min(1e-6).sqrt()  # beyond the rank only rounding is left
        rows = c[:, :i]  # (B, i, N)
        at_j = rows.gather(2, j[..., None].expand(B, i, 1))  # (B, i, 1)
        c[:, i] = (row_of(L, j) - (at_j * rows).sum(1)) / d
        gain = gain - c[:, i].square()
        gain = gain.scatter(1, j, -torch.inf)  # never again
        keep.append(j)
    return torch.cat(keep, 1).sort(-1).values  # (B, K)


def row_of(matrix, j):
    """Row j (B, 1) of each matrix (B, N, N): (B, N)."""
    B, N, _ = matrix.shape
    return matrix.gather(1, j[..., None].expand(B, 1, N))[:, 0]


# --- no choice at all -----------------------------------------------------------------------------

def pooled_grid(N, K):
    """(rows, columns) of a grid of K equal cells over N patches, as square as K allows, or None."""
    side, _ = grid_of(N)
    for rows in range(math.isqrt(K), 0, -1):
        columns = K // rows
        if K % rows == 0 and columns <= side:
            return rows, columns


def average_pooling(X, K):
    """The patches averaged to K cells: (X with each cell's mean at its centre, those centres)."""
    B, N, d = X.shape  # images, visual tokens, channels
    side, first = grid_of(N)
    rows, columns = pooled_grid(N, K)
    patches = X[:, first:].float().mT.reshape(B, d, side, side)
    means = F.adaptive_avg_pool2d(patches, (rows, columns)).flatten(2).mT  # (B, K, d)
    y = torch.arange(rows, device=X.device) + 0.5  # the cells' centres
    x = torch.arange(columns, device=X.device) + 0.5
    y = (y * side / rows).long()
    x = (x * side / columns).long()
    places = first + y[:, None] * side + x  # (rows, columns)
    keep = places.flatten().expand(B, -1)  # (B, K)
    index = keep[..., None].expand(-1, -1, d)
    return X.scatter(1, index, means.to(X.dtype)), keep


# --- the encoder's own attention ------------------------------------------------------------------

def cls_attention(vlm, inputs, hidden=None):
    """How much the encoder's class token looks at each token, (B, N), in the layer that gives X.

    FasterVLM (arXiv 2412.01818) and VisionZip (arXiv 2412.04467) keep the highest. Mean over heads.
    hidden (B, 1 + patches, d) is what enters that layer; without it the encoder runs again.
    """
    tower, layer = vlm.model.model.vision_tower, vlm.layers[-1]
    if hidden is None:
        states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        hidden = states[layer - 1]
    block = tower.encoder.layers[layer]
    attention = block.self_attn
    heads = (attention.num_heads, -1)
    x = block.layer_norm1(hidden)  # (B, 1 + patches, d)
    q = attention.q_proj(x[:, :1])  # (B, 1, d): the class token asks
    k = attention.k_proj(x)  # (B, 1 + patches, d)
    q = q.unflatten(-1, heads).transpose(1, 2)  # (B, heads, 1, d / heads)
    k = k.unflatten(-1, heads).transpose(1, 2)  # (B, heads, 1 + patches, d / heads)
    logits = q @ k.mT / q.shape[-1] ** 0.5  # (B, heads, 1, 1 + patches)
    weights = logits.float().softmax(-1)
    return weights.mean(1)[:, 0, -vlm.tokens:]


# --- all of them, by name -------------------------------------------------------------------------

BY_FEATURES = {
    "diversity": max_min_diversity,
    "coverage": coverage,
    "DPP": dpp,
    "uniform": uniform_grid,
    "norm": feature_norm,
    "random": random_tokens,
}
UNTRAINED = (*BY_FEATURES, "CLS")  # for --choose


def each_image(choose, X, inputs, K):
    """choose(X, K); image by image where they have different numbers of tokens, and K is (B,)."""
    if not torch.is_tensor(K):
        return choose(X, K)
    keeps = []
    for x, real, k in zip(X, inputs["valid"], K.tolist()):
        keeps.append(choose(x[real][None], k)[0])
    return pad_sequence(keeps, True, -1, "left")  # (B, most)


def criteria(vlm):
    """{name: choose(X, inputs, K)} of those that fit this model.

    choose gives keep (B, K); "pooling", which changes tokens, gives (other tokens, keep).
    """
    choices = {name: partial(each_image, choose) for name, choose in BY_FEATURES.items()}
    if not vlm.tokens:  # else LLaVA's: a square of patches, from one of the encoder's layers
        del choices["uniform"]
        return choices
    choices["pooling"] = partial(each_image, average_pooling)
    kind = vlm.model.config.vision_config.model_type
    if kind == "clip_vision_model" and vlm.layers[-1] < 0:  # SigLIP has no class token
        choices["CLS"] = lambda X, inputs, K: select(cls_attention(vlm, inputs), K)
    return choices
