"""
Train the tiny LLaVA of the embedded default from nothing, on two CPU cores.

    python -m data.shapes.pretrain         # writes data/shapes/llava/, in the llava-hf format; resumes if killed

This is data, not method: it stands in for `llava-hf/llava-1.5-7b-hf`, which nobody wants to download to see an idea
work. Its product is committed; run this only to change it. Two stages, because end to end from scratch stalls:

  1. The vision tower alone (CLIP, with a class token). Every patch tells its shape, colour, quadrant and own pixels;
     the class token tells what is in the picture, so that its attention means something.
  2. Projector and Llama on frozen features, by next-token loss on captions and answers. All texts of a scene are
     packed behind its image, but each sees only the image and itself, at the positions it would have alone.
     In most steps the LLM sees a subset of the visual tokens: a VLM that never missed a token cannot do without one.
"""
import argparse
import io
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig,
                          LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast)

from data.files import cli, write
from data.processes import Processes
from data.run import Run
from data.shapes.prepare import (COLORS, FOLDER, NUMBERS, PLACES, SHAPES, SIZE, caption, draw_scene, draw_shape,
                                 questions)

PATCH = 8
GRID = SIZE // PATCH  # 12 patches a side
N = GRID * GRID
CAPTION_PROMPT = "Describe the image."

# llava-hf/llava-1.5-7b-hf's own chat template: USER: <image>\n{question} ASSISTANT: {answer}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_processor():
    """Byte-level BPE tokenizer (any text can be encoded) with CLIP's image processor, as one LlavaProcessor."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = []
    for i in range(3000):
        _, objects = draw_scene(f"tokenizer-{i}")
        rng = random.Random(i)
        texts.append(f"USER: \n{CAPTION_PROMPT} ASSISTANT: {caption(objects, rng)}")
        texts += [f"USER: \n{q} ASSISTANT: {a}" for _, q, a in questions(objects, rng)]
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<unk>", "<s>", "</s>", "<pad>", "<image>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   pad_token="<pad>", padding_side="left", model_max_length=1024,
                                   extra_special_tokens={"image_token": "<image>"})
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return LlavaProcessor(images, fast, patch_size=PATCH, vision_feature_select_strategy="default",
                          num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE)


def build_model(tokenizer):
    """A stock LLaVA of 2.4M parameters: the architecture of LLaVA-1.5-7B, narrower and shallower, heads of 32."""
    vision = CLIPVisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=5, num_attention_heads=4,
                              image_size=SIZE, patch_size=PATCH, projection_dim=128, hidden_act="gelu")
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=160, intermediate_size=432, num_hidden_layers=4,
                       num_attention_heads=5, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2,
                       pad_token_id=3)
    return LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=N, vision_feature_layer=-2, vision_feature_select_strategy="default"))


def draw_scenes(n, name):
    """Draw n scenes. Returns (pictures as uint8 (n, 3, 96, 96), objects of each)."""
    pixels, scenes = torch.empty(n, 3, SIZE, SIZE, dtype=torch.uint8), []
    for i in tqdm(range(n), desc=f"drawing {name}", dynamic_ncols=True):
        image, objects = draw_scene(f"{name}-{i}")
        file = io.BytesIO()
        image.save(file, "JPEG", quality=92)  # the files on disk went through JPEG too
        image = Image.open(file).convert("RGB")
        pixels[i] = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3).permute(2, 0, 1)
        scenes.append(objects)
    return pixels, scenes


def normalise(pixels, image_processor):
    """uint8 (B, 3, H, W) -> what the image processor makes of the same picture."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (image_processor.image_mean, image_processor.image_std))
    return (pixels / 255 - mean) / std


def features(tower, shown):
    """What LLaVA reads: hidden_states[-2] with the class token, (B, 145, 128). The last block is never used."""
    x = tower.pre_layrnorm(tower.embeddings(shown))
    for block in tower.encoder.layers[:-1]:
        x = block(x, None)
    return x


def patch_labels(objects):
    """Dense labels (4, 144): shape, colour and object (0 is background); quadrant (the object's, or the patch's)."""
    labels = torch.zeros(4, GRID, GRID, dtype=torch.uint8)
    half = torch.arange(GRID) // (GRID // 2)
    labels[3] = 2 * half[:, None] + half[None, :]
    for number, o in enumerate(objects, 1):
        mask = Image.new("L", (SIZE, SIZE))
        draw_shape(ImageDraw.Draw(mask), o["shape"], o["x"], o["y"], o["r"], 255)
        covered = mask.resize((GRID, GRID), Image.Resampling.BOX)
        covered = torch.frombuffer(bytearray(covered.tobytes()), dtype=torch.uint8).view(GRID, GRID) > 64
        for row, value in enumerate((1 + SHAPES.index(o["shape"]), 1 + list(COLORS).index(o["color"]), number,
                                     PLACES.index(o["place"]))):
            labels[row][covered] = value
    return labels.flatten(1)


def content(objects):
    """What the class token must tell (54,): which colour has which shape, which shape is where, and how many."""
    pairs, places, number = torch.zeros(6, 5), torch.zeros(5, 4), torch.zeros(len(NUMBERS) - 1)
    for o in objects:
        shape = SHAPES.index(o["shape"])
        pairs[list(COLORS).index(o["color"]), shape] = 1
        places[shape, PLACES.index(o["place"])] = 1
    number[len(objects) - 1] = 1
    return torch.cat([pairs.flatten(), places.flatten(), number])


def cosine(optimizer, step, steps, lr, warmup=100):
    """Linear warm-up, then a cosine to zero."""
    scale = min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = lr * scale


def steps_of(out, name, steps, learned, optimizer):
    """The steps that are left of a stage, whose checkpoint is in out/name: a killed run resumes."""
    there = (out / name / "checkpoint.safetensors").exists()
    run = Run(out / name, {"batch": 1}, Processes("cpu"), resume=there)
    run.hold(learned, optimizer, {})
    return run.steps(steps, save_every=200)


def train_vision(out, tower, image_processor, pixels, scenes, labels, steps, batch=48, lr=1.5e-3):
    """Stage 1: the tower learns what stands where, patch by patch, and in its class token what there is."""
    told = torch.stack([content(objects) for objects in scenes])  # (scenes, 54)
    sizes = {"shape": 1 + len(SHAPES), "color": 1 + len(COLORS), "where": len(PLACES)}
    heads = nn.ModuleDict({name: nn.Linear(128, n) for name, n in sizes.items()} | {
        "pixels": nn.Linear(128, 3 * PATCH * PATCH), "content": nn.Linear(128, told.shape[1])})
    learned = nn.ModuleDict({"tower": tower, "heads": heads})
    for p in (*tower.encoder.layers[-1].parameters(), *tower.post_layernorm.parameters()):
        p.requires_grad_(False)  # LLaVA reads the layer before
    optimizer = torch.optim.AdamW(learned.parameters(), lr=lr, betas=(0.9, 0.98))
    for step in steps_of(out, "vision", steps, learned, optimizer):
        torch.manual_seed(step)
        cosine(optimizer, step, steps, lr)
        ix = torch.randint(len(scenes), (batch,))
        y = labels[ix].long()[:, [0, 1, 3]]  # (B, 3, 144)
        weight = 1 + 5 * (y[:, 0] > 0).float()
        shown = normalise(pixels[ix], image_processor)
        X = features(tower, shown)  # (B, 145, 128)
        logits = [heads[name](X[:, 1:]) for name in sizes]
        dense = sum((F.cross_entropy(z.mT, y[:, k], reduction="none") * weight).mean() for k, z in enumerate(logits))
        own = F.mse_loss(heads["pixels"](X[:, 1:]), F.unfold(shown, PATCH, stride=PATCH).mT)
        cls = F.binary_cross_entropy_with_logits(heads["content"](X[:, 0]), told[ix])
        loss = dense + 2 * own + 10 * cls
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            on = y[:, 0] > 0
            right = {name: f"{(z.argmax(-1) == y[:, k])[on].float().mean():.3f}"
                     for k, (name, z) in enumerate(zip(sizes, logits))}
            tqdm.write(f"step {step} loss {loss:.3f} own {own:.3f} cls {cls:.3f} {right}")


def pack(objects, tokenizer, rng, start):
    """All texts of a scene that stand behind its image: (rows (4, T): id, segment, position, target; kinds).

    Each text is a segment of its own, whose positions begin at `start`; target is 1 where a token is of an answer.
    """
    rows, kinds = [], []
    texts = {("caption", CAPTION_PROMPT, caption(objects, rng))}
    texts |= {q for _ in range(2) for q in questions(objects, rng)}
    for segment, (kind, question, answer) in enumerate(sorted(texts)):
        asked = tokenizer(f"\n{question} ASSISTANT:", add_special_tokens=False).input_ids
        said = tokenizer(f" {answer}", add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        rows += [(i, segment, start + p, p >= len(asked)) for p, i in enumerate(asked + said)]
        kinds.append(kind)
    return torch.tensor(rows).T, kinds


def subset(x, region, K):
    """K of the visual tokens, ascending: x (N, d) their features, region (N,) which object each lies on.

    A third each. Uniform; along a random direction of the features, whatever that prefers; or object by object, each
    thinned at its own rate but none emptied. With uniform ones alone the LLM counts by the mass of object tokens.
    """
    gumbel, kind = -(-torch.rand(N).clamp_min(1e-9).log()).log(), random.randrange(3)
    score = gumbel
    if kind == 1:
        z = ((x - x.mean(0)) / (x.std(0) + 1e-3)) @ torch.randn(x.shape[1])
        score = gumbel + (z - z.mean()) / z.std() * math.exp(random.uniform(math.log(0.5), math.log(4)))
    elif kind == 2:
        score = gumbel + (2 * torch.randn(int(region.max()) + 1))[region]
        for o in range(1, int(region.max()) + 1):
            mine = (region == o).nonzero()[:, 0]
            if len(mine):
                score[mine[score[mine].argmax()]] = torch.inf
    return score.topk(K).indices.sort().values


def train_language(out, model, tokenizer, X, scenes, regions, steps, held_out=200, batch=40, lr=2e-3):
    """Stage 2: projector and Llama learn to caption and to answer, from all or some of the frozen features."""
    llama, projector = model.model.language_model, model.model.multi_modal_projector
    before = torch.tensor(tokenizer("USER: ").input_ids)  # what stands before the image
    packs = [pack(objects, tokenizer, random.Random(i), len(before) + N)
             for i, objects in enumerate(tqdm(scenes, desc="packing", dynamic_ncols=True))]
    learned = nn.ModuleDict({"llama": llama, "projector": projector, "head": model.lm_head})
    optimizer = torch.optim.AdamW(learned.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)

    def logits_of(ix, K=N):
        """Logits at the answers' tokens, those tokens, and (row, segment) of each; K visual tokens are seen."""
        texts = pad_sequence([packs[i][0].T for i in ix], batch_first=True, padding_value=-1)  # (B, T, 4)
        ids, segment, position, target = texts.unbind(-1)
        x = X[ix].float()  # (B, N, d)
        every = torch.arange(N).expand(len(ix), -1)
        keep = every if K == N else torch.stack([subset(xs, regions[i].long(), K) for xs, i in zip(x, ix)])  # (B, K)
        x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))  # (B, K, d)
        front, B, P = llama.embed_tokens(before).expand(len(ix), -1, -1), len(ix), len(before) + K
        embeds = torch.cat([front, projector(x), llama.embed_tokens(ids.clamp_min(0))], 1)  # (B, L, D)
        positions = torch.cat([torch.arange(len(before)).expand(B, -1), len(before) + keep, position.clamp_min(0)], 1)
        segments = F.pad(segment, (P, 0), value=-2)  # what every text sees
        seen = (segments[:, None] == -2) | (segments[:, None] == segments[:, :, None])  # (B, query, key)
        seen = seen & torch.ones(seen.shape[1:], dtype=torch.bool).tril()
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]  # (B, 1, L, L)
        hidden = llama(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).last_hidden_state[:, P:]
        said = target[:, 1:] == 1  # by the state before it
        places = zip(said.nonzero()[:, 0].tolist(), segment[:, 1:][said].tolist())
        return model.lm_head(hidden[:, :-1][said]), ids[:, 1:][said], list(places)

    @torch.no_grad()
    def accuracy(ix):
        """Share of texts whose every token is the arg-max, by kind: exactly what greedy decoding would get right."""
        right = {}
        for part in ix.split(50):
            logits, ids, places = logits_of(part)
            for ok, (b, s) in zip((logits.argmax(-1) == ids).tolist(), places):
                right.setdefault((packs[part[b]][1][s], int(part[b]), s), []).append(ok)
        kinds = sorted({kind for kind, *_ in right})
        by = {kind: [all(ok) for text, ok in right.items() if text[0] == kind] for kind in kinds}
        return " ".join(f"{kind} {sum(ok) / len(ok):.3f}" for kind, ok in by.items())

    for step in steps_of(out, "language", steps, learned, optimizer):
        torch.manual_seed(step)
        random.seed(step)
        cosine(optimizer, step, steps, lr)
        K = round(8 * (N / 8) ** random.random()) if random.random() < 0.6 else N
        logits, ids, _ = logits_of(torch.randint(len(scenes) - held_out, (batch,)), K)
        loss = F.cross_entropy(logits, ids)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 199 or step == steps - 1:
            tqdm.write(f"step {step + 1} loss {loss:.4f} K {K} " + accuracy(torch.arange(len(scenes))[-held_out:]))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, default=FOLDER / "llava", help="folder to write to (%(default)s)")
    ap.add_argument("--work", type=Path, default=Path("out/pretrain"), help="folder of checkpoints, from which a "
                    "killed run resumes (%(default)s)")
    ap.add_argument("--scenes", type=int, default=24000, help="scenes to learn from (%(default)s)")
    ap.add_argument("--vision-steps", type=int, default=1300, help="steps of stage 1 (%(default)s)")
    ap.add_argument("--language-steps", type=int, default=2200, help="steps of stage 2 (%(default)s)")
    args = ap.parse_args()
    torch.manual_seed(0)

    processor = build_processor()
    model = build_model(processor.tokenizer)
    tower = model.model.vision_tower
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer)} words")
    pixels, scenes = draw_scenes(args.scenes, "pretrain")
    labels = torch.stack([patch_labels(objects) for objects in tqdm(scenes, desc="labels", dynamic_ncols=True)])
    train_vision(args.work, tower, processor.image_processor, pixels, scenes, labels, args.vision_steps)
    with torch.no_grad():
        X = torch.cat([features(tower, normalise(p, processor.image_processor))[:, 1:].bfloat16()
                       for p in tqdm(pixels.split(64), desc="features", dynamic_ncols=True)])
    train_language(args.work, model, processor.tokenizer, X, scenes, labels[:, 2], args.language_steps)
    model.half().save_pretrained(args.out)
    processor.save_pretrained(args.out)
    weights = {name.replace("vision_tower.", "vision_tower.vision_model."): t  # as llava-hf's are named on the hub
               for name, t in load_file(args.out / "model.safetensors").items()}
    write(args.out / "model.safetensors", weights, {"format": "pt"})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli(main)
