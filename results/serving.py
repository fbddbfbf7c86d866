"""
How much sooner vLLM answers with fewer tokens: 16 questions at once, each about its own picture.

    python -m results.serving results/serving.json

The model is a LLaVA whose LLM has eight layers, 1,024 wide, with random weights; a picture has 576
visual tokens, of which all stay or 64. Encoder, scorer and choice are in the time.
"""
import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig

from common.files import ROOT, cli, write
from eval.serve import load_vllm, overrides, plugin, start
from eval.tables import check, save

LLM = dict(hidden_size=1024, intermediate_size=2752, num_hidden_layers=8, head_dim=64,
           num_attention_heads=16, num_key_value_heads=16)


def larger_model(folder):
    """The embedded LLaVA's files, with a config of 24 x 24 patches and a larger LLM."""
    shutil.copytree(ROOT / "data/shapes/llava", folder, dirs_exist_ok=True)
    file = Path(folder) / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"]["image_size"] = 192
    config["text_config"] |= LLM
    write(file, config)
    file = Path(folder) / "processor_config.json"
    processor = json.loads(file.read_text())
    processor["image_processor"] |= {"size": {"shortest_edge": 192}, "crop_size": 192}
    write(file, processor)


def throughput(llm, repeats=5):
    """Seconds that 16 answers of 32 tokens take, by how many tokens stay: {K: [s, …]}."""
    from vllm import SamplingParams
    limits = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    times = {"all": [], "64": []}
    for repeat in range(1 + repeats):  # the first is the warm-up
        for keep, seconds in times.items():
            asked = []
            pictures = torch.randint(0, 256, (16, 192, 192, 3), dtype=torch.uint8)  # in no cache
            for pixels in pictures:
                picture = {"image": Image.fromarray(pixels.numpy())}
                asked.append({"prompt_token_ids": [1, 4, 13], "multi_modal_data": picture,
                              "mm_processor_kwargs": {"keep": keep}})
            begin = time.perf_counter()
            llm.generate(asked, limits, use_tqdm=False)
            if repeat:
                seconds.append(time.perf_counter() - begin)
    return times


def table(times):
    """The times as a study's table: medians, the fastest and the slowest, the medians' ratio."""
    rows, whole = {}, statistics.median(times["all"])
    for keep, seconds in times.items():
        median = statistics.median(seconds)
        rows[keep.replace("all", "576")] = {
            "16 answers, s": f"{median:.2f} [{min(seconds):.2f}–{max(seconds):.2f}]",
            "faster": f"{whole / median:.2f}×",
        }
    return {"tables": {"visual tokens of a picture": rows}}


def main():
    parser = argparse.ArgumentParser(prog="python -m results.serving", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="file to write the seconds to")
    args = parser.parse_args()
    check(args, flag="the file")
    load_vllm()
    with tempfile.TemporaryDirectory() as model, tempfile.TemporaryDirectory() as folder:
        larger_model(model)
        plugin(folder)
        choice = argparse.Namespace(model=model, pruner=ROOT / "data/shapes/pruner", keep="64",
                                    choose=None)
        settings = overrides(choice, AutoConfig.from_pretrained(model))
        llm = start(model, settings, ["--dtype", "float32", "--load-format", "dummy",
                                      "--enforce-eager"])
        save(args.json, "python -m results.serving", {"serving": table(throughput(llm))})


if __name__ == "__main__":
    cli(main)
