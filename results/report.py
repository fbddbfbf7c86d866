"""
RESULTS.md: template.md, and in it the tables and verdicts that are made here from the JSON files beside it.

    python -m results.study report
"""
import json

from bench import PUBLISHED, STAGES
from eval.accuracy import retention
from eval.tables import made_by, markdown, mean, percentile, spread

# DiffPrune's figures, arXiv 2605.28051, to stand beside ours. Retention of LLaVA-1.5-7B at 33, 22 and 11 %:
PAPERS = {"papers": (98.3, 97.3, 95.5), "papers, Gumbel": (94.0, 91.3, 87.4),
          "papers, scale gate": (96.5, 94.8, 93.2), "papers, global denoiser": (95.9, 95.0, 92.7)}


def supports(claim):
    return "this supports them" if claim else "this does **not** support them"


def by_kind(table, full, heading="retention"):
    """A line for each row {category: accuracy}, in per cent, with its retention."""
    rows = []
    for name, by in table.items():
        rows.append([name, *(f"{100 * share:.1f}" for share in by.values()), f"{retention(by, full):.1f}"])
    return markdown(["", *full, heading], rows)


def fidelity(made):
    rows = []
    for way, at in made["retention"].items():
        real = {K: f" (LLaVA {theirs})" for K, theirs in made["real"].get(way, {}).items()}
        rows.append([way, *(f"{kept:.1f}{real.get(K, '')}" for K, kept in at.items())])
    rule = [[text, f"{value:.1f}", "yes" if holds else "**no**"] for text, value, holds in made["rule"]]
    return [markdown([f"retention, {made['questions']}", *at], rows), markdown(["rule", "measured", "holds"], rule),
            f"{sum(holds for *_, holds in made['rule'])} of the {len(rule)} parts of the rule hold."]


def accuracy(made):
    full, at, said = next(iter(made.values())), {}, []
    for name, by in made.items():
        way, _, K = name.rpartition(" ")
        at.setdefault(K, {})[way] = retention(by, full)
    for K, kept in at.items():
        best = max([way for way in kept if not way.startswith("scorer")], key=kept.get, default=None)
        if best and "scorer" in kept:
            ours, theirs = f"{kept['scorer']:.1f}", f"{kept[best]:.1f}"
            verdict = "The scorer wins" if float(ours) > float(theirs) else "The scorer does **not** win"
            said.append(f"{verdict} at {K}: it keeps {ours} %, and {best} {theirs} %.")
    return [by_kind(made, full), " ".join(said)]


def variants(made):
    """Each variant's losses and retention, and how far it is from the first of its group at 16."""
    rows, said = [], []
    for name, row in made["rows"].items():
        losses = " / ".join(f"{row[key]:.2f}" for key in ("soft_loss", "hard_loss", "deployed_loss"))
        papers = " / ".join(map(str, PAPERS.get(name, ())))
        first = made["rows"].get(name.partition(",")[0], row)
        for way in [way for way in ("top", "distinct") if way in row]:
            kept = [spread(at["retention"]) for at in row[way].values()]
            rows.append([f"{name}, {way}", f"{row['hardness']:.2f}", losses, f"{row['seconds']:.0f}", *kept, papers])
            if first is not row and "16" in row[way]:
                this, base = row[way]["16"]["retention"], first[way]["16"]["retention"]
                change, clear = mean(this) - mean(base), max(this) < min(base) or min(this) > max(base)
                beyond = f"{'beyond' if clear else 'within'} the spread of the seeds" if len(this) > 1 else "one seed"
                said.append(f"- {name}, {way}: {change:+.1f} points at 16, {beyond}.")
                if way == "top" and name in PAPERS and len(this) > 1:
                    theirs = PAPERS[name][2] - PAPERS["papers"][2]
                    said[-1] += f" The papers have {theirs:+.1f}: {supports(clear and change * theirs > 0)}."
    header = ["variant", "hardness", "soft / hard / deployed", "seconds", *row["top"], "papers"]
    return [f"{made['steps']} steps each.", markdown(header, rows), "\n".join(said)]


def ablations(made):
    at = made["rows"].get("papers", {}).get("distinct", {})
    if not {"16", "~16"} <= set(at):
        return variants(made)
    counts = ", ".join(f"{kept:.1f} ({number})" for number, kept in at["~16"]["by_shapes"].items())
    change = mean(at["~16"]["retention"]) - mean(at["16"]["retention"])
    return [*variants(made), f"The threshold ~16 keeps {at['~16']['kept']:.1f} tokens on average, by the number of "
                             f"shapes {counts}. Against 16 for each it changes the retention by {change:+.1f} points."]


def probes(made):
    gate, gumbel, random = made["papers"], made["papers, Gumbel"], made["random scores"]
    values = {name: [[run[name] for run in runs] for runs in (gate, gumbel)] for name in gate[0]}
    shares = [name.split()[1] for name in random if name.startswith("kept")]
    gap = max(abs(random[f"gated {share}"] - random[f"kept {share}"]) for share in shares)
    coherent, rough = (mean(values[name][0]) / mean(values[name][1]) for name in ("coherence midway", "roughness"))
    rows = [[f"{float(s):.0%}", f"{random[f'gated {s}']:.1f}", f"{random[f'kept {s}']:.1f}"] for s in shares]
    return [markdown(["", "noise gate", "Gumbel, straight-through"],
                     [[name, *(spread(side, 6) for side in pair)] for name, pair in values.items()]),
            f"Coherence midway is {coherent:.2f} times Gumbel's: {supports(coherent > 1)}. "
            f"Roughness is {rough:.2f} times Gumbel's: {supports(rough < 1)}.",
            markdown(["random scores", "gated, accuracy", "kept, accuracy"], rows),
            f"Gated and kept differ by up to {gap:.1f} points: {supports(gap <= 3)}."]


def ceiling(made):
    kept = {name: retention(by, made["all"]) for name, by in made.items()}
    return [by_kind(made, made["all"]), f"Scores optimised for each image by its captions keep "
                                        f"{kept['captions']:.1f} %, the scorer that ships {kept['scorer']:.1f} %."]


def positions(made):
    far, near = made["original"]["scorer"], made["closed up"]["scorer"]
    table = {f"{way}, {place}": by for place, ways in made.items() for way, by in ways.items()}
    most = max(far, key=lambda c: far[c] - near[c])
    said = f"Closing up costs most in '{most}': {100 * (far[most] - near[most]):.1f} points."
    return [by_kind(table, far, "of the first row"), said]


def objects(made):
    rows = [[way, *(f"{100 * share:.1f}" for share in on.values())] for way, on in made.items()]
    return [markdown(["tokens, %", *(f"on {kind}" for kind in made["all"])], rows)]


def speed(made):
    columns, rows = [*STAGES[:-1], "first", "decode"], []
    published = PUBLISHED if "llava-1.5-7b" in made["model"] else {}
    for name, row in {**made["rows"], **published}.items():
        ms = [f"{row[s]['median']:,.2f}" if isinstance(row.get(s), dict) else str(row.get(s, "–")) for s in columns]
        ratio = [f"{row['ratio'][s]:.2f}×" if "ratio" in row else "–" for s in ("prefill", "first")]
        rate = [f"{rate:.3g}" for rate in row.get("images_per_second", {}).values()] or ["–", "–"]
        rows.append([name, f"{row['tflops']:.2f}", *ms, *ratio, *rate])
    ways = [f"To choose, {name}, in ms: " + ", ".join(f"{way} {t['median']:.3f}" for way, t in at.items()) + "."
            for name, at in made.get("choosing", {}).items()]
    return [f"{made['model']}, {made['dtype']}, {made['text']} text tokens, {made['repeats']} passes.",
            markdown(["tokens", "TFLOPs", *columns, "prefill", "first", "prefills/s", "answers/s"], rows), *ways]


def serving(made):
    rows, whole = [], percentile(made["576"], 50)
    for K, seconds in made.items():
        median = percentile(seconds, 50)
        rows.append([K, f"{median:.2f} [{min(seconds):.2f}–{max(seconds):.2f}]", f"{whole / median:.2f}×"])
    return [markdown(["visual tokens of a picture", "16 answers, s", "faster"], rows)]


def flops(made):
    rows = [f"{name} {row['tflops']:.3f}" for name, row in made["rows"].items()]
    return [f"{made['model']}, TFLOPs: {', '.join(rows)}."]


def gpu(made):
    said, training = [], made.get("training")
    if training:
        planned, used = sum(training["planned GB"].values()), training["used GB"]
        said.append(f"Training of the 7B, {training['images at once']} pictures a step: "
                    f"{planned:.1f} GB planned, {used:.1f} used, {training['seconds a step']:.2f} s a step.")
    if "default" in made:
        done = json.loads(made["default"]["said"])
        said.append(f"`train.py` on the embedded default, in {done['settings']['dtype']}: {done['retention']:.1f} % "
                    f"kept at {done['keep']} tokens, after {done['seconds']:.0f} s of training.")
    if "tests" in made:
        said.append(f"The tests: {made['tests']['said']}")
    return said


SECTIONS = {"fidelity": fidelity, "accuracy": accuracy, "objects": objects, "recipes": variants, "ablations": ablations,
            "ceiling": ceiling, "probes": probes, "positions": positions, "speed": speed, "gpu": gpu,
            "serving": serving, "flops": flops}


def section(folder, name):
    """What the files of this name say, in Markdown, or "not measured"."""
    parts = []
    for path in sorted(folder.glob(f"{name}.json")):
        file = json.loads(path.read_text(encoding="utf-8"))
        kind = path.stem.partition("_")[0]
        parts += [*SECTIONS[kind](file["speed" if kind == "flops" else kind]), made_by(file)]
    return "\n\n".join(parts) or "not measured"


def report(folder, template):
    """Write RESULTS.md: the template with each {name} replaced by what was measured."""
    text = template.read_text(encoding="utf-8")
    for name in ("ablations_*", "speed_gpu*", "flops_*", *SECTIONS):
        text = text.replace("{" + name + "}", section(folder, name))
    (folder / "RESULTS.md").write_text(text, encoding="utf-8")
    print(f"wrote {folder / 'RESULTS.md'}")
