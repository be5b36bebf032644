"""The real rank, which rests before each step: `cluster.rank_module=tests.end_to_end.slow_rank`.

For runs that are there for as long as a test takes: their steps are to leave the cores to what is
tested, and to the tests beside it.
"""

import time
from typing import Any

from opt_train.train import warm

REST_SECONDS = 0.1

import_everything = warm.import_everything


def main() -> None:
    from opt_train.train import loop

    take_step = loop.take_step

    def rest_and_take_step(*arguments: Any) -> None:
        time.sleep(REST_SECONDS)
        take_step(*arguments)

    loop.take_step = rest_and_take_step
    warm.main()


if __name__ == "__main__":
    main()
