"""A plain training loop as people run it under `torchrun --max-restarts`: DDP on gloo, a checkpoint
by `torch.save` every `EVERY` steps, the newest one loaded at the start. `recovery.py` starts it.

    recovery_peer.py FOLDER FAULT TIMEOUT

The model is torch's own encoder with a causal mask, of the size of `model=tiny`, so that a restart
imports torch and nothing of ours.

Each step's end goes to FOLDER/steps as "step time"; the fault happens once, on rank 1.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

LAYERS, WIDTH, HEADS, VOCABULARY, POSITIONS = 2, 64, 4, 512, 64
AT_STEP, EVERY, STEPS = 30, 10, 60


class Decoder(nn.Module):
    """A language model's loss from its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.zeros(POSITIONS, WIDTH))
        block = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, LAYERS)
        self.mask = nn.Transformer.generate_square_subsequent_mask(POSITIONS)

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean loss in nats of `tokens` [batch, positions]."""
        states = self.blocks(self.tokens(tokens) + self.positions, mask=self.mask, is_causal=True)
        logits = states @ self.tokens.weight.T
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def main() -> None:
    folder, fault, timeout = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = dist.new_group(timeout=timedelta(seconds=timeout))
    model = Decoder()
    parallel = DistributedDataParallel(model, process_group=group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    done, saved = 0, folder / "checkpoint.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    for step in range(done + 1, STEPS + 1):
        if step == AT_STEP and dist.get_rank() == 1:
            fail_once(folder, fault)
        tokens = torch.randint(VOCABULARY, (4, POSITIONS))
        parallel(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() != 0:
            continue
        with (folder / "steps").open("a") as file:
            file.write(f"{step} {time.time()!r}\n")
        if step % EVERY == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, saved.with_suffix(".new"))
            saved.with_suffix(".new").rename(saved)
    dist.destroy_process_group()


def fail_once(folder: Path, fault: str) -> None:
    try:
        with (folder / "at").open("x") as file:
            file.write(repr(time.time()))
    except FileExistsError:
        return
    match fault:
        case "exception":
            raise ValueError("a bug of the user's own")
        case "SIGKILL" | "SIGSTOP":
            os.kill(os.getpid(), getattr(signal, fault))
        case "hang":
            time.sleep(10_000)


if __name__ == "__main__":
    main()
