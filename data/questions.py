"""
Question files: read them, write the answers, score them. LLaVA's evaluation format in and out.

    rows = read_questions("llava_pope_test.jsonl", "val2014/")          # [{question_id, image, text, …}, …]
    said = answer_file(Path("pope.jsonl"), rows, settings, answer)      # one answer a row; a killed run is continued
    table = score(rows, said)                                           # where the rows have labels
"""
import fcntl
import hashlib
import json
import sys
from pathlib import Path

from data.coco import picture_path
from common.files import InputError, short, write


def read_questions(path, images=None, need=("image", "text", "label")):
    """Rows of a question file: one JSON object a line, or a list of them. InputError names the one that is wrong.

    `image` becomes a path, under `images` or beside the file; `category` is "all" where there is none; `where` is file
    and line. `label` is the answer, or a list of accepted ones. The fields in `need` must be there."""
    path, where, entries, rows = Path(path), path, [], []
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".tsv" or '"conversations"' in text:
            raise InputError(f"{path}: use lmms-eval: python -m eval.lmms --tasks mmbench_en_dev (or scienceqa_img)")
        if text.lstrip().startswith("["):
            entries = [(f"{path}: entry {i}", row) for i, row in enumerate(json.loads(text), 1)]
        else:
            for i, line in enumerate(text.split("\n"), 1):
                where = f"{path}: line {i}"
                if line.strip():
                    entries.append((where, json.loads(line)))
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{where}: cannot be read ({short(e)}); give one JSON object a line, in UTF-8") from None
    for where, row in entries:
        for field in need:
            if not isinstance(row, dict) or row.get(field) in (None, "", []):
                raise InputError(f"{where}: has no {field}; each question needs {', '.join(need)}")
        if not isinstance(row["text"], str) or isinstance(row.get("label"), (dict, bool)):
            raise InputError(f"{where}: text must be a string, label a string or a list of accepted ones")
        folders = [path.parent] if images is None else [Path(images), path.parent]
        row |= {"image": picture_path(folders, row["image"], where), "category": str(row.get("category") or "all")}
        rows.append({**row, "where": where})
    if not rows:
        raise InputError(f"{path}: holds no question; give one JSON object a line")
    return rows


def answer_file(path, rows, settings, answer, overwrite=False):
    """The answers to the rows, in their order, and in the file `path`; answer(rows) yields as ask() does.

    Each batch is appended as it comes, and the whole put in order at the end. An answer_id stands for settings and
    question: the file of a killed run is continued; one that was made otherwise, or that another run writes, refused.
    """
    ids = [hashlib.sha256(json.dumps([settings, i, row["question_id"], row["text"]]).encode()).hexdigest()[:22]
           for i, row in enumerate(rows)]
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no ordinary file")
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.seek(0)
            done = {} if overwrite else read_answers(path, file, ids, settings)
            file.truncate()
            left = [i for i, id in enumerate(ids) if id not in done]
            for part in answer([rows[i] for i in left]):
                for j, text in part:
                    id, row = ids[left[j]], rows[left[j]]
                    done[id] = {"question_id": row["question_id"], "prompt": row["text"], "text": text, "answer_id": id,
                                "model_id": settings["model"], "metadata": settings}
                    file.write(json.dumps(done[id]).encode() + b"\n")
                file.flush()
            write(path, [done[id] for id in ids])
    except BlockingIOError:
        raise InputError(f"--answers {path}: another run is writing it; wait, or give another name") from None
    except OSError as e:
        raise InputError(f"--answers {path}: cannot be written ({short(e)}); give another place") from None
    return [done[id]["text"] for id in ids]


def read_answers(path, file, ids, settings):
    """{answer_id: row} of the answers that are there. Leaves the file at the end of the last whole line."""
    *lines, rest = file.read().split(b"\n")  # rest: a line that a kill cut off, or nothing
    try:
        done = {row["answer_id"]: row for row in map(json.loads, lines)}
        others = [dict(row["metadata"]) for id, row in done.items() if id not in ids]
        if not b'{"question_id"'.startswith(rest[:14]):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise InputError(f"--answers {path}: is no answer file; give another name, or --overwrite it") from None
    for then in others:
        changed = [f"{name} {then.get(name)} (now {settings.get(name)})" for name in {**then, **settings}
                   if then.get(name) != settings.get(name)]
        raise InputError(f"--answers {path}: was made with {', '.join(changed) or 'other questions'}; give another "
                         "name, or --overwrite it")
    if done:
        print(f"{path}: {len(done)} of {len(ids)} answers are there", file=sys.stderr)
    file.seek(sum(len(line) + 1 for line in lines))
    return done


def accepted(label):
    """The answers that one label or a list of them accepts: without case, outer spaces and a full stop."""
    return [str(one).strip().lower().removesuffix(".") for one in (label if isinstance(label, list) else [label])]


def yes_no(rows):
    """Whether all labels are yes or no."""
    return all(set(accepted(row["label"])) <= {"yes", "no"} for row in rows)


def is_right(answer, label, yes_no):
    """Whether an answer is an accepted one."""
    if yes_no:  # as in LLaVA's eval_pope.py: does the first sentence say no?
        answer = "no" if {"No", "no", "not"} & set(answer.split(".")[0].replace(",", "").split(" ")) else "yes"
    return accepted(answer)[0] in accepted(label)


def figures(said, labels, yes_no=False):
    """Accuracy of these answers; with yes_no POPE's five figures."""
    right = [is_right(answer, label, yes_no) for answer, label in zip(said, labels)]
    if not yes_no:
        return {"accuracy": sum(right) / len(right)}
    yes = [is_right(answer, "yes", yes_no) for answer in said]
    true = ["yes" in accepted(label) for label in labels]
    TP = sum(y and t for y, t in zip(yes, true))
    return {"accuracy": sum(right) / len(right), "precision": TP / max(1, sum(yes)), "recall": TP / max(1, sum(true)),
            "f1": 2 * TP / max(1, sum(yes) + sum(true)), "yes": sum(yes) / len(yes)}


def score(rows, said):
    """Print and return the figures, per category and of all rows that have a label."""
    pairs = [(row, answer) for row, answer in zip(rows, said) if row.get("label") not in (None, "", [])]
    if not pairs:
        return None
    if len(pairs) < len(rows):
        print(f"{len(pairs)} of {len(rows)} questions have a label; the figures are of these")
    polar, table = yes_no([row for row, _ in pairs]), {}
    for category in [*sorted({row["category"] for row, _ in pairs} - {"all"}), "all"]:
        mine = [(answer, row["label"]) for row, answer in pairs if category in (row["category"], "all")]
        table[category] = figures(*zip(*mine), polar)
    print(f"{'category':24}" + "".join(f"{name:>11}" for name in table["all"]))
    for category, values in table.items():
        print(f"{category:24}" + "".join(f"{100 * value:11.1f}" for value in values.values()))
    return table
