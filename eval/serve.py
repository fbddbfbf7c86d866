"""
Question files answered by LLaVA-1.5 with its language model in vLLM (tried: 0.32.0), pruned as by infer.py.

    python -m eval.serve --questions FILE --answers OUT.jsonl --pruner out-7b --keep 64 --tensor-parallel-size 2

Encoder, scorer and projector are here and nothing else of the model; vLLM has no encoder, and is given all other flags.
The kept tokens stay at their original positions (eval/inplace.py). Labels in the file make a table by category.
"""
import argparse
import os
import time

import torch

from common.files import InputError, cli, short
from common.pruner import chooser
from data.questions import read_questions
from common.weights import Encoder, find, read_model
from infer import (add_choice_arguments, add_pruner_arguments, add_question_arguments, answer_questions, check_inference,
                   load_pruned)
from model import Llava

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
from eval.inplace import answers, engine, name_of, vllm  # noqa: E402 (vLLM reads the line above as it is loaded)


class Served(Llava):
    """LLaVA-1.5 without a language model until start() gives it vLLM's."""

    def __init__(self, name, device="cpu", dtype=torch.float32):
        super().__init__(*read_model(name, device, dtype, part=Encoder), name)

    def start(self, flags=()):
        """Start vLLM with flags of its command line, and ask it a trial question."""
        try:
            self.llm = engine(str(find(self.name)), str(self.model.dtype).removeprefix("torch."), flags)
            self.trial()
        except Exception as e:
            raise InputError(f"{self.name}: vLLM does not answer ({short(e)}); vllm serve --help=all lists its flags")

    def picture(self, X, keep=None):
        """What vLLM gets for X (N, d_v): the tokens of keep (K,), or all, projected to (K, D), and a name for them."""
        places = torch.arange(len(X)) if keep is None else keep[keep >= 0]
        Z = self.project(X[places][None].to(self.model.dtype))[0].cpu()
        return Z, name_of(Z, places.tolist(), len(X))

    def generate(self, inputs, X, keep=None, max_new_tokens=64):
        """Greedy answers, B strings, as those of the whole model."""
        keep, prompts = [None] * len(X) if keep is None else keep, []
        for row, real, X_i, keep_i in zip(inputs["input_ids"], inputs["attention_mask"].bool(), X, keep):
            ids = row[real].tolist()
            at, most = ids.index(self.image_id), min(max_new_tokens, self.context - len(ids))  # positions end there
            prompts.append((ids[:at] + ids[at + self.tokens - 1:], *self.picture(X_i, keep_i), max(1, most)))
        return answers(self.llm, prompts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_question_arguments(parser, batch=64, required=True)
    add_choice_arguments(parser)
    add_pruner_arguments(parser.add_argument_group("pruner and model"))
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of an answer (default: 128)")
    args, flags = parser.parse_known_args(None, argparse.Namespace(image=None, question=None, show=None, json=False))
    budget = check_inference(args)
    rows = read_questions(args.questions, args.images, need=("question_id", "image", "text"))
    vlm, scorer, settings = load_pruned(args, Served)
    choose, goes_by = chooser(vlm, scorer, settings, budget, args.threshold, args.choose)
    vlm.start(flags)
    start = time.perf_counter()
    answer_questions(args, vlm, rows, choose, {**goes_by, "vllm": vllm.__version__}, scorer)
    print(f"They took {time.perf_counter() - start:.1f} s, encoder and scorer included")


if __name__ == "__main__":
    cli(main)
