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
"""
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, GenerationConfig, LlavaForConditionalGeneration
from transformers.utils import logging


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
            with Image.open(path) as image:
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

    InputError if there is none, or if it is of another kind than LLaVA-1.5.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {device}: torch cannot use it on this machine; try --device cpu") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = str(path_or_name)
    folder = next((path for path in (Path(name), HERE / name) if path.is_dir()), None)
    if folder is None and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise InputError(f"{name}: no such model folder; give one in llava-hf's format or a hub name (owner/model)")
    try:
        config = AutoConfig.from_pretrained(folder or name)
        if config.model_type != "llava":
            raise InputError(f"{name}: model_type {config.model_type!r} in config.json is not supported; it must be 'llava'")
        if not isinstance(config.vision_feature_layer, int) or config.vision_feature_select_strategy != "default":
            raise InputError(f"{name}: config.json must have a single vision_feature_layer and "
                             "vision_feature_select_strategy 'default', as LLaVA-1.5 has")
        model = LlavaForConditionalGeneration.from_pretrained(folder or name, dtype=dtype, use_safetensors=True)
        processor = AutoProcessor.from_pretrained(folder or name)
    except (OSError, ValueError, SafetensorError) as e:
        reason = str(e).strip().split("\n")[0]
        raise InputError(f"{name}: cannot be loaded as a model ({reason}); give a folder in llava-hf's format, "
                         "or a hub name with the network at hand") from None
    return VLM(model.to(device), processor, name)


class VLM:
    """A frozen LLaVA: no parameter requires a gradient, but gradients pass through to its inputs."""

    def __init__(self, model, processor, name):
        self.model, self.processor, self.name = model.eval().requires_grad_(False), processor, name
        vision = model.config.vision_config
        self.tokens = (vision.image_size // vision.patch_size) ** 2  # N, 576 for LLaVA-1.5
        self.width = vision.hidden_size  # d_v, 1024 for LLaVA-1.5
        self.image_id = model.config.image_token_index
        # the processor must count the class token, or it lays out N - 1 places for N tokens
        processor.num_additional_image_tokens, processor.patch_size = 1, vision.patch_size
        processor.vision_feature_select_strategy = "default"
        old = model.generation_config
        model.generation_config = GenerationConfig(do_sample=False, bos_token_id=old.bos_token_id,
                                                   eos_token_id=old.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id)

    def recompute(self):
        """Gradient checkpointing: the backward pass computes the LLM's activations again instead of keeping them."""
        llm = self.model.model.language_model.train()  # transformers does it in train mode only; no dropout, though
        for module in llm.modules():
            module.attention_dropout = 0.0
        # the first is transformers' new name for the second
        getattr(llm, "activation_checkpointing_enable", llm.gradient_checkpointing_enable)({"use_reentrant": False})

    def memory_plan(self, learned, B, recompute=False):
        """A line on the bytes of a training step: B images at once, captions of 20 tokens, so many learned parameters."""
        c, size, L = self.model.config.get_text_config(), self.model.dtype.itemsize, self.tokens + 40
        D, F, layers = c.hidden_size, c.intermediate_size, c.num_hidden_layers
        # A frozen linear map keeps nothing for the backward pass. A layer keeps for each token the inputs of two norms
        # in float32; q, k, v and the attention's output (D each); three tensors of the feed-forward's width F.
        layer = 2 * 4 * D + (4 * D + 3 * F) * size
        kept = L * (layers * D * size + layer if recompute else layers * layer)
        kept += 60 * self.tokens * self.width * size + 20 * c.vocab_size * (size + 8)  # scorer and denoiser; logits
        frozen = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return (f"memory: frozen {frozen / 1e9:.2f} GB; learned {16 * learned / 1e9:.2f} GB (weights, gradients, AdamW's "
                f"two moments); activations about {B * kept / 1e9:.3f} GB for {B} images at once")

    def budget(self, K):
        """K as a whole number from 1 to N, 'all' as N; InputError for anything else."""
        K = self.tokens if K == "all" else int(K) if str(K).isdigit() else 0
        if not 1 <= K <= self.tokens:
            raise InputError(f"--keep must be a whole number from 1 to {self.tokens}, the visual tokens of {self.name}")
        return K

    def inputs(self, images, questions, answers=None):
        """Tensors for B pictures and B questions in the model's own chat form, left-padded to length L.

        input_ids, attention_mask (B, L), pixel_values (B, 3, H, W); with answers (captions), which then follow the
        prompt, also labels (B, L): the answer's tokens and the end of text, -100 elsewhere.
        """
        chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q}]}] for q in questions]
        prompts = [self.processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        texts, tokenizer = prompts, self.processor.tokenizer
        if answers is not None:
            texts = [f"{p} {a}{tokenizer.eos_token}" for p, a in zip(prompts, answers)]
        inputs = self.processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")
        if answers is not None:
            told = [len(t) - len(p) for t, p in zip(tokenizer(texts).input_ids, tokenizer(prompts).input_ids)]
            from_end = torch.arange(inputs.input_ids.shape[1] - 1, -1, -1)  # L-1 … 0
            inputs["labels"] = inputs.input_ids.where(from_end < torch.tensor(told)[:, None], -100)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        # a worker process of train.py must not touch the GPU
        return inputs if torch.utils.data.get_worker_info() else inputs.to(self.model.device)

    @torch.no_grad()
    def encode(self, inputs):
        """X (B, N, d_v): the vision encoder's chosen layer, class token dropped. The encoder gets no gradient."""
        hidden = self.model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        return hidden[self.model.config.vision_feature_layer][:, 1:]

    def embed(self, inputs, X, keep=None):
        """The sequence for the LLM: inputs_embeds (B, L', D), attention_mask, position_ids (and labels) (B, L').

        X (B, N, d_v) goes through the frozen projector and takes the image's places. With keep (B, K), only those
        tokens do: L' = L - N + K, and every token that stays has the position it had in the full sequence.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()  # (B, L)
        rows = {"ids": ids, "mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
                **({"labels": inputs["labels"]} if "labels" in inputs else {})}
        if keep is not None:
            B, N, _ = X.shape  # images, visual tokens
            kept = torch.zeros(B, N, dtype=torch.bool, device=X.device).scatter(1, keep, True)
            rows["mask"] = mask.masked_scatter(ids == self.image_id, kept)
            # a stable sort brings what is dropped to the left, beside the padding; all else keeps its order
            order = rows["mask"].int().argsort(dim=1, stable=True)[:, N - keep.shape[1]:]  # (B, L')
            rows = {name: row.gather(1, order) for name, row in rows.items()}
            X = X.gather(1, keep[..., None].expand(-1, -1, X.shape[-1]))  # (B, K, d_v)
        ids, mask = rows.pop("ids"), rows.pop("mask")
        is_image = (ids == self.image_id) & mask
        Z = self.model.model.multi_modal_projector(X.to(self.model.dtype))  # (B, K, D)
        text = self.model.get_input_embeddings()(ids.masked_fill(ids == self.image_id, 0))  # (B, L', D)
        embeds = text.masked_scatter(is_image[..., None], Z.to(text.dtype))  # out of place, so that gradients pass
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
            sequence["attention_mask"] = self.presence_mask(inputs["input_ids"], sequence["attention_mask"], log_alpha)
        # logits at the caption only: the state before each of its tokens
        hidden = self.model.model.language_model(**sequence, use_cache=False).last_hidden_state[:, :-1]
        said = labels[:, 1:] != -100
        logits = self.model.lm_head(hidden[said])  # (words, V)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[:, 1:][said])

    def presence_mask(self, ids, mask, log_alpha):
        """A float mask for SDPA (B, 1, L, L): causal and padding as ever, plus log alpha in the columns of the image."""
        L = ids.shape[1]
        causal = torch.ones(L, L, dtype=torch.bool, device=ids.device).tril()
        columns = torch.zeros(ids.shape, dtype=log_alpha.dtype, device=ids.device)
        columns = columns.masked_scatter(ids == self.image_id, log_alpha)  # (B, L)
        allowed = causal & mask.bool()[:, None, None, :]
        return torch.where(allowed, columns[:, None, None, :], torch.finfo(log_alpha.dtype).min)

    @torch.no_grad()
    def generate(self, inputs, X, keep=None, max_new_tokens=64, **options):
        """Greedy answers, a list of B strings. Positions go on from the last original one."""
        ids = self.model.generate(**self.embed(inputs, X, keep), max_new_tokens=max_new_tokens, **options)
        return [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]
