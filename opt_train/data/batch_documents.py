"""The documents of a batch: which, which part of each, and how much of the batch it is. Standard
library only."""

from collections.abc import Iterable
from dataclasses import dataclass

from opt_train.data.document_index import Documents, DocumentSource, document_at


@dataclass(frozen=True, slots=True)
class DocumentShare:
    """What a batch has of one document."""

    document: int
    """In the order of the training stream, from 0."""
    source: DocumentSource | None
    document_tokens: int
    """Of the whole document, with the `</s>` behind it."""
    first_token: int
    """Of the document in the stream."""
    ranges: tuple[tuple[int, int], ...]
    """What the batch has of it: tokens of the document, from 0, the second one not included."""
    share: float
    """Of the batch's tokens."""

    @property
    def tokens(self) -> int:
        """How many of it the batch has."""
        return sum(end - begin for begin, end in self.ranges)


def documents_of(
    samples: Iterable[int], sequence_length: int, documents: Documents
) -> list[DocumentShare]:
    """What the batch of these samples has of each document, the largest share first.

    Sample `i` reads tokens `i * sequence_length` to `(i + 1) * sequence_length` of the stream; the
    one behind, which it learns to predict and the next sample reads, is not counted.
    """
    parts: dict[int, list[tuple[int, int]]] = {}
    total = 0
    for sample in samples:
        begin, end = sample * sequence_length, (sample + 1) * sequence_length
        total += sequence_length
        # Found once, then walked: samples are long, and the next document is beside this one.
        document = document_at(documents, begin)
        while begin < end:
            start, behind = documents.start(document), documents.start(document + 1)
            until = min(end, behind)
            parts.setdefault(document, []).append((begin - start, until - start))
            begin, document = until, document + 1
    shares = [
        DocumentShare(
            document=document,
            source=documents.source(document),
            document_tokens=documents.start(document + 1) - documents.start(document),
            first_token=documents.start(document),
            ranges=tuple(sorted(ranges)),
            share=sum(end - begin for begin, end in ranges) / total,
        )
        for document, ranges in parts.items()
    ]
    return sorted(shares, key=lambda share: (-share.tokens, share.document))
