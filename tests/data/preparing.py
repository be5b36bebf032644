"""Prepares a corpus, for a test that kills it: ``python -m tests.data.preparing CORPUS
DIRECTORY``."""

import sys

from opt_train.data.config import DataConfig, TokenizerConfig
from opt_train.data.prepare import prepare

if __name__ == "__main__":
    corpus, directory = sys.argv[1:]
    prepare(
        DataConfig(corpus=corpus, directory=directory, validation_fraction=0.2, shard_tokens=400),
        TokenizerConfig(name="small", vocab_size=300),
        lambda line: print(line, flush=True),
    )
