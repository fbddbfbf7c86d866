"""
What all measurements share: tables, and a JSON file that says under which conditions it was made.

    show("speed", ["tokens", "ms"], [["all 576", "118.7"], ["keep 64", "41.6"]])   # on the terminal
    markdown(["tokens", "ms"], [["all 576", "118.7"], ["keep 64", "41.6"]])        # for RESULTS.md
    save(Path("speed.json"), "python bench.py", {"speed": …})
"""
import platform
import re
import shlex
import sys
import time
from pathlib import Path

import torch
import transformers

from common.budget import Budget
from common.files import InputError, check_place, rounded, write


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def percentile(values, p):
    return sorted(values)[round(p / 100 * (len(values) - 1))]


def show(title, header, rows):
    """Print rows of cells under a header, every column as wide as its widest cell."""
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    print(title)
    for name, *values in rows:
        values = [value.rjust(width) for value, width in zip(values, widths[1:])]
        print("  ".join([name.ljust(widths[0]), *values]), flush=True)


def markdown(header, rows):
    rows = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def spread(values, digits=1):
    """The mean, and the lowest to the highest where there are several."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def conditions():
    """What a number depends on beside the code."""
    info, names = Path("/proc/cpuinfo"), []
    if info.exists():
        names = re.findall("^model name.*: (.*)", info.read_text(), re.M)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": [*names, platform.processor()][0],
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def save(path, program, measured):
    """Write what was measured, with the command and its conditions."""
    command = f"{program} {shlex.join(sys.argv[1:])}".strip()
    write(path, rounded({"conditions": conditions(), "command": command, **measured}))


def made_by(file):
    """The command, machine and date of a saved file, in a sentence."""
    c = file["conditions"]
    seeds = f", {file['seeds']} seeds" if "seeds" in file else ""
    return (f"`{file['command']}` on {c['gpu'] or c['cpu']}, {c['threads']} threads, torch "
            f"{c['torch']}, transformers {c['transformers']}, {c['date']}{seeds}.")


def check(args, *names, flag="--json"):
    """InputError unless these arguments are 1 or more, and args.json, which `flag` gives, is a
    place for measurements."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    if args.json:
        check_place(flag, args.json, "", (".json",))
        if args.json.exists() and '"conditions"' not in args.json.read_text(errors="replace"):
            raise InputError(f"{flag} {args.json}: is there, and holds no measurements; give "
                             "another name")


def budgets(texts, vlm=None):
    """Budgets of --keep; counts where a model with a fixed number of tokens is given."""
    try:
        parsed = [Budget.parse(text) for text in texts]
    except ValueError as e:
        raise InputError(f"--keep: {e}") from None
    if vlm is None or vlm.tokens is None:
        return parsed
    counts = [Budget(budget.of(vlm.tokens), average=budget.average) for budget in parsed]
    if any(budget.count and budget.count > vlm.tokens for budget in parsed):
        raise InputError(f"--keep {' '.join(texts)}: {vlm.name} has {vlm.tokens} visual tokens; "
                         "give at most that many")
    return counts
