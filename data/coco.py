"""
COCO captions for training: read and check the file, and load its pictures in worker processes.

    pairs = read_coco("captions_train2014.json", "train2014/")      # {image path: [captions]}
    data = Captions(list(pairs.items()), held_out=[], seed=0)
    for samples, inputs, unreadable in load_batches(vlm, data, [[0, 1], [2, 3]], "Describe it.", 2, skipped=set()): …
"""
import functools
import json
import os
import random
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from model import InputError, read_image


def read_coco(path, images=None):
    """A COCO captions file as {image path: [captions]}. InputError names the field that is wrong, and the cure."""
    path = Path(path)
    folder = Path(images) if images else path.parent
    try:
        coco = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; --data takes a COCO captions file") from None
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: is not JSON in UTF-8 ({e}); --data takes a COCO captions file") from None
    for field in ("images", "annotations"):
        if not isinstance(coco, dict) or not isinstance(coco.get(field), list) or not coco[field]:
            raise InputError(f"{path}: has no list '{field}'; --data takes a COCO captions file, which has one")
    root, names, pairs, seen = os.path.join(os.path.realpath(folder), ""), {}, {}, set()
    try:
        for row in coco["images"]:
            i, name = row["id"], row["file_name"]
            if i in names:
                raise InputError(f"{path}: images: id {i} twice; give each image its own")
            if not os.path.realpath(folder / name).startswith(root):
                raise InputError(f"{path}: images: file_name {name!r} leads out of {folder}; keep all under --images")
            names[i] = folder / name
        for number, row in enumerate(coco["annotations"]):
            i, image, caption = row.get("id", number), row["image_id"], row["caption"]
            if image not in names:
                raise InputError(f"{path}: annotations: id {i}: image_id {image!r} is none of the images; drop it")
            if i in seen:
                raise InputError(f"{path}: annotations: id {i} twice; give each annotation its own")
            if not isinstance(caption, str) or not caption.strip():
                raise InputError(f"{path}: annotations: id {i}: caption must be text, and not empty; drop it")
            pairs.setdefault(names[image], []).append(caption.strip())
            seen.add(i)
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise InputError(f"{path}: images need id and file_name, annotations image_id and caption ({e!r})") from None
    for image in pairs:
        if not image.is_file():
            raise InputError(f"{path}: images: no file {image}; give the folder of {image.name} with --images")
    if len(pairs) < 2:
        raise InputError(f"{path}: annotations name one image; at least two are needed, since some are held out")
    return pairs


def check_fit(vlm, path, pairs, prompt):
    """InputError for a caption that the model cannot take. A token is at least a byte, so few need counting."""
    tokenizer = vlm.processor.tokenizer
    image_token = tokenizer.convert_ids_to_tokens(vlm.image_id)
    room = vlm.model.config.get_text_config().max_position_embeddings - (vlm.tokens or 0)
    room -= len(tokenizer(prompt).input_ids) + 32  # 32 for the words of the chat form
    for image, captions in pairs.items():
        for caption in captions:
            where = f"{path}: annotations: caption {caption[:30]!r} of {image.name}"
            if len(caption.encode()) > room and len(tokenizer(caption).input_ids) > room:
                raise InputError(f"{where} is longer than the {room} tokens left in the model's context; shorten it")
            if image_token in caption:
                raise InputError(f"{where} has {image_token} in it, which stands for a picture; take it out")


def generator(*key, device="cpu"):
    """A generator of its own for each key. What it draws depends on nothing that ran before."""
    return torch.Generator(device).manual_seed(random.Random(str(key)).getrandbits(63))


class Captions(Dataset):
    """Sample g is a function of (seed, g) alone: (g, image, caption, [paths that could not be read]).

    Every epoch has all images in a new order, each with one of its captions at random. g = -1, -2, … are the held-out
    images with their first caption. In place of an unreadable image stands the next one.
    """

    def __init__(self, training, held_out, seed):
        self.training, self.held_out, self.seed = training, held_out, seed  # two lists of (path, captions)
        self.order = functools.lru_cache(2)(
            lambda epoch: torch.randperm(len(training), generator=generator(seed, "epoch", epoch)).tolist())

    def __getitem__(self, g):
        items, at, u, unreadable = self.held_out, -1 - g, 0.0, []
        if g >= 0:
            items, u = self.training, random.Random(f"{self.seed} caption {g}").random()
            at = self.order(g // len(items))[g % len(items)]
        for i in range(at, at + min(100, len(items))):
            path, captions = items[i % len(items)]
            try:
                return g, read_image(path), captions[int(u * len(captions))], unreadable
            except InputError:
                unreadable.append(str(path))
        return g, None, "", unreadable


def load_batches(vlm, data, batches, prompt, workers, skipped):
    """For each list of sample numbers: (the list, the VLM's inputs, how many images could not be read).

    Pictures are decoded, resized and tokenised in worker processes. `skipped`, a set, gathers the unreadable paths.
    """
    def collate(samples):
        g, images, captions, unreadable = zip(*samples)
        inputs = None if None in images else dict(vlm.inputs(list(images), [prompt] * len(g), list(captions)))
        return g, inputs, sum(unreadable, [])

    # fork: the workers share the model's memory (for its processor), and never touch the GPU
    # a process group of their own: a Ctrl-C is for the main process, which finishes its step
    for g, inputs, unreadable in DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                                            multiprocessing_context="fork" if workers else None,
                                            worker_init_fn=lambda worker: os.setpgid(0, 0)):
        skipped.update(unreadable)
        if inputs is None:
            raise InputError(f"{unreadable[-1]}: cannot be read as an image, nor can those before it; check --images")
        device = vlm.model.device
        yield g, {name: t.to(device) if torch.is_tensor(t) else t for name, t in inputs.items()}, len(unreadable)
