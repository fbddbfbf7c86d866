"""
Ways to choose tokens without learning, which a learned choice has to beat.

    keep = criteria(vlm)["diversity"](X, inputs, 16)      # (B, 16), ascending; pooling gives (other tokens, keep)

None of them sees the question. X (B, N, d) are the encoder's features, K is how many to keep, 1 … N.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from throttler import select


def random_tokens(X, K, generator=None):
    """Any K tokens, equally likely."""
    return select(torch.rand(X.shape[:2], generator=generator, device=X.device), K)


def grid_of(N):
    """(side, first): N tokens are side x side patches behind `first` class tokens, none or one. Else not a grid."""
    side = math.isqrt(N)
    return side, N - side * side


def uniform_grid(X, K):
    """The same K patches of every image, spread evenly: about √K rows with about √K patches each."""
    B, N, _ = X.shape  # images, visual tokens
    side, first = grid_of(N)
    if K > side * side:
        return torch.arange(N, device=X.device).expand(B, -1)  # the class token, too
    keep, rows = [], max(1, round(math.sqrt(K)))
    for i in range(rows):
        y = int((i + 0.5) * side / rows)
        n = K * (i + 1) // rows - K * i // rows  # patches in this row
        for j in range(n):
            keep.append(first + y * side + int((j + 0.5) * side / n))
    return torch.tensor(sorted(keep), device=X.device).expand(B, -1)  # (B, K)


def feature_norm(X, K):
    """The K tokens with the longest features."""
    return select(X.float().norm(dim=-1), K)


def max_min_diversity(X, K):
    """DivPrune (arXiv 2503.02175): greedily the token that is least like those already kept, by cosine."""
    B, N, _ = X.shape  # images, visual tokens
    rows = torch.arange(B, device=X.device)
    x = F.normalize(X.float(), dim=-1)
    far = 1 - x @ x.mT  # (B, N, N)
    alone = (far + 9 * torch.eye(N, device=X.device)).amin(-1)  # (B, N), distance to the nearest other token
    keep = [alone.argmax(-1)]
    nearest = torch.full_like(alone, torch.inf)  # (B, N), distance to the nearest kept token
    for _ in range(K - 1):
        nearest = nearest.minimum(far[rows, keep[-1]])
        nearest[rows, keep[-1]] = -1  # never again
        keep.append(nearest.argmax(-1))
    return torch.stack(keep, 1).sort(-1).values  # (B, K)


def coverage(X, K):
    """MMTok's idea (arXiv 2508.18264) without the question: greedily the token that raises most

        Σ_i max over kept j of cos⁺(x_i - x̄, x_j - x̄)

    x̄ is the mean over the image, cos⁺ = max(0, cos): each token shall have one like it that stays.
    """
    B, N, _ = X.shape  # images, visual tokens
    x = X.float()
    x = F.normalize(x - x.mean(1, keepdim=True), dim=-1)
    alike = (x @ x.mT).clamp_min(0)  # (B, N, N), cos⁺
    covered = alike.new_zeros(B, N)  # the maximum above, so far
    chosen = alike.new_zeros(B, N)  # 1 for a kept token; no gain, a mean, is above 1
    keep = []
    for _ in range(K):
        gain = (alike - covered[:, :, None]).clamp_min(0).mean(1)  # (B, N), by how much j would raise it
        j = (gain - 2 * chosen).argmax(-1, keepdim=True)  # (B, 1)
        covered = covered.maximum(alike.gather(1, j[..., None].expand(B, 1, N))[:, 0])
        chosen = chosen.scatter(1, j, 1)
        keep.append(j)
    return torch.cat(keep, 1).sort(-1).values  # (B, K)


def dpp(X, K):
    """The most probable K tokens of a determinantal point process, greedily, in its fast form (arXiv 1709.05135).

    Its kernel is L_ij = cos(x_i, x_j), whose determinant is large for tokens that are unlike each other: CDPruner's
    (arXiv 2506.10967) without the question's part.
    """
    B, N, _ = X.shape  # images, visual tokens
    rows = torch.arange(B, device=X.device)
    x = F.normalize(X.float(), dim=-1)
    L = x @ x.mT  # (B, N, N)
    gain = torch.ones(B, N, device=X.device)  # d² (B, N): by how much each token would multiply the determinant
    c = X.new_zeros(B, K, N, dtype=torch.float32)  # the kept tokens' rows of the Cholesky factor
    keep = []
    for i in range(K):
        j = gain.argmax(-1)  # (B,)
        d = gain[rows, j].clamp_min(1e-6).sqrt()  # beyond the features' rank nothing is left but rounding
        c[:, i] = (L[rows, j] - torch.einsum("bk,bkn->bn", c[rows, :i, j], c[:, :i])) / d[:, None]
        gain = gain - c[:, i].square()
        gain[rows, j] = -torch.inf  # never again
        keep.append(j)
    return torch.stack(keep, 1).sort(-1).values  # (B, K)


def pooled_grid(N, K):
    """(rows, columns) of a grid of K equal cells over N patches, as square as K allows. None if there is none."""
    side, _ = grid_of(N)
    fitting = [rows for rows in range(1, math.isqrt(K) + 1) if K % rows == 0 and K // rows <= side]
    return (fitting[-1], K // fitting[-1]) if fitting else None


def average_pooling(X, K):
    """No choice at all: the patches averaged to K cells. (X with each cell's mean at its centre, those centres)."""
    B, N, d = X.shape  # images, visual tokens, channels
    (side, first), (rows, columns) = grid_of(N), pooled_grid(N, K)
    patches = X[:, first:].float().mT.reshape(B, d, side, side)
    means = F.adaptive_avg_pool2d(patches, (rows, columns)).flatten(2).mT  # (B, K, d)
    y, x = (((torch.arange(n, device=X.device) + 0.5) * side / n).long() for n in (rows, columns))
    keep = (first + y[:, None] * side + x).flatten().expand(B, -1)  # (B, K)
    return X.scatter(1, keep[..., None].expand(-1, -1, d), means.to(X.dtype)), keep


def cls_attention(vlm, inputs, hidden=None):
    """How much the encoder's class token looks at each token, (B, N), in the layer that gives X: what FasterVLM
    (arXiv 2412.01818) and VisionZip (arXiv 2412.04467) keep the highest of. Mean over heads.
    hidden (B, 1 + patches, d) is what enters that layer; where it is not given, the encoder runs again."""
    if hidden is None:
        states = vlm.model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        hidden = states[vlm.layers[-1] - 1]
    block = vlm.model.model.vision_tower.encoder.layers[vlm.layers[-1]]
    x = block.layer_norm1(hidden)  # (B, 1 + patches, d)
    heads = (block.self_attn.num_heads, -1)
    q = block.self_attn.q_proj(x[:, :1]).unflatten(-1, heads).transpose(1, 2)  # (B, heads, 1, d / heads)
    k = block.self_attn.k_proj(x).unflatten(-1, heads).transpose(1, 2)  # (B, heads, 1 + patches, d / heads)
    attention = (q @ k.mT / q.shape[-1] ** 0.5).float().softmax(-1)  # (B, heads, 1, 1 + patches)
    return attention.mean(1)[:, 0, -vlm.tokens:]


def each_image(choose, X, inputs, K):
    """choose(X, K); image by image where they have different numbers of tokens, and K is (B,)."""
    if not torch.is_tensor(K):
        return choose(X, K)
    counts = inputs["valid"].sum(1).tolist()
    keeps = [choose(X[i:i + 1, :n], int(k))[0] for i, (n, k) in enumerate(zip(counts, K))]
    return pad_sequence(keeps, batch_first=True, padding_value=-1, padding_side="left")  # (B, most)


def criteria(vlm):
    """{name: choose(X, inputs, K)} of those that fit this model; choose as above."""
    ways = {"random": random_tokens, "norm": feature_norm, "diversity": max_min_diversity, "DPP": dpp,
            "coverage": coverage}
    if vlm.tokens and grid_of(vlm.tokens)[1] < 2:
        ways |= {"uniform": uniform_grid, "pooling": average_pooling}
    ways = {name: partial(each_image, choose) for name, choose in ways.items()}
    if vlm.tokens and vlm.model.config.vision_config.model_type == "clip_vision_model" and vlm.layers[-1] < 0:
        ways["CLS"] = lambda X, inputs, K: select(cls_attention(vlm, inputs), K)
    return ways
