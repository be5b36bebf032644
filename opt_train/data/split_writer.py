"""Token ids into shard files: fsynced, hashed and counted on the way."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from opt_train.data.manifest import SPLITS, Shard


class SplitWriter:
    """Cuts the token stream of one split into shards of `shard_tokens` tokens, the last one
    shorter.

    The shards are called `<split>-00000.bin` and so on; a named set's begin with `set-` in front of
    that.
    """

    def __init__(
        self, folder: Path, split: str, dtype: str, shard_tokens: int, vocab_size: int
    ) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(vocab_size, dtype=np.int64)
        """Occurrences of each entry `[vocab_size]`."""
        self.tokens = 0
        self.shards: list[Shard] = []
        self._folder = folder
        self._split = split
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shard_tokens = shard_tokens
        self._waiting: list[npt.NDArray[np.int64]] = []
        self._waiting_tokens = 0
        self._stream = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of all tokens in order, however they are cut into shards."""
        return self._stream.hexdigest()

    def add(self, ids: Sequence[int]) -> None:
        """Append `ids`; writes a shard whenever one is full."""
        piece = np.asarray(ids, dtype=np.int64)
        self._stream.update(piece.astype(self._dtype).tobytes())
        self.counts += np.bincount(piece, minlength=len(self.counts))
        self.tokens += len(piece)
        self._waiting.append(piece)
        self._waiting_tokens += len(piece)
        if self._waiting_tokens >= self._shard_tokens:
            self._write_full_shards()

    def finish(self) -> "SplitWriter":
        """Write what is left. No shard is empty."""
        self._write_full_shards()
        if self._waiting_tokens:
            self._write(np.concatenate(self._waiting))
            self._waiting, self._waiting_tokens = [], 0
        return self

    def _write_full_shards(self) -> None:
        if self._waiting_tokens < self._shard_tokens:
            return
        tokens = np.concatenate(self._waiting)
        whole = len(tokens) - len(tokens) % self._shard_tokens
        for first in range(0, whole, self._shard_tokens):
            self._write(tokens[first : first + self._shard_tokens])
        self._waiting, self._waiting_tokens = [tokens[whole:]], len(tokens) - whole

    def _write(self, tokens: npt.NDArray[np.int64]) -> None:
        stem = self._split if self._split in SPLITS else f"set-{self._split}"
        name = f"{stem}-{len(self.shards):05d}.bin"
        content = tokens.astype(self._dtype).tobytes()
        write_durably(self._folder / name, content)
        self.shards.append(
            Shard(
                path=name,
                split=self._split,
                tokens=len(tokens),
                bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
            )
        )


def write_durably(path: Path, content: bytes) -> None:
    """Write and fsync a new file. An error names the file, which `write` alone does not."""
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
