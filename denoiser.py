"""
The denoiser, step 4 continued: repairs each gated token from its own content. In training only.

One Transformer block whose attention mask is the identity (DiffPrune, arXiv 2605.28051): a token
that saw others could copy from them what the gate withheld, and spoil what the scorer learns.
Softmax over a single key is 1, so the whole attention collapses to two linear maps, and no
attention scores need computing:

    softmax(q_i·k_i)·v_i = v_i        Attention(x)_i = W_o·W_v·x_i

    $ python denoiser.py
    two linear maps  +0.2500 +0.2477 -0.2745 +0.1055 -0.0592
    an identity mask +0.2500 +0.2477 -0.2745 +0.1055 -0.0592
"""
import torch
import torch.nn.functional as F
from torch import nn

from throttler import Attention, Block


class DiagonalAttention(nn.Module):
    """Attention under an identity mask, (B, N, width) -> (B, N, width): token i sees i alone."""

    def __init__(self, width):
        super().__init__()
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x, valid=None):
        return self.out(self.value(x))  # W_o·W_v·x: every softmax weight is 1


class Denoiser(nn.Module):
    """X̃ (B, N, d_v) -> X̄ (B, N, d_v). diagonal=False is the papers' ablation: global attention.

    It starts as the identity (the block's output layers are zero), so training begins from the
    gated tokens themselves.
    """

    def __init__(self, d_v, diagonal=True):
        super().__init__()
        width = min(d_v, 1024)  # as the Scorer's
        attention = DiagonalAttention if diagonal else Attention
        self.block = Block(width, attention)
        for layer in (self.block.attn.out, self.block.mlp[-1]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.narrow = d_v > width
        if self.narrow:
            self.inp = nn.Linear(d_v, width)
            self.out = nn.Linear(width, d_v, bias=False)

    def forward(self, X):
        if not self.narrow:
            return self.block(X)
        x = self.inp(X)  # (B, N, width)
        repair = self.block(x) - x
        return X + self.out(repair)  # (B, N, d_v)


if __name__ == "__main__":
    torch.manual_seed(0)
    x, diagonal = torch.randn(1, 5, 64), DiagonalAttention(64)
    q, k = torch.randn(2, 1, 5, 64)  # any queries and keys will do
    identity = torch.eye(5, dtype=torch.bool)
    attended = F.scaled_dot_product_attention(q, k, diagonal.value(x), attn_mask=identity)
    results = {"two linear maps": diagonal(x), "an identity mask": diagonal.out(attended)}
    for name, y in results.items():
        values = y[0, :, 0].tolist()
        print(f"{name:16}", " ".join(f"{value:+.4f}" for value in values))
