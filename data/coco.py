"""
COCO captions for training: read and check the file, and load its pictures in worker processes.

    training, held_out = split(read_coco("captions_train2014.json", "train2014/"), seed=0)
    data = Captions(training, seed=0)
    for samples, inputs, unreadable in load_batches(vlm, data, [[0, 1], [2, 3]], "Describe it.", 2, skipped=set()): …
"""
import functools
import json
import os
import random
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from common.files import InputError, short
from data.pictures import read_image


def picture_path(folders, name, where):
    """The picture `name` in one of the folders, or what a link there leads to. InputError if there is none."""
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{where}: {short(repr(name), 60)} must be one file name, of a picture in {folders[0]}")
    for folder in folders:
        if os.path.isfile(folder / name):  # False, too, for what no file can be named
            return folder / name
    raise InputError(f"{where}: no file {short(name, 60)} in {folders[0]}; give its folder with --images")


def read_coco(path, images=None):
    """A COCO captions file as {image path: [captions]}. InputError names the field that is wrong, and the cure."""
    path = Path(path)
    try:
        coco = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: is not JSON in UTF-8 ({short(e)}); --data takes a COCO captions file") from None
    for field in ("images", "annotations"):
        if not isinstance(coco, dict) or not isinstance(coco.get(field), list) or not coco[field]:
            raise InputError(f"{path}: has no list '{field}'; --data takes a COCO captions file, which has one")
    names, captions, seen = {}, {}, set()
    try:
        for row in coco["images"]:
            i, name = row.get("id"), row.get("file_name")
            if i is None or i in names or not isinstance(name, str):
                raise InputError(f"{path}: images: id {i}, file_name {name!r}: each needs a name, and an id of its own")
            names[i] = name
        for number, row in enumerate(coco["annotations"], 1):
            i, image, caption = row.get("id"), row.get("image_id"), row.get("caption")
            where = f"{path}: annotations: " + (f"entry {number}" if i is None else f"id {i}")
            if i is not None and i in seen:
                raise InputError(f"{where} twice; give each annotation its own")
            if image not in names:
                cure = "write both as numbers, or both as text" if str(image) in map(str, names) else "drop it"
                raise InputError(f"{where}: image_id {image!r} is none of the images' ids; {cure}")
            if not isinstance(caption, str) or not caption.strip():
                raise InputError(f"{where}: caption must be text, and not empty; drop it")
            captions.setdefault(names[image], []).append(caption.strip())
            seen.add(i)
    except (TypeError, AttributeError) as e:
        raise InputError(f"{path}: images and annotations must be lists of objects ({short(e)})") from None
    folders = [Path(images or path.parent)]
    pairs = {picture_path(folders, name, f"{path}: images"): texts for name, texts in captions.items()}
    if len(pairs) < 2:
        raise InputError(f"{path}: annotations name one image; at least two are needed, since some are held out")
    return pairs


def split(pairs, seed):
    """(training, held_out): lists of (path, captions). A twentieth of the images, 200 at most, drawn at random."""
    items, n = list(pairs.items()), min(200, max(1, len(pairs) // 20))
    order = torch.randperm(len(items), generator=generator(seed, "held out")).tolist()
    return [items[i] for i in sorted(order[n:])], [items[i] for i in sorted(order[:n])]


def generator(*key, device="cpu"):
    """A generator of its own for each key. What it draws depends on nothing that ran before."""
    return torch.Generator(device).manual_seed(random.Random(str(key)).getrandbits(63))


class Captions(Dataset):
    """Sample g is a function of (seed, g) alone: (g, picture, caption, [paths that could not be read]).

    Every epoch has all images in a new order, each with one of its captions at random. Without a seed they stay in
    order, with their first caption. In place of a picture that cannot be read stands the next one.
    """

    def __init__(self, pairs, seed=None):
        self.pairs, self.seed = pairs, seed  # a list of (path, captions)
        self.order = functools.lru_cache(2)(
            lambda epoch: torch.randperm(len(pairs), generator=generator(seed, "epoch", epoch)).tolist())

    def __getitem__(self, g, processor=None):
        n, at, u, unreadable = len(self.pairs), g, 0.0, []
        if self.seed is not None:
            at, u = self.order(g // n)[g % n], random.Random(f"{self.seed} caption {g}").random()
        for i in range(at, at + min(100, n)):
            path, captions = self.pairs[i % n]
            try:
                return g, read_image(path, processor), captions[int(u * len(captions))], unreadable
            except InputError:
                unreadable.append(str(path))
        raise InputError(f"{path}: cannot be read as an image, nor can those before it; check --images")


def load_batches(vlm, data, batches, prompt, workers, skipped):
    """For each list of sample numbers: (the list, the VLM's inputs, how many pictures could not be read).

    Worker processes decode, resize and tokenise. `skipped`, a set, gathers the unreadable paths."""
    def collate(samples, again=False):
        g, pictures, captions, unreadable = zip(*samples)
        try:
            inputs = vlm.inputs(list(pictures), [prompt] * len(g), list(captions))
        except InputError:  # perhaps the processor refuses a picture: then it counts as unreadable
            if again:
                raise
            return collate([data.__getitem__(i, vlm.processor.image_processor) for i in g], again=True)
        return g, dict(inputs), sum(unreadable, [])

    # fork: the workers share the model's memory (for its processor), and never touch the GPU
    # a process group of their own: a Ctrl-C is for the main process, which finishes its step
    loader = DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                        multiprocessing_context="fork" if workers else None,
                        worker_init_fn=lambda worker: os.setpgid(0, 0))
    try:
        for g, inputs, unreadable in loader:
            skipped.update(unreadable)
            moved = {name: t.to(vlm.model.device) if torch.is_tensor(t) else t for name, t in inputs.items()}
            yield g, moved, len(unreadable)
    except InputError as e:  # a worker's comes with its traceback
        raise InputError(str(e).rpartition("InputError: ")[2]) from None
