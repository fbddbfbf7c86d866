"""
The throttler, in pure tensor code: how much of each visual token gets through, and which stay.

Training (AutoSelect, arXiv 2603.07135; DiffPrune, arXiv 2605.28051):

    X -> Scorer -> s -> distinct -> d -> soft top-K -> alpha, summing to the budget K -> noise gate

Inference: the K tokens with the highest d stay, in their original order. Nothing else remains:

    X -> Scorer -> s -> distinct -> d -> select -> K tokens

    $ python throttler.py
    tau 2.0: alpha ['0.791', '0.441', '0.343', '0.326', '0.098'] sum 2.000000
    tau 0.5: alpha ['0.993', '0.594', '0.227', '0.185', '0.002'] sum 2.000000
    tau 0.1: alpha ['1.000', '0.952', '0.035', '0.013', '0.000'] sum 2.000000
    the 2 highest scores  [0, 1]
    the 2 most distinct   [0, 2]    since token 1 is nearly the same as token 0
"""
import torch
import torch.nn.functional as F
from torch import nn


# --- step 1: a score for each token ---------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head self-attention over all tokens, (B, N, width) -> (B, N, width); heads 64 wide."""

    def __init__(self, width):
        super().__init__()
        self.n_head = max(1, width // 64)
        if width % self.n_head:
            raise ValueError(f"width {width} cannot be split into {self.n_head} heads")
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, valid=None):
        B, N, W = x.shape  # images, tokens, width
        nh, hs = self.n_head, W // self.n_head  # heads, width of a head
        qkv = self.qkv(x).view(B, N, 3, nh, hs)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, nh, N, hs) each
        mask = None
        if valid is not None:
            mask = valid[:, None, None, :]  # (B, 1, 1, N): padding is no key
        x = F.scaled_dot_product_attention(q, k, v, mask)  # (B, nh, N, hs)
        return self.out(x.transpose(1, 2).reshape(B, N, W))


class Block(nn.Module):
    """A pre-norm Transformer block around any attention; the feed-forward is 4x as wide."""

    def __init__(self, width, attention=Attention):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x, valid=None):
        x = x + self.attn(self.norm1(x), valid)
        return x + self.mlp(self.norm2(x))


class Scorer(nn.Module):
    """One logit per visual token: X (B, N, d_v) -> scores (B, N), in the type of its own weights.

    Two blocks with global attention, width min(d_v, 1024), then a linear head. It sees the image,
    never the question. Where images have different numbers of tokens, valid (B, N) says which are
    real; padding scores -inf.
    """

    def __init__(self, d_v):
        super().__init__()
        width = min(d_v, 1024)
        self.inp = nn.Identity()
        if d_v != width:
            self.inp = nn.Linear(d_v, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)

    def forward(self, X, valid=None):
        x = self.inp(X.to(self.head.weight.dtype))  # (B, N, d_v) -> (B, N, width)
        for block in self.blocks:
            x = block(x, valid)
        scores = self.head(self.norm(x)).squeeze(-1)  # (B, N)
        if valid is None:
            return scores
        return scores.masked_fill(~valid, -torch.inf)


# --- step 2: the ranking, what a token is worth beside the better ones ----------------------------

# how much likeness costs, in standard deviations of the scores; chosen on validation questions
C = 4.0


def standardised(scores):
    """z = (s - mean) / standard deviation over each image's real tokens; padding stays -inf.

    (B, N) -> (B, N). Adding a constant to all scores of an image does not change its soft top-K, so
    the scores of two images cannot be compared. Their z can: one threshold serves all images.
    """
    padding = scores.isneginf()
    n = (~padding).sum(-1, keepdim=True)  # (B, 1) real tokens
    s = scores.masked_fill(padding, 0)
    mean = s.sum(-1, keepdim=True) / n
    s = (s - mean).masked_fill(padding, 0)
    variance = s.square().sum(-1, keepdim=True) / n
    z = s / (variance + 1e-5).sqrt()
    return z.masked_fill(padding, -torch.inf)


def distinct(scores, X, c=C):
    """d (B, N): a token is worth its score, less what a better token already says.

        d_i = z_i - c · max over tokens j with z_j > z_i of cos⁺(x_i - x̄, x_j - x̄)

    z: the standardised scores (B, N); x: the features X (B, N, d_v), x̄ their mean over the image;
    cos⁺ = max(0, cos). Padding (a score of -inf) stays -inf. It takes N² numbers an image. The
    gradient is that of z alone: which tokens are better, and how alike they are, are constants.
    Related: Matrix NMS (SOLOv2, arXiv 2003.10152), for masks instead of tokens.
    """
    z = standardised(scores.float())
    with torch.no_grad():
        real = ~z.isneginf()[..., None]  # (B, N, 1)
        x = X.float().masked_fill(~real, 0)
        n = real.sum(1, keepdim=True)  # (B, 1, 1) real tokens
        mean = x.sum(1, keepdim=True) / n  # x̄
        x = F.normalize(x - mean, dim=-1)
        alike = x @ x.mT  # (B, N, N), cos(x_i - x̄, x_j - x̄)
        better = z[:, None, :] > z[:, :, None]  # (B, N, N), z_j > z_i
        repeated = alike.masked_fill_(~better, 0).amax(-1)  # (B, N); masked entries are 0: cos⁺
    return z - c * repeated


def check_count(ranking, K, least):
    """ValueError unless each row's K lies between `least` and its tokens."""
    N, many = ranking.shape[-1], torch.is_tensor(K)
    if many:
        N = (~ranking.isneginf()).sum(-1)
    if not torch.as_tensor((least <= K) & (K <= N)).all():
        if many:
            N, K = N.tolist(), K.tolist()
        raise ValueError(f"K must lie between {least} and the {N} tokens there are, not {K}")


def select(ranking, K):
    """Indices (B, K) of the K highest of a ranking (B, N), ascending: the tokens' original order.

    ValueError unless 1 <= K <= N. K may be a tensor (B,), a budget for each image; then keep is as
    wide as the largest of them, and other rows are filled up with -1 at the left.
    """
    check_count(ranking, K, 1)
    many = torch.is_tensor(K)
    top = ranking.topk(int(K.max()) if many else K, dim=-1)  # descending
    none = top.values.isneginf()  # padding is never kept
    if many:
        none |= torch.arange(none.shape[-1], device=K.device) >= K.unsqueeze(-1)
    keep = top.indices.masked_fill(none, -1)
    return keep.sort(dim=-1).values


# --- step 3: weights that sum to the budget -------------------------------------------------------

class SoftTopK(torch.autograd.Function):
    """alpha_i = F(d_i/tau - b), F the Laplace CDF, b the one shift that makes alpha sum to K.

    LapSum (Struski et al., arXiv 2503.06242): closed form after one sort, and so is the gradient.
    In float64 inside.
    """

    @staticmethod
    def forward(ctx, ranking, K, tau):
        s = ranking.double() / tau  # (..., N), s_i = d_i/tau
        if torch.is_tensor(K):
            K = K.unsqueeze(-1)  # (..., 1), a budget for each row
        r = s.sort(dim=-1, descending=True).values
        # F(x) = ½·e^x below 0, and 1 - ½·e^-x above. With the k highest above b, the others below,
        #     Σ_i F(s_i - b) = k - ½·e^b·P + ½·e^-b·Q     P = Σ_{i<=k} e^-r_i,   Q = Σ_{i>k} e^r_i
        edge = torch.full_like(r[..., :1], -torch.inf)
        above = (-r).logcumsumexp(-1)
        below = r.flip(-1).logcumsumexp(-1).flip(-1)
        logP = torch.cat([edge, above], -1)  # (..., N+1), k = 0 … N
        logQ = torch.cat([below, edge], -1)
        # k is how many lie above b. If b were r_k, the sum would be at_r. It falls as b grows, so
        # r_k lies above b as long as at_r <= K.
        k = torch.arange(1, s.shape[-1] + 1, device=s.device)
        P_part = (logP[..., 1:] + r).exp()
        Q_part = (logQ[..., 1:] - r).exp()
        at_r = k - 0.5 * P_part + 0.5 * Q_part
        above_b = (at_r <= K) & ~r.isneginf()  # padding never is
        k = above_b.sum(-1, keepdim=True)
        logP = logP.gather(-1, k)
        logQ = logQ.gather(-1, k)
        # Σ = K is a quadratic in e^b, solved in logarithms, without cancellation: with m = K - k,
        #     e^b = Q / (m + √(m² + PQ)) = (-m + √(m² + PQ)) / P
        m = K - k.double()
        PQ = (logP + logQ).exp()
        sqrt = (m.square() + PQ).sqrt()
        root = (m.abs() + sqrt).log()
        b = 0.5 * (logQ - logP)  # for m = 0
        b = torch.where(m < 0, root - logP, b)
        b = torch.where(m > 0, logQ - root, b)
        x = s - b  # d_i/tau - b
        left = 0.5 * x.clamp(max=0).exp()
        right = 1 - 0.5 * (-x).clamp(max=0).exp()
        alpha = torch.where(x < 0, left, right)  # F(x)
        alpha = alpha.masked_fill(s.isneginf(), 0)
        ctx.save_for_backward(alpha)
        ctx.tau = tau
        return alpha.to(ranking.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        alpha, = ctx.saved_tensors
        f = torch.minimum(alpha, 1 - alpha)  # the Laplace density at d/tau - b
        q = f / f.sum(-1, keepdim=True).clamp_min(1e-300)  # softmax(-|d/tau - b|)
        g = grad.double()
        # ∂L/∂d_i = (1/τ)·f_i·(g_i - Σ_j q_j g_j)
        expected = (q * g).sum(-1, keepdim=True)
        slope = f * (g - expected) / ctx.tau
        return slope.to(grad.dtype), None, None


def soft_top_k(ranking, K, tau=1.0):
    """Weights alpha in [0, 1] that sum to K, (..., N) -> (..., N), in the type of the ranking d.

    Differentiable, monotone, unchanged when all of d shifts; tau -> 0 makes it the hard top-K.
    Padding, a d of -inf, gets 0. K is a number from 0 to N, or a tensor (...,) with one for each
    row; ValueError otherwise.
    """
    check_count(ranking, K, 0)
    if not tau > 0:
        raise ValueError(f"tau must be positive, not {tau}")
    return SoftTopK.apply(ranking, K, tau)


# --- step 4: a gate of noise ----------------------------------------------------------------------

def whitening(X):
    """Mean (d_v,) and L (d_v, d_v), L·Lᵀ the covariance of the tokens X (..., d_v), in float32.

    Estimated in float64, by eigenvalues, not Cholesky: features are low-rank. The eigenvalues are
    floored at 1e-8 of the largest, so that a direction which this sample happens to lack gets some
    noise, too.
    """
    X = X.reshape(-1, X.shape[-1]).double()  # (tokens, d_v)
    mean = X.mean(0)
    X = X - mean
    values, vectors = torch.linalg.eigh(X.T @ X / len(X))
    floor = 1e-8 * values[-1].clamp_min(0)
    values = values.clamp_min(floor)
    L = vectors * values.sqrt()  # columns: √λ_i · v_i
    return mean.float(), L.float()


def _sqrt(t):
    """√t, with a slope of 0 below 1e-12: the true one is infinite at 0, where alpha's is zero."""
    return torch.where(t > 1e-12, t.clamp_min(1e-12).sqrt(), 0)


def vp_gate(X, alpha, mean, L, noise=None):
    """Let a share alpha (B, N) of the information in X (B, N, d_v) through, (B, N, d_v).

    The variance-preserving noise gate: mean and covariance of the result are those of X, whatever
    alpha is. `noise` (B, N, d_v) is standard normal, drawn afresh if not given. Noise that ignores
    the covariance can be averaged out (README).
    """
    if noise is None:
        noise = torch.randn_like(X)
    noise = (noise.to(L.dtype) @ L.T).to(X.dtype)  # L·ε
    alpha = alpha.unsqueeze(-1)  # (B, N, 1)
    a = _sqrt(alpha).to(X.dtype)
    b = _sqrt(1 - alpha).to(X.dtype)
    # x̃ = μ + √α·(x - μ) + √(1-α)·L·ε   (the papers' gate on whitened tokens; α = 1 gives back x)
    return a * X + (1 - a) * mean.to(X.dtype) + b * noise


if __name__ == "__main__":
    scores = torch.tensor([3.0, 1.0, 0.5, 0.4, -2.0])
    for tau in (2.0, 0.5, 0.1):
        alpha = soft_top_k(scores, 2, tau)
        values = [f"{a:.3f}" for a in alpha.tolist()]
        print(f"tau {tau}: alpha {values} sum {alpha.sum():.6f}")
    scores = scores[None]  # (1, 5)
    X = torch.tensor([[
        [1.0, 0.0],
        [0.9, 0.1],
        [0.0, 1.0],
        [-0.1, 1.0],
        [-1.0, -1.0],
    ]])
    highest = select(scores, 2)[0].tolist()
    different = select(distinct(scores, X), 2)[0].tolist()
    print("the 2 highest scores ", highest)
    print("the 2 most distinct  ", different, "   since token 1 is nearly the same as token 0")
