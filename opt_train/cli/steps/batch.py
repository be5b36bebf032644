"""`opt-train batch`: the documents of the batch that a step was trained on."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from opt_logbook.record.run_directory import RunDirectory
from opt_logbook.story.format import printable

from opt_train.data import tokenizer as bpe
from opt_train.data.batch_checks import BatchChecks, check_batch, outside_of_vocabulary
from opt_train.data.batch_documents import DocumentShare, documents_of
from opt_train.data.document_index import DocumentIndex, Documents
from opt_train.data.manifest import TOKENIZER_FILE, TRAIN
from opt_train.data.scanned_documents import ScannedDocuments
from opt_train.data.token_stream import TokenStream, open_split
from opt_train.protocol.exits import DONE
from opt_train.run.past.batch import StepBatch, batch_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SNIPPET_TOKENS = 32
SNIPPET_CHARACTERS = 72
SHOWN = 20
"""Documents that are listed for a person; for a program all are."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--step", type=int, required=True, metavar="N", help="as metrics count: 1 is the first"
    )
    parser.add_argument(
        "--attempt",
        default="",
        metavar="NAME",
        help="of the run, as 1.02; without it the one whose work on the step was kept",
    )


def run(flags: argparse.Namespace) -> int:
    """Print what the batch of a step of the run at `flags.run` consists of. Changes nothing.

    Raises:
        BadInput: there is no such run, attempt or step, or its prepared data is not there.
    """
    batch = batch_of(RunDirectory(flags.run), flags.step, flags.attempt)
    stream = open_split(batch.data, TRAIN, verify=False)
    length = batch.config.data.sequence_length
    index = DocumentIndex.read(batch.data, len(stream))
    # No further than need be: without an index the tokens themselves are read.
    documents: Documents = index or ScannedDocuments(
        stream, batch.manifest.eos, (max(batch.samples) + 1) * length
    )
    shares = documents_of(batch.samples, length, documents)
    rows = np.stack([stream.read(sample * length, length + 1) for sample in batch.samples])
    checks = check_batch(rows[:, :-1], rows[:, 1:])
    outside = outside_of_vocabulary(rows, batch.config.model.vocab_size)
    tokenizer = bpe.load(batch.data / TOKENIZER_FILE)
    if flags.json:
        print(json.dumps(_payload(batch, shares, checks, outside, stream, tokenizer), indent=2))
        return DONE
    lines = _lines(batch, shares, checks, outside, stream, tokenizer, has_sources=index is not None)
    print("\n".join(printable(line) for line in lines))
    return DONE


def _payload(
    batch: StepBatch,
    shares: list[DocumentShare],
    checks: BatchChecks,
    outside: int,
    stream: TokenStream,
    tokenizer: "Tokenizer",
) -> dict[str, Any]:
    return {
        "attempt": batch.attempt,
        "step": batch.step,
        "is_trained": batch.is_trained,
        "position": batch.position,
        "samples": list(batch.samples),
        "checks": asdict(checks) | {"outside": outside},
        "documents": [
            {
                "document": share.document,
                "file": share.source.file if share.source else None,
                "line": share.source.line if share.source else None,
                "first_token": share.first_token,
                "document_tokens": share.document_tokens,
                "ranges": [list(part) for part in share.ranges],
                "tokens": share.tokens,
                "share": share.share,
                "snippet": _snippet(share, stream, tokenizer),
            }
            for share in shares
        ],
    }


def _lines(
    batch: StepBatch,
    shares: list[DocumentShare],
    checks: BatchChecks,
    outside: int,
    stream: TokenStream,
    tokenizer: "Tokenizer",
    *,
    has_sources: bool,
) -> Iterator[str]:
    length = batch.config.data.sequence_length
    yield (
        f"step {batch.step:,} of attempt {batch.attempt}: {len(batch.samples):,} sequences of "
        f"{length:,} tokens, from position {batch.position:,} of the order of the data"
    )
    if not batch.is_trained:
        yield "  the attempt's metrics do not come that far: it is what it would train on"
    yield (
        f"  token entropy {checks.token_entropy:.2f} nats a sequence, labels equal to inputs "
        f"{checks.equal_labels / (len(batch.samples) * length):.1%}, duplicates "
        f"{checks.duplicates:,}, tokens outside of the vocabulary {outside:,}"
    )
    if not has_sources:
        yield (
            "  this data was prepared before the sources of documents were kept: their numbers "
            "and places are told alone"
        )
    for share in shares[:SHOWN]:
        where = f"{share.source}, " if share.source else ""
        first, last = share.ranges[0][0], share.ranges[-1][1]
        yield (
            f"  {share.share:6.1%}  {where}document {share.document:,}: {share.tokens:,} of its "
            f"{share.document_tokens:,} tokens, between {first:,} and {last:,}"
        )
        yield f"          {_snippet(share, stream, tokenizer)}"
    if len(shares) > SHOWN:
        rest = sum(share.share for share in shares[SHOWN:])
        yield f"  {rest:6.1%}  of {len(shares) - SHOWN:,} more documents"


def _snippet(share: DocumentShare, stream: TokenStream, tokenizer: "Tokenizer") -> str:
    """How the batch's part of the document begins, on one line."""
    # The beginning of the part, not of the document: that is what was trained on.
    begin, end = share.ranges[0]
    ids = stream.read(share.first_token + begin, min(SNIPPET_TOKENS, end - begin))
    text = " ".join(str(tokenizer.decode(ids.tolist(), skip_special_tokens=False)).split())
    return text if len(text) <= SNIPPET_CHARACTERS else text[: SNIPPET_CHARACTERS - 1] + "…"
