"""
The frozen VLM: load it, encode images, put all or only the kept visual tokens into the prompt.

    vlm = load("llava-hf/llava-1.5-7b-hf")       # or a folder in that format, as data/shapes/llava
    inputs = vlm.inputs([image], ["What is this?"])
    X = vlm.encode(inputs)                       # (B, N, d_v)
    keep = select(distinct(scorer(X), X), K)     # (B, K), ascending
    print(vlm.generate(inputs, X, keep))

One class serves every model of transformers that puts image features at places of its prompt.
Nothing is known of a model, and nothing is patched: intercept() calls the stock model, and a hook
on its language model (LLM) catches what that is called with, then ends the call. So embeddings,
positions and masks are the stock model's own. Pruning takes the dropped tokens' rows out of all.

A dropped token leaves a gap in the position ids. So pruning equals the full sequence with the
dropped tokens masked out in every layer (where no layer is recurrent), and keeping all equals the
stock model. load() checks both on the model at hand before it is used.

X are the tokens as they enter the LLM, behind the projector. For LLaVA-1.5 alone, they are taken
before it, as in the papers. Where pictures of a batch have different numbers of tokens, X is padded
with zeros at the right, and inputs["valid"] (B, N) says which tokens are real.
"""
import inspect
import random
import sys
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BatchFeature, PreTrainedModel

from common import architectures
from common.files import InputError, short, time_limit
from common.weights import (complete, find, hushed, image_token, one_line, read_model,
                            read_processor, supported)
from data.pictures import read_image  # noqa: F401 (one import brings what a script needs)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# what a stock model may call its LLM with, by shape
ROWS = {"inputs_embeds", "per_layer_inputs"}  # (B, L, …)
PLACES = {"position_ids", "attention_mask", "token_type_ids", "moe_mm_token_type_ids",
          "visual_pos_masks"}  # (…, L), or attention_mask (B, 1, L, L)
DEEP = "deepstack_visual_embeds"  # for each of the first layers (visual tokens of all rows, D)


def add_device_arguments(parser):
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where to run (default here: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="number type of the frozen VLM "
                        "(default: bfloat16 on a GPU, float32 elsewhere)")


def number_type(args):
    """The name of --dtype. Where it was left out: bfloat16 on a GPU, float32 elsewhere."""
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args.dtype


def load(model, device="cpu", dtype=torch.float32, processor=None):
    """A frozen VLM from a folder (also relative to this repository) or a hub name.

    `model` may also be a transformers model that is loaded already, as its from_pretrained() does on
    several cards: it is frozen in place. Without `processor` its own is read. 'random:NAME' (see
    common/architectures.py): the true architecture, random weights and no processor, for timing; on
    device "meta" without weights, for counting. InputError for whatever is wrong with the model:
    before anything else it must answer a trial question, and pass the self-check.
    """
    if isinstance(model, PreTrainedModel):
        name = model.name_or_path or type(model).__name__
        with one_line(name, "reading its processor, as load(model) has no processor=…"):
            kind = supported(model.config.model_type)
            processor = processor or read_processor(find(name), kind)
    else:
        name = str(model)
        model, processor = read_model(name, device, dtype)
    with one_line(name, "a trial question about a grey picture"), hushed():
        tower = getattr(model.config, "vision_config", None)
        papers = model.config.model_type == "llava" and tower.model_type in Llava.TOWERS
        vlm = (Llava if papers else VLM)(model, processor, name)
        if processor:
            vlm.trial()
            vlm.self_check()
    if processor and not vlm.exact:
        print(f"{name}: has recurrent layers, which no mask reaches: with all tokens it is the "
              "stock model, pruned it reads a shorter sequence", file=sys.stderr)
    return vlm


def rows_at(values, i):
    """Of the values (B, N, …) in each row those of index i (B, L), (B, L, …)."""
    i = i.view(*i.shape, *[1] * (values.dim() - 2))
    return values.gather(1, i.expand(-1, -1, *values.shape[2:]))


def at_places(values, places, skip=0):
    """(B, L, …): in each row the values (B, N, …), from `skip` on, where places (B, L) is True.

    Elsewhere stands a value without meaning. Unlike indexing with a mask, this waits for no device.
    """
    i = (places.cumsum(1) - 1 + skip).clamp(0, values.shape[1] - 1)  # (B, L)
    return rows_at(values, i)


def take(value, name, order):
    """What the LLM gets under that name, only of the places order (B, L')."""
    if isinstance(value, dict):
        return {kind: take(mask, name, order) for kind, mask in value.items()}
    if not torch.is_tensor(value):
        return value
    if name in ROWS:
        return rows_at(value, order)
    B, short = order.shape
    if value.dim() == 4:  # a mask (B, heads, L, L): rows, then columns
        value = value.expand(B, -1, -1, -1)
        heads, L = value.shape[1], value.shape[3]
        value = value.gather(2, order[:, None, :, None].expand(B, heads, short, L))
        return value.gather(3, order[:, None, None, :].expand(B, heads, short, short))
    return value.gather(-1, order.expand(*value.shape[:-1], short))


def has_masks(llm_inputs):
    """Whether the stock model makes masks of its own: (B, 1, L, L), or a dict of such."""
    mask = llm_inputs.get("attention_mask")
    return isinstance(mask, dict) or torch.is_tensor(mask) and mask.dim() == 4


def is_kept(keep, N):
    """(B, N) bool for the indices keep (B, K), of which -1 stands for none."""
    B = len(keep)
    kept = torch.zeros(B, N + 1, dtype=torch.bool, device=keep.device)  # the first is for -1
    return kept.scatter(1, keep + 1, True)[:, 1:]


def ragged(counts):
    """{} if all images have as many visual tokens, else {"valid": (B, N) bool, the real ones}."""
    valid = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    return {} if valid.all() else {"valid": valid}


class Intercepted(Exception):
    """Ends a call of the stock model as its LLM begins; carries what that was called with."""


class VLM:
    """A frozen model: no parameter requires a gradient, but gradients pass through to its inputs.

    width: d_v, the LLM's times `levels`: 1, and those that deepstack adds in later layers.
    tokens: N, or None where it varies by the picture. image_id: the placeholder's token id.
    context: the longest sequence in which no window hides a token. chat_tokens: those of a prompt
    beside picture and question. exact: pruning equals masking. decoder: the LLM without its head.
    """

    def __init__(self, model, processor, name):
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.name = name
        config, text = model.config, model.config.get_text_config(decoder=True)
        self.decoder = model.get_decoder()
        self.image_id = image_token(config)
        if self.image_id is None or self.decoder in (None, model) or config.is_encoder_decoder:
            raise InputError("its class has no token that stands for a picture, or no language "
                             "model of its own; give another model")
        self.tokens = None
        self.chat_tokens = 0
        vision = getattr(config, "vision_config", None)
        self.levels = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
        self.width = text.hidden_size * self.levels
        self.set_context(text)
        # some classes ask which tokens are the picture's; some cannot generate from embeddings
        self.typed = "mm_token_type_ids" in inspect.signature(model.forward).parameters
        accepted = inspect.signature(model.prepare_inputs_for_generation).parameters
        self.by_ids = "inputs_embeds" not in accepted
        complete(model, processor)
        if processor:
            names = {getattr(processor, "image_token", None), getattr(processor, "boi_token", None)}
            names.add(processor.tokenizer.convert_ids_to_tokens(self.image_id))
            self.placeholders = names - {None}

    def set_context(self, text):
        """How long a sequence may be: the least of positions, window and attention chunk."""
        kinds = set(getattr(text, "layer_types", None) or ())
        limits = {"context": text.max_position_embeddings}
        if "sliding_attention" in kinds or not kinds and getattr(text, "sliding_window", None):
            limits["sliding window"] = text.sliding_window
        if "chunked_attention" in kinds:
            limits["attention chunk"] = text.attention_chunk_size
        self.limited_by = min(limits, key=limits.get)
        self.context = limits[self.limited_by]
        self.exact = kinds <= {"full_attention", "sliding_attention", "chunked_attention"}

    # --- before anything is done with it ----------------------------------------------------------

    @torch.no_grad()
    def trial(self):
        """Two questions about a grey picture, and one token of an answer.

        InputError, or any error, if the model's files are not of one model.
        """
        with time_limit(10, "the chat template"):
            self.prompts(["?"])
        grey = Image.new("RGB", (64, 48), "grey")
        ids = self.inputs([grey, grey], ["What?", "Where?"])["input_ids"]
        if ids[0].equal(ids[1]):
            raise InputError("two questions become the same prompt, so none would be heard; "
                             "fix chat_template.jinja or tokenizer.json")
        inputs = self.inputs([grey], ["?"])
        X = self.encode(inputs)  # (1, N, d_v)
        text = (inputs["input_ids"] != self.image_id).sum().item()
        self.chat_tokens = text - len(self.processor.tokenizer("?").input_ids)
        first = torch.zeros(1, 1, dtype=torch.long, device=X.device)
        self.generate(inputs, X, first, max_new_tokens=1)

    @torch.no_grad()
    def self_check(self):
        """InputError unless the method's two equalities hold on this model, on noise."""
        def last(logits):
            return logits[:, -1].float().log_softmax(-1)

        def distance(a, b):
            return (a - b).abs().max().item()

        content = random.Random(0).randbytes(64 * 48 * 3)
        noise = Image.frombytes("RGB", (64, 48), content)
        inputs = self.inputs([noise], ["?"])
        X, visual = self.encode(inputs), self.visual(inputs)  # (1, N, d_v), (1, L)
        third = torch.arange(X.shape[1], device=X.device) % 3 == 0  # (N,)
        shown = inputs["attention_mask"].masked_scatter(visual, third.long())
        positions = self.embed(inputs, X)["position_ids"]
        stock = self.model_inputs(inputs)
        full = last(self.model(**stock).logits)
        stock.update(attention_mask=shown, position_ids=positions)
        masked = last(self.model(**stock).logits)

        error = distance(last(self.logits(inputs, X)), full)
        if not error <= 1e-3:
            raise InputError("all tokens kept is not the stock model: log-probabilities differ by "
                             f"{error:.2g}; give another model")
        pruned = last(self.logits(inputs, X, third.nonzero().T))
        error, effect = distance(pruned, masked), distance(full, masked)
        share = 0.25 if self.model.dtype.itemsize == 2 else 0.01
        if self.exact and not error <= max(share * effect, 1e-3):
            raise InputError(f"pruning is not masking: log-probabilities differ by {error:.2g}, "
                             f"and by {effect:.2g} where two thirds of a picture are hidden; give "
                             "another model")

    # --- from pictures and questions to tensors ---------------------------------------------------

    def inputs(self, images, questions, answers=None):
        """Tensors for B pictures (PIL) and B questions in the model's own chat form.

        input_ids, attention_mask (B, L), left-padded; pixel_values and what else the processor
        gives; valid (B, N) where the pictures differ in N; with answers (captions), which follow
        the prompt, labels (B, L): the answer's tokens and the end of text, -100 elsewhere.
        InputError for a picture that the processor refuses, and a text that does not fit.
        """
        for question in questions:
            self.check_text(question, "a question")
        inputs = self.processed(images, self.prompts(questions), answers)
        self.check_length(inputs["input_ids"])
        self.check_places(inputs)
        return self.finish(inputs)

    def prompts(self, questions):
        """Each question in the model's chat form, with the placeholder of one picture."""
        tokenizer, chats = self.processor.tokenizer, []
        for question in questions:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            chats.append([{"role": "user", "content": content}])
        prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        begins = tokenizer(prompts[0]).input_ids[:2]
        if begins == [tokenizer.bos_token_id] * 2:  # the template writes it, too
            prompts = [prompt.removeprefix(tokenizer.bos_token) for prompt in prompts]
        return prompts

    def processed(self, images, prompts, answers):
        """What the processor makes of pictures and texts, and labels if there are answers."""
        tokenizer, texts = self.processor.tokenizer, prompts
        options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        # PaliGemma reads a prompt in both directions, an answer in one: its processor marks both
        suffixed = self.model.config.model_type == "paligemma"
        if answers is not None and suffixed:
            options["suffix"] = answers
        elif answers is not None:
            texts = []
            for prompt, answer in zip(prompts, answers):
                space = "" if prompt[-1:].isspace() else " "
                texts.append(prompt + space + answer + tokenizer.eos_token)
        with one_line("the model's processor", "reading picture and text", cure=""):
            images = [[image] for image in images]
            inputs = self.processor(images=images, text=list(texts), **options)
        ids = inputs["input_ids"] * inputs["attention_mask"]  # padding: token 0, any would do
        inputs["input_ids"] = ids
        labels = inputs.pop("labels", None)
        if answers is not None:
            if not suffixed:
                pairs = zip(tokenizer(texts).input_ids, tokenizer(prompts).input_ids)
                lengths = torch.tensor([len(text) - len(prompt) for text, prompt in pairs])
                from_end = torch.arange(ids.shape[1] - 1, -1, -1)  # L-1 … 0
                labels = ids.where(from_end < lengths[:, None], -100)
            inputs["labels"] = labels
        return inputs

    def check_text(self, text, where):
        """InputError for a question, or a prompt and its caption, that the model cannot take.

        A token is at least a byte, so few texts need counting. Where N varies, check_length()
        counts the picture's part. `where` says which text it is.
        """
        for placeholder in self.placeholders:
            if placeholder in text:
                raise InputError(f"{where} has {placeholder} in it, which stands for the picture; "
                                 "take it out")
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise InputError(f"{where} has half a character in it (a lone surrogate); take it "
                             "out") from None
        room = self.context - self.chat_tokens - (self.tokens or 0)
        if size > room and len(self.processor.tokenizer(text).input_ids) > room:
            raise InputError(f"{where} is longer than the {room} tokens left in the model's "
                             f"{self.limited_by}; shorten it")

    def check_length(self, ids):
        """InputError for too long a sequence, or a token that the model does not know."""
        L, known = ids.shape[1], len(self.model.get_input_embeddings().weight)
        if L > self.context:
            raise InputError(f"picture and text are {L} tokens, and the model's {self.limited_by} "
                             f"is {self.context}; shorten one")
        if (ids.masked_fill(ids == self.image_id, 0) >= known).any():
            raise InputError(f"the tokenizer uses tokens above the model's {known}; get both of "
                             "one model")

    def check_places(self, inputs):
        """InputError unless prompts have as many places as the model makes tokens of a picture."""
        places = self.visual(inputs).sum(1)  # (B,)
        tokens = architectures.tokens_of_each(self.model, inputs)
        if tokens is None:
            tokens = places if self.tokens is None else torch.full_like(places, self.tokens)
        wrong = (places != tokens) | (places == 0)
        if wrong.any():
            i = wrong.int().argmax()
            raise InputError(f"a prompt has {places[i]} places for {tokens[i]} visual tokens; "
                             "fix the chat template, or make the processor's files agree with "
                             "config.json")

    def dummy_inputs(self, batch=1, text_tokens=95, image_size=(672, 672)):
        """As inputs(), without a tokenizer: noise for pictures of (height, width), any text."""
        pixels, places = architectures.dummy_pixels(self.model, batch, image_size, self.tokens)
        ids = torch.ones(batch, places + text_tokens, dtype=torch.long)
        ids[:, 1:1 + places] = self.image_id
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
        return self.finish(BatchFeature(inputs))

    def finish(self, inputs):
        """Say which visual tokens of a padded row are real; all to the model's device and type."""
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[name] = value.to(self.model.dtype)
        inputs.update(ragged(self.visual(inputs).sum(1).tolist()))
        if torch.utils.data.get_worker_info():  # a worker of train.py must not touch the GPU
            return inputs
        return inputs.to(self.model.device)

    def visual(self, inputs):
        """(B, L) bool: the places of the visual tokens in the full sequence, in the order of X."""
        return inputs["input_ids"] == self.image_id

    def boxes(self, inputs):
        """(N, 4): x0, y0, x1, y1 of the first picture's tokens, 0 … 1; all 0 if one is no patch."""
        return architectures.boxes(self.model, inputs, self.tokens)

    # --- from pictures to visual tokens -----------------------------------------------------------

    def model_inputs(self, inputs):
        """What of inputs() the stock model is called with."""
        given = {name: value for name, value in inputs.items() if name not in ("labels", "valid")}
        if self.typed:
            given.setdefault("mm_token_type_ids", self.visual(inputs).int())
        return given

    @torch.no_grad()
    def intercept(self, inputs, **changes):
        """What the stock model calls its LLM with, {name: tensor}. The LLM itself does not run.

        inputs_embeds (B, L, D) and position_ids (…, B, L) are among it. Without pixels, what is at
        the picture's places means nothing. InputError for what cannot be pruned.
        """
        def stop(module, args, llm_inputs):
            raise Intercepted(llm_inputs)

        llm_inputs = {}
        hook = self.decoder.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model(**self.model_inputs(inputs) | changes, use_cache=False)
        except Intercepted as call:
            llm_inputs, = call.args
        except (ValueError, IndexError) as e:  # the stock model compares places and tokens, too
            raise InputError(f"the model cannot read picture and prompt ({short(e)}); make the "
                             "processor's files agree with config.json") from None
        finally:
            hook.remove()
        if llm_inputs.get("inputs_embeds") is None:
            raise InputError("its class gives the language model no embeddings with the picture in "
                             "them; give another model")
        kinds = torch.Tensor, dict, list, tuple
        llm_inputs = {name: value for name, value in llm_inputs.items() if isinstance(value, kinds)}
        llm_inputs.pop("cache_position", None)
        for name in llm_inputs.keys() - ROWS - PLACES - {DEEP}:
            raise InputError(f"its class gives the language model {name}, too, and how to prune "
                             "that is not known; give another model")
        mask = inputs["attention_mask"]
        positions = llm_inputs.get("position_ids", (mask.cumsum(1) - 1).clamp_min(0))
        llm_inputs["position_ids"] = positions.expand(*positions.shape[:-2], *mask.shape)
        return llm_inputs

    @torch.no_grad()
    def encode(self, inputs):
        """X (B, N, d_v): what stands at the picture's places, and what deepstack adds there."""
        llm_inputs = self.intercept(inputs)
        X = llm_inputs["inputs_embeds"][self.visual(inputs)]  # (tokens of all rows, D)
        X = torch.cat([X, *llm_inputs.get(DEEP, [])], -1)  # (tokens of all rows, d_v)
        if "valid" not in inputs:
            return X.view(len(inputs["input_ids"]), -1, self.width)
        valid = inputs["valid"]
        return X.new_zeros(*valid.shape, self.width).masked_scatter(valid[..., None], X)

    def project(self, X):
        """(B, N, d_v) -> (B, N, D), token by token: they are projected already."""
        return X

    # --- from visual tokens to an answer ----------------------------------------------------------

    def embed(self, inputs, X, keep=None):
        """The sequence for the LLM, a dict that the stock model is called with:

            inputs_embeds (B, L', D), attention_mask (B, L'), position_ids (…, B, L') (and labels)

        X (B, N, d_v) takes the picture's places. With keep (B, K), only those tokens do, so that
        L' = L - N + K, and each that stays has the position that it had in the full sequence:

            all       <s>  x0  x1  x2  Why?        keep [0, 2]    <s>  x0  x2  Why?
            position   0   1   2   3    4                          0   1   3    4

        -1 in keep stands for no token, at the left of those of an image that keeps fewer than K.
        What the LLM gets beside that, in some classes, is under "extra"; see prepared().
        """
        shown = inputs["attention_mask"].bool()  # (B, L), what the LLM is to see
        visual, first = self.visual(inputs), 0  # (B, L)
        if keep is not None:
            shown = shown & (at_places(is_kept(keep, X.shape[1]), visual) | ~visual)
        llm_inputs = self.intercept_text(inputs, None if keep is None else shown)
        llm_inputs |= {"shown": shown, "visual": visual & shown}
        llm_inputs |= {name: inputs[name] for name in ("input_ids", "labels") if name in inputs}
        if keep is not None:
            # a stable sort brings what is dropped to the left, beside the padding; else order stays
            dropped = X.shape[1] - keep.shape[1]
            if "valid" in inputs:
                dropped = (~shown).sum(1).min()
            order = shown.int().argsort(dim=1, stable=True)[:, dropped:]  # (B, L')
            llm_inputs = {name: take(value, name, order) for name, value in llm_inputs.items()}
            X = rows_at(X, keep.clamp_min(0))  # (B, K, d_v)
            first = (keep < 0).sum(1, keepdim=True)  # (B, 1), of each row's real tokens
        return self.fill(llm_inputs, X, first)

    def intercept_text(self, inputs, shown=None):
        """What the LLM is called with, of the full length L, but for the picture's embeddings.

        Positions are those of the full sequence. Masks of a class's own are made as if what is not
        shown (B, L) were padding.
        """
        text = {name: t for name, t in inputs.items() if not name.startswith("pixel")}
        llm_inputs = self.intercept(text)
        if not has_masks(llm_inputs):
            llm_inputs.pop("attention_mask", None)
        elif shown is not None:
            positions = llm_inputs["position_ids"]
            llm_inputs = self.intercept(text, attention_mask=shown.long(), position_ids=positions)
        return llm_inputs

    def fill(self, llm_inputs, X, first=0):
        """Put tokens X (B, K, d_v), from `first` (B, 1) on in each row, at the visual places."""
        shown, visual = llm_inputs.pop("shown"), llm_inputs.pop("visual")  # (B, L')
        ids, text = llm_inputs.pop("input_ids"), llm_inputs.pop("inputs_embeds")
        Z = self.project(X.to(self.model.dtype)).to(text.device)  # (B, K, D·levels)
        Z, *deep = at_places(Z, visual, first).split(text.shape[-1], -1)  # (B, L', D) each
        embeds = torch.where(visual[..., None], Z, text)  # out of place, so that gradients pass
        # the embeddings come first: from them generate() infers B
        sequence = {"inputs_embeds": embeds, "attention_mask": shown.long()}
        for name in ("position_ids", "labels"):
            if name in llm_inputs:
                sequence[name] = llm_inputs.pop(name)
        if deep:
            llm_inputs |= {"visual_pos_masks": visual, DEEP: [level[visual] for level in deep]}
        if self.by_ids:  # generate() takes no embeddings: it gets ids, and the LLM the rest
            llm_inputs["inputs_embeds"] = sequence.pop("inputs_embeds")
            sequence = {"input_ids": ids, **sequence}
        return {**sequence, "extra": llm_inputs} if llm_inputs else sequence

    @contextmanager
    def prepared(self, sequence):
        """with prepared(embed(…)) as given: the stock model can be called with **given.

        In this block its LLM gets what is extra, too, when it reads a prompt from its beginning.
        """
        given = {name: value for name, value in sequence.items() if name not in ("extra", "labels")}

        def add_extra(module, args, kwargs):
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            begins = cache is None or not cache.get_seq_length()
            return args, {**kwargs, **sequence["extra"]} if begins else kwargs

        if "extra" not in sequence:
            yield given
            return
        hook = self.decoder.register_forward_pre_hook(add_extra, with_kwargs=True)
        try:
            yield given
        finally:
            hook.remove()

    def logits(self, inputs, X, keep=None, last=0):
        """(B, L', V), or only those of the last places."""
        with self.prepared(self.embed(inputs, X, keep)) as given:
            logits = self.model(**given, use_cache=False, logits_to_keep=last).logits
        return logits[:, -last:]  # some classes give them all

    def loss(self, inputs, X, keep=None):
        """Next-token loss on the labels (the caption), in nats per token.

        NaN where a feature or logit is no number. A caption ends its row: the last logits will do.
        """
        words = int((inputs["labels"] != -100).sum(1).max())
        logits = self.logits(inputs, X, keep, words + 1)[:, :-1]  # (B, words, V), before each word
        labels = inputs["labels"][:, -words:].to(logits.device)
        logits, labels = logits[labels != -100], labels[labels != -100]
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)

    @torch.no_grad()
    def generate(self, inputs, X, keep=None, max_new_tokens=64):
        """Greedy answers, B strings: positions continue from the last original one.

        An answer ends where the model's context does. InputError for logits of NaN.
        """
        sequence = self.embed(inputs, X, keep)
        room = self.context - inputs["attention_mask"].sum(1)  # (B,)
        finite, start = [X.isfinite().all()], 0
        if self.by_ids:
            start = sequence["input_ids"].shape[1]

        def watch(ids, logits):
            finite.append(logits.amax(-1).isfinite().all())
            return logits

        def at_the_end(ids, logits, **_):
            return ids.shape[1] - start >= room

        with self.prepared(sequence) as given:
            ids = self.model.generate(
                **given, max_new_tokens=max_new_tokens, logits_processor=[watch],
                stopping_criteria=[at_the_end])
        if not all(finite):
            raise InputError("features or logits are not finite numbers: the weights are damaged, "
                             "or overflow in this number type; try --dtype float32")
        answers = self.processor.tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
        return [text.strip() for text in answers]


class Llava(VLM):
    """LLaVA-1.5: one square picture, N = 576 patches (577 with the class token of strategy 'full').

    X are the vision encoder's features, before the projector; d_v = 1024.
    """
    TOWERS = ("clip_vision_model", "siglip_vision_model")

    def __init__(self, model, processor, name):
        super().__init__(model, processor, name)
        config, vision = model.config, model.config.vision_config
        layers, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
        self.layers = [layers] if isinstance(layers, int) else layers
        self.first = int(strategy == "default")
        self.side = vision.image_size // vision.patch_size
        class_token = int(vision.model_type == "clip_vision_model")
        self.tokens = self.side ** 2 + class_token - self.first
        self.width = vision.hidden_size * len(self.layers)
        if processor:  # it must count the class token, or it lays out N - 1 places for N tokens
            processor.num_additional_image_tokens = class_token
            processor.patch_size = vision.patch_size
            processor.vision_feature_select_strategy = strategy

    @torch.no_grad()
    def encode(self, inputs):
        """X (B, N, d_v): the vision encoder's chosen layers, class token dropped; no gradient."""
        tower = self.model.model.vision_tower
        hidden = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        X = torch.cat([hidden[i] for i in self.layers], -1)
        return X[:, self.first:]

    def project(self, X):
        """The frozen projector, token by token: (B, N, d_v) -> (B, N, D)."""
        return self.model.model.multi_modal_projector(X)
