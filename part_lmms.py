"""lmms-eval with a pruned model: to be merged into test_all.py. Skipped where lmms-eval is missing."""
import json
import os
import random
import subprocess
import sys

import pytest

from data.files import ROOT, InputError, write
from data.shapes.prepare import draw_scene, questions

os.environ["HF_HUB_OFFLINE"] = "1"  # before lmms-eval is loaded
pytest.importorskip("lmms_eval")
PRUNER = str(ROOT / "data/shapes/pruner")
TASK = """task: drawn
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/test.jsonl}, cache_dir: FOLDER/cache}
test_split: test
output_type: generate_until
doc_to_text: "<image>{{text}}"
doc_to_target: label
doc_to_visual: !function pictures.of
generation_kwargs: {max_new_tokens: 128}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""


def drawn(folder, pictures="[Image.open(doc['image'])]"):
    rows = []
    for n in range(6):
        image, objects = draw_scene(f"lmms-{n}")
        write(folder / f"{n}.png", image)
        for _, text, label in questions(objects, random.Random(n)):
            rows.append(dict(question_id=len(rows), image=f"{folder}/{n}.png", text=text, label=label))
    write(folder / "test.jsonl", rows)
    (folder / "pictures.py").write_text(f"from PIL import Image\n\n\ndef of(doc):\n    return {pictures}\n")
    (folder / "drawn.yaml").write_text(TASK.replace("FOLDER", str(folder)))


def evaluated(folder, keep):
    from eval.lmms import Pruned, TaskManager, simple_evaluate
    model = Pruned.create_from_arg_string(f"pruner={PRUNER},keep={keep},device=cpu,batch_size=7")
    return simple_evaluate(model=model, tasks=["drawn"], task_manager=TaskManager(include_path=str(folder)))


@pytest.mark.parametrize("keep, kept", [("16", 16), ("all", 144)])
def test_lmms_eval_gets_the_answers_of_infer(tmp_path, keep, kept):
    drawn(tmp_path)
    samples = sorted(evaluated(tmp_path, keep)["samples"]["drawn"], key=lambda sample: sample["doc_id"])
    command = f"infer.py --questions {tmp_path}/test.jsonl --answers {tmp_path}/a.jsonl --pruner {PRUNER} --keep {keep}"
    subprocess.run([sys.executable, *command.split(), "--device", "cpu"], cwd=ROOT, check=True)
    answers = [json.loads(line)["text"] for line in open(tmp_path / "a.jsonl")]
    assert [sample["resps"][0][0] for sample in samples] == answers
    assert all(5 < sample["token_counts"][0]["input_tokens"] - kept < 60 for sample in samples)


def test_lmms_eval_names_the_document_without_its_one_picture(tmp_path):
    drawn(tmp_path, "2 * [Image.open(doc['image'])]")
    with pytest.raises(InputError, match="drawn, document [0-9]+: 2 pictures"):
        evaluated(tmp_path, "16")
