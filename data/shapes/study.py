"""
Studies of the method on the embedded default, behind `python bench.py ablations|budgets|probes|ceiling`.

They train many pruners, or look into one training; bench.py itself has what any model and pruner can be asked.

    ablations   train every variant of the recipes, three seeds each (hours on two cores)
    budgets     budgets per image or pooled, top K or a threshold, a range or one K (hours on two cores)
    probes      the papers' measured claims about gradients and noise (minutes)
    ceiling     how far choosing goes, and where the scorer falls short (half an hour)
"""
import json
import os
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from tqdm import tqdm

from bench import accuracies, mean, retention, right_or_wrong, show, spread_of
from data.coco import read_coco
from data.files import write
from data.questions import read_questions
from data.shapes.prepare import caption, draw_scene, prepare, questions
from denoiser import Denoiser
from infer import chooser, load_pruner
from model import HERE, InputError, load, read_image
from throttler import Scorer, select, soft_top_k, vp_gate, whitening
from train import LOSSES, PROMPT, RECIPES, SHAPES, tau_at, training_loss

# --- ablations --------------------------------------------------------------------------------------------------------

VARIANTS = {  # train.py's flags: each differs in one thing from the first of its group (raw scores: from the second)
    "ours": [],
    "ours, per image": ["--budget", "image"],
    "ours, K = 16 only": ["--keep", "16"],
    "ours, raw tokens": ["--no-whiten"],
    "ours, per image, raw scores": ["--budget", "image", "--no-standardise"],
    "ours, no presence": ["--no-presence"],
    "ours, with denoiser": ["--denoiser", "diagonal"],
    "ours, tau 2 to 0.1": ["--tau-start", "2", "--tau-end", "0.1", "--anneal", "0.5"],
    "ours, scale gate": ["--gate", "scale"],
    "ours, Gumbel": ["--gate", "gumbel"],
    "papers": ["--recipe", "papers"],
    "papers, channel noise": ["--recipe", "papers", "--noise", "channel"],
    "papers, isotropic noise": ["--recipe", "papers", "--noise", "isotropic"],
    "papers, scale gate": ["--recipe", "papers", "--gate", "scale"],
    "papers, Gumbel": ["--recipe", "papers", "--gate", "gumbel"],
    "papers, global denoiser": ["--recipe", "papers", "--denoiser", "global"],
}


def train_variants(args, variants):
    """Train these by train.py on the embedded default, seeds 0 … n-1, equal steps: {(variant, seed): folder}.

    A finished run that is in its folder, with the same flags and defaults, is not trained again. --dtype is for the
    training only.
    """
    steps = args.steps or SHAPES["steps"]
    folders = {(variant, seed): args.runs / f"{re.sub('[^A-Za-z0-9]+', '-', variant)}-{seed}"
               for variant in variants for seed in range(args.seeds)}

    def train(job):
        (variant, seed), folder = job
        made, wanted = folder / "variant.json", [variants[variant], steps, args.dtype, SHAPES, RECIPES]
        if not made.exists() or json.loads(made.read_text()) != wanted:
            folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, HERE / "train.py", "--seed", str(seed), "--out", folder, "--overwrite",
                       "--questions", "none", "--device", args.device, "--dtype", args.dtype, "--steps", str(steps),
                       "--eval-every", str(steps), *variants[variant]]
            with open(folder / "log.txt", "w") as log:
                threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
                done = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, **threads})
            if done.returncode:
                raise InputError(f"{folder / 'log.txt'}: training {variant!r} failed; its last lines say why")
            write(made, wanted)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(tqdm(pool.map(train, folders.items()), total=len(folders), desc="training runs", dynamic_ncols=True))
    return folders


def spread(values):
    return f"{mean(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def ablations(args):
    """Train every variant; the accuracy at each budget, cut at the top K, however a variant is deployed."""
    rows, vlm = read_questions(prepare() / "questions.jsonl"), load("data/shapes/llava", args.device)
    budgets, seeds = [vlm.budget(K) for K in args.keep or (16, 32, 48)], range(args.seeds)
    folders = train_variants(args, {name: VARIANTS[name] for name in args.variants or VARIANTS})
    choices = {"all": lambda X, inputs: None}
    for (variant, seed), folder in folders.items():
        scorer = load_pruner(folder)[0].to(args.device)
        choices |= {(variant, seed, K): lambda X, inputs, scorer=scorer, K=K: select(scorer(X), K) for K in budgets}
    answered = accuracies(right_or_wrong(vlm, rows, choices))
    full, table = answered["all"], {}
    for variant in dict.fromkeys(variant for variant, _ in folders):
        ends = [load_pruner(folders[variant, seed])[1]["curve"][-1] for seed in seeds]
        at = {K: [answered[variant, seed, K] for seed in seeds] for K in budgets}
        table[variant] = {**{k: mean(end[k] for end in ends) for k in ("hardness", *LOSSES, "seconds")},
                          "steps": ends[0]["step"] + 1,
                          "retention": {K: [retention(by, full) for by in runs] for K, runs in at.items()},
                          "by_category": {K: {c: mean(by[c] for by in runs) for c in full} for K, runs in at.items()}}
    show(f"after training, mean of the seeds (lowest to highest); loss with all tokens {ends[0]['full_loss']:.3f}",
         ["variant", "hardness", *LOSSES, "seconds", *(f"K = {K}" for K in budgets)],
         ([name, f"{row['hardness']:.2f}", *(f"{row[k]:.3f}" for k in LOSSES), f"{row['seconds']:.0f}",
           *map(spread, row["retention"].values())] for name, row in table.items()))
    return table


# --- budgets: per image or pooled, top-K or a threshold, a range or one K ---------------------------------------------

def budgets(args):
    """What do one pruner for every budget, and counts that differ by the picture, gain at equal mean counts?"""
    rows, vlm = read_questions(prepare() / "questions.jsonl"), load("data/shapes/llava", args.device)
    ladder, seeds = ("8", "12", "16", "24", "32", "48"), range(args.seeds)  # train.calibrate's, for K = 16
    variants = {**{name: (ladder, ["--keep", "8:32", "--budget", name]) for name in ("image", "batch")},
                **{f"only {K}": ([K], ["--keep", K, "--budget", "image"]) for K in ("8", "16", "32", "48")}}
    folders = train_variants(args, {name: flags for name, (_, flags) in variants.items()})
    choices, counts = {"all": lambda X, inputs: None}, {}

    def add(name, choose):
        def counted(X, inputs):
            keep = choose(X, inputs)  # (B, K), -1 for no token
            counts.setdefault(name, []).extend((keep >= 0).sum(1).tolist())
            return keep
        choices[name] = counted

    for (variant, seed), folder in folders.items():
        scorer, settings = load_pruner(folder)
        scorer = scorer.to(args.device)
        for K in variants[variant][0]:
            add((variant, "top-K", seed, K), chooser(vlm, scorer, settings, K)[0])
            if variant in ("image", "batch"):
                add((variant, "threshold", seed, K), chooser(vlm, scorer, settings, f"~{K}")[0])
    answered = accuracies(right_or_wrong(vlm, rows, choices))
    table, ways = {}, dict.fromkeys(name[:2] for name in counts)
    for way in ways:
        at = {K: [(*way, seed, K) for seed in seeds] for K in ladder if (*way, 0, K) in counts}
        table[", ".join(way)] = {K: {"retention": [retention(answered[name], answered["all"]) for name in names],
                                     "kept": [mean(counts[name]) for name in names]} for K, names in at.items()}
    cell = lambda at: f"{spread(at['retention'])} @ {mean(at['kept']):.1f}"
    show("retention, mean of the seeds (lowest to highest) @ tokens kept, mean", ["trained, cut", *ladder],
         ([name, *(cell(at[K]) if K in at else "–" for K in ladder)] for name, at in table.items()))
    shapes = {row["image"]: row["label"] for row in rows if row["category"] == "count"}
    by_shapes = {}
    for variant in ("image", "batch"):
        kept = [(shapes[row["image"]], k) for seed in seeds
                for row, k in zip(rows, counts[variant, "threshold", seed, "16"])]
        by_shapes[variant] = {n: spread_of([k for m, k in kept if m == n]) for n in ("one", "two", "three")}
    show("tokens kept by the threshold ~16, by number of shapes: mean [p10–p90]", ["trained", *by_shapes["image"]],
         ([name, *("{mean:.1f} [{p10}–{p90}]".format(**k) for k in by.values())] for name, by in by_shapes.items()))
    return {"retention": table, "by_shapes": by_shapes}


# --- probes -----------------------------------------------------------------------------------------------------------

def probes(args):
    """The papers' measured claims, on the embedded default, for the noise gate and for Gumbel with straight-through.

    coherence: mean cosine between the scorer's gradients on independent batches, at the start and midway;
    roughness: mean change of the loss from step to step along a random direction in the scorer's weights, noise fixed;
    noise like dropping: accuracy with random scores, all tokens gated to a mean weight of K/N against K tokens kept.
    """
    vlm, folder = load("data/shapes/llava", args.device), prepare()
    pairs = list(read_coco(folder / "train.json").items())
    batch, K, result = 24, 16, {}

    def inputs_of(i):
        part = [pairs[(i * batch + j) % len(pairs)] for j in range(batch)]
        return vlm.inputs([read_image(p) for p, _ in part], [PROMPT] * batch, [captions[0] for _, captions in part])

    statistics_ = whitening(torch.cat([vlm.encode(inputs_of(i)) for i in range(8)]))
    for gate, seed in [(gate, seed) for gate in ("vp", "gumbel") for seed in range(args.seeds)]:
        torch.manual_seed(seed)
        scorer, denoiser = (m.to(vlm.model.device) for m in (Scorer(vlm.width), Denoiser(vlm.width)))
        optimizer = torch.optim.AdamW([*scorer.parameters(), *denoiser.parameters()], lr=SHAPES["lr"])
        flat = lambda ts: torch.cat([t.flatten() for t in ts])

        def loss_at(i, tau):
            return training_loss(vlm, scorer, denoiser, statistics_, inputs_of(i), K, tau, gate)[0]

        def coherence(tau, n=8):
            g = torch.stack([flat(torch.autograd.grad(loss_at(-1 - i, tau), scorer.parameters())) for i in range(n)])
            g = F.normalize(g, dim=1)
            return (((g @ g.T).sum() - n) / (n * (n - 1))).item()

        row = {"coherence_start": coherence(2.0)}
        for step in tqdm(range(args.steps or 60), desc=f"{gate}, seed {seed}", dynamic_ncols=True, leave=False):
            tau = tau_at("papers", step / (args.steps or 60) / 2, 2.0, 0.1)
            optimizer.zero_grad()
            loss_at(step, tau).backward()
            optimizer.step()
        row["coherence_midway"] = coherence(tau)
        weights = list(scorer.parameters())
        direction = [torch.randn_like(w) * w.norm() / w.numel() ** 0.5 for w in weights]
        losses = []
        with torch.no_grad():
            for _ in range(21):  # twenty steps of 1 % of the weights' norm
                torch.manual_seed(seed)
                losses.append(loss_at(-1, tau).item())
                for w, d in zip(weights, direction):
                    w += 0.01 * d
        row["roughness"] = mean(abs(a - b) for a, b in zip(losses, losses[1:]))
        for name, value in row.items():
            result.setdefault(gate, {}).setdefault(name, []).append(value)
    fine = lambda v: f"{mean(v):.4f} ({min(v):.4f}–{max(v):.4f})"
    show(f"mean of {args.seeds} seeds (lowest to highest)", ["", "noise gate", "Gumbel, straight-through", "ratio"],
         ([name, fine(result["vp"][name]), fine(result["gumbel"][name]),
           f"{mean(result['vp'][name]) / mean(result['gumbel'][name]):.2f}"] for name in result["vp"]))

    rows = read_questions(folder / "questions.jsonl")
    shares, choices = [1.0, 0.75, 0.5, 0.33, 0.22, 0.11, 0.06], {}
    mean_X, L = statistics_
    for share in shares:
        K = max(1, round(share * vlm.tokens))
        choices[f"noise {share}"] = lambda X, inputs, K=K: (
            vp_gate(X, soft_top_k(torch.randn(X.shape[:2], device=X.device), K), mean_X, L), None)
        choices[f"dropped {share}"] = lambda X, inputs, K=K: select(torch.rand(X.shape[:2], device=X.device), K)
    torch.manual_seed(0)
    answers = right_or_wrong(vlm, rows, choices)
    right = {name: 100 * mean(mean(r) for r in by.values()) for name, by in answers.items()}
    result["noise_like_dropping"] = [
        {"share": share, "noise": right[f"noise {share}"], "dropped": right[f"dropped {share}"]} for share in shares]
    show("random scores: accuracy with all tokens gated to a mean weight, and with that share of the tokens kept",
         ["share", "gated", "dropped"],
         ([f"{at['share']:.0%}", f"{at['noise']:.1f}", f"{at['dropped']:.1f}"] for at in result["noise_like_dropping"]))
    return result


# --- ceiling ----------------------------------------------------------------------------------------------------------

def ceiling(args):
    """How far choosing goes, and where the scorer falls short. The rows, for K tokens of each of 50 images:

    captions, answers   no scorer: each image's scores optimised for themselves, by the training graph (gate, presence,
                        falling tau), on five captions of it, or, as no scorer may, on its questions and answers
    scorer, these 50    a scorer trained on those captions of these 50 images alone, K for each: can it fit at all?
    scorer              the pruner that ships; and "trained on": the same on 300 images that it was trained on
    """
    folder, vlm = prepare(), load("data/shapes/llava", args.device)
    rows = read_questions(folder / "questions.jsonl")[:250]
    K, steps, recipe = vlm.budget((args.keep or [16])[0]), args.steps or 60, RECIPES["ours"]
    captions = [caption(draw_scene(f"test-{i // 5}")[1], random.Random(f"ceiling-{i}")) for i in range(len(rows))]
    pictures = [read_image(row["image"]) for row in rows]
    texts = {"captions": ([PROMPT] * len(rows), captions),  # five a picture, as there are five questions
             "answers": ([row["text"] for row in rows], [row["label"] for row in rows])}
    batches = {name: [vlm.inputs(pictures[i:i + 50], asked[i:i + 50], said[i:i + 50]) for i in range(0, len(rows), 50)]
               for name, (asked, said) in texts.items()}
    torch.manual_seed(0)
    mean_X, L = whitening(vlm.encode(vlm.inputs(pictures[::5], ["?"] * len(pictures[::5]))))

    def optimise(scorer, parameters, lr, steps, batches, name):
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0)
        for step in tqdm(range(steps), desc=name, dynamic_ncols=True, leave=False):
            tau = tau_at("ours", step / (recipe["anneal"] * steps), recipe["tau_start"], recipe["tau_end"])
            loss, _ = training_loss(vlm, scorer, torch.nn.Identity(), (mean_X, L), batches[step % len(batches)], K, tau,
                                    standardise=True, presence=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    choices = {"all": lambda X, inputs: None}
    for name in texts:
        keeps = []
        for inputs in batches[name]:  # ten pictures
            scores = (0.1 * torch.randn(10, vlm.tokens, device=vlm.model.device)).requires_grad_()
            optimise(lambda X, valid: scores.repeat_interleave(5, 0), [scores], 0.05, steps, [inputs], name)
            keeps.append(select(scores.detach(), K).repeat_interleave(5, 0))
        choices[name] = lambda X, inputs, kept=iter(torch.cat(keeps)): torch.stack([next(kept) for _ in X])
    alone = Scorer(vlm.width).to(vlm.model.device)
    alone.whiten(mean_X, L)
    optimise(alone, alone.parameters(), 1e-3, steps * len(batches["captions"]), batches["captions"], "scorer, these 50")
    choices["scorer, these 50"] = lambda X, inputs: select(alone(X), K)
    shipped = load_pruner(HERE / "data/shapes/pruner")[0].to(args.device)
    choices["scorer"] = lambda X, inputs: select(shipped(X), K)
    answered = accuracies(right_or_wrong(vlm, rows, choices))
    trained = [dict(image=folder / f"train/{i:05d}.jpg", category=category, text=text, label=label) for i in range(300)
               for category, text, label in questions(draw_scene(f"train-{i}")[1], random.Random(f"ceiling-{i}"))]
    pair = {"all, trained on": choices["all"], "scorer, trained on": choices["scorer"]}
    answered |= accuracies(right_or_wrong(vlm, trained, pair))
    whole = lambda name: answered["all, trained on" if name.endswith("trained on") else "all"]
    show(f"{K} tokens of 50 images, and of 300 that the scorer was trained on", ["", *answered["all"], "retention"],
         ([name, *(f"{100 * a:.1f}" for a in by.values()), f"{retention(by, whole(name)):.1f}"]
          for name, by in answered.items()))
    return answered


STUDIES = {"ablations": ablations, "budgets": budgets, "probes": probes, "ceiling": ceiling}
