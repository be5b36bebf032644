"""The real rank, that obeys a fault plan: `cluster.rank_module=tests.slurm.chaotic_rank`.

At each step it looks for a file ``rank<k>.<what>`` in the folder `CHAOS_FOLDER`, removes it, and
does what it says: `SIGKILL` and `SIGSTOP` are sent to the process itself, `exception` is raised. It
sleeps `CHAOS_PAUSE` seconds a step until there is a file ``fast``: training must be there for as
long as the plan takes.
"""

import os
import signal
import time
from pathlib import Path

from opt_train.protocol.commands import Begin
from opt_train.protocol.facts import Phase
from opt_train.protocol.framing import Message
from opt_train.train import fact_pipe, rank, warm

FOLDER, PAUSE = Path(os.environ["CHAOS_FOLDER"]), float(os.environ["CHAOS_PAUSE"])
publish, run_rank = fact_pipe.FactPipe.publish, rank.run_rank
places: list[int] = []


def publish_and_obey(pipe: fact_pipe.FactPipe, fact: Message) -> None:
    publish(pipe, fact)
    if not places or not isinstance(fact, Phase) or fact.phase != "step":
        return
    if not (FOLDER / "fast").exists():
        time.sleep(PAUSE)
    for what in ("SIGKILL", "SIGSTOP", "exception"):
        try:
            (FOLDER / f"rank{places[0]}.{what}").unlink()
        except FileNotFoundError:
            continue
        if what == "exception":
            raise ValueError("a bug of the user's own")
        os.kill(os.getpid(), signal.Signals[what])


def run_and_remember(begin: Begin, *arguments: object) -> int:
    places[:] = [begin.rank]
    return run_rank(begin, *arguments)  # type: ignore[arg-type]


import_everything = warm.import_everything


def main() -> None:
    fact_pipe.FactPipe.publish = publish_and_obey  # type: ignore[method-assign]
    rank.run_rank = run_and_remember
    warm.main()


if __name__ == "__main__":
    main()
