"""
The frozen VLM: load it, encode images, put all or only the kept visual tokens into the prompt, loss, generate.

    vlm = load("llava-hf/llava-1.5-7b-hf")             # or a folder in that format, as data/shapes/llava
    inputs = vlm.inputs([image], ["What is this?"])
    X = vlm.encode(inputs)                             # (B, N, d_v), before the projector
    keep = select(scorer(X), K)                        # (B, K), ascending
    print(vlm.generate(inputs, X, keep))

Nothing is patched: the tokens are computed, chosen and gathered here, and the stock model gets `inputs_embeds`.
A dropped token leaves a gap in the position ids. That makes pruning exactly equal to running the full sequence with
the dropped tokens masked out in every layer, and keeping all tokens exactly equal to the stock model.

Three backbones, one class each, chosen by config.json's model_type. They differ in how tokens are taken out of the
encoder and where they go in the prompt, and in nothing else. Where pictures of a batch have different numbers of
tokens, X is padded with zeros at the right and inputs["valid"] (B, N) says which tokens are real.
"""
import io
import os
import re
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError
from transformers import (AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, BatchFeature,
                          GenerationConfig, PreTrainedConfig, Qwen2VLImageProcessorPil)
from transformers.initialization import no_init_weights
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.utils import logging
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index


HERE = Path(__file__).resolve().parent


class InputError(Exception):
    """Something the user gave is wrong; the message says what, where and the cure in one line."""


def cli(main):
    """Run a script's main(); an InputError ends it with one line on stderr and exit code 2."""
    try:
        main()
    except InputError as e:
        if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
            print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def read_image(path):
    """Open a picture as upright RGB. InputError if it is missing, no picture, or above pillow's limit of pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(path) if isinstance(path, bytes) else path) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off at 255
                    image = image.convert("I").point(lambda v: v / 257).convert("L")
                return image.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{path}: no such image; check the path") from None
    except Exception as e:  # a decoder may fail in any way
        reason = " ".join(str(e).split())
        raise InputError(f"{path}: cannot be read as an image ({reason}); give a JPEG or PNG file") from None


def load(path_or_name, device="cpu", dtype=torch.float32):
    """A frozen VLM from a folder (also relative to this file) or a hub name, in transformers' own format.

    'random:' and a name in RANDOM: the true architecture with random weights and no tokenizer, for timing; on device
    "meta" without weights, for counting. InputError if there is no such model, or if it is of another kind.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {device}: torch cannot use it on this machine; try --device cpu") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = str(path_or_name)
    if name.startswith("random:"):
        return random_vlm(name, device, dtype)
    folder = next((path for path in (Path(name), HERE / name) if path.is_dir()), None)
    if folder is None and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise InputError(f"{name}: no such model folder; give one in transformers' format or a hub name (owner/model)")
    try:
        kind = PreTrainedConfig.get_config_dict(folder or name)[0].get("model_type")
        if kind not in BACKBONES:
            raise InputError(f"{name}: model_type {kind!r} in config.json is not supported; "
                             f"it must be one of {', '.join(BACKBONES)}")
        model = AutoModelForImageTextToText.from_pretrained(folder or name, dtype=dtype, use_safetensors=True)
        processor = BACKBONES[kind].load_processor(folder or name)
    except (OSError, ValueError, SafetensorError) as e:
        reason = str(e).strip().split("\n")[0]
        raise InputError(f"{name}: cannot be loaded as a model ({reason}); give a folder in transformers' format, "
                         "or a hub name with the network at hand") from None
    return BACKBONES[kind](model.to(device), processor, name)


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


def random_vlm(name, device, dtype):
    """The VLM `name` = 'random:…', made where and in the type that it is to have: a 7B in bfloat16 takes 14 GB."""
    if name[7:] not in RANDOM:
        raise InputError(f"{name}: no such architecture; there are {', '.join('random:' + known for known in RANDOM)}")
    config = AutoConfig.for_model(**RANDOM[name[7:]])
    with torch.device(device), no_init_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.tie_weights()
    for key, p in model.named_parameters():  # matrices small and random, norms one, biases zero
        torch.nn.init.normal_(p, std=0.02) if p.dim() > 1 else torch.nn.init.constant_(p, not key.endswith("bias"))
    return BACKBONES[config.model_type](model, None, name)


def at_places(values, places, skip=0):
    """(B, L, …): in each row, the values (B, N, …) from `skip` on at the places (B, L) that are True, in order.

    Elsewhere stands a value without meaning. Unlike indexing with a mask, this waits for no device.
    """
    i = (places.cumsum(1) - 1 + skip).clamp(0, values.shape[1] - 1)  # (B, L)
    return values.gather(1, i.view(*i.shape, *(1,) * (values.dim() - 2)).expand(*i.shape, *values.shape[2:]))


class VLM:
    """What the backbones share. Frozen: no parameter requires a gradient, but gradients pass through to its inputs.

    width: d_v. tokens: N, or None where it varies from picture to picture. image_id: the placeholder's token id.
    """
    tokens, load_processor = None, AutoProcessor.from_pretrained

    def __init__(self, model, processor, name):
        self.model, self.processor, self.name = model.eval().requires_grad_(False), processor, name
        self.image_id = model.config.image_token_id
        old, pad = model.generation_config, processor.tokenizer.pad_token_id if processor else 0
        model.generation_config = GenerationConfig(do_sample=False, bos_token_id=old.bos_token_id,
                                                   eos_token_id=old.eos_token_id, pad_token_id=pad)

    def recompute(self):
        """Gradient checkpointing: the backward pass computes the LLM's activations again instead of keeping them."""
        llm = self.model.model.language_model.train()  # transformers does it in train mode only; no dropout, though
        for module in llm.modules():
            module.attention_dropout = 0.0
        # the first is transformers' new name for the second
        getattr(llm, "activation_checkpointing_enable", llm.gradient_checkpointing_enable)({"use_reentrant": False})

    def memory_plan(self, learned, B, recompute=False):
        """A line on the bytes of a training step: B images at once, captions of 20 tokens, `learned` parameters."""
        c, size, N = self.model.config.get_text_config(), self.model.dtype.itemsize, self.tokens or 2880
        L = N + 40
        D, F, layers = c.hidden_size, c.intermediate_size, c.num_hidden_layers
        # A frozen linear map keeps nothing for the backward pass. A layer keeps for each token the inputs of two norms
        # in float32; q, k, v and the attention's output (D each); three tensors of the feed-forward's width F.
        layer = 2 * 4 * D + (4 * D + 3 * F) * size
        kept = L * (layers * D * size + layer if recompute else layers * layer)
        kept += 60 * N * self.width * size + 20 * c.vocab_size * (size + 8)  # scorer and denoiser; logits
        frozen = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return (f"memory: frozen {frozen / 1e9:.2f} GB; learned {16 * learned / 1e9:.2f} GB (weights, gradients, "
                f"AdamW's two moments); activations about {B * kept / 1e9:.3f} GB for {B} images at once")

    def budget(self, keep, X=None, valid=None):
        """How many tokens `keep` asks for: a whole number, 'all', or a share as '11.1%' of each picture's own tokens.

        An int if all pictures of X (B, N, …) have N tokens, or if N is fixed; with valid (B, N) one for each, (B,). A
        picture that has fewer tokens keeps all. Without X where N varies, `keep` itself. InputError for anything else.
        """
        N, text = self.tokens, str(keep)
        K = int(text) if text.isdecimal() else 0
        share = 1 if text == "all" else float(text[:-1]) / 100 if re.fullmatch(r"\d+(\.\d+)?%", text) else 0
        if not (0 < share <= 1 or 1 <= K <= (N or K)):
            whole = "a whole number" if N is None else f"a whole number from 1 to {N}, the visual tokens of {self.name}"
            raise InputError(f"--keep {keep}: must be {whole}, a share of the tokens as 11.1%, or all")
        if valid is not None:
            N = valid.sum(1)  # (B,)
            return (N.double() * share).round().long().clamp_min(1) if share else N.clamp_max(K)
        N = N if X is None else X.shape[1]
        return K or keep if N is None else max(1, round(N * share)) if share else min(K, N)

    def inputs(self, images, questions, answers=None):
        """Tensors for B pictures and B questions in the model's own chat form, left-padded to length L.

        input_ids, attention_mask (B, L), pixel_values; with answers (captions), which then follow the prompt, also
        labels (B, L): the answer's tokens and the end of text, -100 elsewhere. And what finish() adds.
        """
        placeholder = self.processor.tokenizer.convert_ids_to_tokens(self.image_id)
        if any(placeholder in q for q in questions):
            raise InputError(f"a question has {placeholder} in it, which stands for the picture; take it out")
        chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q}]}] for q in questions]
        prompts = [self.processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        texts, tokenizer = prompts, self.processor.tokenizer
        if answers is not None:
            texts = [p + " " * (not p[-1:].isspace()) + a + tokenizer.eos_token for p, a in zip(prompts, answers)]
        inputs = self.processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")
        if answers is not None:
            told = [len(t) - len(p) for t, p in zip(tokenizer(texts).input_ids, tokenizer(prompts).input_ids)]
            from_end = torch.arange(inputs["input_ids"].shape[1] - 1, -1, -1)  # L-1 … 0
            inputs["labels"] = inputs["input_ids"].where(from_end < torch.tensor(told)[:, None], -100)
        return self.finish(inputs)

    def dummy_inputs(self, batch=1, text_tokens=95, image_size=None):
        """As inputs(), without a tokenizer: noise for pictures of image_size (height, width), and equal text tokens."""
        pixels, places = self.dummy_pixels(batch, image_size)
        ids = torch.ones(batch, places + text_tokens, dtype=torch.long)
        ids[:, 1:1 + places] = self.image_id
        return self.finish(BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}))

    def finish(self, inputs):
        """Add what encode() and embed() need beside what the processor gives; all to the model's device and type."""
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        # a worker process of train.py must not touch the GPU
        return inputs if torch.utils.data.get_worker_info() else inputs.to(self.model.device)

    def visual(self, inputs):
        """(B, L) bool: the places of the visual tokens in the full sequence, in the order of X."""
        return inputs["input_ids"] == self.image_id

    def positions(self, inputs):
        """Position ids of the full sequence, (B, L)."""
        return (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)

    def text(self, ids, visual):
        """Embeddings (B, L, D) of all that is no visual token."""
        return self.model.get_input_embeddings()(ids.masked_fill(ids == self.image_id, 0))

    def embed(self, inputs, X, keep=None):
        """The sequence for the LLM: inputs_embeds (B, L', D), attention_mask (B, L'), position_ids (and labels).

        X (B, N, d_v) goes through the frozen projector and takes the image's places. With keep (B, K), only those
        tokens do: L' = L - N + K, and every token that stays has the position it had in the full sequence.
        -1 in keep stands for no token, at the left of the tokens of an image that keeps fewer than K.
        """
        visual, skip = self.visual(inputs), 0
        rows = {"ids": inputs["input_ids"], "mask": inputs["attention_mask"].bool(), "visual": visual,
                "position_ids": self.positions(inputs), **({"labels": inputs["labels"]} if "labels" in inputs else {})}
        if keep is not None:
            B, N, _ = X.shape  # images, visual tokens
            kept = torch.zeros(B, N + 1, dtype=torch.bool, device=X.device).scatter(1, keep + 1, True)[:, 1:]  # (B, N)
            rows["mask"] = rows["mask"] & (at_places(kept, visual) | ~visual)
            # a stable sort brings what is dropped to the left, beside the padding; all else keeps its order
            out = (~rows["mask"]).sum(1).min() if "valid" in inputs else N - keep.shape[1]
            order = rows["mask"].int().argsort(dim=1, stable=True)[:, out:]  # (B, L')
            rows = {name: row.gather(-1, order.expand(*row.shape[:-1], -1)) for name, row in rows.items()}
            X = X.gather(1, keep.clamp_min(0)[..., None].expand(-1, -1, X.shape[-1]))  # (B, K, d_v)
            skip = (keep < 0).sum(1, keepdim=True)
        ids, mask = rows.pop("ids"), rows.pop("mask")
        visual = rows.pop("visual") & mask
        Z = self.project(X.to(self.model.dtype))  # (B, K, D)
        # out of place, so that gradients pass
        embeds = torch.where(visual[..., None], at_places(Z, visual, skip), self.text(ids, visual))  # (B, L', D)
        return {"inputs_embeds": embeds, "attention_mask": mask.long(), **rows}

    def loss(self, inputs, X, keep=None, alpha=None):
        """Next-token loss on the labels (the caption), in nats per token.

        With alpha (B, N), visual token i takes part in every layer's attention with weight alpha_i: log alpha_i is
        added to its logit as a key. At alpha = 1 it is present; below 1e-8 it is absent, exactly as if dropped.
        """
        sequence = self.embed(inputs, X, keep)
        labels = sequence.pop("labels")
        if alpha is not None:
            log_alpha = alpha.clamp_min(1e-8).log().to(self.model.dtype)  # softmax_j(q_i·k_j + log α_j)
            log_alpha = log_alpha.masked_fill(alpha < 1e-8, torch.finfo(log_alpha.dtype).min)
            sequence["attention_mask"] = self.presence_mask(inputs, log_alpha)
        # logits at the caption only: the state before each of its tokens
        hidden = self.model.model.language_model(**sequence, use_cache=False).last_hidden_state[:, :-1]
        said = labels[:, 1:] != -100
        logits = self.model.lm_head(hidden[said])  # (words, V)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[:, 1:][said])

    def presence_mask(self, inputs, log_alpha):
        """A float mask for SDPA (B, 1, L, L): causal and padding as ever, plus log alpha in the image's columns."""
        visual, mask = self.visual(inputs), inputs["attention_mask"].bool()  # (B, L)
        causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
        columns = torch.where(visual, at_places(log_alpha, visual), 0)  # (B, L)
        allowed = causal & mask[:, None, None, :]
        return torch.where(allowed, columns[:, None, None, :], torch.finfo(log_alpha.dtype).min)

    @torch.no_grad()
    def generate(self, inputs, X, keep=None, max_new_tokens=64, **options):
        """Greedy answers, a list of B strings. Positions go on from the last original one."""
        ids = self.model.generate(**self.embed(inputs, X, keep), max_new_tokens=max_new_tokens, **options)
        return [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]


def ragged(counts):
    """{} if all images have as many visual tokens, else {"valid": (B, N) bool, which of a padded row are real}."""
    valid = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    return {} if valid.all() else {"valid": valid}


class Llava(VLM):
    """LLaVA-1.5: one square picture, N = 576 patches (577 with the class token of strategy 'full')."""

    def __init__(self, model, processor, name):
        super().__init__(model, processor, name)
        config, vision = model.config, model.config.vision_config
        if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
            raise InputError(f"{name}: vision tower {vision.model_type!r} is not supported; it must be CLIP or SigLIP")
        layers, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
        self.layers, self.first = [layers] if isinstance(layers, int) else layers, int(strategy == "default")
        class_token, self.side = int(vision.model_type == "clip_vision_model"), vision.image_size // vision.patch_size
        self.tokens = self.side ** 2 + class_token - self.first  # N, 576 for LLaVA-1.5
        self.width = vision.hidden_size * len(self.layers)  # d_v, 1024 for LLaVA-1.5
        if processor:  # it must count the class token, or it lays out N - 1 places for N tokens
            processor.num_additional_image_tokens, processor.patch_size = class_token, vision.patch_size
            processor.vision_feature_select_strategy = strategy

    @torch.no_grad()
    def encode(self, inputs):
        """X (B, N, d_v): the vision encoder's chosen layers, class token dropped. The encoder gets no gradient."""
        hidden = self.model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        return torch.cat([hidden[i] for i in self.layers], -1)[:, self.first:]

    def project(self, X):
        """The frozen projector, token by token: (B, N, d_v) -> (B, N, D)."""
        return self.model.model.multi_modal_projector(X)

    def dummy_pixels(self, batch, image_size):
        side = self.model.config.vision_config.image_size
        return {"pixel_values": torch.randn(batch, 3, side, side)}, self.tokens


class LlavaNext(Llava):
    """LLaVA-NeXT: the picture once as a whole and once as tiles, from which the padding is cut away again.

    Only patches that survive the cut are visual tokens. A newline token ends each row of tiles; it always stays.
    """

    def __init__(self, model, processor, name):
        super().__init__(model, processor, name)
        if self.tokens != self.side ** 2:
            raise InputError(f"{name}: a class token among the patches is not supported in LLaVA-NeXT; set "
                             "vision_feature_select_strategy to 'default' for CLIP, to 'full' for SigLIP")
        self.tile_tokens, self.tokens = self.tokens, None

    def tiles(self, size):
        """How many tiles a picture of that size (height, width) has, the whole one included."""
        config = self.model.config
        return image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)

    def pack(self, sizes):
        """What each image's places hold, (P_i,): a patch's number among those of all tiles, or -1, a newline."""
        tiles = [self.tiles(size) for size in sizes]
        numbers = torch.arange(sum(tiles) * self.tile_tokens).view(-1, self.tile_tokens, 1).split(tiles)
        packed, _ = self.model.model.pack_image_features(  # the stock model packs numbers in place of features
            numbers, sizes, self.model.config.vision_feature_select_strategy, image_newline=torch.tensor([-1]))
        return [places[:, 0] for places in packed]

    def finish(self, inputs):
        sizes, pixels = inputs["image_sizes"], inputs["pixel_values"]
        if pixels.dim() == 5:  # (B, tiles, 3, H, W), padded: encode the real tiles only
            inputs["pixel_values"] = torch.cat([image[:self.tiles(size)] for image, size in zip(pixels, sizes)])
        packed, image = self.pack(sizes), inputs["input_ids"] == self.image_id
        inputs["newline"] = torch.zeros_like(image).masked_scatter(image, torch.cat(packed) < 0)  # (B, L)
        patches = [places[places >= 0] for places in packed]
        inputs["patches"] = torch.nn.utils.rnn.pad_sequence(patches, batch_first=True)  # (B, N)
        inputs.update(ragged([len(p) for p in patches]))
        return super().finish(inputs)

    def visual(self, inputs):
        return super().visual(inputs) & ~inputs["newline"]

    def text(self, ids, visual):
        newline = ((ids == self.image_id) & ~visual)[..., None]
        return torch.where(newline, self.model.model.image_newline, super().text(ids, visual))

    @torch.no_grad()
    def encode(self, inputs):
        """X (B, N, d_v): first the whole picture's patches, then the tiles' that are left, row by row."""
        X = super().encode(inputs).flatten(0, 1)[inputs["patches"]]
        return X * inputs["valid"][..., None] if "valid" in inputs else X

    def dummy_pixels(self, batch, image_size):
        sizes, side = torch.tensor([image_size or (672, 672)] * batch), self.model.config.vision_config.image_size
        pixels = torch.randn(batch * self.tiles(sizes[0]), 3, side, side)
        return {"pixel_values": pixels, "image_sizes": sizes}, len(self.pack(sizes)[0])


class QwenProcessor:
    """Tokenizer and image processor. The stock Qwen2_5_VLProcessor needs torchvision, for videos."""

    def __init__(self, path):
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        self.apply_chat_template = partial(self.tokenizer.apply_chat_template, tokenize=False)
        self.batch_decode = self.tokenizer.batch_decode

    def __call__(self, images, text, **kwargs):
        pixels = self.image_processor(images=images, return_tensors="pt")
        counts = pixels["image_grid_thw"].prod(1) // self.image_processor.merge_size ** 2
        text = [t.replace("<|image_pad|>", "<|image_pad|>" * n) for t, n in zip(text, counts.tolist())]
        return BatchFeature({**self.tokenizer(text, **kwargs), **pixels})


class Qwen(VLM):
    """Qwen2.5-VL: any picture size. A visual token is a merged group of 2 x 2 patches, d_v their four features."""
    load_processor = QwenProcessor

    def __init__(self, model, processor, name):
        super().__init__(model, processor, name)
        self.vision = model.model.visual
        self.width = model.config.vision_config.hidden_size * self.vision.spatial_merge_unit

    def finish(self, inputs):
        ids, grid = inputs["input_ids"], inputs["image_grid_thw"]  # (B, 3): 1, rows, columns of patches
        # positions (3, B, L), always given: the model itself would go on from what an earlier call left in it
        inputs["position_ids"], _ = self.model.model.get_rope_index(
            ids, (ids == self.image_id).int(), image_grid_thw=grid, attention_mask=inputs["attention_mask"])
        inputs.update(ragged((grid.prod(1) // self.vision.spatial_merge_unit).tolist()))
        inputs["grid"] = grid.tolist()  # stays where it can be read without waiting for the device
        return super().finish(inputs)

    def positions(self, inputs):
        """Position ids of the full sequence, (3, B, L): time, row and column."""
        return inputs["position_ids"]

    @torch.no_grad()
    def encode(self, inputs):
        """X (B, N, d_v), in raster order: the encoder's last layer leaves the groups window by window."""
        v, grid, device = self.vision, torch.tensor(inputs["grid"]), self.model.device
        places = get_vision_position_ids(grid, v.spatial_merge_size).to(device)
        hidden = v(inputs["pixel_values"], grid_thw=grid, position_ids=places).last_hidden_state  # (patches, d_v / 4)
        window, _ = get_vision_window_index(grid, v.spatial_merge_size, v.window_size, v.patch_size)
        X = hidden.view(-1, self.width)[window.argsort().to(device)]
        if "valid" not in inputs:
            return X.view(len(grid), -1, self.width)
        return X.new_zeros(*inputs["valid"].shape, self.width).masked_scatter(inputs["valid"][..., None], X)

    def project(self, X):
        """The frozen merger, group by group: (B, N, d_v) -> (B, N, D)."""
        B, N, _ = X.shape
        return self.vision.merger(X.reshape(B * N * self.vision.spatial_merge_unit, -1)).view(B, N, -1)

    def dummy_pixels(self, batch, image_size):
        m, unit = self.vision.spatial_merge_size, self.vision.patch_size * self.vision.spatial_merge_size
        rows, columns = (side // unit for side in image_size or (672, 672))
        grid, patch = torch.tensor([[1, m * rows, m * columns]] * batch), self.vision.patch_embed.proj.weight[0].numel()
        return {"pixel_values": torch.randn(grid.prod(1).sum(), patch), "image_grid_thw": grid}, rows * columns


BACKBONES = {"llava": Llava, "llava_next": LlavaNext, "qwen2_5_vl": Qwen}
