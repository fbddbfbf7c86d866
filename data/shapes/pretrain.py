"""
Train the tiny LLaVA of the embedded default from nothing (about 45 minutes on two CPU cores with bfloat16 units).

    python data/shapes/pretrain.py                      # writes data/shapes/llava/, in the llava-hf format

This is data, not method: it stands in for `llava-hf/llava-1.5-7b-hf`, which nobody wants to download to see an idea
work. Its product is committed; run this only to change it. Two stages, because end to end from scratch stalls:

  1. The vision tower alone (CLIP, with a class token), on dense labels for every patch: shape, colour, quadrant.
  2. Projector and Llama on frozen features, by next-token loss on captions and answers. All texts of a scene are
     packed behind its image, but each sees only the image and itself, at the positions it would have alone.
"""
import argparse
import io
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from tqdm import tqdm
from transformers import (CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig,
                          LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast)

from prepare import COLORS, HERE, PLACES, SHAPES, SIZE, caption, draw_scene, draw_shape, questions

PATCH = 8
GRID = SIZE // PATCH  # 12 patches a side
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
    """A stock LLaVA of 2.2M parameters: the architecture of LLaVA-1.5-7B, narrower and shallower."""
    vision = CLIPVisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=5, num_attention_heads=4,
                              image_size=SIZE, patch_size=PATCH, projection_dim=128)
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=160, intermediate_size=432, num_hidden_layers=4,
                       num_attention_heads=4, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2,
                       pad_token_id=3)
    return LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=GRID * GRID, vision_feature_layer=-2, vision_feature_select_strategy="default"))


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


def patch_labels(objects):
    """Dense labels (3, 144): shape and colour (0 is background), quadrant (the object's, or the patch's own)."""
    labels = torch.zeros(3, GRID, GRID, dtype=torch.long)
    half = torch.arange(GRID) // (GRID // 2)
    labels[2] = 2 * half[:, None] + half[None, :]
    for o in objects:
        mask = Image.new("L", (SIZE, SIZE))
        draw_shape(ImageDraw.Draw(mask), o["shape"], o["x"], o["y"], o["r"])
        covered = mask.resize((GRID, GRID), Image.Resampling.BOX)
        covered = torch.frombuffer(bytearray(covered.tobytes()), dtype=torch.uint8).view(GRID, GRID) > 64
        for row, value in enumerate((1 + SHAPES.index(o["shape"]), 1 + list(COLORS).index(o["color"]),
                                     PLACES.index(o["place"]))):
            labels[row][covered] = value
    return labels.flatten(1)


def features(tower, pixels):
    """What the projector sees: hidden_states[-2] without the class token, (B, 144, 128)."""
    return tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


def cosine(optimizer, step, steps, lr, warmup=100):
    """Linear warm-up, then a cosine to zero."""
    scale = min(1, (step + 1) / warmup) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())
    for group in optimizer.param_groups:
        group["lr"] = lr * scale


def train_vision(tower, image_processor, pixels, scenes, steps, batch=64, lr=1.5e-3):
    """Stage 1: the tower learns what stands where, patch by patch."""
    labels = torch.stack([patch_labels(objects) for objects in tqdm(scenes, desc="labels", dynamic_ncols=True)])
    sizes = (1 + len(SHAPES), 1 + len(COLORS), len(PLACES))
    heads = nn.ModuleList(nn.Linear(128, n) for n in sizes)
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], lr=lr, betas=(0.9, 0.98))
    bar = tqdm(range(steps), desc="stage 1: vision", dynamic_ncols=True)
    for step in bar:
        cosine(optimizer, step, steps, lr)
        ix = torch.randint(len(scenes), (batch,))
        y = labels[ix]  # (B, 3, 144)
        weight = 1 + 5 * (y[:, 0] > 0).float()
        with torch.autocast("cpu", torch.bfloat16):
            X = features(tower, normalise(pixels[ix], image_processor))
            logits = [head(X).float() for head in heads]
        loss = sum((F.cross_entropy(z.transpose(1, 2), y[:, k], reduction="none") * weight).mean()
                   for k, z in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            fg = y[:, 0] > 0
            right = [f"{(z.argmax(-1) == y[:, k])[fg].float().mean():.3f}" for k, z in enumerate(logits)]
            bar.set_postfix(loss=f"{loss:.3f}", shape=right[0], color=right[1], where=right[2])


def pack(objects, tokenizer, rng, image_id):
    """All texts of a scene behind its image: (ids, segment, position, target, kind), one row of lists.

    Segment 0 is what every text sees (BOS, "USER: ", the image); a text is a segment of its own, whose positions
    restart after the image; `target` is True where the token is part of an answer.
    """
    prefix = tokenizer("USER: ").input_ids + [image_id] * GRID * GRID
    rows = [(i, 0, p, False, "") for p, i in enumerate(prefix)]
    texts = {("caption", CAPTION_PROMPT, caption(objects, rng))}
    texts |= {q for _ in range(2) for q in questions(objects, rng)}
    for segment, (kind, question, answer) in enumerate(sorted(texts), 1):
        asked = tokenizer(f"\n{question} ASSISTANT:", add_special_tokens=False).input_ids
        told = tokenizer(f" {answer}", add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        for p, i in enumerate(asked + told):
            rows.append((i, segment, len(prefix) + p, p >= len(asked), kind))
    return rows


def train_language(model, tokenizer, X, scenes, steps, held_out, batch=48, lr=2e-3):
    """Stage 2: projector and Llama learn to caption and to answer; the vision tower is frozen."""
    image_id, pad = model.config.image_token_index, tokenizer.pad_token_id
    packs = [pack(s, tokenizer, random.Random(i), image_id) for i, s in enumerate(tqdm(scenes, desc="packing"))]
    llama, projector = model.model.language_model, model.model.multi_modal_projector
    learned = [p for m in (llama, projector, model.lm_head) for p in m.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)

    def logits_of(ix):
        L = max(len(packs[i]) for i in ix)
        rows = [packs[i] + [(pad, -1, 0, False, "")] * (L - len(packs[i])) for i in ix]
        ids, segment, position, target = (torch.tensor([[r[k] for r in row] for row in rows]) for k in range(4))
        seen = (segment[:, None] == 0) | (segment[:, None] == segment[:, :, None])  # (B, query, key)
        seen = (seen & torch.ones(L, L, dtype=torch.bool).tril())[:, None]
        with torch.autocast("cpu", torch.bfloat16):
            embeds = llama.embed_tokens(ids)
            embeds = embeds.masked_scatter((ids == image_id)[..., None], projector(X[ix]).to(embeds.dtype))
            hidden = llama(inputs_embeds=embeds, attention_mask=seen, position_ids=position).last_hidden_state
            hidden = hidden[:, :-1][target[:, 1:]]  # the state before each answer token
            return model.lm_head(hidden).float(), ids[:, 1:][target[:, 1:]], rows, target

    @torch.no_grad()
    def accuracy(ix):
        """Share of texts whose every token is the arg-max, by kind: exactly what greedy decoding would get right."""
        logits, ids, rows, _ = logits_of(ix)
        right, texts, at = (logits.argmax(-1) == ids).tolist(), {}, 0
        for b, row in enumerate(rows):
            for _, segment, _, is_target, kind in row:
                if is_target:
                    texts.setdefault((kind, b, segment), []).append(right[at])
                    at += 1
        kinds = sorted({k for k, *_ in texts} - {"caption"})
        return {k: sum(all(v) for t, v in texts.items() if t[0] == k) / sum(t[0] == k for t in texts) for k in kinds}

    train = torch.arange(len(scenes) - held_out)
    bar = tqdm(range(steps), desc="stage 2: language", dynamic_ncols=True)
    for step in bar:
        cosine(optimizer, step, steps, lr)
        logits, ids, *_ = logits_of(train[torch.randint(len(train), (batch,))].tolist())
        loss = F.cross_entropy(logits, ids)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss:.3f}")
        if step % 100 == 99 or step == steps - 1:
            kinds = accuracy(range(len(scenes) - held_out, len(scenes)))
            right = " ".join(f"{k} {v:.3f}" for k, v in kinds.items())
            bar.write(f"{time.strftime('%T')} step {step + 1} loss {loss:.4f} {right}")


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, default=HERE / "llava")
    ap.add_argument("--scenes", type=int, default=24000)
    ap.add_argument("--vision-steps", type=int, default=1500)
    ap.add_argument("--language-steps", type=int, default=2600)
    args = ap.parse_args()
    torch.manual_seed(0)

    processor = build_processor()
    model = build_model(processor.tokenizer)
    tower = model.model.vision_tower
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer)} words")
    pixels, scenes = draw_scenes(args.scenes, "pretrain")
    stage1 = HERE / "vision.safetensors"
    if not stage1.exists():
        train_vision(tower, processor.image_processor, pixels, scenes, args.vision_steps)
        save_file(tower.state_dict(), stage1)
    tower.load_state_dict(load_file(stage1))
    with torch.no_grad():
        X = torch.cat([features(tower, normalise(p, processor.image_processor)).bfloat16()
                       for p in tqdm(pixels.split(64), desc="features", dynamic_ncols=True)])
    train_language(model, processor.tokenizer, X, scenes, args.language_steps, held_out=200)
    model.half().save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(f"wrote {args.out}")
