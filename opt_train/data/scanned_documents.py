"""The documents of a token stream without an index: found by the `</s>` behind each."""

import bisect

import numpy as np

from opt_train.data.document_index import DocumentSource
from opt_train.data.token_stream import TokenStream

_TOKENS_AT_ONCE = 1 << 22


class ScannedDocuments:
    """Numbers and places of the documents; where they came from is not on record."""

    def __init__(self, stream: TokenStream, eos: int, until: int) -> None:
        """Read the stream as far as token `until`, and on to the end of the document there."""
        starts = [0]
        position = 0
        while position < len(stream) and starts[-1] <= until:
            count = min(_TOKENS_AT_ONCE, len(stream) - position)
            ends = np.flatnonzero(stream.read(position, count) == eos)
            starts += (ends + position + 1).tolist()
            position += count
        # What begins where the stream ends is no document.
        self._starts = starts[: bisect.bisect_left(starts, len(stream))]
        self._tokens = min(position, len(stream))

    def __len__(self) -> int:
        return len(self._starts)

    def start(self, document: int) -> int:
        return self._starts[document] if document < len(self._starts) else self._tokens

    def source(self, document: int) -> DocumentSource | None:
        return None
