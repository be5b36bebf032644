"""The real rank without what DeepSpeed compiles on a CPU:
`cluster.rank_module=tests.parallel.deepspeed_rank`."""

from opt_train.train import warm
from tests.parallel import deepspeed_on_cpu

import_everything = warm.import_everything


def main() -> None:
    deepspeed_on_cpu.apply()
    warm.main()


if __name__ == "__main__":
    main()
