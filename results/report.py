"""
RESULTS.md: template.md, and in it the tables that are made here from the JSON files beside it.

    python -m results.study report
"""
import json
import re

from bench import tables
from common.files import InputError, short
from eval.accuracy import retention
from eval.tables import made_by, markdown, spread


def cell(value, digits):
    """Text as it is, a number rounded, a list as its mean with the lowest and the highest."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return spread(value, digits)
    return f"{value:.{digits}f}"


def study(measured):
    """The tables of a study."""
    parts = []
    for title, table in measured["tables"].items():
        digits = measured.get("digits", {}).get(title, 1)
        columns = list(next(iter(table.values())))
        rows = [[name, *(cell(row[column], digits) for column in columns)]
                for name, row in table.items()]
        parts.append(markdown([title, *columns], rows))
    return parts


def accuracy(measured):
    """A line for each row {category: accuracy}, in per cent, and who wins at each budget."""
    full, rows, kept = next(iter(measured.values())), [], {}
    for name, by_category in measured.items():
        share = retention(by_category, full)
        per_cent = [f"{100 * value:.1f}" for value in by_category.values()]
        rows.append([name, *per_cent, f"{share:.1f}"])
        way, _, K = name.rpartition(" ")
        kept.setdefault(K, {})[way] = share
    verdicts = []
    for K, at in kept.items():
        free = [way for way in at if not way.startswith("scorer")]
        if "scorer" in at and free:
            best = max(free, key=at.get)
            wins = "wins" if round(at["scorer"], 1) > round(at[best], 1) else "does **not** win"
            verdicts.append(f"The scorer {wins} at {K}: it keeps {at['scorer']:.1f} %, and {best} "
                            f"{at[best]:.1f} %.")
    return [markdown(["accuracy, %", *full, "retention"], rows), " ".join(verdicts)]


def speed(measured):
    """The tables of bench.py: times, launches or FLOPs."""
    parts = [f"{measured['model']}, {measured['text']} text tokens: {measured['unit']}."]
    for title, columns, lines in tables(measured["rows"]):
        parts.append(markdown([title, *columns[1:]], lines))
    return parts


OTHERS = {"accuracy": accuracy, "speed": speed, "flops": speed, "launches": speed}


def section(folder, name):
    """What the files of this name say, in Markdown, or "not measured"."""
    parts = []
    for path in sorted(folder.glob(f"{name}.json")):
        kind = path.stem.partition("_")[0]
        try:
            file = json.loads(path.read_text(encoding="utf-8"))
            measured = file["speed" if OTHERS.get(kind) is speed else kind]
            parts += OTHERS.get(kind, study)(measured)
            parts.append(made_by(file))
        except (ValueError, LookupError, TypeError, AttributeError, StopIteration) as e:
            raise InputError(f"{path}: holds no such measurements ({short(repr(e))}); make it "
                             "again, or take it away") from None
    return "\n\n".join(parts) or "not measured"


def report(folder, template):
    """Write RESULTS.md: the template with each {name} replaced by what was measured."""
    text = template.read_text(encoding="utf-8")
    text = re.sub(r"\{([a-z_0-9*]+)\}", lambda match: section(folder, match[1]), text)
    (folder / "RESULTS.md").write_text(text, encoding="utf-8")
    print(f"wrote {folder / 'RESULTS.md'}")
