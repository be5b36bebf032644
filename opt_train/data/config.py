"""What a run reads."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from opt_train.protocol.keys import BELOW_ONE, FIXED, NOT_NEGATIVE, OPERATIONAL, POSITIVE


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """A corpus, made into token shards once by `opt-train prepare`."""

    name: Annotated[str, OPERATIONAL] = "stdlib"
    corpus: Annotated[str, FIXED] = "stdlib"
    """``stdlib`` (the sources of the running Python's standard library), or a file, folder or glob
    of ``.txt``, ``.py``, ``.md`` (a document a file) or ``.jsonl`` (a document a line, key
    ``text``)."""
    directory: Annotated[str, OPERATIONAL] = ""
    """Where the shards lie; empty: ``prepared/<name>-<tokenizer>``."""
    max_bytes: Annotated[int, NOT_NEGATIVE, FIXED] = 0
    """Take documents up to this many bytes of text in all; 0: all of them."""
    validation_fraction: Annotated[float, BELOW_ONE, FIXED] = 0.02
    """Part of the documents, chosen by a hash of each one's text, that is held out."""
    validation_sets: Annotated[str, OPERATIONAL] = ""
    """Further texts to measure the loss on, as comma-separated ``name=corpus`` pairs, each a corpus
    like the one above: ``"web=texts/web,code=src"``. A document of theirs is not trained on."""
    sequence_length: Annotated[int, POSITIVE, FIXED] = 2048
    # 2^26 tokens are a file of 128 MiB as uint16; a shard is gathered in memory before it is
    # written.
    shard_tokens: Annotated[int, POSITIVE, OPERATIONAL] = 1 << 26


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """Byte-level BPE: trained on the corpus, or read from GPT-2's two files."""

    key_kind: ClassVar = FIXED

    name: str = "bpe"
    vocab_size: Annotated[int, POSITIVE] = 4096
    """Entries to train, specials included; ignored when files are given."""
    vocab_file: str = ""
    merges_file: str = ""
