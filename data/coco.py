"""
COCO captions for training: read and check the file, and load its pictures in worker processes.

    training, held_out = split(read_coco("captions_train2014.json", "train2014/"), seed=0)
    data = Captions(training, seed=0)
    for samples, inputs in load_batches(vlm, data, [[0, 1], [2, 3]], "Describe it.", 2, set()): …
"""
import functools
import hashlib
import io
import json
import os
import random
import sys
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from common.files import InputError, read_text, short, time_limit
from data.pictures import read_image

WAIT = 600  # seconds for a batch


def picture_path(folders, name, where):
    """The path of the picture `name`: in the first of the folders that has it, else in the last.
    InputError for a name that leads out of them; what links there lead to is the user's choice."""
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{where}: {short(repr(name), 60)} must be one file name, of a picture in "
                         f"{folders[0]}")
    for folder in folders[:-1]:
        if os.path.isfile(folder / name):
            return folder / name
    return folders[-1] / name


def check_present(pictures, folders, most=0):
    """InputError if more than `most` of the pictures {path: where it is named} are absent."""
    absent = [path for path in pictures if not os.path.isfile(path)]
    if not absent:
        return
    for folder in folders:
        if os.path.isdir(folder) and not os.access(folder, os.X_OK):
            raise InputError(f"{folder}: no picture in it may be opened; change its permissions")
    message = (f"{pictures[absent[0]]}: no file {absent[0].name!r:.60} in "
               f"{' or '.join(map(str, folders))}; {len(absent)} of {len(pictures)} are absent: ")
    if len(absent) <= most:
        print(f"{message}others stand for them", file=sys.stderr)
    elif len(absent) < len(pictures):
        raise InputError(f"{message}fetch them, or take out what names them")
    else:
        raise InputError(f"{message}give their folder with --images")


def read_coco(path, images=None):
    """A COCO captions file as {image path: [captions]}. InputError names the field that is wrong,
    and the cure. One picture in a hundred may be absent: Captions shows the next one instead."""
    needed = "a COCO captions file, as captions_train2014.json"
    try:
        coco = json.loads(read_text(path, needed))
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: is not JSON ({short(e)}); --data takes {needed}") from None
    for field in ("images", "annotations"):
        rows = coco.get(field) if isinstance(coco, dict) else None
        if not isinstance(rows, list) or not rows:
            raise InputError(f"{path}: has no list '{field}'; --data takes {needed}, which has one")
        if not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{path}: {field}: must be a list of objects, as in {needed}")
    if not any("caption" in row for row in coco["annotations"]):
        raise InputError(f"{path}: its annotations have no caption; of COCO's files, --data takes "
                         "the one with captions (captions_train2014.json)")

    folder = Path(images or Path(path).parent)
    try:
        pictures = pictures_by_id(path, coco["images"], folder)
        pairs = captions_by_picture(path, pictures, coco["annotations"])
    except TypeError as e:  # an id that is a list
        raise InputError(f"{path}: ids must be numbers or text ({short(e)})") from None
    if len(pairs) < 2:
        raise InputError(f"{path}: annotations name one image; at least two are needed, since some "
                         "are held out")
    check_present(dict.fromkeys(pairs, f"{path}: images"), [folder], max(1, len(pairs) // 100))
    return pairs


def pictures_by_id(path, images, folder):
    """{id: path}; two ids may name one picture, as a.jpg and ./a.jpg."""
    pictures = {}
    for row in images:
        number, name = row.get("id"), row.get("file_name")
        if number is None or number in pictures or not isinstance(name, str):
            raise InputError(f"{path}: images: id {short(number)}, file_name {short(repr(name))}: "
                             "each needs a name, and an id of its own")
        pictures[number] = picture_path([folder], name, f"{path}: images")
    return pictures


def captions_by_picture(path, pictures, annotations):
    """{path: [captions]}."""
    captions, seen = {}, set()
    for entry, row in enumerate(annotations, 1):
        number, image, caption = row.get("id"), row.get("image_id"), row.get("caption")
        where = f"{path}: annotations: id {short(number)}"
        if number is None:
            where = f"{path}: annotations: entry {entry}"
        elif number in seen:
            raise InputError(f"{where} twice; give each annotation its own")
        seen.add(number)
        if image not in pictures:
            cure = "drop it"
            if str(image).lstrip("0") in {str(other).lstrip("0") for other in pictures}:
                cure = "write both alike, as a number without quotes"
            raise InputError(f"{where}: image_id {short(repr(image))} is none of the images' ids; "
                             f"{cure}")
        if not isinstance(caption, str) or not caption.strip():
            raise InputError(f"{where}: caption must be text, and not empty; drop it")
        captions.setdefault(pictures[image], []).append(caption.strip())
    return captions


def split(pairs, seed):
    """(training, held_out): lists of (path, captions). A twentieth of the images, 200 at most, is
    drawn at random."""
    items = list(pairs.items())
    n = min(200, max(1, len(items) // 20))
    order = torch.randperm(len(items), generator=generator(seed, "held out")).tolist()
    training = [items[i] for i in sorted(order[n:])]
    held_out = [items[i] for i in sorted(order[:n])]
    return training, held_out


def digest(path):
    """Twelve hex digits of a file, by its size and up to 64 kB from the middle. None if absent."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            file.seek(max(0, size // 2 - 2 ** 15))
            content = file.read(2 ** 16)
    except OSError:
        return None
    return hashlib.sha256(b"%d " % size + content).hexdigest()[:12]


def digests(pairs, most=1000):
    """{path: digest} of the pictures, or of 1,000 that are evenly drawn, but for absent ones."""
    some = [path for path, _ in pairs[::-(-len(pairs) // most)]]
    found = {os.path.abspath(path): digest(path) for path in some}
    return {path: digits for path, digits in found.items() if digits}


def generator(*key, device="cpu"):
    """A generator of its own for each key. What it draws depends on nothing that ran before."""
    return torch.Generator(device).manual_seed(random.Random(str(key)).getrandbits(63))


class Captions(Dataset):
    """Sample g is a function of (seed, g) alone: (g, picture, caption, [paths that could not be
    read]).

    Every epoch has all images in a new order, each with one of its captions at random. Without a
    seed they stay in order, with their first caption. In place of a picture that cannot be read
    stands the next one.
    """

    def __init__(self, pairs, seed=None):
        self.pairs, self.seed = pairs, seed  # a list of (path, captions)
        self.order = functools.lru_cache(2)(self.draw_order)

    def draw_order(self, epoch):
        source = generator(self.seed, "epoch", epoch)
        return torch.randperm(len(self.pairs), generator=source).tolist()

    def __getitem__(self, g, processor=None):
        n, first, u = len(self.pairs), g, 0.0
        if self.seed is not None:
            first = self.order(g // n)[g % n]
            u = random.Random(f"{self.seed} caption {g}").random()
        unreadable = []
        for i in range(first, first + min(100, n)):
            path, captions = self.pairs[i % n]
            try:
                picture = read_image(path, processor)
                return g, picture, captions[int(u * len(captions))], unreadable
            except InputError:
                unreadable.append(str(path))
        raise InputError(f"{path}: cannot be read as an image, nor can those before it; check "
                         "--images")


def worker_options(workers):
    """What a DataLoader needs for processes that share the model's memory, for its processor.

    They never touch the GPU. OSError if there is no room for them.
    """
    context = get_context("fork")
    # as many semaphores as a DataLoader makes, freed at once: one without room ends untidily
    [context.Semaphore() for _ in range(8 + 3 * workers)]
    return {
        "num_workers": workers,
        "multiprocessing_context": context,
        # a process group of their own: a Ctrl-C is for the main process, which ends its step
        "worker_init_fn": lambda worker: os.setpgid(0, 0),
    }


def load_batches(vlm, data, batches, prompt, workers, skipped):
    """For each list of sample numbers: (the list, the VLM's inputs).

    Worker processes decode, resize and tokenise. `skipped`, a set, gathers the unreadable paths."""
    def inputs_of(samples):
        numbers, pictures, captions, unreadable = zip(*samples)
        inputs = vlm.inputs(list(pictures), [prompt] * len(numbers), list(captions))
        return numbers, dict(inputs), sum(unreadable, [])

    def collate(samples):
        try:
            batch = inputs_of(samples)
        except InputError:  # perhaps the processor refuses a picture: then it counts as unreadable
            processor = vlm.processor.image_processor
            batch = inputs_of([data.__getitem__(g, processor) for g, *_ in samples])
        if not workers:
            return batch
        # as bytes, through a pipe: torch would put tensors into /dev/shm, which is small in a
        # container, and a worker that finds it full dies without a word
        packed = io.BytesIO()
        torch.save(batch, packed)
        return packed.getvalue()

    if sys.platform != "linux":  # forked processes are safe there alone
        workers = 0
    try:
        options = worker_options(workers) if workers else {}
        loader = iter(DataLoader(data, batch_sampler=batches, collate_fn=collate, **options))
        for _ in batches:
            # of a worker that hangs, or was killed while it wrote a batch, no end would come
            with time_limit(WAIT, "reading a batch of pictures"):
                batch = next(loader)
            if workers:
                batch = torch.load(io.BytesIO(batch), weights_only=True)
            numbers, inputs, unreadable = batch
            skipped.update(unreadable)
            for name, value in inputs.items():
                if torch.is_tensor(value):
                    inputs[name] = value.to(vlm.model.device)
            yield numbers, inputs
    except InputError as e:  # a worker's comes with its traceback
        raise InputError(str(e).rpartition("InputError: ")[2]) from None
    except TimeoutError as e:
        raise InputError(f"--workers {workers}: {e}; --workers 0 reads without other processes. A "
                         "training continues with --resume") from None
    except OSError as e:
        raise InputError(f"--workers {workers}: these processes cannot start ({short(e)}; is "
                         "/dev/shm full?); give --workers 0, or the container a larger --shm-size"
                         ) from None
