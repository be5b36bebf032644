"""One rank of `test_layout_chain.py`: `layout_chain_ranks.py RANK WORLD STORE LINK FOLDER`; prints
what it found.

A link is the JSON object `{layout, ways, before, after, trouble}`. The ranks restore what the link
named `before` left in FOLDER (none: they begin), train two steps, get into `trouble`, save as
`after`, and tell the loss of the step after.
"""

import json
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from opt_train.checkpoint.manifest import read
from opt_train.checkpoint.restore import restore
from tests.checkpoint.snapshot_ranks import Case, same, whole
from tests.parallel.engine_state import save_together, world_sum
from tests.train.leave import leave_with


def go_on(link: dict[str, Any], folder: Path) -> dict[str, Any]:
    case = Case(link["layout"], link["ways"], "fp32")
    before, after = link.get("before"), link["after"]
    engine = case.engine(seed=3)
    done, first = 0, None
    if before is not None:
        restore(engine, folder / before / "step", read(folder / before / "step"))
        same(whole(engine), load_file(folder / f"{before}.reference"))
        done = json.loads((folder / f"{before}.steps").read_text())
    for number in range(done, done + 2):
        loss = world_sum(case.step(engine, number) / case.layout.tensor)
        first = loss if first is None else first
    if link.get("trouble") == "evaluation":
        case.evaluate(engine)
    if link.get("trouble") == "raised":
        case.fail_in_forward(engine)
    reference = whole(engine)
    save_together(engine, folder / after / "step")
    if dist.get_rank() == 0:
        save_file(reference, folder / f"{after}.reference")
        (folder / f"{after}.steps").write_text(json.dumps(done + 2))
    dist.barrier()
    # An engine whose forward pass has raised goes no further.
    then = (
        world_sum(case.step(engine, done + 2) / case.layout.tensor)
        if link.get("trouble") != "raised"
        else None
    )
    return {"first": first, "then": then}


def main() -> None:
    rank, world, store, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[5])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    leave_with(go_on(json.loads(sys.argv[4]), folder))


if __name__ == "__main__":
    main()
