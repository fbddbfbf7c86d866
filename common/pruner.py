"""
A trained pruner: find it, load it, and choose tokens by it; or without one, by a criterion.

    scorer, settings = load_pruner("out")
    vlm = load(settings["model"])
    choose, _ = chooser(vlm, scorer, settings, 16)
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
from common.criteria import UNTRAINED, criteria
from common.files import ROOT, InputError, short
from throttler import Scorer, distinct, select, standardised

# what the choice goes by: (scores (B, N), X (B, N, d)) -> (B, N), comparable between pictures
RANKINGS = {
    "distinct": distinct,
    "top": lambda scores, X: standardised(scores),  # the papers': the highest scores
}
# the types that pruner.json's fields may have
KINDS = {
    "model": (str,),
    "width": (int,),
    "tokens": (int, type(None)),
    "keep": (str, int),
    "choose": (str,),
}


# --- a pruner's folder ----------------------------------------------------------------------------

def default_pruner(model=None):
    """(folder, why) of the pruner for this model, or for any: ./out once its training is finished,
    else the one that ships with this code. (None, why) if neither is for this model.
    """
    shipped = "it ships with this code; ./out holds no finished training"
    for folder, why in ((Path("out"), "your training"), (ROOT / "data/shapes/pruner", shipped)):
        try:
            settings = json.loads((folder / "pruner.json").read_text(encoding="utf-8"))
            if settings["finished"] and model in (None, settings["model"]):
                return folder, why
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            pass
    return None, "there is none for this model"


def check_settings(settings):
    """ValueError, or a TypeError, unless pruner.json holds what train.py writes there."""
    for name, kinds in KINDS.items():
        if name not in settings:
            raise ValueError(f"pruner.json has no {name}")
        if type(settings[name]) not in kinds:
            raise ValueError(f"{name} cannot be {settings[name]!r}")
    Budget.parse(settings["keep"])
    if settings["choose"] not in RANKINGS:
        raise ValueError(f"choose must be one of {', '.join(RANKINGS)}")
    if settings.get("thresholds") is not None:
        check_thresholds(**settings["thresholds"])


def check_thresholds(shares, values, images=None):
    """ValueError unless the shares rise, from above 0 to 1, while the thresholds for them fall."""
    if len(shares) != len(values) or not all(map(math.isfinite, shares + values)):
        raise ValueError("thresholds: shares and values must be equally many numbers")
    rising = shares == sorted(set(shares)) and all(0 < share <= 1 for share in shares)
    falling = values == sorted(values, reverse=True) and len(set(values)) >= min(2, len(values))
    if not (rising and falling):
        raise ValueError("thresholds: shares must rise from above 0 to 1, values fall")


def load_pruner(folder):
    """(scorer, settings) from a folder that train.py wrote.

    InputError if a file is missing or does not fit.
    """
    folder = Path(folder)
    try:
        if (folder / "checkpoint.safetensors").exists() and not (folder / "pruner.json").exists():
            raise InputError(f"{folder}: its training is not finished; train.py --resume goes on")
        settings = json.loads((folder / "pruner.json").read_text(encoding="utf-8"))
        check_settings(settings)
        with torch.device("meta"):  # takes no memory, whatever width is named
            scorer = Scorer(settings["width"])
        # safetensors calls a file absent that may not be read
        open(folder / "scorer.safetensors", "rb").close()
        with safe_open(folder / "scorer.safetensors", "pt") as file:
            for name, t in scorer.state_dict().items():
                if file.get_slice(name).get_shape() != list(t.shape):
                    raise ValueError(f"{name} has another shape than by width {settings['width']}")
            weights = {name: file.get_tensor(name) for name in file.keys()}
        for name, t in weights.items():
            if not (t.is_floating_point() and t.float().isfinite().all()):
                raise ValueError(f"{name} holds what is not a finite number")
        scorer.load_state_dict(weights, assign=True)
    except (OSError, ValueError, TypeError, OverflowError, RuntimeError, SafetensorError) as e:
        reason = short(e)
        if getattr(e, "filename", None):
            reason = f"{Path(e.filename).name}: {e.strerror}"
        raise InputError(f"{folder}: its pruner.json and scorer.safetensors are not a trained "
                         f"pruner ({reason}); give a folder that train.py wrote") from None
    return scorer.float().eval().requires_grad_(False), {**settings, "folder": folder}


def fingerprint(module):
    """Twelve hex digits for a model, of its config and some 64 values of each weight.

    No path or date is in it.
    """
    config = module.config.to_diff_dict() if hasattr(module, "config") else {}
    config.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, t in module.state_dict().items():
        step = max(1, t.numel() // 64)
        some = t.flatten()[::step].float().cpu()
        digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()[:12]


# --- a budget on average --------------------------------------------------------------------------

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
    """The T above which a budget ~K holds on average, from the pruner's table.

    N: visual tokens, or None where pictures differ in them.
    """
    pruner = f"--keep {budget}: {settings.get('folder', 'the pruner')}"
    table = settings.get("thresholds") or {"shares": []}
    shares = table["shares"]
    if len(shares) < 2:
        raise InputError(f"{pruner} has no thresholds: its training is not finished, or held out "
                         "too few images; give a number without ~")
    if budget.count and N is None:
        raise InputError(f"--keep {budget}: this model's pictures differ in their number of "
                         "tokens, so an average must be a share, as ~11.1%")
    if budget.count and N != settings["tokens"]:
        varied = "a varying number of"
        raise InputError(f"{pruner} was trained with {settings['tokens'] or varied} visual tokens, "
                         f"and this model has {N}; give a share, as ~11.1%")
    share = budget.share or budget.count / N
    if not 0.999 * shares[0] <= share <= 1.001 * shares[-1]:
        raise InputError(f"{pruner} has thresholds for {shares[0]:.2%} to {shares[-1]:.2%} of the "
                         "tokens; stay within these, or give a number without ~")
    i = bisect_left(shares, share, 1, len(shares) - 1)
    low, high = shares[i - 1:i + 1]
    at_low, at_high = table["values"][i - 1:i + 1]
    return at_low + (at_high - at_low) * (share - low) / (high - low)


# --- the choice -----------------------------------------------------------------------------------

def by_budget(choose, budget):
    """choose(X, inputs) from a choose(X, inputs, K)."""
    def by(X, inputs):
        K = budget.of(real_tokens(X, inputs.get("valid")))
        return choose(X, inputs, K)
    return by


def by_scores(vlm, scorer, ranking, budget, T=None):
    """choose(X, inputs) by a pruner's scores: a budget, or with T all that rank above it."""
    def rank(X, valid=None):
        return ranking(scorer(X, valid), X)  # (B, N); a score that is no number makes it NaN

    by_graph = getattr(vlm, "recorded", lambda fn: fn)(rank)  # common.graphs.Graphs has it

    def choose(X, inputs):
        valid = inputs.get("valid")  # (B, N), or None
        d = by_graph(X) if valid is None else rank(X, valid)  # (B, N)
        if d.isnan().any():
            raise InputError(f"{vlm.name}: the scores of the visual tokens are NaN; try "
                             "--dtype float32")
        K = budget.of(real_tokens(X, valid)) if T is None else count_above(d, T)
        return select(d, K)  # (B, K)
    return choose


def check_average(budget, T, choose, settings):
    """InputError unless the pruner has thresholds for the choice, where budget or T needs them."""
    average = budget and budget.average
    if choose not in RANKINGS and (average or T is not None):
        raise InputError(f"--choose {choose}: --threshold and --keep ~K need the thresholds of "
                         "a trained pruner; give a number without ~")
    if T is None and average and choose != settings["choose"]:
        raise InputError(f"--keep {budget}: the thresholds of this pruner are for --choose "
                         f"{settings['choose']}; give a number without ~")


def chooser(vlm, scorer, settings, budget=None, T=None, choose=None):
    """(choose, by): choose(X, inputs) -> keep (B, K), or None for all tokens; by: a record of how.

    budget: a Budget, or 16 or "11.1%" (None: what the pruner was trained for); or T, a threshold.
    choose: one of RANKINGS, or a criterion (None: what the settings say). scorer: None where there
    is no pruner.
    InputError for a budget that cannot be, and for what needs a pruner, or another one.
    """
    choose = choose or settings["choose"]
    if not isinstance(budget, Budget):
        budget = Budget.parse(budget or settings["keep"])
    check_average(budget, T, choose, settings)
    by = {"threshold": T, "choose": choose}
    if T is None:
        by = {"keep": str(budget), "choose": choose}
        if budget.everything or budget == Budget(vlm.tokens):
            return (lambda X, inputs: None), {"keep": "all"}
        if vlm.tokens and budget.count and budget.count > vlm.tokens:
            raise InputError(f"--keep {budget}: {vlm.name} has {vlm.tokens} visual tokens; give "
                             "fewer, or all")
    if choose not in RANKINGS:
        fitting = criteria(vlm)
        if choose not in fitting:
            others = ", ".join(name for name in UNTRAINED if name in fitting)
            raise InputError(f"--choose {choose}: {vlm.name} has no square grid of tokens, or no "
                             f"class token, for it; choose by {others}")
        return by_budget(fitting[choose], budget), by
    if T is None and budget.average:
        T = threshold_of(budget, settings, vlm.tokens)
    return by_scores(vlm, scorer, RANKINGS[choose], budget, T), by
