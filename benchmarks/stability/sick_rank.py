"""The real rank, whose training goes wrong: `cluster.rank_module=benchmarks.stability.sick_rank`.

The environment has `SICK`, a JSON object: `sickness` (`sicknesses.inject`), `peer`
(`peers.put_in`), `odd_batches`, the numbers of single batches of garbage, `step_seconds`, which a
step takes at least; and `SICK_FOLDER`, where an event leaves a mark that it has happened.
"""

import json
import os
import time
from typing import Any

from opt_train.train import warm

import_everything = warm.import_everything


def main() -> None:
    """Be a warm rank that is sick."""
    from benchmarks.stability import peers, sicknesses  # noqa: PLC0415

    told = json.loads(os.environ["SICK"])
    sicknesses.inject(told.get("sickness", {}))
    peers.put_in(told.get("peer", ""))
    if odd := told.get("odd_batches"):
        sicknesses.poison_batches("garbage", lambda number: number in odd)
    if seconds := told.get("step_seconds"):
        take_time(seconds)
    warm.main()


def take_time(seconds: float) -> None:
    """Let no step begin earlier than `seconds` after the one before."""
    from opt_train.train import loop  # noqa: PLC0415

    take_step = loop.take_step
    began = time.monotonic()

    def wait_and_take_step(*arguments: Any) -> None:
        nonlocal began
        time.sleep(max(0.0, began + seconds - time.monotonic()))
        began = time.monotonic()
        take_step(*arguments)

    loop.take_step = wait_and_take_step


if __name__ == "__main__":
    main()
