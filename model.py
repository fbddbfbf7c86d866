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

Three backbones, one class each, chosen by config.json's model_type. They differ in how tokens leave the encoder and are
projected, and in their places and positions in the prompt. Where pictures of a batch have different numbers of tokens,
X is padded with zeros at the right and inputs["valid"] (B, N) says which tokens are real.
"""
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BatchFeature, PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from common.files import InputError, short
from data.pictures import read_image  # noqa: F401 (so that one import brings what a script needs)
from common.weights import PROCESSORS, complete, find, one_line, read_model, supported

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_device_arguments(parser):
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run "
                        "(default here: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="number type of the frozen VLM (default: bfloat16 on a GPU, "
                        "float32 elsewhere)")


def number_type(args):
    """The name of --dtype. Where it was left out it becomes bfloat16 on a GPU, and float32 elsewhere."""
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args.dtype


def load(model, device="cpu", dtype=torch.float32, attention=None, device_map=None, processor=None):
    """A frozen VLM from a folder (also relative to this repository) or a hub name, in transformers' own format.

    `model` may also be a transformers model that is loaded already: it is frozen in place. processor: else its own.
    'random:NAME' (see common/weights.py): the true architecture, random weights and no processor, for timing; on device
    "meta" without weights, for counting. attention and device_map are those of from_pretrained().
    InputError for whatever is wrong with the model: before anything else, it must answer a trial question.
    """
    if isinstance(model, PreTrainedModel):
        name = model.name_or_path or type(model).__name__
        with one_line(name, "reading its processor, as load(model) has no processor=…"):
            processor = processor or PROCESSORS[supported(model.config.model_type)](find(name), trust_remote_code=False)
    else:
        name = str(model)
        model, processor = read_model(name, device, dtype, attention or "sdpa", device_map)
    with one_line(name, "a trial question about a grey picture"):
        vlm = BACKBONES[supported(model.config.model_type)](model, processor, name)
        if processor:
            vlm.trial()
    return vlm


def at_places(values, places, skip=0):
    """(B, L, …): in each row, the values (B, N, …) from `skip` on at the places (B, L) that are True, in order.

    Elsewhere stands a value without meaning. Unlike indexing with a mask, this waits for no device.
    """
    i = (places.cumsum(1) - 1 + skip).clamp(0, values.shape[1] - 1)  # (B, L)
    return values.gather(1, i.view(*i.shape, *(1,) * (values.dim() - 2)).expand(*i.shape, *values.shape[2:]))


def ragged(counts):
    """{} if all images have as many visual tokens, else {"valid": (B, N) bool, which of a padded row are real}."""
    valid = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    return {} if valid.all() else {"valid": valid}


def cells(rows, columns):
    """(rows·columns, 4): x0, y0, x1, y1 of a grid's cells, row by row, as shares of the picture's sides."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([x, y, x + 1, y + 1], -1).view(-1, 4) / torch.tensor([columns, rows, columns, rows])


class VLM:
    """What the backbones share. Frozen: no parameter requires a gradient, but gradients pass through to its inputs.

    width: d_v. tokens: N, or None where it varies from picture to picture. image_id: the placeholder's token id.
    context: the longest sequence. form: the tokens of a prompt beside the picture and the question.
    """

    def __init__(self, model, processor, name):
        self.model, self.processor, self.name = model.eval().requires_grad_(False), processor, name
        self.image_id, text = model.config.image_token_id, model.config.get_text_config()
        self.context, self.form = text.max_position_embeddings, 0
        layers = getattr(text, "layer_types", None) or []
        if set(layers) - {"full_attention"} or (not layers and getattr(text, "sliding_window", None)):
            raise InputError("sliding-window attention reaches too far over dropped tokens; give a model without it")
        complete(model, processor)

    @torch.no_grad()
    def trial(self):
        """A question about a grey picture, and one token of its answer. Any error if the parts are not of one model."""
        inputs = self.inputs([Image.new("RGB", (64, 48), "grey")], ["?"])
        X, places = self.encode(inputs), self.visual(inputs).sum().item()  # (1, N, d_v)
        if places != X.shape[1]:
            raise InputError(f"a prompt has {places} places for {X.shape[1]} visual tokens; mend the processor's files")
        self.form = (inputs["input_ids"] != self.image_id).sum().item() - len(self.processor.tokenizer("?").input_ids)
        self.generate(inputs, X, torch.zeros(1, 1, dtype=torch.long, device=X.device), max_new_tokens=1)

    def recompute(self):
        """Gradient checkpointing: the backward pass computes the LLM's activations again instead of keeping them."""
        llm = self.model.model.language_model.train()  # transformers does it in train mode only; no dropout, though
        for module in llm.modules():
            module.attention_dropout = 0.0
        # the first is transformers' new name for the second
        getattr(llm, "activation_checkpointing_enable", llm.gradient_checkpointing_enable)({"use_reentrant": False})

    def memory(self, learned, B, recompute=False):
        """Bytes of a training step by part: B images at once, captions of 20 tokens, `learned` parameters."""
        c, size, N = self.model.config.get_text_config(), self.model.dtype.itemsize, self.tokens or 2880
        L = N + 40
        D, F, layers = c.hidden_size, c.intermediate_size, c.num_hidden_layers
        # A frozen linear map keeps nothing for the backward pass. A layer keeps for each token the inputs of two norms
        # in float32; q, k, v, the attention's output (D each), one number a head; three tensors of the MLP's width F.
        layer = 2 * 4 * D + (4 * D + 3 * F) * size + 4 * c.num_attention_heads
        kept = L * (layers * D * size + layer if recompute else layers * layer)
        kept += 60 * N * self.width * size + 20 * c.vocab_size * (size + 8)  # scorer and denoiser; logits
        own = [p.to_local() if hasattr(p, "to_local") else p for p in self.model.parameters()]  # a shard counts as such
        frozen = sum(p.numel() * p.element_size() for p in own)
        return {"frozen": frozen, "learned": 16 * learned, "activations": B * kept}  # 16: AdamW's moments, too

    def images_that_fit(self, learned, free_bytes, recompute=False):
        """How many images fit at once in what a device has free beside the frozen model; a tenth of it is a reserve."""
        plan = self.memory(learned, 1, recompute)
        return max(0, int((0.9 * free_bytes - plan["learned"]) // plan["activations"]))

    def check_text(self, text, where):
        """InputError for a question, or a prompt and its caption, that the model cannot take; `where` says which.

        A token is at least a byte, so few texts need counting. Where N varies, inputs() counts the picture's part.
        """
        placeholder, room = self.processor.image_token, self.context - self.form - (self.tokens or 0)
        if placeholder in text:
            raise InputError(f"{where} has {placeholder} in it, which stands for the picture; take it out")
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise InputError(f"{where} has half a character in it (a lone surrogate); take it out") from None
        if size > room and len(self.processor.tokenizer(text).input_ids) > room:
            raise InputError(f"{where} is longer than the {room} tokens left in the model's context; shorten it")

    def inputs(self, images, questions, answers=None):
        """Tensors for B pictures (PIL) and B questions in the model's own chat form, left-padded to length L.

        input_ids, attention_mask (B, L), pixel_values; with answers (captions), which then follow the prompt, also
        labels (B, L): the answer's tokens and the end of text, -100 elsewhere. And what finish() adds.
        InputError for a picture that the processor refuses, and a text that does not fit.
        """
        tokenizer, placeholder, prompts = self.processor.tokenizer, self.processor.image_token, []
        for question in questions:
            self.check_text(question, "a question")
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            prompts.append(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        if tokenizer(prompts[0]).input_ids[:2] == [tokenizer.bos_token_id] * 2:  # the template writes it, too
            prompts = [prompt.removeprefix(tokenizer.bos_token) for prompt in prompts]
        texts = prompts
        if answers is not None:
            texts = [p + " " * (not p[-1:].isspace()) + a + tokenizer.eos_token for p, a in zip(prompts, answers)]
        if any(text.count(placeholder) != 1 for text in texts):
            raise InputError(f"{placeholder} stands for the picture: chat templates must write it once, a text never")
        try:
            inputs = self.processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")
        except Exception as e:
            raise InputError(f"the model's processor refuses it ({short(e)})") from None
        ids = inputs["input_ids"] = inputs["input_ids"] * inputs["attention_mask"]  # padding: token 0, any would do
        L, known = ids.shape[1], len(self.model.get_input_embeddings().weight)
        if L > self.context:
            raise InputError(f"picture and text are {L} tokens, and the model's context is {self.context}; shorten one")
        if (ids.masked_fill(ids == self.image_id, 0) >= known).any():
            raise InputError(f"the tokenizer uses tokens above the model's {known}; get both of one model")
        if answers is not None:
            told = [len(t) - len(p) for t, p in zip(tokenizer(texts).input_ids, tokenizer(prompts).input_ids)]
            from_end = torch.arange(L - 1, -1, -1)  # L-1 … 0
            inputs["labels"] = ids.where(from_end < torch.tensor(told)[:, None], -100)
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
        return self.model.get_input_embeddings()(ids.masked_fill(ids == self.image_id, 0)).to(ids.device)

    def embed(self, inputs, X, keep=None):
        """The sequence for the LLM: inputs_embeds (B, L', D), attention_mask (B, L'), position_ids (and labels).

        X (B, N, d_v) goes through the frozen projector and takes the image's places. With keep (B, K), only those
        tokens do: L' = L - N + K, and every token that stays has the position it had in the full sequence.
        -1 in keep stands for no token, at the left of the tokens of an image that keeps fewer than K.
        """
        visual, skip = self.visual(inputs), 0
        rows = {"ids": inputs["input_ids"], "mask": inputs["attention_mask"].bool(), "visual": visual,
                "position_ids": self.positions(inputs)}
        if "labels" in inputs:
            rows["labels"] = inputs["labels"]
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
        Z = self.project(X.to(self.model.dtype)).to(ids.device)  # (B, K, D)
        # out of place, so that gradients pass
        embeds = torch.where(visual[..., None], at_places(Z, visual, skip), self.text(ids, visual))  # (B, L', D)
        return {"inputs_embeds": embeds, "attention_mask": mask.long(), **rows}

    def loss(self, inputs, X, keep=None):
        """Next-token loss on the labels (the caption), in nats per token. NaN where a feature or logit is no number."""
        sequence = self.embed(inputs, X, keep)
        labels = sequence.pop("labels")[:, 1:]
        # logits at the caption only: the state before each of its tokens
        hidden = self.model.model.language_model(**sequence, use_cache=False).last_hidden_state[:, :-1]
        labels = labels.to(hidden.device)
        logits = self.model.lm_head(hidden[labels != -100])  # (words, V)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[labels != -100])

    @torch.no_grad()
    def generate(self, inputs, X, keep=None, max_new_tokens=64, **options):
        """Greedy answers, B strings: positions continue from the last original one. InputError for logits of NaN."""
        finite = [X.isfinite().all()]

        def watch(ids, logits):
            finite.append(logits.amax(-1).isfinite().all())
            return logits

        ids = self.model.generate(**self.embed(inputs, X, keep), max_new_tokens=max_new_tokens,
                                  logits_processor=[watch], **options)
        if not all(finite):
            raise InputError("features or logits are no finite numbers: the weights are damaged, or overflow in this "
                             "number type; try --dtype float32")
        return [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]


class Llava(VLM):
    """LLaVA-1.5: one square picture, N = 576 patches (577 with the class token of strategy 'full')."""

    def __init__(self, model, processor, name):
        super().__init__(model, processor, name)
        config, vision = model.config, model.config.vision_config
        if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
            raise InputError(f"vision tower {vision.model_type!r} is not supported; it must be CLIP or SigLIP")
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

    def boxes(self, inputs):
        """(N, 4): x0, y0, x1, y1 of each token in the square that the model saw, 0 … 1; a class token's are all 0."""
        patches = cells(self.side, self.side)
        return F.pad(patches, (0, 0, self.tokens - len(patches), 0))

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
            raise InputError("a class token among the patches is not supported in LLaVA-NeXT; set "
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
        return torch.where(newline, self.model.model.image_newline.to(ids.device), super().text(ids, visual))

    @torch.no_grad()
    def encode(self, inputs):
        """X (B, N, d_v): first the whole picture's patches, then the tiles' that are left, row by row."""
        X = super().encode(inputs).flatten(0, 1)[inputs["patches"]]
        return X * inputs["valid"][..., None] if "valid" in inputs else X

    def boxes(self, inputs):
        """(N, 4): as above; the whole picture's patches, then the tiles', which lie around its middle with padding."""
        (height, width), config, side = inputs["image_sizes"][0].tolist(), self.model.config, self.side
        rows, columns = get_anyres_image_grid_shape(
            (height, width), config.image_grid_pinpoints, config.vision_config.image_size)  # of tiles
        tiles = cells(rows * side, columns * side).view(rows, side, columns, side, 4).transpose(1, 2).reshape(-1, 4)
        scale = min(rows / height, columns / width)
        filled = torch.tensor([width * scale / columns, height * scale / rows]).repeat(2)  # the picture's share of them
        tiles = ((tiles - 0.5) / filled + 0.5).clamp(0, 1)
        patches = self.pack(inputs["image_sizes"][:1].cpu())[0]
        return torch.cat([cells(side, side), tiles])[patches[patches >= 0]]

    def dummy_pixels(self, batch, image_size):
        sizes, side = torch.tensor([image_size or (672, 672)] * batch), self.model.config.vision_config.image_size
        pixels = torch.randn(batch * self.tiles(sizes[0]), 3, side, side)
        return {"pixel_values": pixels, "image_sizes": sizes}, len(self.pack(sizes)[0])


class Qwen(VLM):
    """Qwen2.5-VL: any picture size. A visual token is a merged group of 2 x 2 patches, d_v their four features."""

    def __init__(self, model, processor, name):
        super().__init__(model, processor, name)
        self.vision, self.tokens = model.model.visual, None
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

    def boxes(self, inputs):
        """(N, 4): as above, of the first picture's groups of patches."""
        _, rows, columns = inputs["grid"][0]
        return cells(rows // self.vision.spatial_merge_size, columns // self.vision.spatial_merge_size)

    def dummy_pixels(self, batch, image_size):
        m, unit = self.vision.spatial_merge_size, self.vision.patch_size * self.vision.spatial_merge_size
        rows, columns = (side // unit for side in image_size or (672, 672))
        grid, patch = torch.tensor([[1, m * rows, m * columns]] * batch), self.vision.patch_embed.proj.weight[0].numel()
        return {"pixel_values": torch.randn(grid.prod(1).sum(), patch), "image_grid_thw": grid}, rows * columns


BACKBONES = {"llava": Llava, "llava_next": LlavaNext, "qwen2_5_vl": Qwen}
