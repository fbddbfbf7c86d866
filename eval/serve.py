"""
LLaVA-1.5, Qwen2.5-VL and Qwen3-VL served by vLLM (tried: 0.32.0), their pictures pruned inside it.

    python -m eval.serve llava-hf/llava-1.5-7b-hf --pruner out-7b --keep 64 --port 8000
    python -m eval.serve Qwen/Qwen3-VL-8B-Instruct --choose diversity --keep 11.1%
    python -m eval.serve MODEL --pruner out-7b --questions FILE --answers OUT.jsonl

The first two start `vllm serve`, the third answers a question file by the same engine. All other
flags are vLLM's own, and requests are ordinary ones (eval/README.md).
"""
import argparse
import json
import os
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

if not __package__:
    print("error: start it in the folder above, as python -m eval.serve", file=sys.stderr)
    sys.exit(2)

import torch
from transformers import AutoConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from common.budget import Budget
from common.criteria import BY_FEATURES
from common.files import ROOT, InputError, cli, portable, short
from common.pruner import RANKINGS, fingerprint, load_pruner
from common.weights import find, one_line, read_processor
from data.pictures import read_image
from data.questions import answer_file, read_questions, score
from infer import add_question_arguments, check_questions
from model import VLM
from throttler import select

CLASSES = {
    "llava": "LlavaPruned",
    "qwen2_5_vl": "Qwen2_5_VLPruned",
    "qwen3_vl": "Qwen3VLPruned",
}
DIGITS = 4  # channels beside an embedding: two for the row, two for the column


# --- budgets, choices, positions: without vLLM ----------------------------------------------------

def tokens_of(config):
    """N, the visual tokens of every picture, or None where it varies with the picture's size."""
    if config.model_type != "llava":
        return None
    vision = config.vision_config
    class_token = int(vision.model_type == "clip_vision_model")
    left_out = int(config.vision_feature_select_strategy == "default")
    return (vision.image_size // vision.patch_size) ** 2 + class_token - left_out


def width_of(config):
    """d_v, the channels of X: LLaVA's of the encoder, the Qwens' of the LLM and deepstack."""
    vision = config.vision_config
    if config.model_type == "llava":
        return vision.hidden_size
    levels = getattr(vision, "deepstack_visual_indexes", [])
    return vision.out_hidden_size * (1 + len(levels))


def grids_of(config, data):
    """(rows, columns) of visual tokens of each picture in a processor's data; LLaVA has one row."""
    if config.model_type == "llava":
        return [(1, tokens_of(config))] * len(data.get("pixel_values", []))
    merge = config.vision_config.spatial_merge_size
    patches = torch.as_tensor(data.get("image_grid_thw", [])).view(-1, 3)  # 1, rows, columns
    return [(rows // merge, columns // merge) for _, rows, columns in patches.tolist()]


def parse_budget(keep, N=None):
    """The Budget of a server or a request. ValueError if it cannot be, with N tokens a picture."""
    budget = Budget.parse(keep)
    if budget.average:
        raise ValueError(f"keep {keep}: places are laid out before the picture is looked at, so "
                         "there is no budget on average; leave out the ~")
    if N and budget.count and budget.count > N:
        raise ValueError(f"keep {keep}: a picture has {N} visual tokens; give fewer, or all")
    return budget


def untrained(config):
    """{name: choose(X (1, N, d_v), K)} of the criteria that go by X alone."""
    if tokens_of(config):
        return BY_FEATURES
    return {name: choose for name, choose in BY_FEATURES.items() if name != "uniform"}


def load_choice(config):
    """choose(X (N, d_v), K) -> places (K,), ascending, as overrides() settled it."""
    if config.pruner is None:
        criterion = untrained(config)[config.choose]
        return lambda X, K: criterion(X[None], K)[0]
    scorer, _ = load_pruner(config.pruner)

    def by_scores(X, K):
        if X.is_cuda:
            scorer.to(X)  # in its number type, as in infer.py
        scores = scorer(X[None])  # (1, N)
        return select(RANKINGS[config.choose](scores, X[None]), K)[0]
    return by_scores


def to_digits(places, columns):
    """Rows and columns of places (K,) as two digits each, (K, 4): bfloat16 is exact to 256."""
    at = torch.stack([places // columns, places % columns], 1)  # (K, 2)
    return torch.stack([at // 256, at % 256], 2).flatten(1)


def from_digits(digits):
    """Rows and columns (2, K) of digits (K, 4), of any number type."""
    high, low = digits.long().view(-1, 2, 2).unbind(2)  # (K, 2) each
    return (256 * high + low).T


def first_positions(length, pictures):
    """(positions (3, L), ahead) of a pruned prompt, as in the full one: time, row and column.

    pictures: (offset, K, rows, columns) of each, in their order. The tokens of one all stand at
    its first position; text goes on behind its longer side. ahead: what the place of a later token
    lacks to its position.
    """
    positions = torch.arange(length).repeat(3, 1)
    ahead = 0
    for offset, K, rows, columns in pictures:
        behind = offset + K
        positions[:, offset:behind] = offset + ahead
        ahead += max(rows, columns) - K
        positions[:, behind:] = torch.arange(behind, length) + ahead
    return positions, ahead


# --- the plugin: what goes before vLLM's own classes ----------------------------------------------
#
# vLLM is not patched.
# 1. PrunedProcessor lays out K places for a picture, where vLLM's own class lays out N.
# 2. Pruned.embed_multimodal lets the encoder see the whole picture and hands on the K tokens that
#    are chosen. A kept token must stay where it was, so its row and column go along as channels.
# 3. vLLM asks models with M-RoPE, as the Qwens, for the positions of a prompt. LLaVA poses as one:
#    its picture is a single row of N columns. get_mrope_input_positions puts a picture's tokens all
#    at its first position, and the text behind it where it is in the full sequence.
# 4. embed_input_ids, called before each forward pass, takes rows and columns off the embeddings,
#    and forward adds them to the positions.

@cache
def image_processor(model, revision):
    """infer.py's. vLLM takes torchvision's where it can, which resizes a little differently."""
    return AutoImageProcessor.from_pretrained(model, revision=revision, backend="pil")


class PrunedInfo:
    """What vLLM asks about pictures."""

    def get_supported_mm_limits(self):
        kinds = super().get_supported_mm_limits()
        return {kind: 0 for kind in kinds} | {"image": None}  # any number of pictures, no videos

    def get_hf_processor(self, **options):
        processor = super().get_hf_processor(**options)
        config = self.ctx.model_config
        processor.image_processor = image_processor(config.model, config.revision)
        return processor


class PrunedProcessor:
    """Lays out K places for a picture: K by the request's own "keep", or else by the server's."""
    further = {}  # of pictures by vLLM's name for them: max(rows, columns) - K

    def _apply_hf_processor_main(self, mm_items, hf_kwargs):
        config, options = self.info.get_hf_config(), dict(hf_kwargs)
        budget = parse_budget(options.pop("keep", config.keep), tokens_of(config))
        data = super()._apply_hf_processor_main(mm_items, options)
        grids = []
        for rows, columns in grids_of(config, data):
            grids.append((budget.of(rows * columns), rows, columns))
        if grids:  # else vLLM has all of them in its cache
            data["grid"] = torch.tensor(grids)
        return data

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
        """Refuse a prompt that with all visual tokens would have more positions than the model."""
        result = super().apply(inputs, timing_ctx)
        names, items = (result[key].get("image", []) for key in ("mm_hashes", "mm_kwargs"))
        length = len(result["prompt_token_ids"])
        for name, item in zip(names, items):
            if item is not None:  # vLLM does not show again what it has in its cache
                K, rows, columns = item["grid"].data.tolist()
                self.further[name] = max(rows, columns) - K
            length += self.further.get(name, 0)
        if len(self.further) > 1_000_000:  # more than vLLM's cache holds
            self.further.clear()
        context = self.info.get_hf_config().get_text_config().max_position_embeddings
        if length > context:
            raise ValueError(f"with all visual tokens the prompt has {length} positions, and the "
                             f"model {context}; ask with fewer pictures")
        return result


class Pruned:
    """A model of vLLM whose pictures are pruned. super() is vLLM's own class."""

    def __init__(self, *, vllm_config, prefix=""):
        refuse(vllm_config)
        config = vllm_config.model_config.hf_config
        # an answer may end as far beyond the context as tokens were dropped: RoPE needs the rows
        text, further = config.get_text_config(), vllm_config.model_config.max_model_len
        text.max_position_embeddings += further
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        text.max_position_embeddings -= further
        self.choose = load_choice(config)
        most = vllm_config.scheduler_config.max_num_batched_tokens
        self.steps = torch.zeros(3, most, dtype=torch.long)  # from the picture's first position
        self.places = torch.zeros(3, most, dtype=torch.long)

    def features(self, pictures):
        """X of each picture, (N, d_v): here behind the merger, deepstack's levels beside it."""
        return super().embed_multimodal(**pictures)

    def project(self, X):
        return X

    def embed_multimodal(self, grid, **pictures):
        """For each picture (K, D + 4): its kept tokens, and at their right rows and columns."""
        from vllm.distributed.parallel_state import get_tp_group
        embeddings = []
        for X, (K, _, columns) in zip(self.features(pictures), grid.tolist()):
            places = self.choose(X, K)  # (K,)
            places = get_tp_group().broadcast(places, 0)  # GPUs differ in last bits, never in this
            Z = self.project(X[places])  # (K, D)
            digits = to_digits(places, columns).to(Z.dtype)
            embeddings.append(torch.cat([Z, digits], 1))
        return embeddings

    def get_mrope_input_positions(self, input_tokens, mm_features):
        pictures = []
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            pictures.append((feature.mm_position.offset, *feature.data["grid"].data.tolist()))
        return first_positions(len(input_tokens), pictures)

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        """The tokens of a step. It may hold a part of a picture: each token has its own digits."""
        self.steps.zero_()
        Z = multimodal_embeddings
        if Z is not None and len(Z):
            digits = torch.cat([part[:, -DIGITS:] for part in Z])
            self.steps[1:, :len(input_ids)][:, is_multimodal] = from_digits(digits)
            Z = [part[:, :-DIGITS] for part in Z]
        return super().embed_input_ids(input_ids, Z, is_multimodal=is_multimodal)

    def forward(self, input_ids, positions, *inputs, **options):
        n = positions.shape[-1]
        places = self.places[:, :n]  # CUDA graphs know this address
        torch.add(positions, self.steps[:, :n], out=places)
        return super().forward(input_ids, self.seen(places), *inputs, **options)

    def seen(self, places):
        """What the language model reads of time, row and column, (3, n)."""
        return places

    def get_encoder_cudagraph_config(self):
        config = super().get_encoder_cudagraph_config()
        config.modalities = []  # such a graph would go past embed_multimodal
        return config


class PrunedLlava(Pruned):
    """X is before the projector, which only the kept tokens go through."""

    def features(self, pictures):
        return self._process_image_pixels(self._parse_and_validate_image_input(**pictures))

    def project(self, X):
        return self.multi_modal_projector(X)

    def seen(self, places):
        return places[2]  # all tokens are in one row: the column is the position


def refuse(vllm_config):
    """ValueError for what would give wrong answers."""
    parallel, pictures = vllm_config.parallel_config, vllm_config.model_config.multimodal_config
    wrong = {
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--enable-dbo": parallel.enable_dbo,
        "--enable-mm-embeds": pictures.enable_mm_embeds,
        "--video-pruning-rate": pictures.is_multimodal_pruning_enabled(),
    }
    for flag, given in wrong.items():
        if given:
            raise ValueError(f"{flag}: with it the model would not learn where its tokens stand")


def register():
    """Make the pruned classes known to a process of vLLM, which calls this as it starts."""
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
        qwen3_vl.Qwen3VLMultiModalProcessor, qwen3_vl.Qwen3VLProcessingInfo,
        qwen3_vl.Qwen3VLDummyInputsBuilder)


# --- the command ----------------------------------------------------------------------------------

def parse_arguments():
    """(arguments, the flags that are left for vLLM)."""
    parser = argparse.ArgumentParser(prog="python -m eval.serve", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("model", help="folder or hub name of a LLaVA-1.5, Qwen2.5-VL or Qwen3-VL")
    add("--pruner", metavar="DIR", help="folder with the pruner that was trained for it")
    add("--choose", choices=[*RANKINGS, *BY_FEATURES], help="distinct and top go by the pruner "
        "(default: as it was trained), the others without one (default: diversity)")
    add("--keep", metavar="K", help="visual tokens to keep of each picture: a number, a share as "
        "11.1%%, or all (default: as the pruner was trained; without one 11.1%%)")
    add("--max-new-tokens", type=int, default=128, metavar="N",
        help="tokens of an answer to a question of a file (default: %(default)s)")
    add_question_arguments(parser, batch=256)
    return parser.parse_known_args()


def overrides(args, config):
    """What --hf-overrides tells vLLM: the class and its settings. InputError if they do not fit."""
    name, N = CLASSES.get(config.model_type), tokens_of(config)
    if name is None:
        raise InputError(f"{args.model}: is of type {config.model_type}; inside vLLM only "
                         f"{', '.join(CLASSES)} can be pruned, others by infer.py")
    if args.pruner:
        _, trained = load_pruner(args.pruner)
        pruner, fitting = str(Path(args.pruner).resolve()), RANKINGS
        if trained["width"] != width_of(config):
            raise InputError(f"{args.pruner}: was trained for features {trained['width']} wide, "
                             f"and {args.model} has {width_of(config)}; give this model's pruner")
    else:
        trained = {"keep": "11.1%", "choose": "diversity"}
        pruner, fitting = None, untrained(config)
    keep, choose = args.keep or trained["keep"], args.choose or trained["choose"]
    if choose not in fitting:
        raise InputError(f"--choose {choose}: for this model, {'with' if pruner else 'without'} a "
                         f"pruner, it must be one of {', '.join(fitting)}")
    try:
        parse_budget(keep, N)
    except ValueError as e:
        raise InputError(f"--keep {str(e).removeprefix('keep ')}") from None
    settings = {"architectures": [name], "pruner": pruner, "choose": choose, "keep": keep}
    if N:
        settings["mrope_section"] = [1, 1, 1]  # by this vLLM knows a model with M-RoPE
    return settings


def plugin(folder):
    """Let each process that starts from here find register(): an entry point on its path."""
    info = Path(folder) / "diffprune-0.dist-info"
    info.mkdir()
    entry = "[vllm.general_plugins]\ndiffprune = eval.serve:register\n"
    (info / "entry_points.txt").write_text(entry)
    paths = [folder, str(ROOT)]
    sys.path[:0] = paths
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, before])


def start(model, settings, flags):
    """vLLM's LLM with flags of its command line. InputError if it does not start."""
    import vllm
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    parser = FlexibleArgumentParser(usage="vllm serve --help=all lists vLLM's flags")
    vllm.EngineArgs.add_cli_args(parser)
    parser.set_defaults(model=model, hf_overrides=settings)
    try:
        return vllm.LLM.from_engine_args(vllm.EngineArgs.from_cli_args(parser.parse_args(flags)))
    except Exception as e:
        raise InputError(f"{model}: vLLM does not start ({short(e)}); "
                         "vllm serve --help=all lists its flags") from None


def prompt_of(row, processor, config, most):
    """(token ids with one place for the picture, how long the answer may be) of a question."""
    where = row["where"]
    with one_line(where, "reading the question", cure="; fix it"):
        prompts = VLM.prompts(SimpleNamespace(processor=processor), [row["text"]])
        ids = processor.tokenizer(prompts[0]).input_ids
    N = tokens_of(config) or 1
    room = config.get_text_config().max_position_embeddings - (len(ids) - 1 + N)
    if room < 1 or ids.count(config.image_token_id) != 1:
        raise InputError(f"{where}: is too long for the model, or has {processor.image_token} in "
                         "it, which stands for the picture; change it")
    return ids, min(most, room)


def answers(llm, rows, processor, config, batch, most):
    """Answer the rows as the server would; yields [(row number, answer), …] batch by batch."""
    import vllm
    for first in range(0, len(rows), batch):
        prompts, limits = [], []
        for row in rows[first:first + batch]:
            ids, length = prompt_of(row, processor, config, most)
            picture = read_image(row["image"], processor.image_processor)
            prompts.append({"prompt_token_ids": ids, "multi_modal_data": {"image": picture}})
            limits.append(vllm.SamplingParams(temperature=0, max_tokens=length))
        try:
            outputs = llm.generate(prompts, limits, use_tqdm=False)
        except ValueError as e:
            raise InputError(f"{rows[first]['where']} or one of the {len(prompts) - 1} after it: "
                             f"vLLM refuses it ({short(e)}); shorten it") from None
        part = []
        for i, output in enumerate(outputs, first):
            ids = output.outputs[0].token_ids  # its text lacks a last character that is cut in half
            part.append((i, processor.tokenizer.decode(ids, skip_special_tokens=True).strip()))
        yield part


def answer_questions(args, model, config, settings, flags):
    import vllm
    rows = read_questions(args.questions, args.images, need=("question_id", "image", "text"))
    with one_line(args.model, "reading its processor"):
        processor = read_processor(model, config.model_type)
        tokenizer = processor.tokenizer
        tokenizer.chat_template = processor.chat_template or tokenizer.chat_template
    for row in rows:
        prompt_of(row, processor, config, args.max_new_tokens)  # a fault is found before the start
    llm = start(model, settings, flags)
    pruner = settings["pruner"] and fingerprint(load_pruner(settings["pruner"])[0])
    conditions = {"model": portable(args.model), "pruner": pruner, "choose": settings["choose"],
            "keep": settings["keep"], "dtype": str(llm.model_config.dtype),
            "max_new_tokens": args.max_new_tokens, "vllm": vllm.__version__}

    def answer(left):
        return answers(llm, left, processor, config, args.batch, args.max_new_tokens)
    texts = answer_file(args.answers, rows, conditions, answer, args.overwrite)
    score(rows, texts)
    print(f"{len(rows)} answers are in {args.answers}")


def load_vllm():
    """vLLM's own command. InputError without vLLM."""
    try:
        from vllm.entrypoints.cli import main as command
    except (ImportError, RuntimeError) as e:
        raise InputError(f"vLLM cannot be loaded ({short(e)}); pip install vllm==0.32.0") from None
    return command


def main():
    args, flags = parse_arguments()
    if any(flag.startswith(("--hf-overrides", "--hf_overrides")) for flag in flags):
        raise InputError("--hf-overrides: this command says them to vLLM; leave them out")
    if (args.questions is None) != (args.answers is None):
        raise InputError("--questions and --answers go together")
    check_questions(args)
    with one_line(args.model, "reading config.json"):
        model = str(find(args.model))
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    settings = overrides(args, config)
    print(f"{args.model}: keeps {settings['keep']} by {settings['choose']}", file=sys.stderr)
    vllm_command = load_vllm()
    with tempfile.TemporaryDirectory() as folder:
        plugin(folder)
        if args.questions:
            return answer_questions(args, model, config, settings, flags)
        sys.argv = ["vllm", "serve", model, "--hf-overrides", json.dumps(settings), *flags]
        vllm_command.main()


if __name__ == "__main__":
    cli(main)
