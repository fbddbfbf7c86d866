"""
Train a tiny LLaVA like the embedded default's from nothing, on two CPU cores. This is data, not method.

    python -m data.shapes.pretrain         # writes out/llava/, in the llava-hf format; resumes if killed

Two stages, since end to end it stalls. The model in git was made by them, too, but in pieces (results/RESULTS.md):

  1. The vision tower alone (CLIP, with a class token). Every patch tells its shape, colour, quadrant and own pixels;
     the class token tells what is in the picture, so that its attention means something.
  2. Projector and Llama on frozen features, by next-token loss on captions and answers. All texts of a scene are
     packed behind its image, but each sees only the image and itself, at the positions it would have alone.
     In most steps the LLM sees a subset of the visual tokens: a VLM that has always seen all fails when some are gone.
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
from data.shapes.prepare import (COLORS, FOLDER, PLACES, SHAPES, SIZE, STRANGE, caption, draw_scene, draw_shape,
                                  place_objects, place_strangers, questions)

PATCH = 8
GRID = SIZE // PATCH  # 12 patches a side
N = GRID * GRID
CAPTION_PROMPT = "Describe the image."


def build_processor():
    """Byte-level BPE tokenizer (any text can be encoded), CLIP's image processor and llava-hf's chat template."""
    tokenizer, texts = ByteLevelBPETokenizer(), []
    for i in range(3000):
        objects, rng = place_objects(random.Random(f"tokenizer-{i}")), random.Random(i)
        said = [(CAPTION_PROMPT, caption(objects, rng)), *(q[1:] for q in questions(objects, rng))]
        texts += [f"USER: \n{question} ASSISTANT: {answer}" for question, answer in said]
    tokenizer.train_from_iterator(texts, vocab_size=512, min_frequency=0, show_progress=False,
                                  special_tokens=["<unk>", "<s>", "</s>", "<pad>", "<image>"])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>", pad_token="<pad>", padding_side="left", model_max_length=1024,
                                   extra_special_tokens={"image_token": "<image>"})
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    template = (FOLDER / "llava/chat_template.jinja").read_text()
    return LlavaProcessor(images, fast, PATCH, "default", template, num_additional_image_tokens=1)


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


def scenes_to_learn(n, image_processor, split="pretrain"):
    """Draw n scenes: pictures (n, 3, 96, 96) as the processor gives them, the objects of each, and labels.

    (n, 4, 144) of each patch: shape and colour (a stranger's, too), object, 0 for none, quadrant (its object's or own).
    """
    pixels, scenes, half = torch.empty(n, 3, SIZE, SIZE, dtype=torch.half), [], torch.arange(GRID) // (GRID // 2)
    labels = torch.zeros(n, 4, N, dtype=torch.uint8)
    labels[:, 3] = (2 * half[:, None] + half).flatten()
    for i in tqdm(range(n), desc="drawing scenes", dynamic_ncols=True):
        (image, objects), file = draw_scene(f"{split}-{i}"), io.BytesIO()
        image.save(file, "JPEG", quality=92)  # as the files on disk
        pixels[i] = image_processor(Image.open(file), return_tensors="pt").pixel_values[0]
        scenes.append(objects)
        for o in place_strangers(f"{split}-{i}") + objects:  # as they lie on each other
            mask = Image.new("L", (SIZE, SIZE))
            draw_shape(ImageDraw.Draw(mask), o, 255, 1)
            covered = torch.tensor(list(mask.resize((GRID, GRID), Image.Resampling.BOX).tobytes())) > 64  # (144,)
            if o in objects:
                told = [SHAPES.index(o["shape"]) + 1, list(COLORS).index(o["color"]) + 1, objects.index(o) + 1]
                labels[i, 3, covered] = PLACES.index(o["place"])
            else:
                told = [len(SHAPES) + STRANGE.index(o["shape"]) + 1, len(COLORS) + int(6 * o["tone"]) + 1, 0]
            labels[i, :3, covered] = torch.tensor(told, dtype=torch.uint8)[:, None]
    return pixels, scenes, labels


def content(objects):
    """What the class token must tell (54,): which colour has which shape, which shape is where, and how many."""
    told = torch.zeros(54)
    for o in objects:
        shape = SHAPES.index(o["shape"])
        told[5 * list(COLORS).index(o["color"]) + shape] = 1
        told[30 + 4 * shape + PLACES.index(o["place"])] = 1
    told[49 + len(objects)] = 1
    return told


def descend(folder, learned, loss_at, steps, lr, weight_decay):
    """Minimise loss_at(step) by AdamW: linear warm-up, then a cosine to zero. A killed run resumes from its folder."""
    optimizer = torch.optim.AdamW(learned.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    run = Run(folder, {"steps": steps, "batch": 1}, Processes("cpu"), (folder / "checkpoint.safetensors").exists())
    run.hold(learned, optimizer, {})
    for step in run.steps(steps, save_every=200):
        torch.manual_seed(step)
        random.seed(step)
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
        optimizer.step()
        run.bar.set_postfix(stage=folder.name, loss=f"{loss:.3f}")


def train_vision(folder, tower, pixels, scenes, labels, steps, batch=48):
    """Stage 1: the tower learns what stands where, patch by patch, and in its class token what there is."""
    told = torch.stack([content(objects) for objects in scenes])  # (scenes, 54)
    sizes = {"shape": 1 + len(SHAPES + STRANGE), "color": 1 + 2 * len(COLORS), "where": len(PLACES)}
    heads = nn.ModuleDict({name: nn.Linear(128, n) for name, n in sizes.items()} | {
        "pixels": nn.Linear(128, 3 * PATCH * PATCH), "content": nn.Linear(128, told.shape[1])})

    def loss_at(step):
        ix = torch.randint(len(scenes), (batch,))
        y = labels[ix].long()[:, [0, 1, 3]]  # (B, 3, 144)
        weight = 1 + 5 * (y[:, 0] > 0).float()
        shown = pixels[ix].float()
        X = tower(shown, output_hidden_states=True).hidden_states[-2]  # (B, 145, 128), what LLaVA reads
        dense = sum((F.cross_entropy(heads[name](X[:, 1:]).mT, y[:, k], reduction="none") * weight).mean()
                    for k, name in enumerate(sizes))
        own = F.mse_loss(heads["pixels"](X[:, 1:]), F.unfold(shown, PATCH, stride=PATCH).mT)
        return dense + 2 * own + 10 * F.binary_cross_entropy_with_logits(heads["content"](X[:, 0]), told[ix])

    descend(folder, nn.ModuleDict({"tower": tower, "heads": heads}), loss_at, steps, lr=1.5e-3, weight_decay=0.01)


def pack(objects, tokenizer, rng, start, exists):
    """All texts of a scene that stand behind its image: (T, 4), a row for each token: id, segment, position, target.

    Each text is a segment of its own, whose positions begin at `start`; target is 1 where a token is of an answer.
    Beside the caption: two questions of each kind, or one of each and five more of 'exists', which is learned last.
    """
    rows, texts = [], {("caption", CAPTION_PROMPT, caption(objects, rng)), *questions(objects, rng)}
    texts |= {questions(objects, rng)[-1] for _ in range(5)} if exists else {*questions(objects, rng)}
    for segment, (_, question, answer) in enumerate(sorted(texts)):
        asked = tokenizer(f"\n{question} ASSISTANT:", add_special_tokens=False).input_ids
        said = tokenizer(f" {answer}", add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        rows += [(i, segment, start + p, p >= len(asked)) for p, i in enumerate(asked + said)]
    return torch.tensor(rows)


def subset(x, region, K):
    """K of the visual tokens, ascending: x (N, d) their features, region (N,) which object each lies on.

    A third each. Uniform; along a random direction of the features, whatever it prefers; or each object thinned at its
    own rate. The last two leave some of each. With uniform ones alone the LLM counts by the mass of object tokens.
    """
    score, kind = -(-torch.rand(N).clamp_min(1e-9).log()).log(), random.randrange(3)  # Gumbel noise
    if kind == 1:
        z = ((x - x.mean(0)) / (x.std(0) + 1e-3)) @ torch.randn(x.shape[1])
        score += (z - z.mean()) / z.std() * math.exp(random.uniform(math.log(0.5), math.log(4)))
    elif kind == 2:
        score += (2 * torch.randn(int(region.max()) + 1))[region]
    if kind:
        for o in region[region > 0].unique():
            score[score.masked_fill(region != o, -torch.inf).argmax()] = torch.inf
    return score.topk(K).indices.sort().values


def train_language(folder, model, tokenizer, X, scenes, regions, steps, exists, batch=40):
    """Stage 2: projector and Llama learn to caption and to answer, from all or some of the frozen features."""
    llama, projector = model.model.language_model, model.model.multi_modal_projector
    before = torch.tensor(tokenizer("USER: ").input_ids)  # what stands before the image
    packs = [pack(objects, tokenizer, random.Random(i), len(before) + N, exists)
             for i, objects in enumerate(tqdm(scenes, desc="packing", dynamic_ncols=True))]

    def loss_at(step):
        K = round(8 * (N / 8) ** random.random()) if random.random() < 0.6 else N
        ix = torch.randint(len(scenes), (batch,))
        texts = pad_sequence([packs[i] for i in ix], batch_first=True, padding_value=-1)  # (B, T, 4)
        ids, segment, position, target = texts.unbind(-1)
        x = X[ix].float()  # (B, N, d)
        keep = torch.stack([subset(xs, regions[i].long(), K) for xs, i in zip(x, ix)])  # (B, K)
        x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))  # (B, K, d)
        front, P = llama.embed_tokens(before).expand(batch, -1, -1), len(before) + K
        embeds = torch.cat([front, projector(x), llama.embed_tokens(ids.clamp_min(0))], 1)  # (B, L, D)
        positions = torch.cat([torch.arange(len(before)).expand(batch, -1), len(before) + keep, position], 1)  # (B, L)
        segments = F.pad(segment, (P, 0), value=-2)  # what every text sees
        seen = (segments[:, None] == -2) | (segments[:, None] == segments[:, :, None])  # (B, query, key)
        mask = (seen & torch.ones(seen.shape[1:], dtype=torch.bool).tril())[:, None]  # (B, 1, L, L)
        hidden = llama(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).last_hidden_state[:, P:]
        said = target[:, 1:] == 1  # by the state before it
        return F.cross_entropy(model.lm_head(hidden[:, :-1][said]), ids[:, 1:][said])

    descend(folder, nn.ModuleList([llama, projector, model.lm_head]), loss_at, steps, lr=2e-3, weight_decay=0.05)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = ap.add_argument
    add("--out", type=Path, default=Path("out/llava"), help="folder to write to (%(default)s)")
    add("--work", type=Path, default=Path("out/pretrain"), help="folder of checkpoints (%(default)s)")
    add("--scenes", type=int, default=24000, help="scenes to learn from (%(default)s)")
    add("--steps", type=int, nargs=3, default=[2600, 2200, 1400], help="of stage 1, and of both rounds of stage 2")
    args = ap.parse_args()
    torch.manual_seed(0)

    processor = build_processor()
    processor.save_pretrained(args.out)  # a folder that cannot be written is found out now
    model = build_model(processor.tokenizer)
    tower = model.model.vision_tower
    pixels, scenes, labels = scenes_to_learn(args.scenes, processor.image_processor)
    train_vision(args.work / "vision", tower, pixels, scenes, labels, args.steps[0])
    with torch.no_grad():
        X = torch.cat([tower(p.float(), output_hidden_states=True).hidden_states[-2][:, 1:].bfloat16()
                       for p in tqdm(pixels.split(64), desc="features", dynamic_ncols=True)])
    for name, steps in zip(("language", "exists"), args.steps[1:]):
        train_language(args.work / name, model, processor.tokenizer, X, scenes, labels[:, 2], steps, name == "exists")
    model.half().save_pretrained(args.out)
    weights = {name.replace("vision_tower.", "vision_tower.vision_model."): t  # as llava-hf's are named on the hub
               for name, t in load_file(args.out / "model.safetensors").items()}
    write(args.out / "model.safetensors", weights, {"format": "pt"})


if __name__ == "__main__":
    cli(main)
