"""
A training run: its folder, and how it saves, stops and resumes.

    run = Run(Path("out"), settings, Processes("cpu"))
    run.hold(modules, optimizer, statistics)             # what a checkpoint has in it
    for step in run.steps(1000, save_every=100): …     # starts where it stood, saves, heeds signals

What is random depends on the seed and the step alone, so a run that was killed ends as if it had
not been.
"""
import json
import math
import os
import signal
import sys
import time

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tqdm import tqdm

from common.files import InputError, lock, rounded, short, write

CHECKPOINT = "checkpoint.safetensors"
RESULTS = ("pruner.json", "scorer.safetensors", "log.jsonl", "watched.json")


class Run:
    """A run in its folder. InputError if the folder holds another one, or anything of such a name,
    if another one is still writing there, or if the one to resume does not fit `settings`.

    settings: all that determines the outcome. state: what a checkpoint holds beside tensors.
    """

    def __init__(self, folder, settings, processes, resume=False, overwrite=False):
        self.folder, self.processes, self.start = folder, processes, time.time()
        self.checkpoint, self.tensors = folder / CHECKPOINT, None
        self.state = {
            "step": 0,
            "seconds": 0.0,
            "curve": [],
            "skipped": [],
            "watched": [],
        }
        if resume:
            self.tensors, state = read_checkpoint(self.checkpoint)
            self.state |= state
            for name, value in settings.items():
                old = state.get("settings", {}).get(name, "none, as an earlier version made it")
                if old != value:
                    raise InputError(f"--{name.replace('_', '-')} {value}: the run in {folder} has "
                                     f"{old}; --resume needs the same")
        elif not overwrite:
            for name in (CHECKPOINT, *RESULTS):
                if os.path.lexists(folder / name):
                    raise InputError(f"--out {folder}: holds {name} already; add --resume to "
                                     "continue a run, --overwrite to replace it, or give another "
                                     "folder")
        self.state["settings"] = settings
        if processes.first:
            self.make_folder()
        self.step, self.before = self.state["step"], self.state["seconds"]
        self.curve = self.state["curve"]
        # of the first process alone: a sum over processes counts them
        self.skipped = set(self.state["skipped"]) if processes.first else set()

    def make_folder(self):
        """Make the folder, and keep other runs out of it."""
        try:
            str(self.folder).encode()  # safetensors reads no other names
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "a")
        except (OSError, ValueError) as e:
            raise InputError(f"--out {self.folder}: cannot be written ({short(e)}); give a folder "
                             "to write to") from None
        lock(self.lock, f"--out {self.folder}")

    def check_contents(self, contents):
        """Remember {name: digest} of what the run reads. InputError if a resumed run finds another
        content; a picture that could not be read may have been mended since."""
        before = self.state.setdefault("contents", contents)
        skipped = {os.path.abspath(name) for name in self.state["skipped"]}
        for name, digest in contents.items():
            if before.get(name, digest) != digest and name not in skipped:
                raise InputError(f"{name}: not the same content that the run in {self.folder} "
                                 "began with; --resume needs that")

    def seconds(self):
        """How long the run has taken, without the time between a stop and its resumption."""
        return self.before + time.time() - self.start

    def hold(self, modules, optimizer, statistics):
        """Say what belongs in a checkpoint: a ModuleDict, its AdamW, and named tensors. Resuming
        fills all of them."""
        self.modules, self.optimizer, self.statistics = modules, optimizer, statistics
        resumed = self.tensors is not None
        if resumed:
            try:
                self.fill()
            except (KeyError, ValueError, IndexError, RuntimeError) as e:
                raise InputError(f"{self.checkpoint}: does not fit this run ({short(e)}); start "
                                 "again with --overwrite") from None
        self.processes.copy(*modules.state_dict().values(), *statistics.values())
        if resumed:
            return
        self.save(0)  # a folder that cannot be written to is found out now
        for name in RESULTS:  # of the run that this one replaces
            if self.processes.first:
                (self.folder / name).unlink(missing_ok=True)

    def fill(self):
        """Put the checkpoint's tensors where they belong."""
        weights = {name: self.tensors.pop(name) for name in self.modules.state_dict()}
        self.modules.load_state_dict(weights)
        for name, t in self.statistics.items():
            t.copy_(self.tensors.pop(f"statistics.{name}"))
        moments = {}
        for key, t in self.tensors.items():
            _, parameter, name = key.split(".")  # adam.3.exp_avg: of the parameter number 3
            moments.setdefault(int(parameter), {})[name] = t
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})

    def save(self, step):
        self.state.update(step=step, seconds=self.seconds(), skipped=sorted(self.skipped))
        tensors = dict(self.modules.state_dict())
        for name, t in self.statistics.items():
            tensors[f"statistics.{name}"] = t
        for parameter, moments in self.optimizer.state_dict()["state"].items():
            for name, t in moments.items():
                tensors[f"adam.{parameter}.{name}"] = t
        note = {"state": json.dumps(self.state)}
        self.processes.once(lambda: write(self.checkpoint, tensors, note))

    def steps(self, total, save_every):
        """The steps that are left. After each: count unreadable images, save, and stop if a signal
        came.

        The first SIGINT or SIGTERM finishes the step and saves; a second one ends at once.
        """
        signals = []

        def note(number, frame):
            if signals:
                sys.exit(128 + number)
            signals.append(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        self.bar = tqdm(range(self.step, total), desc="training", initial=self.step, total=total,
                        dynamic_ncols=True, disable=not self.processes.first)
        try:
            for step in self.bar:
                yield step
                device = self.processes.device
                counts = torch.tensor([len(self.skipped), len(signals)], device=device)
                self.processes.sum(counts)
                unreadable, stop = counts.tolist()
                read = (step + 1) * self.state["settings"]["batch"]
                too_many = unreadable > max(1, 0.01 * read)
                if (step + 1) % save_every == 0 or step + 1 == total or stop or too_many:
                    self.save(step + 1)
                if too_many:
                    raise InputError(f"--images: {unreadable} of {read} images could not be read, "
                                     f"more than 1 % ({', '.join(sorted(self.skipped)[:5])}); fix "
                                     "them, then --resume")
                if stop:
                    self.bar.close()
                    self.processes.say(f"stopped by a signal after step {step}; the same command "
                                       "(train.py: with --resume) continues from there")
                    sys.exit(128 + (signals or [signal.SIGTERM])[0])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        self.report()

    def report(self):
        """What a finished training must say."""
        if self.skipped:
            names = short(", ".join(sorted(self.skipped)), 2000)
            self.processes.say(f"unreadable images, {len(self.skipped)}, each replaced by the "
                               f"next: {names}")
        hardness = self.curve[-1]["hardness"] if self.curve else 1.0
        if hardness < 0.8:
            self.processes.say(f"warning: hardness {hardness:.2f} at the end: alpha is far from 0 "
                               "and 1, so the scores learned from half-dropped tokens, which "
                               "inference has not; try more --steps")

    def log(self, entry):
        """Add an evaluation to the curve and to log.jsonl."""
        self.curve.append({**entry, "seconds": self.seconds()})
        self.write("log.jsonl", rounded(self.curve))

    def watch(self, step, tau, images, alphas):
        """Add to watched.json how the weights of some images' tokens stand: alphas, a list of
        (B, N)."""
        alphas = [row.tolist() for alpha in alphas for row in alpha]
        self.state["watched"].append(rounded({"step": step, "tau": tau, "alpha": alphas}))
        self.write("watched.json", {"images": images, "frames": self.state["watched"]})

    def write(self, name, content):
        if self.processes.first:
            write(self.folder / name, content)

    def best(self, settled):
        """The evaluation with the lowest deployed losses, with K and with a quarter of K tokens,
        once tau is down at `settled`. Until then the latest: while alpha is soft, a low deployed
        loss is luck."""
        candidates = [entry for entry in self.curve if entry["tau"] == settled]
        if not candidates:
            return self.curve[-1]
        return min(candidates, key=lambda entry: entry["deployed_loss"] + entry["quarter_loss"])

    def check_finite(self, step, value):
        if not math.isfinite(value):
            raise InputError(f"step {step}: a loss or its gradient is {value}; {self.checkpoint} "
                             "is from before; try a lower --lr or --dtype float32")


def read_checkpoint(path):
    """(tensors, state): all of a run in one file, so that its pieces always belong together."""
    try:
        open(path, "rb").close()  # safetensors calls a file absent that may not be read
        with safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["state"])
        if state["curve"]:  # then the best scorer so far is beside it, and no step makes it again
            safe_open(path.with_name("scorer.safetensors"), "pt")
        return load_file(path), dict(state)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        raise InputError(f"--resume: {path} cannot be read ({short(e)}); leave --resume away to "
                         "start a run, or --overwrite this one") from None
