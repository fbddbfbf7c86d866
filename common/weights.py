"""
Model folders: read one in transformers' format, from disk or the hub, or make one up with random weights.

    model, processor = read_model("llava-hf/llava-1.5-7b-hf", "cuda", torch.bfloat16)
    model, _ = read_model("random:llava-1.5-7b", "meta", torch.bfloat16)            # takes no memory: for counting

A folder can be wrong in many ways, and transformers answers with any type of error, or with a model that is partly
random. All of it ends here in one line that names the folder and the cure. Nothing in a folder is executed.
"""
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (AutoConfig, AutoModelForImageTextToText, AutoTokenizer, BatchFeature, GenerationConfig,
                          LlavaForConditionalGeneration, LlavaNextProcessor, LlavaProcessor, PreTrainedConfig,
                          ProcessorMixin, Qwen2VLImageProcessorPil)
from transformers.initialization import no_init_weights
from transformers.utils import logging

from common.files import ROOT, InputError, short

UNUSED = ("inv_freq", "position_ids", "vision_model.head.")  # names in some weight files that no model has a need of
VICUNA = dict(model_type="llama", vocab_size=32064, rms_norm_eps=1e-5, max_position_embeddings=4096)
QWEN = dict(rms_norm_eps=1e-6, max_position_embeddings=128000, rope_theta=1e6,
            rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]))
RANDOM = {  # the published configurations, where they differ from the stock one of their class
    "llava-1.5-7b": dict(model_type="llava", text_config=VICUNA),
    "llava-next-7b": dict(model_type="llava_next", text_config=VICUNA),
    "qwen2.5-vl-3b": dict(
        model_type="qwen2_5_vl", vision_config=dict(hidden_size=1280, out_hidden_size=2048, tokens_per_second=2),
        text_config=dict(QWEN, hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
                         intermediate_size=11008, vocab_size=151936), tie_word_embeddings=True),
    "qwen2.5-vl-7b": dict(
        model_type="qwen2_5_vl", vision_config=dict(hidden_size=1280, out_hidden_size=3584, tokens_per_second=2),
        text_config=dict(QWEN, hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
                         intermediate_size=18944, vocab_size=152064)),
}


@contextmanager
def one_line(name, step):
    """Whatever goes wrong inside is an InputError of one line that begins with the model's name."""
    try:
        yield
    except InputError as e:
        raise InputError(f"{name}: {e}") from None
    except torch.OutOfMemoryError:
        raise InputError(f"{name}: does not fit into the device's memory; try --dtype bfloat16") from None
    except Exception as e:  # transformers and tokenizers raise errors of every type
        raise InputError(f"{name}: {step} fails ({short(e)}); give a folder with all files of one model in "
                         "transformers' format, or a hub name with the network at hand") from None


def supported(kind):
    if kind not in PROCESSORS:
        raise InputError(f"model_type {kind!r} in config.json is not supported; it must be one of "
                         f"{', '.join(PROCESSORS)}")
    return kind


def read_model(name, device="cpu", dtype=torch.float32, attention="sdpa", device_map=None, part=None):
    """(model, processor) from a folder or the hub; (model, None) for 'random:' and a name in RANDOM.

    part: a class to read in place of the model's own, as Encoder."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        device = torch.empty(0, device=device).device
    except Exception:
        raise InputError(f"--device {device}: torch cannot use it on this machine; try --device cpu") from None
    if name.startswith("random:"):
        return random_model(name, device, dtype, attention), None
    if device.type == "meta":
        raise InputError("--device meta: is for counting with a random: model, and computes nothing; try --device cpu")
    with one_line(name, "reading config.json"):
        source = find(name)
        kind = supported(PreTrainedConfig.get_config_dict(source)[0].get("model_type"))
        if part and kind != part.config_class.model_type:
            raise InputError(f"is of type {kind}, and only {part.config_class.model_type} (LLaVA-1.5) can be read in "
                             "part; use infer.py")
    with one_line(name, "reading the weights"):
        model = read_weights(source, dtype, attention, device_map, part or AutoModelForImageTextToText)
        if device_map is None:
            model.to(device)
    with one_line(name, "reading tokenizer.json and the processor's files"):
        return model, PROCESSORS[kind](source, trust_remote_code=False)


class Encoder(LlavaForConditionalGeneration):
    """LLaVA-1.5 without its language model, of which no weight is read."""
    _keys_to_ignore_on_load_unexpected, _tied_weights_keys = ["language_model", "lm_head"], {}

    def __init__(self, config):
        super().__init__(config)  # in no memory: from_pretrained() fills a model that is on the meta device
        self.lm_head = self.model.language_model = torch.nn.Identity()

    def get_input_embeddings(self):  # how many there are is all that is asked of it
        return torch.nn.Embedding(self.config.text_config.vocab_size, 1, device="meta")


def find(name):
    """The folder of that name, or the hub name as it is. InputError if it is neither, or if the folder is not whole."""
    folder = next((path for path in (Path(name), ROOT / name) if path.is_dir()), None)
    if folder is None and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise InputError("no such model folder; give one in transformers' format or a hub name (owner/model)")
    for file in folder.iterdir() if folder else []:
        if file.name == "adapter_config.json":
            raise InputError("is a LoRA adapter (adapter_config.json); merge it into its model and save that")
        if file.is_file():
            with open(file, "rb") as f:
                if f.read(23) == b"version https://git-lfs":
                    raise InputError(f"{file.name} is a Git LFS pointer, not the file; run git lfs pull in that folder")
    return folder or name


def read_weights(source, dtype, attention, device_map, model):
    """The model, if its safetensors are what config.json describes: what is missing would be drawn at random."""
    model, report = model.from_pretrained(
        source, dtype=dtype, attn_implementation=attention, device_map=device_map, use_safetensors=True,
        trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True)
    wrong = [f"{key} is missing" for key in sorted(report["missing_keys"])]
    for key, stored, described in sorted(report["mismatched_keys"]):
        wrong.append(f"{key} is {tuple(stored)} in the weights, {tuple(described)} in config.json")
    for key in sorted(report["unexpected_keys"]):
        if not any(part in key for part in UNUSED):
            wrong.append(f"{key} is not in the model that config.json describes")
    if wrong:
        raise InputError(f"the weights do not fit config.json: {wrong[0]} ({len(wrong)} such tensors in all); "
                         "get weights and config.json of one model")
    return model


def random_model(name, device, dtype, attention):
    """The architecture `name`, made where and in the type that it is to have: a 7B in bfloat16 takes 14 GB."""
    if name[7:] not in RANDOM:
        raise InputError(f"{name}: no such architecture; there are {', '.join('random:' + known for known in RANDOM)}")
    config = AutoConfig.for_model(**RANDOM[name[7:]])
    with torch.device(device), no_init_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()
    for key, p in model.named_parameters():  # matrices small and random, norms one, biases zero
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.02)
        else:
            torch.nn.init.constant_(p, not key.endswith("bias"))
    return model


def complete(model, processor=None):
    """Give the model greedy decoding, and its tokenizer the chat template and the special tokens that it lacks."""
    old, image, pad = model.generation_config, model.config.image_token_id, 0
    eos = old.eos_token_id
    if processor:
        tokenizer, placeholder = processor.tokenizer, processor.image_token
        known = tokenizer.convert_tokens_to_ids(placeholder)
        if known != image:
            raise InputError(f"the tokenizer's {placeholder} is {known}, config.json's image token {image}; correct "
                             "image_token_id (or image_token_index) there")
        eos = tokenizer.eos_token_id if eos is None else eos
        if eos is None:
            raise InputError("has no token for the end of a text; name eos_token in tokenizer_config.json")
        if tokenizer.eos_token is None:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos if isinstance(eos, int) else eos[0])
        if tokenizer.pad_token is None:  # any will do, since padding is masked
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.chat_template = getattr(processor, "chat_template", None) or tokenizer.chat_template
        if not tokenizer.chat_template:
            raise InputError("has no chat template (chat_template.jinja); get it from where the model was published")
        pad = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(do_sample=False, bos_token_id=old.bos_token_id, eos_token_id=eos,
                                               pad_token_id=pad)


class QwenProcessor:
    """Tokenizer and image processor. The stock Qwen2_5_VLProcessor needs torchvision, for videos."""
    image_token = "<|image_pad|>"

    def __init__(self, source, trust_remote_code=False):
        self.tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(source)
        self.chat_template = ProcessorMixin.get_processor_dict(source)[0].get("chat_template")  # in one of three files
        self.batch_decode = self.tokenizer.batch_decode

    def __call__(self, images, text, **kwargs):
        pixels = self.image_processor(images=images, return_tensors="pt")
        counts = pixels["image_grid_thw"].prod(1) // self.image_processor.merge_size ** 2
        text = [t.replace(self.image_token, self.image_token * n) for t, n in zip(text, counts.tolist())]
        return BatchFeature({**self.tokenizer(text, **kwargs), **pixels})


PROCESSORS = {"llava": LlavaProcessor.from_pretrained, "llava_next": LlavaNextProcessor.from_pretrained,
              "qwen2_5_vl": QwenProcessor}
