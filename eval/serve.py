"""
LLaVA-1.5, Qwen2.5-VL or Qwen3-VL served by vLLM (tried: 0.32.0), with their pictures pruned inside the engine.

    python -m eval.serve llava-hf/llava-1.5-7b-hf --pruner out-7b --keep 64 --port 8000
    python -m eval.serve Qwen/Qwen3-VL-8B-Instruct --choose diversity --keep 11.1%
    python -m eval.serve MODEL --pruner out-7b --keep 64 --questions FILE --answers OUT.jsonl

The first two start `vllm serve`, the third answers a question file by the same engine. All other flags are vLLM's own.
Requests are ordinary ones. This file is a plugin of vLLM, which stays as it is:

1. PrunedProcessor lays out K places for a picture where vLLM's lays out all N.
2. Pruned.embed_multimodal lets the encoder see the whole picture and hands on the K tokens that are chosen. At the right
   of each stand its row and its column, since a token that is kept must stay where it was.
3. vLLM asks a model with M-RoPE, as Qwen2.5-VL, for the positions of a prompt. LLaVA poses as one: its picture is a
   single row of N columns. Pruned.get_mrope_input_positions puts all tokens of a picture at its first position, and the
   text behind it where it is in the full sequence.
4. Pruned.embed_input_ids, called before each forward pass, cuts the rows and columns off again, and forward adds them.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoConfig

from common import criteria
from common.budget import Budget
from common.files import ROOT, InputError, cli, portable, short
from common.pruner import RANKINGS, fingerprint, load_pruner
from common.weights import PROCESSORS, find, one_line
from data.pictures import read_image
from data.questions import answer_file, read_questions, score
from infer import add_question_arguments
from throttler import select

CLASSES = {"llava": "LlavaPruned", "qwen2_5_vl": "Qwen2_5_VLPruned", "qwen3_vl": "Qwen3VLPruned"}
UNLEARNED = {
    "diversity": criteria.max_min_diversity,
    "coverage": criteria.coverage,
    "DPP": criteria.dpp,
    "uniform": criteria.uniform_grid,
    "norm": criteria.feature_norm,
    "random": criteria.random_tokens,
}
DIGITS = 4  # channels: two for the row, two for the column


# --- what needs no vLLM ---------------------------------------------------------------------------

def tokens_of(config):
    """N, the visual tokens of each picture, or None where it varies with the picture's size."""
    if config.model_type != "llava":
        return None
    vision = config.vision_config
    class_token = int(vision.model_type == "clip_vision_model")
    dropped = int(config.vision_feature_select_strategy == "default")
    return (vision.image_size // vision.patch_size) ** 2 + class_token - dropped


def width_of(config):
    """d_v, the channels of X: the encoder's for LLaVA, else the LLM's times 1 + the levels of deepstack."""
    vision = config.vision_config
    if config.model_type == "llava":
        layers = config.vision_feature_layer
        return vision.hidden_size * (1 if isinstance(layers, int) else len(layers))
    return vision.out_hidden_size * (1 + len(getattr(vision, "deepstack_visual_indexes", [])))


def grids_of(config, data):
    """(rows, columns) of the visual tokens of each picture that a processor has read; LLaVA's stand in one row."""
    if config.model_type == "llava":
        return [(1, tokens_of(config))] * len(data.get("pixel_values", []))
    merge = config.vision_config.spatial_merge_size
    grids = torch.as_tensor(data.get("image_grid_thw", [])).view(-1, 3)  # 1, rows and columns of patches
    return [(rows // merge, columns // merge) for _, rows, columns in grids.tolist()]


def parse_budget(keep, N=None):
    """The Budget of a server or of a request. ValueError for what cannot be; N: the tokens of every picture."""
    budget = Budget.parse(keep)
    if budget.average:
        raise ValueError(f"keep {keep}: places are laid out before the picture is looked at, so a budget on average "
                         "cannot be; give it without ~")
    if N and budget.count and budget.count > N:
        raise ValueError(f"keep {keep}: a picture has {N} visual tokens; give fewer, or all")
    return budget


def load_choice(pruner, choose):
    """choose(X (N, d_v), K) -> places (K,), ascending: by a pruner's scores, or without one by a criterion."""
    if pruner is None:
        criterion = UNLEARNED[choose]
        return lambda X, K: criterion(X[None], K)[0]
    scorer, settings = load_pruner(pruner)
    ranking = RANKINGS[choose or settings["choose"]]

    def choice(X, K):
        scores = scorer.to(X.device)(X[None])  # (1, N)
        return select(ranking(scores, X[None]), K)[0]
    return choice


def to_digits(places, columns):
    """Row and column of these places (K,) as two digits each, (K, 4): bfloat16 is exact up to 256."""
    at = torch.stack([places // columns, places % columns], 1)  # (K, 2)
    return torch.stack([at // 256, at % 256], 2).flatten(1)


def from_digits(digits):
    """(2, K), rows and columns of digits (K, 4) of any number type."""
    high, low = digits.long().view(-1, 2, 2).unbind(2)  # (K, 2) each
    return (256 * high + low).T


def first_positions(length, pictures):
    """(positions (3, L), ahead) of a pruned prompt of that length, as in the full one: time, row, column.

    pictures: (offset, K, rows, columns) of each, in their order. Their tokens all stand at the picture's first
    position. Text goes on behind the longer side. ahead: by how much a further token's position exceeds its number.
    """
    positions, ahead = torch.arange(length).repeat(3, 1), 0
    for offset, K, rows, columns in pictures:
        first = offset + ahead
        positions[:, offset:offset + K] = first
        ahead += max(rows, columns) - K
        positions[:, offset + K:] = torch.arange(offset + K, length) + ahead
    return positions, ahead


# --- the plugin -----------------------------------------------------------------------------------

class PrunedInfo:
    """What vLLM asks about pictures."""

    def get_supported_mm_limits(self):
        return {"image": None}  # any number; no videos

    def get_hf_processor(self, **options):
        return super().get_hf_processor(**options | {"backend": "pil"})  # as infer.py; torchvision's differs


class PrunedProcessor:
    """It lays out the places of a picture: K, by the request's "keep" or else the server's."""
    further = {}  # by a picture's name in vLLM: by how much the positions behind it exceed the places

    def _apply_hf_processor_main(self, mm_items, hf_kwargs):
        options, config = dict(hf_kwargs), self.info.get_hf_config()
        budget = parse_budget(options.pop("keep", config.keep), tokens_of(config))
        data = super()._apply_hf_processor_main(mm_items, options)
        grids = [(budget.of(rows * columns), rows, columns) for rows, columns in grids_of(config, data)]
        return data | {"grid": torch.tensor(grids)} if grids else data  # none: all pictures are in the cache

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
        from vllm.multimodal.inputs import MultiModalFieldConfig
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return {**fields, "grid": MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        from vllm.multimodal.processing import PromptReplacement
        image_id = self.info.get_hf_config().image_token_id

        def places(i):
            K, _, _ = out_mm_kwargs["image"][i]["grid"].data.tolist()
            return [image_id] * K
        return [PromptReplacement(modality="image", target=[image_id], replacement=places)]

    def apply(self, inputs, timing_ctx):
        """Refuse a prompt whose pictures would reach beyond the model's positions if they kept all tokens."""
        result = super().apply(inputs, timing_ctx)
        length = len(result["prompt_token_ids"])
        for name, item in zip(result["mm_hashes"].get("image", []), result["mm_kwargs"].get("image", [])):
            if item is not None:  # else vLLM has it in its cache, and does not show it again
                K, rows, columns = item["grid"].data.tolist()
                self.further[name] = max(rows, columns) - K
            length += self.further.get(name, 0)
        if len(self.further) > 1_000_000:  # more than vLLM's cache holds
            self.further.clear()
        context = self.info.get_hf_config().get_text_config().max_position_embeddings
        if length > context:
            raise ValueError(f"with all visual tokens the prompt has {length} positions, and the model {context}")
        return result


class Pruned:
    """A model of vLLM whose pictures are pruned; vLLM's own class is what super() means here."""

    def __init__(self, *, vllm_config, prefix=""):
        refuse(vllm_config)
        config = vllm_config.model_config.hf_config
        # the last position may lie as far beyond the context as tokens were dropped: RoPE's table needs these rows
        text, further = config.get_text_config(), vllm_config.model_config.max_model_len
        text.max_position_embeddings += further
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        text.max_position_embeddings -= further
        self.choose = load_choice(config.pruner, config.choose)
        most = vllm_config.scheduler_config.max_num_batched_tokens
        self.steps = torch.zeros(3, most, dtype=torch.long)  # of each token from the picture's first: 0, row, column
        self.places = torch.zeros(3, most, dtype=torch.long)  # (vLLM makes tensors on its device here)

    def features(self, pictures):
        """X of each picture, (N, d_v): for the Qwens behind the merger, with deepstack's levels as further channels."""
        return super().embed_multimodal(**pictures)

    def project(self, X):
        return X

    def embed_multimodal(self, grid, **pictures):
        """For each picture (K, D + 4): its kept tokens, and at the right of each the digits of its row and column."""
        from vllm.distributed.parallel_state import get_tp_group
        embeddings = []
        for X, (K, _, columns) in zip(self.features(pictures), grid.tolist()):
            places = self.choose(X, K)  # (K,)
            places = get_tp_group().broadcast(places, 0)  # the GPUs' last bits may differ, the choice must not
            Z = self.project(X[places])  # (K, D)
            embeddings.append(torch.cat([Z, to_digits(places, columns).to(Z.dtype)], 1))
        return embeddings

    def get_mrope_input_positions(self, input_tokens, mm_features):
        pictures = []
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            pictures.append((feature.mm_position.offset, *feature.data["grid"].data.tolist()))
        return first_positions(len(input_tokens), pictures)

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        """vLLM asks for the tokens of a step, which may hold a part of a picture. They bring their digits along."""
        self.steps.zero_()
        if multimodal_embeddings is not None and len(multimodal_embeddings):
            digits = torch.cat([Z[:, -DIGITS:] for Z in multimodal_embeddings])
            self.steps[1:, :len(input_ids)][:, is_multimodal] = from_digits(digits)
            multimodal_embeddings = [Z[:, :-DIGITS] for Z in multimodal_embeddings]
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def forward(self, input_ids, positions, *inputs, **options):
        n = positions.shape[-1]
        places = torch.add(positions, self.steps[:, :n], out=self.places[:, :n])  # in place: CUDA graphs know this address
        return super().forward(input_ids, self.positions_of(places), *inputs, **options)

    def positions_of(self, places):
        """What the language model is given of time, row and column, (3, n)."""
        return places

    def get_encoder_cudagraph_config(self):
        config = super().get_encoder_cudagraph_config()
        config.modalities = []  # such a graph would go past embed_multimodal
        return config


class PrunedLlava(Pruned):
    """X is taken before the projector, which only the kept tokens go through."""

    def features(self, pictures):
        return self._process_image_pixels(self._parse_and_validate_image_input(**pictures))  # (B, N, d_v)

    def project(self, X):
        return self.multi_modal_projector(X)

    def positions_of(self, places):
        return places[2]  # one row: the column is the place


def refuse(vllm_config):
    """ValueError for what would give wrong answers."""
    parallel, multimodal = vllm_config.parallel_config, vllm_config.model_config.multimodal_config
    wrong = {
        "--pipeline-parallel-size: later stages do not see where the kept tokens stand":
            parallel.pipeline_parallel_size > 1,
        "--enable-dbo: half a batch does not see where its tokens stand": parallel.enable_dbo,
        "--enable-mm-embeds: there must be a picture to choose from": multimodal.enable_mm_embeds,
        "--video-pruning-rate: it renumbers the pictures' tokens, too": multimodal.is_multimodal_pruning_enabled(),
    }
    for reason, given in wrong.items():
        if given:
            raise ValueError(reason)


def register():
    """Called by each process of vLLM, as plugin() arranges: make the pruned classes known to it."""
    from vllm import ModelRegistry
    from vllm.model_executor.models import llava, qwen2_5_vl, qwen3_vl
    from vllm.model_executor.models.interfaces import SupportsMRoPE
    from vllm.multimodal import MULTIMODAL_REGISTRY

    def add(name, bases, processor, info, dummies):
        model = type(name, bases, {})
        processor = type("Processor", (PrunedProcessor, processor), {})
        info = type("Info", (PrunedInfo, info), {})
        MULTIMODAL_REGISTRY.register_processor(processor, info=info, dummy_inputs=dummies)(model)
        ModelRegistry.register_model(name, model)

    add("LlavaPruned", (PrunedLlava, llava.LlavaForConditionalGeneration, SupportsMRoPE),
        llava.LlavaMultiModalProcessor, llava.LlavaProcessingInfo, llava.LlavaDummyInputsBuilder)
    add("Qwen2_5_VLPruned", (Pruned, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration),
        qwen2_5_vl.Qwen2_5_VLMultiModalProcessor, qwen2_5_vl.Qwen2_5_VLProcessingInfo,
        qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder)
    add("Qwen3VLPruned", (Pruned, qwen3_vl.Qwen3VLForConditionalGeneration),
        qwen3_vl.Qwen3VLMultiModalProcessor, qwen3_vl.Qwen3VLProcessingInfo, qwen3_vl.Qwen3VLDummyInputsBuilder)


# --- the command ----------------------------------------------------------------------------------

def parse_arguments():
    """(our arguments, vLLM's flags)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("model", help="folder or hub name of a LLaVA-1.5, Qwen2.5-VL or Qwen3-VL")
    parser.add_argument("--pruner", metavar="DIR", help="folder with the pruner that was trained for it")
    parser.add_argument("--choose", choices=[*RANKINGS, *UNLEARNED], help="how tokens are chosen: distinct and top by "
                        "the pruner (default: as it was trained), the others without (default: diversity)")
    parser.add_argument("--keep", metavar="K", help="visual tokens to keep of each picture: a number, a share as "
                        "11.1%%, or all (default: as the pruner was trained)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens of an answer to a "
                        "question file (default: %(default)s)")
    add_question_arguments(parser, batch=256)
    return parser.parse_known_args()


def overrides(args, config):
    """What vLLM's --hf-overrides says: the class, and its settings. InputError for arguments that are wrong."""
    name = CLASSES.get(config.model_type)
    if name is None:
        raise InputError(f"{args.model}: is of type {config.model_type}, and only {', '.join(CLASSES)} can be pruned "
                         "inside vLLM; use infer.py")
    keep, choose, N = args.keep, args.choose, tokens_of(config)
    if args.pruner:
        _, settings = load_pruner(args.pruner)
        keep, choose = keep or settings["keep"], choose or settings["choose"]
        if settings["width"] != width_of(config):
            raise InputError(f"{args.pruner}: was trained for features {settings['width']} wide, but {args.model} has "
                             f"{width_of(config)}; give the pruner of this model")
    choose = choose or "diversity"
    if (choose in RANKINGS) != bool(args.pruner):
        raise InputError(f"--choose {choose}: {'needs' if choose in RANKINGS else 'goes without'} a --pruner")
    if choose == "uniform" and N is None:
        raise InputError("--choose uniform: is for square pictures; take another for this model")
    if keep is None:
        raise InputError("--keep: say how many visual tokens to keep, as 64 or 11.1%")
    try:
        parse_budget(keep, N)
    except ValueError as e:
        raise InputError(f"--{e}") from None
    pruner = args.pruner and str(Path(args.pruner).resolve())
    return {"architectures": [name], "pruner": pruner, "choose": choose, "keep": keep,
            **({"mrope_section": [1, 1, 1]} if N else {})}  # vLLM's sign of M-RoPE


def plugin(folder):
    """Write the entry point by which each process that starts from here finds register()."""
    info = Path(folder) / "diffprune-0.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\ndiffprune = eval.serve:register\n")
    paths = [folder, str(ROOT)]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])


def engine(model, settings, flags):
    """vLLM's LLM with flags of its command line. InputError if it does not start."""
    import vllm
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    parser = vllm.EngineArgs.add_cli_args(FlexibleArgumentParser(usage="vllm serve --help=all lists vLLM's flags"))
    parser.set_defaults(model=model, hf_overrides=settings)
    try:
        return vllm.LLM.from_engine_args(vllm.EngineArgs.from_cli_args(parser.parse_args(flags)))
    except Exception as e:
        raise InputError(f"{model}: vLLM does not start ({short(e)}); vllm serve --help=all lists its flags") from None


class Asker:
    """Questions of a file, answered by vLLM as the server would."""

    def __init__(self, llm, config, processor, most):
        self.llm, self.most, self.tokens = llm, most, tokens_of(config) or 1
        self.processor, self.tokenizer, self.image_id = processor, processor.tokenizer, config.image_token_id
        self.context = config.get_text_config().max_position_embeddings

    def prompt(self, row):
        """Token ids with one place for the picture, and how many further ones there may be. InputError names the row."""
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["text"]}]}]
        template = self.processor.chat_template or self.tokenizer.chat_template
        text = self.tokenizer.apply_chat_template(chat, chat_template=template, add_generation_prompt=True, tokenize=False)
        try:
            ids = self.tokenizer(text).input_ids
        except (TypeError, UnicodeEncodeError):
            raise InputError(f"{row['where']}: has half a character in it (a lone surrogate); take it out") from None
        if ids[:2] == [self.tokenizer.bos_token_id] * 2:  # the template writes it, too
            ids = ids[1:]
        room = self.context - (len(ids) - 1 + self.tokens)
        if ids.count(self.image_id) != 1 or room < 1:
            raise InputError(f"{row['where']}: is too long for the model, or has its sign for a picture in it; mend it")
        return ids, min(room, self.most)

    def answers(self, rows, batch):
        """Yields [(row number, answer), …] batch by batch."""
        import vllm
        for start in range(0, len(rows), batch):
            part = rows[start:start + batch]
            asked, limits = [], []
            for row in part:
                ids, most = self.prompt(row)
                picture = read_image(row["image"], self.processor.image_processor)
                asked.append({"prompt_token_ids": ids, "multi_modal_data": {"image": picture}})
                limits.append(vllm.SamplingParams(temperature=0, max_tokens=most))
            try:
                outputs = self.llm.generate(asked, limits)
            except ValueError as e:
                raise InputError(f"{part[0]['where']} and the {len(part) - 1} after it: vLLM refuses one of them "
                                 f"({short(e)}); shorten it") from None
            texts = [self.tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)  # .text lacks a
                     for output in outputs]  # last character that was cut in half
            yield [(start + i, text.strip()) for i, text in enumerate(texts)]


def answer_file_by(args, llm, config, processor, rows, settings):
    import vllm
    asker = Asker(llm, config, processor, args.max_new_tokens)
    scorer = settings["pruner"] and fingerprint(load_pruner(settings["pruner"])[0])
    made = {"model": portable(args.model), "pruner": scorer, "keep": settings["keep"], "choose": settings["choose"],
            "vllm": vllm.__version__, "dtype": str(llm.model_config.dtype), "max_new_tokens": args.max_new_tokens}
    start = time.perf_counter()
    said = answer_file(args.answers, rows, made, lambda left: asker.answers(left, args.batch), args.overwrite)
    score(rows, said)
    print(f"{len(rows)} answers are in {args.answers}, after {time.perf_counter() - start:.1f} s")


def main():
    args, flags = parse_arguments()
    if any(flag.startswith(("--hf-overrides", "--hf_overrides")) for flag in flags):
        raise InputError("--hf-overrides: is what this command sets; leave it out")
    if (args.questions is None) != (args.answers is None):
        raise InputError("--questions and --answers go together")
    with one_line(args.model, "reading config.json"):
        model = str(find(args.model))
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    settings = overrides(args, config)
    with tempfile.TemporaryDirectory() as folder:
        plugin(folder)
        if args.questions is None:
            from vllm.entrypoints.cli.main import main as vllm_main
            sys.argv = ["vllm", "serve", model, "--hf-overrides", json.dumps(settings), *flags]
            return vllm_main()
        rows = read_questions(args.questions, args.images, need=("question_id", "image", "text"))
        with one_line(args.model, "reading its processor"):
            processor = PROCESSORS[config.model_type](model, trust_remote_code=False)
        llm = engine(model, settings, flags)
        answer_file_by(args, llm, config, processor, rows, settings)


if __name__ == "__main__":
    cli(main)
