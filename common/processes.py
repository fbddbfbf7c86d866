"""
The processes of a training: one, or those that torchrun started.

    processes = Processes("cuda")
    processes.sum(loss)                 # over all of them; nothing happens where there is one
"""
import atexit
import os
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm

from common import memory
from common.files import InputError, short


class Processes:
    """One process, or those of torchrun: each takes its part of every batch, the first one writes
    and speaks."""

    def __init__(self, device):
        try:
            self.rank = int(os.environ.get("RANK") or 0)
            self.world = int(os.environ.get("WORLD_SIZE") or 1)
            local = int(os.environ.get("LOCAL_RANK") or 0)
        except ValueError:
            self.rank, self.world = 0, 0
        if not 0 <= self.rank < self.world or self.world > 1 and "MASTER_ADDR" not in os.environ:
            raise InputError("RANK and WORLD_SIZE in the environment name no group of processes; "
                             "start with torchrun, or unset them")
        self.first, self.device = self.rank == 0, device
        if self.world > 1:
            self.join(local)

    def join(self, local):
        """Meet the other processes; number `local` of this machine takes the GPU of that number."""
        backend = "gloo"
        try:
            if self.device.startswith("cuda"):
                backend, self.device = "nccl", f"cuda:{local}"
                torch.cuda.set_device(self.device)
            dist.init_process_group(backend)
        except (RuntimeError, ValueError) as e:
            raise InputError(f"torchrun's processes do not meet ({short(e)}); start all of them, "
                             "on each machine at most as many as it has GPUs") from None
        atexit.register(dist.destroy_process_group)

    def share(self, samples, even=False):
        """This process's part of a range of sample numbers; `even` repeats one, so that all have as
        many."""
        mine = samples[self.rank::self.world]
        if even and len(mine) * self.world < len(samples):
            return [*mine, samples[0]]
        return mine

    def sum(self, *tensors):
        """Each tensor becomes its sum over the processes."""
        for t in tensors if self.world > 1 else ():
            dist.all_reduce(t)

    def copy(self, *tensors):
        """Each tensor becomes that of the first process."""
        for t in tensors if self.world > 1 else ():
            dist.broadcast(t.data, 0)

    def once(self, work):
        """Run work() in the first process; the others wait for it."""
        if self.first:
            work()
        self.wait()

    def wait(self):
        """Wait until all are here.

        By a barrier: gloo frees a sum in a thread of its own, which aborts a process that is just
        ending.
        """
        if self.world > 1:
            dist.barrier()

    def shard(self, vlm):
        """Split the weights of each frozen decoder layer over the processes (FSDP2): a model larger
        than a card fits.

        A layer is gathered while it runs, so every process must run the same number of forward
        passes.
        """
        if self.world == 1:
            raise InputError("--shard splits a model over several processes; start with torchrun "
                             "--nproc_per_node N")
        from torch.distributed.device_mesh import init_device_mesh  # not in every build of torch
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh(self.device.partition(":")[0], (self.world,))
        for layer in vlm.decoder.layers:
            fully_shard(layer, mesh=mesh)  # moves it to the device, too
        vlm.model.to(self.device)

    def say(self, text):
        if self.first:
            tqdm.write(text, file=sys.stderr)

    def plan(self, vlm, learned, args):
        """(images at a time, parts of a step) for this process's share of a batch; says in plain
        words which."""
        batch, recompute = args.batch, args.checkpointing
        if batch < self.world:
            raise InputError(f"--batch {batch}: is fewer than the {self.world} processes; raise it")
        if args.shard and batch % self.world:
            raise InputError(f"--batch {batch}: --shard needs a multiple of the {self.world} "
                             "processes")
        share = len(self.share(range(batch)))
        free, source = memory.free(self.device, self.world)
        fit = args.at_once or memory.images_that_fit(vlm, learned, free, recompute)
        if not fit:
            raise InputError(f"not one image fits beside this model in {free / 1e9:.1f} GB "
                             f"({source}); try --checkpointing, or --dtype bfloat16")
        fit = min(share, fit)
        if self.world > 1:  # the process with the least room decides for all
            least = torch.tensor(fit, device=self.device)
            dist.all_reduce(least, dist.ReduceOp.MIN)
            fit = least.item()
        planned = sum(memory.of_a_step(vlm, learned, fit, recompute).values())
        parts = -(-share // fit)
        self.say(f"{learned:,} parameters learn; {fit} images at a time, {parts} times a step: "
                 f"about {planned / 1e9:.1f} GB with the model, {free / 1e9:.1f} GB are free "
                 f"({source})")
        return fit, parts
