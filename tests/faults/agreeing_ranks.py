"""Two ranks, one of which fails: `python agreeing_ranks.py RANK FOLDER` prints what each has to
say."""

import sys
from pathlib import Path

import torch.distributed as dist

from opt_train.checkpoint.all_or_none import all_or_none
from opt_train.checkpoint.manifest import CheckpointError


def main(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2
    )

    def fail() -> None:
        if rank == 1:
            raise OSError(28, "No space left on device", "shard-00002")

    all_or_none(lambda: None, None, "nothing")
    try:
        all_or_none(fail, None, "it was not saved")
    except CheckpointError as error:
        print(error, flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
