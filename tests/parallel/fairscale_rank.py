"""The real rank, with what fairscale misses on a CPU:
`cluster.rank_module=tests.parallel.fairscale_rank`."""

from opt_train.train import warm
from tests.parallel import fairscale_on_cpu

import_everything = warm.import_everything


def main() -> None:
    fairscale_on_cpu.apply()
    warm.main()


if __name__ == "__main__":
    main()
