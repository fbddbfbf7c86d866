"""
Question files: read them, write the answers, score them. LLaVA's evaluation format in and out.

    rows = read_questions("llava_pope_test.jsonl", "val2014/")          # [{question_id, image, text, …}, …]
    said = answer_file(Path("pope.jsonl"), rows, settings, answer)      # one answer a row; a killed run is gone on with
    table = score(rows, said)                                           # where the rows have labels
"""
import base64
import csv
import hashlib
import io
import itertools
import json
import sys
from pathlib import Path

from model import InputError

LETTER = "\nAnswer with the option's letter from the given choices directly."  # LLaVA's suffix for multiple choice
LETTER_CN = "\n请直接回答选项字母。"  # … where the file's name has _cn


def read_questions(path, images=None, need=("image", "text", "label")):
    """Rows of a question file, `image` made a full path. InputError names the line that is wrong.

    One JSON object a line; or ScienceQA's list and MMBench's .tsv, turned into such rows as LLaVA turns them.
    """
    path = Path(path)
    folder = Path(images) if images else path.parent
    if not path.is_file():
        raise InputError(f"{path}: no such question file; check --questions")
    try:
        text = path.read_text(encoding="utf-8")
        lines = (science_qa(text) if text.startswith("[") else
                 mmbench(text, LETTER_CN if "_cn" in path.name else LETTER) if path.suffix == ".tsv" else
                 text.strip("\n").split("\n"))
    except (OSError, ValueError, LookupError, TypeError, csv.Error) as e:
        raise InputError(f"{path}: cannot be read ({e!r}); give a question file of LLaVA's, in UTF-8") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = {"category": "all", **(json.loads(line) if isinstance(line, str) else line)}
            [row[field] for field in need]  # KeyError names the one that is missing
            row["category"] = str(row["category"])
            if not isinstance(row["text"], str):
                raise TypeError("text is no string")
            row["image"] = folder / row["image"] if isinstance(row["image"], str) else row["image"]
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{path}: line {number} needs {', '.join(need)} in one JSON object ({e!r})") from None
        if isinstance(row["image"], Path) and not row["image"].is_file():
            raise InputError(f"{path}: line {number}: no image {row['image']}; give its folder with --images")
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: holds no question; give LLaVA's format, one JSON object a line")
    return rows


def science_qa(text):
    """What has a picture in llava_test_CQM-A.json. Its scorer knows such questions by the <image> in the prompt."""
    rows = []
    for row in filter(lambda row: "image" in row, json.loads(text)):
        prompt = row["conversations"][0]["value"].replace("<image>", "").strip() + LETTER
        rows.append({"question_id": row["id"], "image": row["image"], "text": prompt, "prompt": "<image>\n" + prompt})
    return rows


def mmbench(text, suffix):
    """A table of hint, question, options and a picture in base64."""
    csv.field_size_limit(2 ** 31 - 1)
    rows = []
    for row in csv.DictReader(io.StringIO(text, newline=""), delimiter="\t"):
        row = {name: value for name, value in row.items() if (value or "").lower() not in ("", "nan", "none")}
        options = itertools.takewhile(row.__contains__, "ABCD")
        parts = [row[name] for name in ("hint", "question") if name in row] + [f"{c}. {row[c]}" for c in options]
        rows.append({"question_id": int(row["index"]), "image": base64.b64decode(row["image"]),
                     "text": "\n".join(parts) + suffix, "category": row.get("category", "all"),
                     **({"label": row["answer"]} if "answer" in row else {})})
    return rows


def answer_file(path, rows, settings, answer, overwrite=False):
    """The answers to the rows, in their order, and in the file `path`; answer(rows) yields as ask() does.

    Each batch is appended as it comes, and the whole put in order at the end. An answer_id stands for settings and
    question: the file of a killed run is gone on with, and one that was made otherwise refused.
    """
    def store(answers):
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in answers), encoding="utf-8")
        temporary.replace(path)

    ids = [hashlib.sha256(json.dumps([settings, i, row["question_id"], row["text"]]).encode()).hexdigest()[:22]
           for i, row in enumerate(rows)]
    done = {}
    if path.exists() and not overwrite:
        try:
            *lines, rest = path.read_text(encoding="utf-8").split("\n")  # rest: a line that a kill cut off, or nothing
            done = {row["answer_id"]: row for row in map(json.loads, lines)}
            if not '{"question_id"'.startswith(rest[:14]):
                raise ValueError(rest)
        except (ValueError, KeyError, TypeError):
            raise InputError(f"--answers {path}: is no answer file; give another name, or --overwrite it") from None
        if not done.keys() <= set(ids):
            raise InputError(f"--answers {path}: answers other questions, or was made with other settings ({settings} "
                             f"now, {done.popitem()[1].get('metadata')} then); give another name, or --overwrite it")
        print(f"{path}: {len(done)} of {len(rows)} answers are there", file=sys.stderr)
    store(done.values())
    left = [i for i, id in enumerate(ids) if id not in done]
    with open(path, "a", encoding="utf-8") as file:
        for part in answer([rows[i] for i in left]):
            for j, text in part:
                i = left[j]
                done[ids[i]] = {"question_id": rows[i]["question_id"], "prompt": rows[i].get("prompt", rows[i]["text"]),
                                "text": text, "answer_id": ids[i], "model_id": settings["model"], "metadata": settings}
                file.write(json.dumps(done[ids[i]]) + "\n")
            file.flush()
    store(done[id] for id in ids)
    return [done[id]["text"] for id in ids]


def normal(text):
    return str(text).strip().lower().removesuffix(".")


def figures(said, labels, yes_no=False):
    """Accuracy of these answers; with yes_no POPE's five figures, counted as LLaVA's eval_pope.py counts."""
    if not yes_no:
        return {"accuracy": sum(normal(s) == normal(label) for s, label in zip(said, labels)) / len(said)}
    yes = [not {"No", "no", "not"} & set(s.split(".")[0].replace(",", "").split(" ")) for s in said]
    true = [normal(label) == "yes" for label in labels]
    TP = sum(y and t for y, t in zip(yes, true))
    precision, recall = TP / max(1, sum(yes)), TP / max(1, sum(true))
    return {"accuracy": sum(y == t for y, t in zip(yes, true)) / len(said), "precision": precision, "recall": recall,
            "f1": 2 * TP / max(1, sum(yes) + sum(true)), "yes": sum(yes) / len(said)}


def score(rows, said):
    """Print and return the figures per category and of all rows."""
    yes_no = {normal(row["label"]) for row in rows} <= {"yes", "no"}
    table = {}
    for category in [*sorted({row["category"] for row in rows} - {"all"}), "all"]:
        mine = [(text, row["label"]) for text, row in zip(said, rows) if category in (row["category"], "all")]
        table[category] = figures(*zip(*mine), yes_no)
    print(f"{'category':24}" + "".join(f"{name:>11}" for name in table["all"]))
    for category, values in table.items():
        print(f"{category:24}" + "".join(f"{100 * v:11.1f}" for v in values.values()))
    return table
