"""``python -m opt_train.burn_in.pair_rank``: one rank of an all-reduce between two nodes."""

import argparse
import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from opt_logbook.record.durable_file import replace_file

# torch.distributed re-exports them, but not to type checkers.
from torch._C._distributed_c10d import PrefixStore, TCPStore

from opt_train.burn_in.device import device_of_slot
from opt_train.burn_in.results import BurnInResult, BurnInTest, to_line
from opt_train.diagnosis.causes import Cause
from opt_train.host.interface import address_of_interface
from opt_train.parallel.store import bind_store, reach_store

MEASURE_SECONDS = 1.0
REPEATS_MAX = 20
_POLL_SECONDS = 0.05


def main(arguments: list[str]) -> int:
    """Meet the ranks of the other node and print what was measured."""
    parser = argparse.ArgumentParser(prog="python -m opt_train.burn_in.pair_rank")
    parser.add_argument("--device", required=True)
    parser.add_argument("--slot", type=int, required=True)
    parser.add_argument("--slots", type=int, required=True, help="of each node")
    parser.add_argument("--address", type=Path, required=True, help="file of the store's address")
    parser.add_argument("--interface", required=True)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--first", action="store_true")
    given = parser.parse_args(arguments)
    device = device_of_slot(given.device, given.slot)
    if device is None:
        print(f"slot {given.slot} has no GPU", file=sys.stderr)
        return 1
    rank = given.slot + (0 if given.first else given.slots)
    timeout = timedelta(seconds=given.seconds)
    store = _store(rank, given.interface, given.address, timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("meeting", store),
        rank=rank,
        world_size=2 * given.slots,
        timeout=timeout,
    )
    # A world of its own for every meeting: what hangs in one hangs in no other.
    result = all_reduce(device, given.bytes)
    print(to_line([result]), flush=True)
    # The store goes with rank 0: all must have what they came for.
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _store(rank: int, interface: str, path: Path, timeout: timedelta) -> TCPStore:
    """The ranks' store: rank 0 binds it to a free port and says where, the others wait for that."""
    if rank == 0:
        host = address_of_interface(interface)
        store = bind_store(host, timeout)
        replace_file(path, json.dumps([host, store.port]).encode())
        return store
    deadline = time.monotonic() + timeout.total_seconds()
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError("the other node has not said where its store listens")
        time.sleep(_POLL_SECONDS)
    host, port = json.loads(path.read_text())
    return reach_store(host, port, timeout)


def all_reduce(device: torch.device, size: int) -> BurnInResult:
    """Sum `size` bytes over all ranks again and again; the sums must be right.

    The value is the bus bandwidth as NCCL's own tests define it: what each rank moves, 2 (n - 1)/n
    of the size, over the time.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    words = max(1, size // 4)
    # Small whole numbers: sums are exact in every order.
    own = (torch.arange(words, dtype=torch.float32) % 1024 + rank).to(device)
    right = (torch.arange(words, dtype=torch.float32) % 1024 * world + sum(range(world))).to(device)
    values = own.clone()
    dist.all_reduce(values)  # connections are made in the first one
    wrong = int((values != right).sum())
    seconds, repeats = 0.0, 0
    more = torch.ones(1, device=device)
    while bool(more.item()):
        values.copy_(own)
        # Whoever is late would else be timed too.
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds += time.perf_counter() - began
        repeats += 1
        wrong += int((values != right).sum())
        # All stop after the same one: the first rank's clock decides.
        more.fill_(float(seconds < MEASURE_SECONDS and repeats < REPEATS_MAX))
        dist.broadcast(more, 0)
    moved = 2 * (world - 1) / world * 4 * words * repeats
    return BurnInResult(
        BurnInTest.PAIR,
        value=moved / seconds,
        unit="B/s",
        trouble=f"{wrong} of its sums are wrong" if wrong else "",
        cause=Cause.SILENT_CORRUPTION if wrong else "",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
