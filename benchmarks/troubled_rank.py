"""The real rank, that raises or hangs once, at the first step after it is told to:
`cluster.rank_module=troubled_rank`.

The environment has ``TROUBLE``, ``exception`` or ``hang``, and ``TROUBLE_FOLDER``: its file `now`
tells the ranks to, and the one that does writes the moment down (`at`).
"""

import os
import time
from pathlib import Path

from opt_train.protocol.facts import Phase
from opt_train.protocol.framing import Message
from opt_train.train import fact_pipe, warm

publish = fact_pipe.FactPipe.publish


def publish_and_fail(pipe: fact_pipe.FactPipe, fact: Message) -> None:
    publish(pipe, fact)
    folder = Path(os.environ["TROUBLE_FOLDER"])
    if not isinstance(fact, Phase) or fact.phase != "step" or not (folder / "now").exists():
        return
    try:
        with (folder / "at").open("x") as file:
            file.write(repr(time.time()))
    except FileExistsError:
        return
    if os.environ["TROUBLE"] == "exception":
        raise ValueError("a bug of the user's own")
    while True:
        time.sleep(1)


import_everything = warm.import_everything


def main() -> None:
    fact_pipe.FactPipe.publish = publish_and_fail  # type: ignore[method-assign]
    warm.main()


if __name__ == "__main__":
    main()
