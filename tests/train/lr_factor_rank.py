"""The real rank, which knows the tests' order: `cluster.rank_module=tests.train.lr_factor_rank`."""

from opt_train.train import warm
from tests.train import lr_factor  # noqa: F401 - importing it makes the order known

import_everything, main = warm.import_everything, warm.main

if __name__ == "__main__":
    main()
