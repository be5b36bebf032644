"""The tokens of a split, memory-mapped across its shards. Without torch."""

import bisect
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from opt_train.data.manifest import DatasetManifest
from opt_train.data.verify import check_shards
from opt_train.protocol.exits import BadInput


class TokenStream:
    """The tokens of one split, memory-mapped across its shards."""

    def __init__(self, shards: list[npt.NDArray[np.unsignedinteger]]) -> None:
        self._shards = shards
        self._ends = list(accumulate(len(shard) for shard in shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Tokens `start` to `start + count`, as int64 `[count]`, across shard borders where need
        be."""
        if start < 0 or start + count > len(self):
            raise IndexError(f"tokens {start} to {start + count} of {len(self)}")
        result = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            shard = bisect.bisect_right(self._ends, start + done)
            offset = start + done - (self._ends[shard] - len(self._shards[shard]))
            piece = self._shards[shard][offset : offset + count - done]
            result[done : done + len(piece)] = piece
            done += len(piece)
        return result


def open_split(
    directory: Path, split: str, verify: bool, progress: Callable[[int, int], None] | None = None
) -> TokenStream:
    """Map the shards of ``train``, ``validation`` or a named set.

    Sizes are always compared with the manifest; with `verify` every byte is (about 1.5 GB/s), and
    `progress` is called with the bytes done and in all after each piece.

    Raises:
        BadInput: there is no such set, or a shard is missing, of the wrong size, or its checksum is
            wrong; the message names the file.
    """
    manifest = DatasetManifest.read(directory)
    if split not in manifest.splits:
        raise BadInput(
            f"{directory} holds no validation set {split!r}; name it in data.validation_sets and "
            "run `opt-train prepare`"
        )
    check_shards(directory, manifest, split, verify=verify, progress=progress)
    # Little-endian on disk, whichever machine reads them.
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    return TokenStream(
        [
            # Mapped, not read: OPT's 180 billion tokens are 360 GB, and a node's ranks share the
            # page cache.
            np.memmap(directory / shard.path, dtype=dtype, mode="r")
            for shard in manifest.shards_of(split)
        ]
    )


def samples_in(tokens: TokenStream, sequence_length: int, split: str) -> int:
    """How many samples a split has.

    Raises:
        BadInput: not even one.
    """
    samples = (len(tokens) - 1) // sequence_length
    if samples < 1:
        raise BadInput(
            f"data.sequence_length={sequence_length} needs {sequence_length + 1} tokens but the "
            f"{split} split has "
            f"{len(tokens)}; use a shorter sequence or a larger corpus"
        )
    return samples
