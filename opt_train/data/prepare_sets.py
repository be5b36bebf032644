"""Named validation sets as splits of prepared data: made with the corpus, or added to a folder that
is finished.

They decide nothing of what is trained, with one exception: documents of theirs that the corpus has
too are left out of training when the corpus is prepared. Later that is not possible any more, so
such a set is refused then.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opt_train.data import tokenizer as bpe
from opt_train.data.config import DataConfig
from opt_train.data.corpus import Corpus, digest_of, open_named_set
from opt_train.data.manifest import (
    DATASET_FILE,
    TOKENIZER_FILE,
    TRAIN,
    DatasetManifest,
    NamedSet,
    Shard,
)
from opt_train.data.named_sets import named_sets
from opt_train.data.prepared import check_length, check_sets, counted_documents
from opt_train.data.split_writer import SplitWriter
from opt_train.data.staging_folder import StagingFolder
from opt_train.protocol.exits import BadInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def open_sets(data: DataConfig) -> dict[str, Corpus]:
    """The corpus of each set that `data.validation_sets` names.

    Raises:
        BadInput: the key cannot be read, or one of the corpora is not there.
    """
    return {name: open_named_set(name, corpus) for name, corpus in named_sets(data).items()}


def sets_by_document(sets: Mapping[str, Corpus]) -> dict[bytes, str]:
    """The digest of each document of the sets, and the first set that holds it.

    Raises:
        BadInput: a set has no text.
    """
    found: dict[bytes, str] = {}
    for name, corpus in sets.items():
        documents = 0
        for text in corpus.documents():
            documents += 1
            found.setdefault(digest_of(text), name)
        if documents == 0:
            raise BadInput(f"{corpus} has no text; add documents or leave the set out")
    return found


def write_set(
    folder: Path,
    name: str,
    corpus: Corpus,
    tokenizer: "Tokenizer",
    *,
    dtype: str,
    data: DataConfig,
    left_out: int,
) -> tuple[NamedSet, tuple[Shard, ...]]:
    """Tokenize a set into shards in `folder`.

    Raises:
        BadInput: it is shorter than one sequence.
    """
    writer = SplitWriter(folder, name, dtype, data.shard_tokens, bpe.size_of(tokenizer))
    documents = 0
    for _, ids in bpe.encoded(tokenizer, corpus.documents()):
        writer.add(ids)
        documents += 1
    writer.finish()
    made = NamedSet(name, corpus.name, writer.tokens, documents, left_out)
    check_length(made, data)
    return made, tuple(writer.shards)


def add_sets(
    staging: StagingFolder,
    place: Path,
    prepared: DatasetManifest,
    data: DataConfig,
    progress: Callable[[str], None],
) -> DatasetManifest:
    """Add the sets that the finished folder `place` lacks. Nothing else in it changes, nor does its
    fingerprint.

    A crash leaves either the folder as it was, perhaps with shards that no manifest names, or all
    of it.

    Raises:
        BadInput: a set holds documents that the folder's training tokens hold already, or cannot be
            made.
    """
    lacking = check_sets(prepared, data, place)
    if not lacking:
        return prepared
    sets = {name: corpus for name, corpus in open_sets(data).items() if name in lacking}
    tokenizer = bpe.load(place / TOKENIZER_FILE)
    # By another tokenizer the set's ids would mean other text than the model was trained on.
    if (
        hashlib.sha256((place / TOKENIZER_FILE).read_bytes()).hexdigest()
        != prepared.tokenizer_sha256
    ):
        raise BadInput(
            f"{place / TOKENIZER_FILE} has changed since the data was prepared; restore it from a "
            "copy"
        )
    made: list[NamedSet] = []
    shards: list[Shard] = []
    for name, corpus in sets.items():
        progress(f"adding the validation set {name} ({len(corpus.files):,} files)")
        named, its = write_set(
            staging.path, name, corpus, tokenizer, dtype=prepared.dtype, data=data, left_out=0
        )
        _check_not_trained_on(corpus, documents_in(staging.path, its, prepared), place, prepared)
        made.append(named)
        shards += its
    manifest = dataclasses.replace(
        prepared, sets=(*prepared.sets, *made), shards=(*prepared.shards, *shards)
    )
    manifest.write(staging.path)
    # The manifest goes last: until it is there, nobody reads the shards.
    staging.move_into(place, [*(shard.path for shard in shards), DATASET_FILE])
    for named in made:
        progress(f"added the validation set {named.name} of {named.tokens:,} tokens to {place}")
    return manifest


def documents_in(
    folder: Path, shards: tuple[Shard, ...], manifest: DatasetManifest
) -> Iterator[bytes]:
    """The tokens of each document in a split's shards, without the `</s>` behind it, as they lie
    there."""
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    begun = b""
    for shard in shards:
        tokens = np.memmap(folder / shard.path, dtype=dtype, mode="r")
        first = 0
        for end in np.flatnonzero(tokens == manifest.eos).tolist():
            yield begun + tokens[first:end].tobytes()
            begun, first = b"", end + 1
        # Shards are cut by tokens, so a document may go on in the next one.
        begun += tokens[first:].tobytes()


def _check_not_trained_on(
    corpus: Corpus, documents: Iterator[bytes], place: Path, prepared: DatasetManifest
) -> None:
    # Tokens are compared, not texts: the corpus may have changed or gone since, and the same
    # tokenizer makes the same tokens of the same text.
    digests = {hashlib.sha256(document).digest() for document in documents}
    training = documents_in(place, prepared.shards_of(TRAIN), prepared)
    trained = sum(hashlib.sha256(document).digest() in digests for document in training)
    if trained:
        raise BadInput(
            f"{corpus} holds {counted_documents(trained)} that {place} has among its training "
            "tokens; take them out of the set, or use another data.name, where they are left "
            "out of training"
        )
