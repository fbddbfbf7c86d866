"""
Public benchmarks by lmms-eval (tried: 0.7.3), answered greedily and pruned as by infer.py.

    python -m eval.lmms --tasks pope,gqa --pruner out-7b --keep 64      # --include_path DIR for tasks of your own

lmms-eval's own command finds the model by an entry point. In this folder, with a new folder diffprune-0.dist-info:
    printf '[lmms_eval.models]\ndiffprune = eval.lmms:MANIFEST\n' > diffprune-0.dist-info/entry_points.txt
    PYTHONPATH=. python -m lmms_eval --model diffprune --model_args pruner=out-7b,keep=64 --batch_size 16 --tasks pope
"""
import argparse
import sys
from pathlib import Path

from PIL import Image

from common.files import InputError, cli, short
from data.pictures import upright
from common.pruner import chooser
from eval.tables import budgets, check, save
from infer import add_pruner_arguments, load_pruned

try:
    from lmms_eval import evaluator  # the whole module: by the entry point, it is itself just being imported
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import make_table
except (ImportError, RuntimeError) as e:
    print(f"error: lmms-eval cannot be loaded ({short(e)}); pip install lmms-eval==0.7.3", file=sys.stderr)
    sys.exit(2)

MANIFEST = ModelManifest("diffprune", simple_class_path="eval.lmms.Pruned")


class Pruned(lmms):
    def __init__(self, keep=None, batch_size=16, **options):  # pruner, model, device, dtype: as infer.py's
        super().__init__()
        add_pruner_arguments(parser := argparse.ArgumentParser(prog="diffprune"))
        args = parser.parse_args([f"--{name}={value}" for name, value in options.items() if value])
        self.vlm, scorer, settings = load_pruned(args)
        budget = budgets([str(keep)], self.vlm)[0] if keep else None
        self.choose, self.batch = chooser(self.vlm, scorer, settings, budget)[0], max(1, int(batch_size))

    def question(self, request):
        """(picture, text) of a request. InputError if it asks for more than a greedy answer about one picture."""
        text, options, doc_to_visual, number, task, split = request.args
        where, found = f"{task}, document {number}", doc_to_visual(self.task_dict[task][split][number]) or []
        greedy = not options.get("temperature") and (options.get("num_beams") or 1) == 1
        if len(found) != 1 or not isinstance(found[0], Image.Image) or not greedy:
            raise InputError(f"{where}: {len(found)} pictures or videos, {options}; it must be one picture and greedy")
        text = text.replace("<image>", "").replace(self.vlm.processor.image_token, "").strip()
        self.vlm.check_text(text, where)
        return upright(found[0]), text

    def generate_until(self, requests):
        """(answer, {tokens that the LLM read and wrote}) of the requests, in their order."""
        results, tokenizer = {}, self.vlm.processor.tokenizer
        words = [request.args[1].get("max_new_tokens") or 128 for request in requests]  # 128: as infer.py
        order = sorted(range(len(requests)), key=lambda i: (words[i], len(requests[i].args[0])))
        while order:
            part = [i for i in order[:self.batch] if words[i] == words[order[0]]]
            order = order[len(part):]
            pictures, texts = map(list, zip(*(self.question(requests[i]) for i in part)))
            inputs = self.vlm.inputs(pictures, texts)
            X = self.vlm.encode(inputs)  # (B, N, d_v)
            keep, read = self.choose(X, inputs), inputs["attention_mask"].sum(1)  # (B, K) or None, (B,)
            if keep is not None:
                read = read - self.vlm.visual(inputs).sum(1) + (keep >= 0).sum(1)
            for i, n, answer in zip(part, read.tolist(), self.vlm.generate(inputs, X, keep, words[part[0]])):
                results[i] = answer, {"input_tokens": n, "output_tokens": len(tokenizer.tokenize(answer))}
        return [results[i] for i in range(len(requests))]

    def loglikelihood(self, requests):
        raise InputError(f"{requests[0].task_name}: asks for likelihoods or several rounds; give a task of one answer")
    generate_until_multi_round = loglikelihood


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", required=True, help="names of lmms-eval's tasks, with commas between them")
    parser.add_argument("--include_path", metavar="DIR", help="folder of task files of your own")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results, and under which conditions")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="questions at a time")
    parser.add_argument("--keep", metavar="K", help="visual tokens to keep, as of infer.py")
    add_pruner_arguments(parser)
    args = parser.parse_args()
    check(args, "limit", "batch_size")
    manager, tasks = TaskManager("WARNING", include_path=args.include_path), args.tasks.split(",")
    if not set(tasks) <= set(manager.all_tasks):
        raise InputError(f"--tasks {args.tasks}: lmms-eval knows not all; python -m lmms_eval --tasks list names them")
    lm = Pruned(args.keep, args.batch_size, pruner=args.pruner, model=args.model, device=args.device, dtype=args.dtype)
    results = evaluator.simple_evaluate(model=lm, tasks=tasks, task_manager=manager, limit=args.limit)
    print(make_table(results))
    if args.json:
        save(args.json, "python -m eval.lmms", {name: results.get(name) for name in ("results", "efficiency")})


if __name__ == "__main__":
    cli(main)
