"""
Model folders: read one in transformers' format, from disk or the hub.

    model, processor = read_model("llava-hf/llava-1.5-7b-hf", "cuda", torch.bfloat16)

A folder can be wrong in many ways, and transformers answers with any type of error, or with a model
that is partly random. All of it ends here in one line that names the folder and the cure. Nothing
in a folder is executed, but for its chat template, in transformers' sandbox.
"""
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import (AutoFeatureExtractor, AutoModelForImageTextToText, AutoTokenizer,
                          GenerationConfig, PreTrainedConfig)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import logging

from common.architectures import random_model
from common.files import ROOT, InputError, out_of_memory, short

# in some weight files; no model needs them
UNUSED = ("inv_freq", "position_ids", "vision_model.head.")
CURE = ("; give a folder with all files of one model in transformers' format, or a hub name with "
        "the network at hand")
# PaliGemma's own form of a prompt, for which it publishes no chat template
PALIGEMMA = ("{% for message in messages %}{% for part in message['content'] %}"
             "{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}{% endfor %}")


@contextmanager
def one_line(name, step, cure=CURE):
    """Whatever goes wrong inside is an InputError of one line that begins with the model's name."""
    name = name or "model ''"
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except InputError as e:
        raise InputError(f"{name}: {e}") from None
    except ImportError as e:  # it says which package to install
        raise InputError(f"{name}: {step} fails ({short(e)})") from None
    except BaseException as e:  # of any type; a panic in tokenizers is not even an Exception
        if out_of_memory(e):
            cure = "; it does not fit into the device's memory: try --dtype bfloat16"
        raise InputError(f"{name}: {step} fails ({short(e)}){cure}") from None


@contextmanager
def hushed():
    """Nothing written inside reaches standard error: a panic in tokenizers fills pages there."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


def supported(kind):
    """The model_type of a config.json, if transformers has a vision-language model of that name."""
    if not (kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and kind in PROCESSOR_MAPPING_NAMES):
        raise InputError(f"model_type {kind!r} in config.json is no model for pictures and text in "
                         f"transformers {transformers.__version__}, as llava or qwen3_vl are")
    return kind


def read_model(name, device="cpu", dtype=torch.float32):
    """(model, processor) from a folder or the hub; (model, None) for 'random:' and its names."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        device = torch.empty(0, device=device).device
    except Exception:
        raise InputError(f"--device {device}: torch cannot use it on this machine; try --device "
                         "cpu") from None
    if name.startswith("random:"):
        return random_model(name, device, dtype), None
    if device.type == "meta":
        raise InputError("--device meta: is for counting with a random: model, and computes "
                         "nothing; try --device cpu")
    with one_line(name, "reading config.json"):
        source = find(name)
        kind = supported(PreTrainedConfig.get_config_dict(source)[0].get("model_type"))
    with one_line(name, "reading the weights"):
        model = read_weights(source, dtype).to(device)
    with one_line(name, "reading tokenizer.json and the processor's files"), hushed():
        return model, read_processor(source, kind)


def find(name):
    """The folder of that name, or the hub name as it is. InputError if neither, or not whole."""
    folder = next((path for path in (Path(name), ROOT / name) if name and path.is_dir()), None)
    if folder is None and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise InputError("no such model folder; give one in transformers' format or a hub name "
                         "(owner/model)")
    for file in folder.iterdir() if folder else []:
        if file.name == "adapter_config.json":
            raise InputError("is a LoRA adapter (adapter_config.json); merge it into its model and "
                             "save that")
        if file.is_file():
            with open(file, "rb") as f:
                if f.read(23) == b"version https://git-lfs":
                    raise InputError(f"{file.name} is a Git LFS pointer, not the file; run git lfs "
                                     "pull in that folder")
    return folder or name


def read_weights(source, dtype):
    """The model, if its safetensors are what config.json describes.

    Where a weight is missing, transformers would make it random.
    """
    model, report = AutoModelForImageTextToText.from_pretrained(
        source, dtype=dtype, attn_implementation="sdpa", use_safetensors=True,
        trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True)
    wrong = [f"{key} is missing" for key in sorted(report["missing_keys"])]
    for key, stored, described in sorted(report["mismatched_keys"]):
        wrong.append(f"{key} is {tuple(stored)} in the weights, {tuple(described)} in config.json")
    for key in sorted(report["unexpected_keys"]):
        if not any(part in key for part in UNUSED):
            wrong.append(f"{key} is not in the model that config.json describes")
    if wrong:
        raise InputError(f"the weights do not fit config.json: {wrong[0]} ({len(wrong)} such "
                         "tensors in all); get weights and config.json of one model")
    return model


def read_processor(source, kind):
    """The stock processor for a model_type, whatever class its files name, but for its video part.

    That needs torchvision, and few pictures do.
    """
    readers = {"tokenizer": AutoTokenizer, "image_processor": AutoImageProcessor,
               "feature_extractor": AutoFeatureExtractor}

    class Processor(getattr(transformers, PROCESSOR_MAPPING_NAMES[kind])):
        @classmethod
        def _get_arguments_from_pretrained(cls, source, *_, **options):
            parts = dict.fromkeys(cls.get_attributes())
            for part in parts.keys() & readers:
                parts[part] = readers[part].from_pretrained(source, **options)
            return list(parts.values())

        def check_argument_for_proper_class(self, name, part):
            if part is not None:
                super().check_argument_for_proper_class(name, part)

    return Processor.from_pretrained(source, trust_remote_code=False)


def image_token(config):
    """The id that stands for the picture in a prompt, or None."""
    for key in ("image_token_id", "image_token_index", "image_patch_id"):
        if getattr(config, key, None) is not None:
            return getattr(config, key)


def complete(model, processor=None):
    """Give the model greedy decoding, and its tokenizer the template and special tokens it lacks.

    An answer ends at each end of text that the model or the tokenizer names.
    InputError where config.json and the processor's files are not of one model.
    """
    old, tokenizer = model.generation_config, getattr(processor, "tokenizer", None)
    ends = []
    for end in (old.eos_token_id, getattr(tokenizer, "eos_token_id", None)):
        ends += end if isinstance(end, list) else [end]
    ends = [end for end in dict.fromkeys(ends) if end is not None]
    if processor:
        template = getattr(processor, "chat_template", None) or tokenizer.chat_template
        if model.config.model_type == "paligemma":
            template = template or PALIGEMMA
        if not template:
            raise InputError("has no chat template (chat_template.jinja); get it from where the "
                             "model was published")
        tokenizer.chat_template = template
        if not ends:
            raise InputError("has no token for the end of a text; name eos_token in "
                             "tokenizer_config.json")
        if tokenizer.eos_token is None:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
        if tokenizer.pad_token is None:  # any will do, since padding is masked
            tokenizer.pad_token = tokenizer.eos_token
        check_processor(model.config, processor)
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=old.bos_token_id, eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id if processor else 0)


def check_processor(config, processor):
    """InputError unless the processor's files and config.json mean the same token and tiles."""
    tokenizer, token, known = processor.tokenizer, image_token(config), processor.image_token_ids
    name = tokenizer.convert_ids_to_tokens(token)
    written = name in tokenizer.get_added_vocab() and name in tokenizer.chat_template
    if token not in known and written:
        processor.image_token, processor.image_token_id = name, token  # the tokenizer names another
    elif token not in known:
        other = tokenizer.convert_ids_to_tokens(known[0])
        raise InputError(f"the tokenizer's {other} is {known[0]}, config.json's image token "
                         f"{token}; correct image_token_id (or image_token_index) there")
    pinpoints = getattr(config, "image_grid_pinpoints", None)
    theirs = getattr(processor.image_processor, "image_grid_pinpoints", pinpoints)
    if theirs != pinpoints:
        raise InputError("image_grid_pinpoints differ in config.json and in the processor's files, "
                         "so pictures would get wrong tiles; get both of one model")
