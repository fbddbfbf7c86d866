"""
The throttler, in pure tensor code: how much of each visual token gets through, and which tokens stay.

Training (AutoSelect, arXiv 2603.07135; DiffPrune, arXiv 2605.28051):

    X -> Scorer -> s -> soft top-K -> alpha, summing to the budget K -> noise gate -> X̃

Inference: X -> Scorer -> s; X, s -> select_cover -> K tokens, in their original order. Nothing else remains.

    $ python throttler.py
    tau 2.0: alpha ['0.791', '0.441', '0.343', '0.326', '0.098'] sum 2.000000
    tau 0.5: alpha ['0.993', '0.594', '0.227', '0.185', '0.002'] sum 2.000000
    tau 0.1: alpha ['1.000', '0.952', '0.035', '0.013', '0.000'] sum 2.000000
    select [[0, 1]]
"""
import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """Plain multi-head self-attention over all tokens, (B, N, width) -> (B, N, width); heads are 64 wide."""

    def __init__(self, width):
        super().__init__()
        self.n_head = max(1, width // 64)
        if width % self.n_head:
            raise ValueError(f"width {width} cannot be split into {self.n_head} heads")
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, valid=None):
        B, N, W = x.shape  # images, tokens, width
        q, k, v = self.qkv(x).view(B, N, 3, self.n_head, W // self.n_head).permute(2, 0, 3, 1, 4)  # (B, nh, N, 64)
        mask = None if valid is None else valid[:, None, None, :]  # (B, 1, 1, N): padding is no key
        x = F.scaled_dot_product_attention(q, k, v, mask)  # (B, nh, N, 64)
        return self.out(x.transpose(1, 2).reshape(B, N, W))


class Block(nn.Module):
    """A pre-norm Transformer block around any attention; the feed-forward is 4x as wide."""

    def __init__(self, width, attention=Attention):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, *valid):
        x = x + self.attn(self.norm1(x), *valid)
        return x + self.mlp(self.norm2(x))


class Scorer(nn.Module):
    """One logit per visual token: X (B, N, d_v) -> scores (B, N), in float32 whatever the VLM's type.

    Two blocks with global attention, width min(d_v, 1024), then a linear head. It sees the image, never the question.
    Where images have different numbers of tokens, valid (B, N) says which are real; padding scores -inf.
    """

    def __init__(self, d_v):
        super().__init__()
        width = min(d_v, 1024)
        self.inp = nn.Linear(d_v, width) if d_v != width else nn.Identity()
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)

    def forward(self, X, valid=None):
        x = self.inp(X.to(self.head.weight.dtype))  # (B, N, d_v) -> (B, N, width)
        for block in self.blocks:
            x = block(x, valid)
        scores = self.head(self.norm(x)).squeeze(-1)  # (B, N)
        return scores if valid is None else scores.masked_fill(~valid, -torch.inf)


class SoftTopK(torch.autograd.Function):
    """alpha_i = F(s_i/tau - b), F the CDF of the Laplace distribution, b the one shift that makes alpha sum to K.

    LapSum (Struski et al., arXiv 2503.06242): closed form after one sort, and so is the gradient. In float64 inside.
    """

    @staticmethod
    def forward(ctx, scores, K, tau):
        s = scores.double() / tau  # (..., N)
        K = K.unsqueeze(-1) if torch.is_tensor(K) else K  # one budget for all rows, or (..., 1)
        r = s.sort(dim=-1, descending=True).values
        # With the k highest scores above b and the others below,
        #     Σ_i F(s_i - b) = k - ½·e^b·P + ½·e^-b·Q     P = Σ_{i<=k} e^-r_i,   Q = Σ_{i>k} e^r_i
        edge = torch.full_like(r[..., :1], -torch.inf)
        logP = torch.cat([edge, (-r).logcumsumexp(-1)], -1)  # (..., N+1), k = 0 … N
        logQ = torch.cat([r.flip(-1).logcumsumexp(-1).flip(-1), edge], -1)
        # k = how many scores, put in the place of b, leave a sum of at most K (the sum falls as b grows)
        k = torch.arange(1, s.shape[-1] + 1, device=s.device)
        at_r = k - 0.5 * (logP[..., 1:] + r).exp() + 0.5 * (logQ[..., 1:] - r).exp()
        k = ((at_r <= K) & ~r.isneginf()).sum(-1, keepdim=True)  # padding is never above b
        logP, logQ = logP.gather(-1, k), logQ.gather(-1, k)
        # Σ = K is a quadratic in e^b, solved in logarithms and without cancellation: with m = K - k,
        #     e^b = Q / (m + √(m² + PQ)) = (-m + √(m² + PQ)) / P
        m = K - k.double()
        root = (m.abs() + (m.square() + (logP + logQ).exp()).sqrt()).log()
        b = torch.where(m > 0, logQ - root, torch.where(m < 0, root - logP, 0.5 * (logQ - logP)))
        x = s - b  # alpha_i = F(s_i/tau - b); s is s/tau here
        alpha = torch.where(x < 0, 0.5 * x.clamp(max=0).exp(), 1 - 0.5 * (-x).clamp(max=0).exp())
        alpha = alpha.masked_fill(s.isneginf(), 0)
        ctx.save_for_backward(alpha)
        ctx.tau = tau
        return alpha.to(scores.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        alpha, = ctx.saved_tensors
        f = torch.minimum(alpha, 1 - alpha)  # the Laplace density at s/tau - b
        q = f / f.sum(-1, keepdim=True).clamp_min(1e-300)  # softmax(-|s/tau - b|)
        g = grad.double()
        # ∂L/∂s_i = (1/τ)·f_i·(g_i - Σ_j q_j g_j)
        ds = f * (g - (q * g).sum(-1, keepdim=True)) / ctx.tau
        return ds.to(grad.dtype), None, None


def check_count(scores, K, least):
    """ValueError unless each row's K lies between `least` and its tokens."""
    N = (~scores.isneginf()).sum(-1) if torch.is_tensor(K) else scores.shape[-1]
    if not torch.as_tensor((least <= K) & (K <= N)).all():
        raise ValueError(f"K must lie between {least} and the {N} tokens there are, not {K}")


def soft_top_k(scores, K, tau=1.0):
    """Weights alpha in [0, 1] that sum to K, (..., N) -> (..., N), in the type of `scores`.

    Differentiable, monotone, unchanged when all scores shift; tau -> 0 makes it the hard top-K. A score of -inf
    (padding) gets 0. K is a number from 0 to N, or a tensor (...,) with one for each row; ValueError otherwise.
    """
    check_count(scores, K, 0)
    if not tau > 0:
        raise ValueError(f"tau must be positive, not {tau}")
    return SoftTopK.apply(scores, K, tau)


def whitening(X):
    """Mean (d,) and L (d, d) with L·Lᵀ the covariance of the tokens X (..., d); float32, estimated in float64.

    By eigenvalues, not Cholesky: features are low-rank. They are floored at 1e-8 of the largest, so that a direction
    that this sample happens to lack gets some noise, too.
    """
    X = X.reshape(-1, X.shape[-1]).double()  # (tokens, d)
    mean = X.mean(0)
    X = X - mean
    values, vectors = torch.linalg.eigh(X.T @ X / len(X))
    L = vectors * values.clamp_min(1e-8 * values[-1].clamp_min(0)).sqrt()  # columns: √λ_i · v_i
    return mean.float(), L.float()


def _sqrt(t):
    """√t, with a slope of 0 below 1e-12. The true slope is infinite at 0, where it meets a zero slope of alpha."""
    return torch.where(t > 1e-12, t.clamp_min(1e-12).sqrt(), 0)


def vp_gate(X, alpha, mean, L, noise=None):
    """Let a share alpha (B, N) of the information in X (B, N, d) through: the variance-preserving noise gate.

    Mean and covariance of the result are those of X whatever alpha is. `noise` (B, N, d) is standard normal, drawn
    afresh if not given. Noise that ignores the covariance can be averaged out (README).
    """
    noise = torch.randn_like(X) if noise is None else noise
    noise = (noise.to(L.dtype) @ L.T).to(X.dtype)  # L·ε
    alpha = alpha.unsqueeze(-1)  # (B, N, 1)
    a, b = _sqrt(alpha).to(X.dtype), _sqrt(1 - alpha).to(X.dtype)
    # x̃ = μ + √α·(x - μ) + √(1-α)·L·ε   (the papers' gate, on whitened tokens; α = 1 gives back x)
    return a * X + (1 - a) * mean.to(X.dtype) + b * noise


def standardised(scores):
    """z = (s - mean) / standard deviation over each image's real tokens, (B, N) -> (B, N); padding stays -inf.

    Soft top-K is blind to a shift of an image's scores, so their level means nothing. The level of z does: thresholds
    and select_cover read it.
    """
    padding = scores.isneginf()
    n = (~padding).sum(-1, keepdim=True)
    s = scores.masked_fill(padding, 0)
    s = (s - s.sum(-1, keepdim=True) / n).masked_fill(padding, 0)
    return (s / (s.square().sum(-1, keepdim=True) / n + 1e-5).sqrt()).masked_fill(padding, -torch.inf)


def select(scores, K):
    """The papers' choice: indices (B, K) of the K highest of the scores (B, N), ascending.

    ValueError unless 1 <= K <= N. K may be a tensor (B,); a row that keeps fewer than the most begins with -1.
    """
    check_count(scores, K, 1)
    most = int(K.max()) if torch.is_tensor(K) else K
    top = scores.topk(most, dim=-1)  # descending
    keep = top.indices.masked_fill(top.values.isneginf(), -1)  # never padding
    return first_of(keep, K)


def select_cover(scores, X, K):
    """As select, but tokens that cover what matters: one after another, they make this sum as large as they can,

        Σ_i w_i · max over kept j of cos⁺(x_i - x̄, x_j - x̄)        w = softmax(z), z the standardised scores

    x are the features X (B, N, d), x̄ the mean of an image's, cos⁺ = max(0, cos): the sum is the share of all weight w
    that is covered. So each token that matters has one like it among the kept. Coverage is MMTok's idea (arXiv
    2508.18264); here the learned scores weigh it. It takes N² numbers of memory for each image, and K·N² steps.
    """
    check_count(scores, K, 1)
    padding = scores.isneginf()
    w = standardised(scores.float()).softmax(-1)  # (B, N), 0 for padding
    x = X.float().masked_fill(padding[..., None], 0)
    x = F.normalize(x - x.sum(1, keepdim=True) / (~padding).sum(1)[:, None, None], dim=-1)
    alike = (x @ x.mT).clamp_min(0)  # (B, N, N), cos⁺
    covered, keep = torch.zeros_like(w), []  # covered (B, N): the max above, so far
    barred, rows = 2.0 * padding, torch.arange(len(x), device=x.device)  # no padding, no token twice: a gain is <= 1
    for _ in range(int(torch.as_tensor(K).max())):
        gain = w[:, None] @ (alike - covered[..., None]).clamp_min(0)  # (B, 1, N): by how much token j would raise it
        keep.append((gain[:, 0] + 1e-12 * w - barred).argmax(-1))  # where nothing is gained, the highest score
        covered = covered.maximum(alike[rows, keep[-1]])
        barred[rows, keep[-1]] = 4.0
    keep = torch.stack(keep, 1)  # (B, K), in the order of choice
    return first_of(keep.masked_fill(padding.gather(1, keep), -1), K)


def first_of(keep, K):
    """The first K of each row of keep (B, most), ascending, and -1 at the left in place of the rest."""
    if torch.is_tensor(K):
        keep = keep.masked_fill(torch.arange(keep.shape[1], device=K.device) >= K.unsqueeze(-1), -1)
    return keep.sort(dim=-1).values


if __name__ == "__main__":
    scores = torch.tensor([3.0, 1.0, 0.5, 0.4, -2.0])
    for tau in (2.0, 0.5, 0.1):
        alpha = soft_top_k(scores, 2, tau)
        print(f"tau {tau}: alpha", [f"{a:.3f}" for a in alpha.tolist()], f"sum {alpha.sum():.6f}")
    print("select", select(scores[None], 2).tolist())
