"""
Train a tiny LLaVA like the embedded default's from nothing, on two CPU cores. Data, not method.

    python -m data.shapes.pretrain         # writes out/llava/, as llava-hf does; resumes if killed

It takes two stages, since end to end it stalls. The model in git comes from the same stages, but in
pieces (results/RESULTS.md):

  1. The vision tower alone: CLIP, with a class token. Each patch predicts its shape, colour,
     quadrant and own pixels. The class token predicts what is in the picture, so that its attention
     means something.
  2. Projector and Llama on frozen features, by next-token loss on captions and answers. All texts
     of a scene are packed behind its image, but each sees only the image and itself, at the
     positions it would have alone. In most steps the LLM sees a subset of the visual tokens: a VLM
     that has always seen all of them fails when some are gone.
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
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig,
                          LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast)

from common.files import cli, write
from common.processes import Processes
from common.run import Run
from data.shapes.prepare import (COLORS, FOLDER, PLACES, SHAPES, SIZE, STRANGE, caption, draw_scene,
                                 draw_shape, place_objects, place_strangers, questions)

PATCH = 8
GRID = SIZE // PATCH  # 12 patches a side
N = GRID * GRID  # visual tokens
COLOR_NAMES = list(COLORS)
ALL_SHAPES = SHAPES + STRANGE
CAPTION_PROMPT = "Describe the image."
SCENES = 24000
STEPS = {  # of stage 1, and of the two rounds of stage 2
    "vision": 2600,
    "language": 2200,
    "exists": 1400,
}


# --- a stock LLaVA, small -------------------------------------------------------------------------

def build_processor():
    """Byte-level BPE, so any text can be encoded; CLIP's image processor; llava-hf's template."""
    texts = []
    for i in range(3000):
        objects = place_objects(random.Random(f"tokenizer-{i}"))
        rng = random.Random(i)
        texts.append(f"USER: \n{CAPTION_PROMPT} ASSISTANT: {caption(objects, rng)}")
        for _, question, answer in questions(objects, rng):
            texts.append(f"USER: \n{question} ASSISTANT: {answer}")
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, 512, min_frequency=0, show_progress=False,
                            special_tokens=special)
    bpe.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=1024,
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
    template = (FOLDER / "llava/chat_template.jinja").read_text()
    return LlavaProcessor(images, tokenizer, PATCH, "default", template,
                          num_additional_image_tokens=1)


def build_model(tokenizer):
    """A stock LLaVA of 2.4M parameters: LLaVA-1.5-7B's, but narrow and shallow, heads of 32."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=128,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=5,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=N,
    ))


# --- what there is to learn -----------------------------------------------------------------------

def scenes_to_learn(n, image_processor, split="pretrain"):
    """Draw n scenes: pictures (n, 3, 96, 96) as the processor gives them, the objects of each, and
    labels (n, 4, 144) of the patches."""
    pixels = torch.empty(n, 3, SIZE, SIZE, dtype=torch.half)
    scenes = []
    labels = []
    for i in tqdm(range(n), desc="drawing scenes", dynamic_ncols=True):
        image, objects = draw_scene(f"{split}-{i}")
        file = io.BytesIO()
        image.save(file, "JPEG", quality=92)  # as the files on disk
        pixels[i] = image_processor(Image.open(file), return_tensors="pt").pixel_values[0]
        scenes.append(objects)
        labels.append(label_patches(objects, place_strangers(f"{split}-{i}")))
    return pixels, scenes, torch.stack(labels)


def label_patches(objects, strangers):
    """(4, 144): each patch's shape and colour (0: background), object (0: none), and quadrant.

    A patch is of the uppermost thing that covers a quarter of it. On an object the quadrant is the
    object's, elsewhere the patch's own.
    """
    half = torch.arange(GRID) // (GRID // 2)  # 0 in the upper or left half, 1 in the other
    labels = torch.zeros(4, N, dtype=torch.uint8)
    labels[3] = (2 * half[:, None] + half).flatten()
    for thing in strangers + objects:  # in the order they were drawn
        mask = Image.new("L", (SIZE, SIZE))
        draw_shape(ImageDraw.Draw(mask), thing, 255, scale=1)
        shares = mask.resize((GRID, GRID), Image.BOX)
        covered = torch.tensor(list(shares.tobytes())) > 64  # (144,)
        labels[0, covered] = ALL_SHAPES.index(thing["shape"]) + 1
        if thing in strangers:
            labels[1, covered] = len(COLORS) + int(6 * thing["tone"]) + 1
        else:
            labels[1, covered] = COLOR_NAMES.index(thing["color"]) + 1
            labels[2, covered] = objects.index(thing) + 1
            labels[3, covered] = PLACES.index(thing["place"])
    return labels


def content(objects):
    """What the class token predicts (54,): which colour has which shape (30), which shape is where
    (20), and how many there are (4)."""
    facts = torch.zeros(54)
    for o in objects:
        shape = SHAPES.index(o["shape"])
        facts[5 * COLOR_NAMES.index(o["color"]) + shape] = 1
        facts[30 + 4 * shape + PLACES.index(o["place"])] = 1
    facts[49 + len(objects)] = 1
    return facts


def descend(folder, modules, loss_at, steps, lr, weight_decay):
    """Minimise loss_at(step) by AdamW: a linear warm-up, then a cosine to zero.

    A run that was killed resumes from its folder.
    """
    optimizer = torch.optim.AdamW(modules.parameters(), lr, (0.9, 0.98), weight_decay=weight_decay)
    resume = (folder / "checkpoint.safetensors").exists()
    run = Run(folder, {"steps": steps, "batch": 1}, Processes("cpu"), resume)
    run.hold(modules, optimizer, {})
    for step in run.steps(steps, save_every=200):
        torch.manual_seed(step)
        random.seed(step)
        warm_up = min(1, (step + 1) / 100)
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * warm_up * cosine
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        run.bar.set_postfix(stage=folder.name, loss=f"{loss:.3f}")


# --- stage 1: the vision tower --------------------------------------------------------------------

def train_vision(folder, tower, pixels, scenes, labels, steps, batch=48):
    """The tower learns what is where, patch by patch, and in its class token what there is."""
    facts = torch.stack([content(objects) for objects in scenes])  # (scenes, 54)
    heads = nn.ModuleDict({
        "shape": nn.Linear(128, 1 + len(ALL_SHAPES)),
        "color": nn.Linear(128, 1 + 2 * len(COLORS)),
        "where": nn.Linear(128, len(PLACES)),
        "pixels": nn.Linear(128, 3 * PATCH * PATCH),
        "content": nn.Linear(128, facts.shape[1]),
    })

    def loss_at(step):
        ix = torch.randint(len(scenes), (batch,))
        shape, color, _, quadrant = labels[ix].long().unbind(1)  # (B, 144) each
        images = pixels[ix].float()
        X = tower(images, output_hidden_states=True).hidden_states[-2]  # (B, 145, 128), LLaVA's
        cls = X[:, 0]
        X = X[:, 1:]  # (B, 144, 128)
        weight = 1 + 5 * (shape > 0).float()  # things count more than background
        loss = 0
        for name, label in (("shape", shape), ("color", color), ("where", quadrant)):
            of_each = F.cross_entropy(heads[name](X).mT, label, reduction="none")  # (B, 144)
            loss = loss + (of_each * weight).mean()
        patches = F.unfold(images, PATCH, stride=PATCH).mT  # (B, 144, 192)
        loss = loss + 2 * F.mse_loss(heads["pixels"](X), patches)
        return loss + 10 * F.binary_cross_entropy_with_logits(heads["content"](cls), facts[ix])

    modules = nn.ModuleDict({"tower": tower, "heads": heads})
    descend(folder, modules, loss_at, steps, lr=1.5e-3, weight_decay=0.01)


@torch.no_grad()
def features(tower, pixels):
    """X (scenes, N, 128) of all scenes, in bfloat16: they fill the memory."""
    X = []
    for images in tqdm(pixels.split(64), desc="features", dynamic_ncols=True):
        hidden = tower(images.float(), output_hidden_states=True).hidden_states[-2]
        X.append(hidden[:, 1:].bfloat16())
    return torch.cat(X)


# --- stage 2: projector and Llama -----------------------------------------------------------------

def pack(objects, tokenizer, rng, start, exists):
    """All texts of a scene, packed: (T, 4), a row for each token of id, segment, position, target.

    Each text is a segment of its own, whose positions begin at `start`; target is 1 where a token
    belongs to an answer. Beside the caption there are two questions of each kind, or with `exists`
    one of each and five more of that kind, which is learned last.
    """
    texts = {("caption", CAPTION_PROMPT, caption(objects, rng)), *questions(objects, rng)}
    if exists:
        texts |= {questions(objects, rng)[-1] for _ in range(5)}
    else:
        texts |= set(questions(objects, rng))
    rows = []
    for segment, (_, question, answer) in enumerate(sorted(texts)):
        prompt = tokenizer(f"\n{question} ASSISTANT:", add_special_tokens=False).input_ids
        answer = tokenizer(f" {answer}", add_special_tokens=False).input_ids
        for p, token in enumerate([*prompt, *answer, tokenizer.eos_token_id]):
            rows.append((token, segment, start + p, p >= len(prompt)))
    return torch.tensor(rows)


def subset(x, region, K):
    """K of the visual tokens, ascending. x (N, d): their features; region (N,): the object of each.

    One of three ways: uniform; along a random direction of the features, whatever it prefers; or
    each object thinned at its own rate. The last two leave some of each object. With uniform ones
    alone the LLM counts by the mass of object tokens.
    """
    way = random.randrange(3)
    score = -(-torch.rand(N).clamp_min(1e-9).log()).log()  # Gumbel noise: uniform without more
    if way == 1:
        z = ((x - x.mean(0)) / (x.std(0) + 1e-3)) @ torch.randn(x.shape[1])
        strength = math.exp(random.uniform(math.log(0.5), math.log(4)))
        score += (z - z.mean()) / z.std() * strength
    elif way == 2:
        score += (2 * torch.randn(int(region.max()) + 1))[region]
    if way:
        for o in region[region > 0].unique():
            best = score.masked_fill(region != o, -torch.inf).argmax()
            score[best] = torch.inf
    return score.topk(K).indices.sort().values


def visible(segment, P):
    """The attention mask (B, 1, L, L) of packed texts (B, T) behind a prefix of P tokens.

    Causal; and a text sees the prefix and itself, but no other text.
    """
    segment = F.pad(segment, (P, 0), value=-2)  # (B, L), the prefix is -2
    prefix = segment[:, None] == -2  # (B, 1, L)
    itself = segment[:, None] == segment[:, :, None]  # (B, query, key)
    return (prefix | itself).tril()[:, None]


def train_language(folder, model, tokenizer, X, scenes, regions, steps, exists, batch=40):
    """Projector and Llama learn to caption and to answer, from all or some frozen features."""
    llama = model.model.language_model
    projector = model.model.multi_modal_projector
    before = torch.tensor(tokenizer("USER: ").input_ids)  # what stands before the image
    start = len(before)  # the position of the first visual token
    packs = []
    for i, objects in enumerate(tqdm(scenes, desc="packing", dynamic_ncols=True)):
        packs.append(pack(objects, tokenizer, random.Random(i), start + N, exists))

    def loss_at(step):
        K = N
        if random.random() < 0.6:
            K = round(8 * (N / 8) ** random.random())
        ix = torch.randint(len(scenes), (batch,))
        x = X[ix].float()  # (B, N, d)
        keep = torch.stack([subset(xs, regions[i].long(), K) for xs, i in zip(x, ix)])  # (B, K)
        x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))  # (B, K, d)

        texts = pad_sequence([packs[i] for i in ix], batch_first=True, padding_value=-1)
        ids, segment, position, target = texts.unbind(-1)  # (B, T) each
        front = llama.embed_tokens(before).expand(batch, -1, -1)
        words = llama.embed_tokens(ids.clamp_min(0))
        embeds = torch.cat([front, projector(x), words], 1)  # (B, L, D)
        positions = torch.cat([torch.arange(start).expand(batch, -1), start + keep, position], 1)
        mask = visible(segment, start + K)
        hidden = llama(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
        hidden = hidden.last_hidden_state[:, start + K:-1]  # (B, T-1, D), each predicts the next
        answer = target[:, 1:] == 1
        return F.cross_entropy(model.lm_head(hidden[answer]), ids[:, 1:][answer])

    modules = nn.ModuleList([llama, projector, model.lm_head])
    descend(folder, modules, loss_at, steps, lr=2e-3, weight_decay=0.05)


def main():
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, default=Path("out/llava"), metavar="DIR",
                    help="folder to write to; checkpoints go beside it (default: %(default)s)")
    out = ap.parse_args().out
    work = out.with_name("pretrain")
    torch.manual_seed(0)

    processor = build_processor()
    processor.save_pretrained(out)  # a folder that cannot be written is found out now
    model = build_model(processor.tokenizer)
    tower = model.model.vision_tower
    pixels, scenes, labels = scenes_to_learn(SCENES, processor.image_processor)
    train_vision(work / "vision", tower, pixels, scenes, labels, STEPS["vision"])
    X = features(tower, pixels)
    for name in ("language", "exists"):
        train_language(work / name, model, processor.tokenizer, X, scenes, labels[:, 2],
                       STEPS[name], exists=name == "exists")
    model.half().save_pretrained(out)
    weights = {}
    for name, t in load_file(out / "model.safetensors").items():
        name = name.replace("vision_tower.", "vision_tower.vision_model.")  # as llava-hf's
        weights[name] = t
    write(out / "model.safetensors", weights, {"format": "pt"})


if __name__ == "__main__":
    cli(main)
