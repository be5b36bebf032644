"""Corpus to tokenizer to token shards, once: in a folder beside its final place, renamed when all
of it is durable."""

import errno
import hashlib
import json
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from opt_train.data import tokenizer as bpe
from opt_train.data.config import DataConfig, TokenizerConfig
from opt_train.data.corpus import (
    Corpus,
    Document,
    digest_of,
    is_held_out,
    open_corpus,
    position_in_split,
)
from opt_train.data.document_index import IndexWriter
from opt_train.data.manifest import (
    DATASET_FILE,
    HELD_OUT,
    SPLITS,
    TOKENIZER_FILE,
    TRAIN,
    DatasetManifest,
)
from opt_train.data.prepare_sets import add_sets, open_sets, sets_by_document, write_set
from opt_train.data.prepared import (
    check_configuration,
    check_sets,
    configuration_of,
    directory_of,
)
from opt_train.data.split_writer import SplitWriter, write_durably
from opt_train.data.staging_folder import StagingFolder
from opt_train.protocol.exits import BadInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROGRESS_SECONDS = 2.0


def prepare(
    data: DataConfig, tokenizer: TokenizerConfig, progress: Callable[[str], None]
) -> DatasetManifest:
    """Make sure that the prepared data of this configuration exists, and return its manifest.

    Data that the same configuration prepared is returned at once, and a named validation set that
    it lacks is added to it. A crash at any moment leaves either nothing at the final place or all
    of it. `progress` is called with lines for a person.

    Raises:
        BadInput: a key, the corpus, the space or the folder does not allow it; the message names
            which and the fix.
    """
    directory = directory_of(data, tokenizer)
    configuration = configuration_of(data, tokenizer)
    prepared = _already_prepared(directory, configuration)
    if prepared is not None and not check_sets(prepared, data, directory):
        return prepared
    _check(data, tokenizer)
    place = _place_of(directory)
    sets = open_sets(data)
    if prepared is None:
        open_corpus(data)  # whose mistakes should be reported before anything is made
    try:
        with StagingFolder.beside(place, progress) as staging:
            # Somebody else may have finished while this process waited for the lock.
            if (prepared := _already_prepared(directory, configuration)) is not None:
                return add_sets(staging, place, prepared, data, progress)
            manifest = _fill(staging.path, open_corpus(data), sets, data, tokenizer, progress)
            staging.rename_to(place)
    except OSError as error:
        raise _refused(directory, error) from error
    progress(f"prepared {manifest.train_tokens:,} training tokens in {directory}")
    return manifest


def _check(data: DataConfig, tokenizer: TokenizerConfig) -> None:
    if not 0.0 < data.validation_fraction < 1.0:
        raise BadInput(
            f"data.validation_fraction={data.validation_fraction} must lie between 0 and 1; the "
            "default is 0.02"
        )
    if data.max_bytes < 0:
        raise BadInput(f"data.max_bytes={data.max_bytes} is negative; use 0 for the whole corpus")
    if data.shard_tokens < 1:
        raise BadInput(
            f"data.shard_tokens={data.shard_tokens} must be at least 1; the default is {1 << 26}"
        )
    bpe.check(tokenizer)


def _already_prepared(
    directory: Path, configuration: dict[str, str | int | float]
) -> DatasetManifest | None:
    """The manifest, if the same configuration has prepared `directory`; None, if nothing is
    there."""
    try:
        if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
            return None
        if not directory.is_dir() or not (directory / DATASET_FILE).exists():
            raise BadInput(
                f"data.directory={directory} exists and holds no prepared data; remove it or name "
                "another folder"
            )
    except OSError as error:
        raise _refused(directory, error) from error
    manifest = DatasetManifest.read(directory)
    check_configuration(manifest, configuration, directory)
    return manifest


def _fill(
    folder: Path,
    corpus: Corpus,
    sets: Mapping[str, Corpus],
    data: DataConfig,
    config: TokenizerConfig,
    progress: Callable[[str], None],
) -> DatasetManifest:
    """Write tokenizer, shards and manifest into `folder`, all fsynced."""
    split = _survey(corpus, data.validation_fraction, sets_by_document(sets), progress)
    tokenizer = _tokenizer(corpus, split, config, progress)
    vocab_size = bpe.size_of(tokenizer)
    # GPT-2's 50,265 ids take two bytes each: 180 billion tokens, as many as OPT had, are 360 GB.
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    serialized = tokenizer.to_str().encode()
    write_durably(folder / TOKENIZER_FILE, serialized)

    named = [
        write_set(
            folder, name, texts, tokenizer, dtype=dtype, data=data, left_out=split.left_out[name]
        )
        for name, texts in sets.items()
    ]
    writers = {
        name: SplitWriter(folder, name, dtype, data.shard_tokens, vocab_size) for name in SPLITS
    }
    index = IndexWriter(folder, corpus.file_names)
    _tokenize(corpus, split, tokenizer, writers, index, progress)
    index.finish()
    train, validation = (writers[name].finish() for name in SPLITS)

    tokenizer_sha256 = hashlib.sha256(serialized).hexdigest()
    # Over the streams, not the files: how tokens are cut into shards changes nothing that is
    # trained.
    fingerprint = hashlib.sha256(
        json.dumps([dtype, tokenizer_sha256, train.sha256, validation.sha256]).encode()
    ).hexdigest()
    perplexity = unigram_perplexity(train.counts, validation.counts)
    progress(f"a unigram model of the training tokens has validation perplexity {perplexity:.1f}")
    manifest = DatasetManifest(
        name=data.name,
        fingerprint=fingerprint,
        tokenizer=config.name,
        tokenizer_sha256=tokenizer_sha256,
        vocab_size=vocab_size,
        eos=bpe.EOS,
        dtype=dtype,
        train_tokens=train.tokens,
        validation_tokens=validation.tokens,
        documents=split.documents,
        unigram_perplexity=perplexity,
        shards=(
            *train.shards,
            *validation.shards,
            *(shard for _, shards in named for shard in shards),
        ),
        configuration=configuration_of(data, config),
        sets=tuple(made for made, _ in named),
    )
    manifest.write(folder)
    return manifest


def unigram_perplexity(train: npt.NDArray[np.int64], validation: npt.NDArray[np.int64]) -> float:
    """Perplexity of validation tokens under the unigram model of training tokens, add-one smoothed.

    Args:
        train: occurrences of each entry `[vocab_size]`.
        validation: the same of the validation tokens.
    """
    # One added to each count: an entry that training never saw would make the perplexity infinite.
    logarithms = np.log(train + 1.0) - math.log(float(train.sum()) + len(train))
    return math.exp(-float((validation * logarithms).sum()) / float(validation.sum()))


# The corpus, read three times: to split it, to train the tokenizer, to write tokens ---------------


@dataclass(frozen=True, slots=True)
class _Split:
    """Which documents are held out, and how much text there is."""

    fraction: float
    named: Mapping[bytes, str]
    """The documents of named sets, by digest."""
    left_out: Counter[str]
    """Named set to the documents of the corpus that are neither trained on nor held out because it
    holds them."""
    documents: int
    """In both splits."""
    bytes: int

    def name_of(self, text: str) -> str:
        """``train``, ``validation``, or nothing for a document that is left out."""
        # Held out first, whoever else has it: a named set may share text with validation, never
        # with training.
        if is_held_out(text, self.fraction):
            return HELD_OUT
        return "" if self.named and digest_of(text) in self.named else TRAIN


def _survey(
    corpus: Corpus, fraction: float, named: Mapping[bytes, str], progress: Callable[[str], None]
) -> _Split:
    progress(f"reading the corpus {corpus.name} ({len(corpus.files):,} files)")
    documents = size = 0
    smallest, largest = 1.0, -1.0
    in_sets: list[tuple[float, str]] = []
    for text in corpus.documents():
        documents += 1
        size += len(text.encode())
        position = position_in_split(text)
        smallest = min(smallest, position)
        if named and (name := named.get(digest_of(text))):
            in_sets.append((position, name))
        else:
            largest = max(largest, position)
    if documents == 0:
        if corpus.max_bytes:
            raise BadInput(
                f"{corpus} has no text within data.max_bytes={corpus.max_bytes}; raise it"
            )
        raise BadInput(f"{corpus} has no text; add documents")
    if smallest >= largest:
        single = "is a single document"
        if in_sets:
            single = "has no two documents outside data.validation_sets"
        raise BadInput(
            f"{corpus} {single}, and one is needed for training and another for validation; add "
            "documents"
        )
    # A corpus of a few documents may have none below the line, or none above it: move the line just
    # past the nearest.
    if smallest >= fraction:
        fraction = math.nextafter(smallest, 1.0)
    elif largest < fraction:
        fraction = largest
    progress(f"{documents:,} documents, {size / 1e6:.1f} MB of text")
    left_out = Counter(name for position, name in in_sets if position >= fraction)
    for name, count in left_out.items():
        progress(
            f"left {count:,} of them out of training: the validation set {name} holds the same text"
        )
    return _Split(fraction, named, left_out, documents - left_out.total(), size)


def _tokenizer(
    corpus: Corpus, split: _Split, config: TokenizerConfig, progress: Callable[[str], None]
) -> "Tokenizer":
    if config.vocab_file:
        progress(f"reading the tokenizer {config.name} from {config.vocab_file}")
        return bpe.from_files(config)
    progress(f"training the tokenizer {config.name} with {config.vocab_size:,} entries")
    # Training documents alone: merges learnt from held-out text would flatter the validation loss.
    # They are read again, because a corpus need not fit into memory.
    texts = (text for text in corpus.documents() if split.name_of(text) == TRAIN)
    return bpe.train(texts, config.vocab_size)


def _tokenize(
    corpus: Corpus,
    split: _Split,
    tokenizer: "Tokenizer",
    writers: dict[str, SplitWriter],
    index: IndexWriter,
    progress: Callable[[str], None],
) -> None:
    done, reported_at = 0, time.monotonic()
    # Texts are tokenized a batch at a time, in order: their sources wait here for their tokens.
    waiting: deque[Document] = deque()

    def texts() -> Iterator[str]:
        for document in corpus.documents_with_sources():
            waiting.append(document)
            yield document.text

    for text, ids in bpe.encoded(tokenizer, texts()):
        document = waiting.popleft()
        name = split.name_of(text)
        if name == TRAIN:
            index.add(writers[TRAIN].tokens, document.file, document.line)
        if name:
            writers[name].add(ids)
        done += len(text.encode())
        if time.monotonic() - reported_at >= PROGRESS_SECONDS:
            reported_at = time.monotonic()
            tokens = sum(writer.tokens for writer in writers.values())
            progress(f"tokenized {done / 1e6:.1f} of {split.bytes / 1e6:.1f} MB, {tokens:,} tokens")


# What stands in the way ---------------------------------------------------------------------------


def _place_of(directory: Path) -> Path:
    """Where the finished folder is renamed to: links followed, since a rename would meet the link
    itself.

    Raises:
        BadInput: no folder can be renamed to there.
    """
    try:
        place = Path(os.path.realpath(directory))
        if place.is_symlink():
            raise BadInput(
                f"data.directory={directory} is a link that leads round in a circle; remove it"
            )
        why = _why_not_replaceable(place)
    except OSError as error:
        raise _refused(directory, error) from error
    if why:
        raise BadInput(
            f"data.directory={directory} is {why}, and no finished folder can take its place; "
            "give a folder below it"
        )
    return place


def _why_not_replaceable(place: Path) -> str:
    """What `place` is that no rename can put another folder there; empty: it is nothing of the
    kind."""
    if place == Path.cwd():
        # The rename would work, and leave this process in a folder without a name.
        return "the folder you are in"
    if _is_mount_point(place):
        return "a mount point"
    return ""


def _is_mount_point(place: Path) -> bool:
    if os.path.ismount(place):
        return True
    # A bind mount within one file system is only to be seen in this list, which writes white space
    # as octal.
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    written = os.fsencode(place).replace(b"\\", rb"\134")
    for character in b" \t\n":
        written = written.replace(bytes([character]), b"\\%03o" % character)
    # The fifth field is the mount point (proc(5)).
    return any(line.split(b" ")[4] == written for line in lines)


def _refused(directory: Path, error: OSError) -> BadInput:
    """The sentence for an operating system that says no."""
    where = error.filename or directory
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BadInput(
            f"data.directory={directory}: no space left while writing {where}; free some or name "
            "a folder on "
            "another disk"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return BadInput(
            f"data.directory={directory} cannot be written ({error.strerror}: {where}); name a "
            "folder you may write to"
        )
    return BadInput(
        f"data.directory={directory} cannot be used ({error.strerror}: {where}); name another "
        "folder"
    )
