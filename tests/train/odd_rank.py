"""The real rank, whose device 1 adds up a little otherwise: `tests.train.odd_rank`."""

import math
from typing import Any

from opt_train.protocol.commands import Begin
from opt_train.train import rank, validation, warm

loss_over, run_rank = validation.loss_over, rank.run_rank


def run_odd(begin: Begin, *arguments: Any) -> int:
    def another(*of: Any) -> tuple[float, float]:
        loss, tokens = loss_over(*of)
        return (math.nextafter(loss, math.inf) if begin.rank == 1 else loss), tokens

    validation.loss_over = another
    return run_rank(begin, *arguments)


rank.run_rank = run_odd
import_everything, main = warm.import_everything, warm.main

if __name__ == "__main__":
    main()
