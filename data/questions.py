"""
Question files: read them, write the answers, score them. LLaVA's evaluation format in and out.

    rows = read_questions("pope.jsonl", "val2014/")           # [{question_id, image, text, …}, …]
    answers = answer_file(Path("answers.jsonl"), rows, settings, answer)  # a killed run continues
    table = score(rows, answers)                              # where the rows have labels
"""
import hashlib
import json
import re
import sys
from pathlib import Path

from common.files import InputError, check_writable, lock, read_text, short, write
from data.coco import check_present, digest, picture_path

NEEDED = "one JSON object a line, or a list of them"


def read_questions(path, images=None, need=("image", "text", "label")):
    """Rows of a question file: one JSON object a line, or a list of them. InputError names the one
    that is wrong.

    `image` becomes a path, under `images` or beside the file; `category` is "all" where there is
    none; `where` is file and line. `label` is the answer, or a list of accepted ones. The fields in
    `need` must be there.
    """
    folders = [Path(path).parent]
    if images is not None:
        folders.insert(0, Path(images))
    rows = []
    for where, row in entries(path):
        for field in need:
            if not isinstance(row, dict) or row.get(field) in (None, "", []):
                raise InputError(f"{where}: has no {field}; each question needs {', '.join(need)}")
        label = row.get("label")
        labels = label if isinstance(label, list) else [label]
        no_word = any(isinstance(one, (dict, bool, list)) for one in labels)
        if not isinstance(row["text"], str) or no_word:
            raise InputError(f"{where}: text must be a string, label a string or a list of "
                             "accepted ones")
        image = picture_path(folders, row["image"], where)
        rows.append({**row, "image": image, "where": where,
                     "category": str(row.get("category") or "all")})
    if not rows:
        raise InputError(f"{path}: holds no question; give {NEEDED}")
    check_numbers(rows)
    check_present({row["image"]: row["where"] for row in reversed(rows)}, folders)
    return rows


def entries(path):
    """(file and line, what stands there as JSON) for each row of a question file."""
    text = read_text(path, NEEDED)
    if Path(path).suffix == ".tsv" or '"conversations"' in text:
        raise InputError(f"{path}: use lmms-eval: python -m eval.lmms --tasks mmbench_en_dev (or "
                         "scienceqa_img)")
    where, found = path, []
    try:
        if text.lstrip().startswith("["):
            return [(f"{path}: entry {i}", row) for i, row in enumerate(parse(text), 1)]
        for i, line in enumerate(text.split("\n"), 1):
            where = f"{path}: line {i}"
            if line.strip():
                found.append((where, parse(line)))
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: cannot be read ({short(e)}); give {NEEDED}") from None
    return found


def parse(text):
    """JSON; a NaN, which pandas writes where a label is missing, is None."""
    return json.loads(text, parse_constant={}.get)


def check_numbers(rows):
    """InputError where labels 1 and 0 must stand for yes and no, which no answer of a model equals:
    where they are the only numbers."""
    numbers = [row for row in rows if re.fullmatch(r"\d+(\.0)?", str(row.get("label")))]
    if numbers and all(float(row["label"]) < 2 for row in numbers):
        label = numbers[0]["label"]
        raise InputError(f"{numbers[0]['where']}: label {label!r} is no word of an answer; write "
                         f"yes or no (or [{label!r}] where the number is meant)")


# --- answers --------------------------------------------------------------------------------------

def answer_file(path, rows, settings, answer, overwrite=False):
    """The answers to the rows, in their order, and in the file `path`; answer(rows) yields as ask()
    does.

    Each batch is appended as it comes, and the whole put in order at the end. An answer_id stands
    for settings, question and picture: the file of a killed run is continued; one that was made
    otherwise, that another run writes, or that is something else, refused.
    """
    pictures = {image: digest(image) for image in {row["image"] for row in rows}}
    lines = []
    for i, row in enumerate(rows):
        lines.append(answer_row(i, row, settings, pictures[row["image"]]))
    try:
        check_writable(path)
        with open(path, "a+b") as file:
            lock(file, f"--answers {path}")
            file.seek(0)
            done = {}
            if not overwrite:
                done = read_answers(path, file, lines, settings)
            file.truncate()
            left = [i for i, line in enumerate(lines) if line["answer_id"] not in done]
            for part in answer([rows[i] for i in left]):
                for j, text in part:
                    line = lines[left[j]] | {"text": text}
                    done[line["answer_id"]] = line
                    file.write(json.dumps(line).encode() + b"\n")
                file.flush()
            done = [done[line["answer_id"]] for line in lines]
            write(path, done)
    except OSError as e:
        raise InputError(f"--answers {path}: cannot be written ({short(e)}); give another "
                         "place") from None
    return [line["text"] for line in done]


def answer_row(i, row, settings, picture):
    """The line that answers question number i, without its text; picture: a digest."""
    key = json.dumps([settings, i, row["question_id"], row["text"], picture])
    return {"question_id": row["question_id"], "prompt": row["text"], "text": "",
            "answer_id": hashlib.sha256(key.encode()).hexdigest()[:22],
            "model_id": settings["model"], "metadata": settings}


def read_answers(path, file, lines, settings):
    """{answer_id: row} of the answers that are there. Leaves the file at the end of the last whole
    line; what follows a kill cut off."""
    *whole, rest = file.read().split(b"\n")
    ids = {line["answer_id"] for line in lines}
    starts = [json.dumps(line).encode().partition(b'"text": "')[0] for line in lines]
    try:
        done = {row["answer_id"]: row for row in map(json.loads, whole)}
        others = [dict(row["metadata"]) for id, row in done.items() if id not in ids]
        ours = any(rest.startswith(start) or done and start.startswith(rest) for start in starts)
        if rest and not ours or not all(isinstance(row["text"], str) for row in done.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"--answers {path}: is not an answer file; give another name, or "
                         "--overwrite it") from None
    for other in others:
        changed = [f"{name} {other.get(name)} (now {settings.get(name)})"
                   for name in {**other, **settings} if other.get(name) != settings.get(name)]
        cause = ", ".join(changed) or "other questions or pictures"
        raise InputError(f"--answers {path}: was made with {cause}; give another name, or "
                         "--overwrite it")
    if done:
        print(f"{path}: {len(done)} of {len(ids)} answers are there", file=sys.stderr)
    file.seek(sum(len(line) + 1 for line in whole))
    return done


# --- right or wrong -------------------------------------------------------------------------------

def accepted(label):
    """The answers that one label or a list of them accepts: without case, outer spaces and a full
    stop."""
    labels = label if isinstance(label, list) else [label]
    return [str(one).strip().lower().removesuffix(".") for one in labels]


def yes_no(rows):
    """Whether all labels are yes or no."""
    return all(set(accepted(row["label"])) <= {"yes", "no"} for row in rows)


def is_right(answer, label, yes_no):
    """Whether an answer is an accepted one. To the label B, "(B)" and "B. red" are, too."""
    if yes_no:  # as in LLaVA's eval_pope.py: does the first sentence say no?
        words = answer.split(".")[0].replace(",", "").split(" ")
        answer = "no" if {"No", "no", "not"} & set(words) else "yes"
    given = accepted(answer)
    letter = re.match(r"[(\[]?([a-z])[)\].:]", given[0])
    if letter:
        given.append(letter[1])
    return not set(given).isdisjoint(accepted(label))


def figures(answers, labels, yes_no=False):
    """Accuracy of these answers; with yes_no POPE's five figures."""
    right = [is_right(answer, label, yes_no) for answer, label in zip(answers, labels)]
    accuracy = sum(right) / len(right)
    if not yes_no:
        return {"accuracy": accuracy}
    yes = [is_right(answer, "yes", yes_no) for answer in answers]
    true = ["yes" in accepted(label) for label in labels]
    hits = sum(y and t for y, t in zip(yes, true))
    return {
        "accuracy": accuracy,
        "precision": hits / max(1, sum(yes)),
        "recall": hits / max(1, sum(true)),
        "f1": 2 * hits / max(1, sum(yes) + sum(true)),
        "yes": sum(yes) / len(yes),
    }


def score(rows, answers):
    """Print and return the figures, per category and of all rows that have a label."""
    pairs = [(row, answer) for row, answer in zip(rows, answers)
             if row.get("label") not in (None, "", [])]
    if not pairs:
        return None
    if len(pairs) < len(rows):
        print(f"{len(pairs)} of {len(rows)} questions have a label; the figures are of these")
    polar = yes_no([row for row, _ in pairs])
    categories = {row["category"] for row, _ in pairs} - {"all"}
    table = {}
    for category in [*sorted(categories), "all"]:
        mine = [(answer, row["label"]) for row, answer in pairs
                if category in (row["category"], "all")]
        table[category] = figures(*zip(*mine), polar)
    print(f"{'category':24}" + "".join(f"{name:>11}" for name in table["all"]))
    for category, values in table.items():
        print(f"{category:24}" + "".join(f"{100 * value:11.1f}" for value in values.values()))
    return table
