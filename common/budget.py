"""
A budget: how many visual tokens to keep. The text that a user gives is parsed once; from there on
it is a Budget. A budget on average is a threshold on the ranking d, from a table of the training.

    Budget.parse("16").of(144)         # 16
    Budget.parse("11.1%").of(576)      # 64
"""
import re
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Budget:
    """How many tokens to keep: a count, or a share of each picture's own.

    average: that many on average over many pictures, else of each.
    """
    count: int | None = None
    share: float | None = None
    average: bool = False

    @staticmethod
    def parse(text):
        """16, 11.1%, all, and on average ~16 or ~11.1%. ValueError for anything else."""
        number = str(text).removeprefix("~")
        average = str(text).startswith("~")
        if number == "all" and not average:
            return Budget(share=1.0)
        if re.fullmatch(r"\d{1,9}", number, re.ASCII) and int(number) > 0:
            return Budget(count=int(number), average=average)
        if re.fullmatch(r"\d{1,3}(\.\d+)?%", number, re.ASCII) and 0 < float(number[:-1]) <= 100:
            return Budget(share=float(number[:-1]) / 100, average=average)
        raise ValueError(f"{text!r} is not a budget: give a number of tokens as 16, a share as "
                         "11.1%, or all; ~16 or ~11.1% is that many on average")

    def __str__(self):
        if self.everything:
            return "all"
        number = str(self.count) if self.share is None else f"{100 * self.share:.6g}%"
        return "~" * self.average + number

    @property
    def everything(self):
        return self.share == 1.0 and not self.average

    @property
    def exact(self):
        """The same budget for each picture instead of on average."""
        return replace(self, average=False)

    def of(self, N):
        """K for a picture of N tokens, from 1 to N: an int, or a tensor (B,) for a tensor of N."""
        if torch.is_tensor(N):
            K = torch.full_like(N, self.count or 0)
            if self.share is not None:
                K = (N.double() * self.share).round().long()
            return K.clamp_min(1).minimum(N)
        K = self.count or round(N * self.share)
        return min(N, max(1, K))


def real_tokens(X, valid=None):
    """How many visual tokens the images of X (B, N, d) have: N; with valid (B, N) a tensor (B,)."""
    return X.shape[1] if valid is None else valid.sum(1)


def threshold(d, total):
    """The T above which exactly `total` of the d (tokens,) lie: midway between two of them."""
    d = d.sort(descending=True).values
    below = d[total] if total < len(d) else d[-1] - 1
    return ((d[total - 1] + below) / 2).item()


def quantiles(d, n=64):
    """Thresholds: above values[i] lies a share shares[i] of all d (tokens,), padding aside."""
    d = d[d != -torch.inf]
    N = len(d)
    totals = sorted({round(N ** (i / (n - 1))) for i in range(n)})  # log-spaced, from one to all
    return {
        "shares": [total / N for total in totals],
        "values": [threshold(d, total) for total in totals],
    }


def count_above(d, T):
    """How many tokens of each image have a d (B, N) above T, at least one: K (B,) for a choice."""
    return (d > T).sum(-1).clamp_min(1)


def hardness_of(alpha, K):
    """Mean of the K largest weights of each image, (B,). At 1, alpha is that of the hard choice."""
    total = alpha.sort(descending=True).values.cumsum(-1)  # (B, N)
    K = torch.as_tensor(K, device=alpha.device).expand(len(alpha))
    return total.gather(1, K[:, None] - 1)[:, 0] / K
