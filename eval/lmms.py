"""
Public benchmarks by lmms-eval (tried: 0.7.3), answered greedily and pruned as by infer.py.

    python -m eval.lmms --tasks pope,gqa --pruner out-7b --keep 64
    python -m eval.lmms --tasks pope,gqa --model llava-hf/llava-1.5-7b-hf --choose diversity
"""
import argparse
import sys
from pathlib import Path

if not __package__:
    print("error: start it in the folder above, as python -m eval.lmms", file=sys.stderr)
    sys.exit(2)

from PIL import Image

from common.files import InputError, cli, short
from common.pruner import chooser
from data.pictures import upright
from eval.tables import budgets, check, save
from infer import add_pruner_arguments, load_pruned

missing = None
try:
    from lmms_eval import evaluator
    from lmms_eval.api.model import lmms
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import make_table
except (ImportError, RuntimeError) as e:
    lmms, missing = object, short(e)  # --help works without it, too


class Pruned(lmms):
    """A model of lmms-eval's. options: pruner, model, choose, device, dtype, as infer.py's."""

    def __init__(self, keep=None, batch_size=16, **options):
        super().__init__()
        parser = argparse.ArgumentParser(prog="diffprune")
        add_pruner_arguments(parser)
        args = parser.parse_args([f"--{name}={value}" for name, value in options.items() if value])
        self.vlm, scorer, settings = load_pruned(args)
        budget = budgets([str(keep)], self.vlm)[0] if keep else None
        self.choose, _ = chooser(self.vlm, scorer, settings, budget, choose=args.choose)
        self.batch = max(1, int(batch_size))

    def question(self, request):
        """(picture, text) of a request. InputError unless it is greedy, about one picture."""
        text, options, doc_to_visual, number, task, split = request.args
        where = f"{task}, document {number}"
        pictures = doc_to_visual(self.task_dict[task][split][number]) or []
        greedy = not options.get("temperature") and (options.get("num_beams") or 1) == 1
        if len(pictures) != 1 or not isinstance(pictures[0], Image.Image) or not greedy:
            raise InputError(f"{where}: {len(pictures)} pictures or videos, {options}; it must be "
                             "one picture, and greedy")
        for placeholder in {"<image>", *self.vlm.placeholders}:
            text = text.replace(placeholder, "")
        self.vlm.check_text(text, where)
        return upright(pictures[0]), text.strip()

    def batches(self, requests):
        """(numbers of requests, new tokens at most), alike in length, so that little is padding."""
        lengths, limits = [], []
        for request in requests:
            text, options, *_ = request.args
            lengths.append(len(text))
            limits.append(options.get("max_new_tokens") or 128)  # as infer.py's
        order = sorted(range(len(requests)), key=lambda i: (limits[i], lengths[i]))
        while order:
            limit = limits[order[0]]
            part = [i for i in order[:self.batch] if limits[i] == limit]
            order = order[len(part):]
            yield part, limit

    def generate_until(self, requests):
        """(answer, {tokens that the LLM read and wrote}) of the requests, in their order."""
        results = [None] * len(requests)
        for part, limit in self.batches(requests):
            pictures, texts = zip(*(self.question(requests[i]) for i in part))
            inputs = self.vlm.inputs(list(pictures), list(texts))
            X = self.vlm.encode(inputs)  # (B, N, d_v)
            keep = self.choose(X, inputs)  # (B, K), or None
            read = inputs["attention_mask"].sum(1)  # (B,)
            if keep is not None:
                read = read - self.vlm.visual(inputs).sum(1) + (keep >= 0).sum(1)
            answers = self.vlm.generate(inputs, X, keep, limit)
            for i, n, answer in zip(part, read.tolist(), answers):
                written = len(self.vlm.processor.tokenizer.tokenize(answer))
                results[i] = answer, {"input_tokens": n, "output_tokens": written}
        return results

    def loglikelihood(self, requests):
        raise InputError(f"{requests[0].task_name}: asks for likelihoods or several rounds; give a "
                         "task of one answer")
    generate_until_multi_round = loglikelihood


def main():
    parser = argparse.ArgumentParser(prog="python -m eval.lmms", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", required=True, help="names of lmms-eval's tasks, with commas between them")
    add("--include_path", metavar="DIR", help="folder of task files of your own")
    add("--limit", type=int, metavar="N", help="only the first N questions of each task")
    add("--json", type=Path, metavar="FILE", help="save the results, and under which conditions")
    add("--batch-size", type=int, default=16, metavar="N", help="questions at a time")
    add("--keep", metavar="K", help="visual tokens to keep, as of infer.py")
    add_pruner_arguments(parser)
    args = parser.parse_args()
    if missing:
        raise InputError(f"lmms-eval cannot be loaded ({missing}); pip install lmms-eval==0.7.3 "
                         "'filelock<4'")
    check(args, "limit", "batch_size")
    manager = TaskManager("WARNING", include_path=args.include_path)
    tasks = args.tasks.split(",")
    if not set(tasks) <= set(manager.all_tasks):
        raise InputError(f"--tasks {args.tasks}: lmms-eval does not know all of them; python -m "
                         "lmms_eval --tasks list names those there are")
    model = Pruned(args.keep, args.batch_size, pruner=args.pruner, model=args.model,
                   choose=args.choose, device=args.device, dtype=args.dtype)
    results = evaluator.simple_evaluate(model=model, tasks=tasks, task_manager=manager,
                                        limit=args.limit)
    print(make_table(results))
    if args.json:
        saved = {name: results.get(name) for name in ("results", "efficiency")}
        save(args.json, "python -m eval.lmms", saved)


if __name__ == "__main__":
    cli(main)
