"""
vLLM's LLaVA (tried: 0.32.0) for pruned pictures: each kept token stands at its original position.

By itself vLLM numbers the tokens of a prompt one by one, which closes the gaps of the dropped ones. A model with
M-RoPE, as Qwen2.5-VL, is asked for the positions. LlavaInPlace poses as one; its three rows of positions are equal. The
name that goes with a picture (multi_modal_uuids, or uuid in a request to vllm serve) tells which tokens were kept.

    python -m eval.inplace results/serving.json      # what fewer tokens save there: a larger LLM with random weights
"""
import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from common.files import ROOT, cli, short, write
from eval.tables import check, save

try:
    import vllm
    from vllm.model_executor.models.interfaces import SupportsMRoPE
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration
    from vllm.utils.argparse_utils import FlexibleArgumentParser
except (ImportError, RuntimeError) as e:
    print(f"error: vLLM cannot be loaded ({short(e)}); pip install vllm==0.32.0", file=sys.stderr)
    sys.exit(2)


class LlavaInPlace(LlavaForConditionalGeneration, SupportsMRoPE):
    def get_mrope_input_positions(self, input_tokens, mm_features):
        """Positions (3, L) of a prompt, and how many tokens were dropped from it."""
        positions, dropped = torch.arange(len(input_tokens)), 0
        for feature in mm_features:
            at, K, mask = feature.mm_position.offset, feature.mm_position.length, feature.identifier.split(":")[-1]
            if mask.count("1") == K and set(mask) <= {"0", "1"}:  # else a picture without such a name: all are kept
                positions[at:at + K] = positions[at] + torch.tensor([i for i, bit in enumerate(mask) if bit == "1"])
                positions[at + K:] += len(mask) - K
                dropped += len(mask) - K
        return positions.expand(3, -1), dropped

    def embed_multimodal(self, image_embeds=None, **pictures):  # (B, K, D), or a list where K differs
        return super().embed_multimodal(**pictures) if image_embeds is None else image_embeds

    def forward(self, input_ids, positions, *inputs, **options):
        return super().forward(input_ids, positions[0], *inputs, **options)


def register():
    """Make LlavaInPlace known to a process of vLLM: to those of eval.serve here, to vllm serve's as a plugin."""
    vllm.ModelRegistry.register_model("LlavaInPlace", LlavaInPlace)


register()


def engine(model, dtype, flags):
    """vLLM with that model, but for its encoder. flags: of vLLM's command line."""
    parser = vllm.EngineArgs.add_cli_args(FlexibleArgumentParser(usage="vllm serve --help=all lists vLLM's flags"))
    parser.set_defaults(
        model=model, dtype=dtype, enable_mm_embeds=True, limit_mm_per_prompt={"image": 0},
        hf_overrides={"architectures": ["LlavaInPlace"], "mrope_section": [1, 1, 1]},  # three rows of positions
        gpu_memory_utilization=0.8)  # the encoder needs room, too
    return vllm.LLM.from_engine_args(vllm.EngineArgs.from_cli_args(parser.parse_args(flags)))


def name_of(Z, places, N):
    """A name for the kept tokens Z (K, D) at these of N places. It stands for the picture in vLLM's caches, too."""
    mask = "".join("01"[i in places] for i in range(N))
    return f"{hashlib.sha256(Z.float().numpy().tobytes()).hexdigest()}:{mask}"


def answers(llm, prompts):
    """Greedy answers to the prompts: (token ids with one place for the picture, Z, its name, most tokens to write)."""
    asked = [{"prompt_token_ids": ids, "multi_modal_data": {"image": Z[None]}, "multi_modal_uuids": {"image": [name]}}
             for ids, Z, name, _ in prompts]
    limits = [vllm.SamplingParams(temperature=0, max_tokens=most) for *_, most in prompts]
    return [output.outputs[0].text.strip() for output in llm.generate(asked, limits, use_tqdm=False)]


def throughput(repeats=5):
    """Seconds that 16 answers of 32 tokens take, each about a picture of 576 tokens, and of 64: {K: [s, …]}."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "data/shapes/llava", folder, dirs_exist_ok=True)
        file = Path(folder) / "config.json"
        config = json.loads(file.read_text())
        config["vision_config"]["image_size"] = 192  # 24 x 24 patches
        config["text_config"] |= dict(hidden_size=1024, intermediate_size=2752, num_hidden_layers=8, head_dim=64,
                                      num_attention_heads=16, num_key_value_heads=16)
        write(file, config)
        llm = engine(folder, "float32", ["--load-format", "dummy", "--enforce-eager"])
    times = {576: [], 64: []}
    for repeat in range(1 + repeats):  # the first is the warm-up
        for K, seconds in times.items():
            prompts = [([1, 4, 13], Z, name_of(Z, range(K), 576), 32) for Z in torch.randn(16, K, 1024)]
            start = time.perf_counter()
            answers(llm, prompts)
            if repeat:
                seconds.append(time.perf_counter() - start)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="file to write the seconds to")
    args = parser.parse_args()
    check(args)
    save(args.json, "python -m eval.inplace", {"serving": throughput()})


if __name__ == "__main__":
    cli(main)
