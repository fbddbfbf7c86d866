"""
A trained pruner: find it, load it, and choose tokens by it as it is deployed.

    scorer, settings = load_pruner("out")
    vlm = load(settings["model"])
    choose, _ = chooser(vlm, scorer, settings, Budget.parse("16"))
    keep = choose(X, inputs)                                           # (B, 16)
"""
import hashlib
import json
import math
from bisect import bisect_left
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from common.budget import Budget, count_above, quantiles, real_tokens
from common.files import ROOT, InputError, short
from throttler import Scorer, distinct, select, standardised

# what the choice goes by, (scores (B, N), X (B, N, d)) -> (B, N), comparable from picture to picture
RANKINGS = {
    "distinct": distinct,
    "top": lambda scores, X: standardised(scores),  # the papers': the highest scores
}


def default_pruner():
    """(folder, why): ./out once its training is finished, else the pruner that ships with the embedded default."""
    try:
        finished = json.loads(Path("out/pruner.json").read_text(encoding="utf-8"))["finished"]
    except (OSError, ValueError, LookupError, TypeError):
        finished = False
    if finished:
        return Path("out"), "your training"
    return ROOT / "data/shapes/pruner", "it ships with this code; ./out holds no finished training"


def load_pruner(folder):
    """(scorer, settings) from a folder that train.py wrote. InputError if a file is missing or does not fit."""
    folder = Path(folder)
    if (folder / "checkpoint.safetensors").exists() and not (folder / "pruner.json").exists():
        raise InputError(f"{folder}: its training is not finished; run train.py again with --resume")
    try:
        settings = {"choose": "distinct", **json.loads((folder / "pruner.json").read_text(encoding="utf-8"))}
        for name in ("model", "width", "tokens", "keep"):
            if name not in settings:
                raise ValueError(f"pruner.json has no {name}")
        Budget.parse(settings["keep"])
        if settings["choose"] not in RANKINGS:
            raise ValueError(f"choose must be one of {', '.join(RANKINGS)}")
        table = settings.get("thresholds") or {}
        for value in table.get("shares", []) + table.get("values", []):
            if not math.isfinite(value):
                raise ValueError("a threshold is no number")
        with torch.device("meta"):  # takes no memory, whatever width is named
            scorer = Scorer(settings["width"])
        with safe_open(folder / "scorer.safetensors", "pt") as file:
            for name, t in scorer.state_dict().items():
                if file.get_slice(name).get_shape() != list(t.shape):
                    raise ValueError(f"{name} has another shape than by width {settings['width']}")
            scorer.load_state_dict({name: file.get_tensor(name) for name in file.keys()}, assign=True)
        for name, t in scorer.state_dict().items():
            if not t.isfinite().all():
                raise ValueError(f"{name} holds what is no number")
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RuntimeError, SafetensorError) as e:
        raise InputError(f"{folder}: its pruner.json and scorer.safetensors are no trained pruner ({short(e)}); give a "
                         "folder that train.py wrote") from None
    return scorer.float().eval().requires_grad_(False), {**settings, "folder": folder}


@torch.no_grad()
def thresholds(vlm, scorer, choose, batches):
    """The table that says above which T a budget ~K holds on average, by these batches' images."""
    rankings = []
    for inputs in batches:
        X = vlm.encode(inputs).float()
        ranking = RANKINGS[choose](scorer(X, inputs.get("valid")), X)  # (B, N)
        rankings += ranking
    return {"images": len(rankings), **quantiles(torch.cat(rankings))}


def threshold_of(budget, settings, N):
    """The T above which a budget ~K holds on average, from the pruner's table. N: visual tokens, or None."""
    told, table = f"--keep {budget}: {settings.get('folder', 'the pruner')}", settings.get("thresholds") or {}
    if len(table.get("shares", [])) < 2:
        raise InputError(f"{told} has no thresholds: its training is not finished, or held out too few images; give a "
                         "number without ~")
    if budget.count and N is None:
        raise InputError(f"--keep {budget}: this model's pictures differ in their number of tokens; give a share, as "
                         "~11.1%")
    if budget.count and N != settings["tokens"]:
        raise InputError(f"{told} was trained with {settings['tokens'] or 'a varying number of'} visual tokens, and "
                         f"this model has {N}; give a share, as ~11.1%")
    share, shares, values = budget.share or budget.count / N, table["shares"], table["values"]
    if not 0.999 * shares[0] <= share <= 1.001 * shares[-1]:
        raise InputError(f"{told} has thresholds for {shares[0]:.2%} to {shares[-1]:.2%} of the tokens; stay within "
                         "these, or give a number without ~")
    i = bisect_left(shares, share, 1, len(shares) - 1)
    return values[i - 1] + (values[i] - values[i - 1]) * (share - shares[i - 1]) / (shares[i] - shares[i - 1])


def chooser(vlm, scorer, settings, budget=None, T=None, choose=None):
    """(choose, what it goes by): choose(X, inputs) -> keep (B, K), or None for all tokens.

    budget: a Budget (None: what the pruner was trained for); or T, a threshold. choose: one of RANKINGS (None: what
    the pruner says). InputError for a budget that cannot be, or that the pruner has no threshold for.
    """
    how = choose or settings["choose"]
    goes_by = {"threshold": T, "choose": how}
    if T is None:
        budget = budget or Budget.parse(settings["keep"])
        if budget.everything or budget == Budget(count=vlm.tokens):
            return (lambda X, inputs: None), {"keep": "all"}
        if vlm.tokens and budget.count and budget.count > vlm.tokens:
            raise InputError(f"--keep {budget}: {vlm.name} has {vlm.tokens} visual tokens; give fewer, or all")
        goes_by = {"keep": str(budget), "choose": how}
        if budget.average:
            if how != settings["choose"]:
                raise InputError(f"--keep {budget}: the thresholds of this pruner are for --choose {settings['choose']}; "
                                 "give a number without ~")
            T = threshold_of(budget, settings, vlm.tokens)

    def chosen(X, inputs):
        valid = inputs.get("valid")  # (B, N), or None
        scores = scorer(X, valid)  # (B, N)
        if not (scores < math.inf).all():
            raise InputError(f"{vlm.name}: the scores of the visual tokens are no numbers; try --dtype float32")
        ranking = RANKINGS[how](scores, X)  # (B, N)
        K = budget.of(real_tokens(X, valid)) if T is None else count_above(ranking, T)
        return select(ranking, K)  # (B, K)
    return chosen, goes_by


def fingerprint(module):
    """Twelve hex digits for a model, of its config and some 64 values of each weight; no path or date is in it."""
    config = module.config.to_diff_dict() if hasattr(module, "config") else {}
    config.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, t in module.state_dict().items():
        some = t.flatten()[::max(1, t.numel() // 64)].float().cpu()
        digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()[:12]
