"""
A training run: its folder, and how it saves, stops and resumes.

    run = Run(Path("out"), settings, Processes("cpu"))
    run.hold(modules, optimizer, statistics)             # what a checkpoint has in it
    for step in run.steps(1000, save_every=100): …       # starts where it stood, saves, stops at a signal

What is random depends on the seed and the step alone, so a run that was killed ends as if it had not been.
"""
import fcntl
import json
import math
import signal
import sys
import time

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tqdm import tqdm

from common.files import InputError, rounded, short, write


class Run:
    """A run in its folder. InputError if another one is there, is still writing, or does not fit `settings`.

    settings: all that determines the outcome. state: what a checkpoint holds beside tensors.
    """

    def __init__(self, folder, settings, processes, resume=False, overwrite=False):
        self.folder, self.processes, self.start = folder, processes, time.time()
        self.checkpoint, self.tensors = folder / "checkpoint.safetensors", None
        self.state = {"step": 0, "curve": [], "skipped": [], "seconds": 0.0, "watched": []}
        there = [f for f in (self.checkpoint, folder / "pruner.json", folder / "scorer.safetensors") if f.exists()]
        if resume:
            self.tensors, self.state = read_checkpoint(self.checkpoint)
            for name, value in settings.items():
                old = self.state["settings"].get(name, "none, as an earlier version made it")
                if old != value:
                    raise InputError(f"--{name.replace('_', '-')} {value}: the run in {folder} has {old}; --resume "
                                     "needs the same")
        elif there and not overwrite:
            raise InputError(f"--out {folder}: holds a run ({there[0].name}); add --resume to continue it, or "
                             "--overwrite to replace it")
        self.state["settings"] = settings
        if processes.first:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self.lock = open(folder / ".lock", "w")
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"--out {folder}: another run writes there; wait, or give another folder") from None
            except OSError as e:
                raise InputError(f"--out {folder}: cannot be written ({short(e)}); give a folder to write to") from None
        self.step, self.before, self.curve = self.state["step"], self.state["seconds"], self.state["curve"]
        self.skipped = set(self.state["skipped"]) if processes.first else set()  # a sum over processes counts them

    def seconds(self):
        """How long the run has taken, without the time between a stop and its resumption."""
        return self.before + time.time() - self.start

    def hold(self, modules, optimizer, statistics):
        """Say what belongs in a checkpoint: a ModuleDict, its AdamW, and named tensors. Resuming fills all of them."""
        self.modules, self.optimizer, self.statistics = modules, optimizer, statistics
        if self.tensors is not None:
            try:
                modules.load_state_dict({k: self.tensors.pop(k) for k in modules.state_dict()})
                for name, t in statistics.items():
                    t.copy_(self.tensors.pop(f"statistics.{name}"))
                moments = {}
                for name, t in self.tensors.items():  # adam.3.exp_avg: of the parameter number 3
                    moments.setdefault(int(name.split(".")[1]), {})[name.split(".")[2]] = t
                optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
            except (KeyError, ValueError, IndexError, RuntimeError) as e:
                raise InputError(f"{self.checkpoint}: does not fit this run ({short(e)}); start again with "
                                 "--overwrite") from None
        self.processes.copy(*modules.state_dict().values(), *statistics.values())
        if self.tensors is None:
            self.save(0)  # a folder that cannot be written to is found out now
            for name in ("pruner.json", "scorer.safetensors", "log.jsonl", "watched.json"):  # of the run it replaces
                if self.processes.first:
                    (self.folder / name).unlink(missing_ok=True)

    def save(self, step):
        self.state.update(step=step, seconds=self.seconds(), skipped=sorted(self.skipped))
        adam = {f"adam.{i}.{k}": t for i, m in self.optimizer.state_dict()["state"].items() for k, t in m.items()}
        statistics = {f"statistics.{name}": t for name, t in self.statistics.items()}
        tensors = {**self.modules.state_dict(), **statistics, **adam}
        self.processes.once(lambda: write(self.checkpoint, tensors, {"state": json.dumps(self.state)}))

    def steps(self, total, save_every):
        """The steps that are left. After each: count unreadable images, save, and stop if a signal came.

        The first SIGINT or SIGTERM finishes the step and saves; a second one ends at once.
        """
        signals = []

        def note(number, frame):
            if signals:
                sys.exit(128 + number)
            signals.append(number)

        old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        self.bar = tqdm(range(self.step, total), desc="training", initial=self.step, total=total, dynamic_ncols=True,
                        disable=not self.processes.first)
        try:
            for step in self.bar:
                yield step
                counts = torch.tensor([len(self.skipped), len(signals)], device=self.processes.device)
                self.processes.sum(counts)
                unreadable, stop = counts.tolist()
                seen = (step + 1) * self.state["settings"]["batch"]
                too_many = unreadable > max(1, 0.01 * seen)
                if (step + 1) % save_every == 0 or step + 1 == total or stop or too_many:
                    self.save(step + 1)
                if too_many:
                    raise InputError(f"--images: {unreadable} of {seen} images could not be read, more than "
                                     f"1 % ({', '.join(sorted(self.skipped)[:5])}); repair them, then --resume")
                if stop:
                    self.bar.close()
                    self.processes.say(f"stopped by a signal after step {step}; the same command (train.py: with "
                                       "--resume) continues from there")
                    sys.exit(128 + (signals or [signal.SIGTERM])[0])
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
        if self.skipped:
            names = ", ".join(sorted(self.skipped))
            self.processes.say(f"unreadable images, {len(self.skipped)}, each replaced by the next: {names}")
        hardness = self.curve[-1]["hardness"] if self.curve else 1.0
        if hardness < 0.8:
            self.processes.say(f"warning: hardness {hardness:.2f} at the end: alpha is far from 0 and 1, so the scores "
                               "learned from half-dropped tokens, which inference has not; try more --steps")

    def log(self, entry):
        """Add an evaluation to the curve and to log.jsonl."""
        self.curve.append({**entry, "seconds": self.seconds()})
        self.write("log.jsonl", rounded(self.curve))

    def watch(self, step, tau, images, alphas):
        """Add to watched.json how the weights of some images' tokens stand: alphas, a list of (B, N)."""
        alphas = [row.tolist() for alpha in alphas for row in alpha]
        self.state["watched"].append(rounded({"step": step, "tau": tau, "alpha": alphas}))
        self.write("watched.json", {"images": images, "frames": self.state["watched"]})

    def write(self, name, content):
        if self.processes.first:
            write(self.folder / name, content)

    def best(self, settled):
        """The evaluation with the lowest deployed losses, with K and a quarter of K tokens, once tau is down at
        `settled`. Until then the latest: while alpha is soft, a low deployed loss is luck."""
        down = [e for e in self.curve if e["tau"] == settled]
        return min(down or self.curve[-1:], key=lambda e: e["deployed_loss"] + e["quarter_loss"])

    def check_finite(self, step, value):
        if not math.isfinite(value):
            raise InputError(f"step {step}: a loss or its gradient is {value}; {self.checkpoint} is from before; try a "
                             "lower --lr or --dtype float32")


def read_checkpoint(path):
    """(tensors, state): all of a run in one file, so that its pieces always belong together."""
    try:
        with safe_open(path, "pt") as file:
            return load_file(path), json.loads(file.metadata()["state"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        cure = "--overwrite starts anew" if path.exists() else "leave --resume away to start a run"
        raise InputError(f"--resume: {path} cannot be read ({short(e)}); {cure}") from None
