"""
CUDA graphs: answers for which the GPU does not wait for Python.

A GPU does nothing by itself. Python launches every kernel, each matrix product and each sum, and
needs some ten microseconds for one; a 7B takes about 1,400 of them to read a prompt, and as many
for every further token. The GPU works off a short prompt sooner than Python can launch it, and
idles in between: there pruning saves work that nobody waited for. A CUDA graph is a recording of
launches, which kernels on which memory in which order, and a single launch replays it.

    fast = Graphs(load("llava-hf/llava-1.5-7b-hf", "cuda", torch.bfloat16))
    X = fast.encode(inputs)                             # then as with any VLM
    print(fast.generate(inputs, X, keep))

The price: a recording repeats itself to the letter. Each set of shapes needs its own; while it is
made, nothing may come from the CPU or wait for a number of the GPU's; and what Python computed
meanwhile is baked in. The model is the stock one, unpatched: it gets a StaticCache, whose memory
stays where it is, and a mask of the slots that count.
"""
import inspect
import sys
from itertools import islice

import torch
import torch.nn.functional as F
from transformers import LlamaModel, StaticCache
from transformers.cache_utils import StaticLayer

from common.files import short

CALLED = inspect.signature(LlamaModel.forward).parameters
CACHE = "cache" if "cache" in CALLED else "past_key_values"  # the second until transformers 5.23


class Graphed:
    """fn, from tensors to tensors, as CUDA graphs: one for each set of shapes, `most` of them.

    fn must give the same when it is repeated. On a CPU, or for more shapes, fn itself runs.
    RuntimeError if it cannot be recorded.
    """

    device = "cuda"
    pool = None  # memory for all graphs: they run in turn, and what they give is copied at once

    def __init__(self, fn, most=64):
        self.fn, self.most, self.recorded = fn, most, {}

    @torch.no_grad()
    def __call__(self, *tensors):
        shapes = tuple((t.shape, t.dtype) for t in tensors)
        if shapes not in self.recorded:
            if tensors[0].device.type != self.device or len(self.recorded) == self.most:
                return self.fn(*tensors)
            static = [t.clone() for t in tensors]
            self.recorded[shapes] = static, *self.record(static)
        static, replay, results = self.recorded[shapes]
        torch._foreach_copy_(static, list(tensors))
        replay()
        return [result.clone() for result in results]

    def record(self, static):
        """(a function that computes the results anew, the results): from `static`, in place."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # what the first calls set up must not be in the recording
                self.fn(*static)
        torch.cuda.current_stream().wait_stream(stream)
        Graphed.pool = Graphed.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=Graphed.pool, stream=stream):
            results = self.fn(*static)
        return graph.replay, results


class Graphs:
    """A VLM that replays graphs to encode and to generate; in all else it is the VLM it was given.

    The first answer is compared with the VLM's own. If it differs, or something cannot be recorded,
    one line says so, and from there on all is the VLM's own, eager. Always eager: pictures with
    different numbers of tokens, and what does not fit into the context or the `slots` of the cache,
    of which 1,024 take 0.54 GB a picture in a 7B.
    """

    def __init__(self, vlm, slots=1024, kind=Graphed):
        self.vlm, self.kind, self.on, self.compared = vlm, kind, True, False
        self.slots = torch.arange(slots, device=vlm.model.device)
        self.caches = {}  # one for each batch size
        self.encode_pixels = self.recorded(lambda pixels: vlm.encode({"pixel_values": pixels}))
        self.begin = kind(self._begin)
        self.read = kind(self._read)
        self.go_on = kind(self._go_on)

    def __getattr__(self, name):
        return getattr(self.vlm, name)

    def attempt(self, fast, eager):
        """fast(), or eager() once graphs are off."""
        if self.on:
            try:
                return fast()
            except RuntimeError as error:
                self.on = False
                print(f"no CUDA graphs from here on: {short(error)}", file=sys.stderr)
        return eager()

    def recorded(self, fn):
        """fn, from a tensor to a tensor, by graphs while they are on."""
        graph = self.kind(lambda t: [fn(t)])
        return lambda t: self.attempt(lambda: graph(t)[0], lambda: fn(t))

    def encode(self, inputs):
        """X (B, N, d_v), by a graph where N is fixed: other encoders copy from the CPU."""
        if self.vlm.tokens is None:
            return self.vlm.encode(inputs)
        return self.encode_pixels(inputs["pixel_values"])

    def generate(self, inputs, X, keep=None, max_new_tokens=64):
        """Greedy answers, B strings, as the VLM's."""
        def eager():
            return self.vlm.generate(inputs, X, keep, max_new_tokens)

        def fast():
            if not self.compared:  # by eight tokens: rounding alone may part long answers
                right = self.vlm.generate(inputs, self.vlm.encode(inputs), keep, 8)
                if self.answer(inputs, X, keep, 8) != right:
                    raise RuntimeError("the first answer by graphs was another")
            self.compared = True
            return self.answer(inputs, X, keep, max_new_tokens)

        whole = inputs["input_ids"].shape[1] + max(8, max_new_tokens)
        dropped = 0 if keep is None else X.shape[1] - keep.shape[1]
        fits = whole <= self.vlm.context and whole - dropped + 31 <= len(self.slots)  # 31: padding
        if "valid" in inputs or not fits:
            return eager()
        return self.attempt(fast, eager)

    def answer(self, inputs, X, keep, max_new_tokens):
        """As generate(), by graphs alone. RuntimeError where logits are no numbers."""
        config = self.vlm.model.generation_config
        ends = torch.tensor(config.eos_token_id, device=X.device)
        done = torch.zeros(len(X), 1, dtype=torch.bool, device=X.device)
        words = []
        for token in islice(self.stream(inputs, X, keep), max_new_tokens):
            words.append(token.masked_fill(done, config.pad_token_id))
            done |= torch.isin(token, ends)
            if done.all():  # the one wait for the GPU in a token
                break
        words = torch.cat(words, 1)  # (B, T)
        if (words < 0).any():
            raise RuntimeError("features or logits are not finite numbers")
        texts = self.vlm.processor.tokenizer.batch_decode(words, skip_special_tokens=True)
        return [text.strip() for text in texts]

    @torch.no_grad()
    def stream(self, inputs, X, keep=None):
        """The answers' tokens (B, 1) one by one, without an end; -1 where logits are no numbers."""
        B, N, _ = X.shape  # images, visual tokens
        if keep is None:
            keep = torch.arange(N, device=X.device).expand(B, -1)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        length = ids.shape[1] - N + keep.shape[1]  # L'
        more = -length % 32  # padding at the left: few lengths, few graphs
        if self.vlm.tokens:
            rows = F.pad(ids, (more, 0)), F.pad(mask, (more, 0))
            token, start, position = self.begin(X, keep, *rows)
        else:  # embed() copies from the CPU
            sequence = self.vlm.embed(inputs, X, keep)
            if sequence.keys() != {"inputs_embeds", "attention_mask", "position_ids"}:
                raise RuntimeError("the language model is told more than embeddings")
            embeds, *rows = sequence.values()
            embeds = F.pad(embeds, (0, 0, more, 0))
            rows = [F.pad(row, (more, 0)) for row in rows]
            token, start, position = self.read(embeds, *rows)
        slot = self.slots[length + more:][:1]
        while True:
            yield token
            position = position + 1
            token, = self.go_on(token, slot, start, position)
            slot = slot + 1

    # --- what is recorded -----------------------------------------------------------------------

    def _begin(self, X, keep, ids, mask):
        """As _read(), of a sequence that is put together here."""
        return self._read(**self.vlm.embed({"input_ids": ids, "attention_mask": mask}, X, keep))

    def _read(self, inputs_embeds, attention_mask, position_ids):
        """A prompt (B, L', D): the next token, rows' first slots (B,), last positions (…, B, 1)."""
        mask = attention_mask.bool()
        own = self.slots[:mask.shape[1], None]  # (L', 1)
        real = F.pad(mask, (0, len(self.slots) - len(own)))[:, None]  # (B, 1, slots)
        # padding sees itself: a row of attention that sees nothing is NaN, and NaN spreads
        seen = (self.slots <= own) & real | (self.slots == own)  # (B, L', slots)
        token = self._next(own[0], seen, inputs_embeds=inputs_embeds, position_ids=position_ids)
        return token, mask.int().argmax(1), position_ids[..., -1:].clone()

    def _go_on(self, token, slot, start, position):
        """The token after `token` (B, 1), which goes to the cache's `slot` (1,)."""
        seen = (self.slots <= slot) & (self.slots >= start[:, None])  # (B, slots)
        token = token.clamp_min(0)
        return [self._next(slot, seen[:, None], input_ids=token, position_ids=position)]

    def _next(self, slot, seen, **inputs):
        """The token after the inputs, which fill the cache from `slot` on; seen (B, L, slots)."""
        B, model = len(seen), self.vlm.model
        if B not in self.caches:
            text = model.config.get_text_config()
            self.caches[B] = StaticCache(text, max_cache_len=len(self.slots))
        for layer in self.caches[B].layers:
            if type(layer) is not StaticLayer:
                raise RuntimeError("not all layers have full attention")
            layer.cumulative_length.copy_(slot[0])  # its own count would rise with every replay
        options = {CACHE: self.caches[B], "logits_to_keep": 1}
        logits = model(**inputs, attention_mask=seen[:, None], **options).logits[:, -1]  # (B, V)
        finite = logits.amax(-1, keepdim=True).isfinite()
        return logits.argmax(-1, keepdim=True).masked_fill(~finite, -1)
