"""The real rank, with what fairscale misses on a CPU:
`cluster.rank_module=tests.parallel.fairscale_rank`."""

from opt_train.train import warm
from tests.parallel import fairscale_on_cpu

if __name__ == "__main__":
    fairscale_on_cpu.apply()
    warm.main()
