"""
Memory of a training: what a step takes, what there is, and how to take less.

    of_a_step(vlm, learned=36_000_000, B=4)      # bytes by part: frozen, learned, activations
    images_that_fit(vlm, 36_000_000, 60e9)       # how many pictures at a time
"""
import subprocess

import torch


def of_a_step(vlm, learned, B, recompute=False):
    """Bytes by part, for B pictures with captions of 20 tokens, and `learned` parameters."""
    c, size = vlm.model.config.get_text_config(), vlm.model.dtype.itemsize
    D, F, layers = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    N = vlm.tokens or 2880
    L = N + 40
    # A frozen linear map keeps nothing for the backward pass. A layer keeps for each token the
    # inputs of two norms in float32; q, k, v and the attention's output (D each), a number for
    # each head; three tensors of the MLP's width F.
    layer = 2 * 4 * D + (4 * D + 3 * F) * size + 4 * c.num_attention_heads
    kept = L * layers * layer
    if recompute:
        kept = L * (layers * D * size + layer)
    kept += 4 * N * (48 * min(vlm.width, 1024) + 12 * vlm.width)  # scorer, gate, denoiser
    kept += 6 * N * N  # the ranking: how alike all pairs are, and which is the better
    kept += 20 * c.vocab_size * (size + 8)  # logits
    frozen = 0
    for p in vlm.model.parameters():
        own = p.to_local() if hasattr(p, "to_local") else p  # of a shard, only its part
        frozen += own.nbytes
    learned = 16 * learned + 4 * vlm.width ** 2  # with AdamW's moments; the gate's L
    return {"frozen": frozen, "learned": learned, "activations": B * kept}


def images_that_fit(vlm, learned, free_bytes, recompute=False):
    """How many pictures fit at once beside the frozen model; a tenth of the room is a reserve."""
    step = of_a_step(vlm, learned, 1, recompute)
    return max(0, int((0.9 * free_bytes - step["learned"]) // step["activations"]))


def recompute(vlm):
    """Gradient checkpointing: the backward pass computes the LLM's activations once more."""
    llm = vlm.decoder.train()  # transformers does it in train mode only; no dropout, though
    for module in llm.modules():
        module.attention_dropout = 0.0
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    # the first is transformers' new name for the second
    enable = getattr(llm, "activation_checkpointing_enable", llm.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def free(device, world=1):
    """(bytes that each of `world` processes can have now, who says so)."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0], "as CUDA says"
    size, source = system_memory()
    return size / world, source


def system_memory():
    """(bytes that programs can get without swapping, who says so)."""
    try:
        with open("/proc/meminfo") as lines:  # Linux: of the machine, not of a container
            sizes = dict(line.split(":") for line in lines)
        return 1024 * int(sizes["MemAvailable"].split()[0]), "as Linux says"
    except (OSError, KeyError, ValueError):
        pass
    try:
        report = subprocess.run(["vm_stat"], capture_output=True, text=True).stdout
        title, *rows = report.splitlines()  # … (page size of 16384 bytes)
        pages = dict(row.split(":") for row in rows if ":" in row)
        kinds = ("free", "inactive", "speculative")
        free = sum(int(pages[f"Pages {kind}"].strip(" .")) for kind in kinds)
        return free * int(title.split()[-2]), "as macOS says"
    except (OSError, KeyError, ValueError, IndexError):
        return 4e9, "a guess: this system does not say; --at-once gives the number itself"
