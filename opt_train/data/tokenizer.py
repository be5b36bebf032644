"""Byte-level BPE with OPT's four special entries, trained on a corpus or read from GPT-2's two
files.

The ids follow OPT (arXiv 2205.01068; metaseq and its Hugging Face port): `<s>` 0, `<pad>` 1, `</s>`
2, `<unk>` 3.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from opt_train.data.config import TokenizerConfig
from opt_train.protocol.exits import BadInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# In OPT's order, which decides their ids: released weights mean these numbers.
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
PAD = 1
EOS = 2
"""OPT joins documents with `</s>`."""

SMALLEST_VOCABULARY = len(SPECIALS) + 256
"""The specials and every byte: with fewer there is text that cannot be written."""

LARGEST_TRAINED_VOCABULARY = 1 << 20

BATCH_BYTES = 1 << 21
"""Text that is tokenized at once, in parallel over its documents."""

IDS = 1 << 32
"""Ids are below this: shards hold no wider numbers."""


def check(config: TokenizerConfig) -> None:
    """Check what can be checked before any text is read.

    Raises:
        BadInput: one of the two files without the other, a file that is missing, or an impossible
            size.
    """
    if bool(config.vocab_file) != bool(config.merges_file):
        given, other = ("vocab", "merges") if config.vocab_file else ("merges", "vocab")
        raise BadInput(
            f"tokenizer.{given}_file is set without tokenizer.{other}_file; give both or neither"
        )
    for key, name in (("vocab_file", config.vocab_file), ("merges_file", config.merges_file)):
        if name and not os.path.isfile(name):  # Path's raises for a name that is too long
            raise BadInput(
                f"tokenizer.{key}={name} does not exist; name GPT-2's file or leave both keys "
                "empty to train"
            )
    if (
        not config.vocab_file
        and not SMALLEST_VOCABULARY <= config.vocab_size <= LARGEST_TRAINED_VOCABULARY
    ):
        raise BadInput(
            f"tokenizer.vocab_size={config.vocab_size} must lie between {SMALLEST_VOCABULARY} "
            "(four specials and "
            f"256 bytes) and {LARGEST_TRAINED_VOCABULARY}"
        )


def train(texts: Iterator[str], vocab_size: int) -> "Tokenizer":
    """A byte-level BPE of at most `vocab_size` entries. The same texts give the same tokenizer,
    byte for byte."""
    import tokenizers  # noqa: PLC0415
    from tokenizers import decoders, models, pre_tokenizers, trainers  # noqa: PLC0415

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[
            tokenizers.AddedToken(special, special=True, normalized=False) for special in SPECIALS
        ],
        # Every byte, seen in training or not: text that holds a missing one could not be written
        # down.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _as_text_only(tokenizer)


def from_files(config: TokenizerConfig) -> "Tokenizer":
    """GPT-2's byte-level BPE with OPT's ids.

    metaseq's `gpt2-vocab.json` (50,265 entries) has the specials in front already and is taken as
    it is: those are the released models' ids. OpenAI's `vocab.json` (50,257 entries) has none: its
    entries, `<|endoftext|>` among them, move up by four to make room, which is a valid tokenizer
    but not the released models'.

    Raises:
        BadInput: the files are not GPT-2's two files.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415

    vocabulary = _vocabulary(Path(config.vocab_file))
    merges = _merges(Path(config.merges_file), vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(special, special=True, normalized=False) for special in SPECIALS]
    )
    return _as_text_only(tokenizer)


def load(path: Path) -> "Tokenizer":
    """The tokenizer that `prepare` saved as `tokenizer.json`; text that looks like a special entry
    stays text.

    Raises:
        BadInput: the file is missing or damaged.
    """
    from tokenizers import Tokenizer  # noqa: PLC0415

    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(
            f"{path} cannot be read ({error.strerror}); prepare the data again"
        ) from None
    except Exception as error:  # the library's Rust side raises bare Exception
        raise BadInput(
            f"{path} is no tokenizer ({error}); delete its folder and prepare the data again"
        ) from None
    return _as_text_only(tokenizer)


def encoded(tokenizer: "Tokenizer", texts: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """Each document's text and its ids, `</s>` behind them, in order."""
    for batch in _in_batches(texts):
        for text, encoding in zip(
            batch, tokenizer.encode_batch_fast(batch, add_special_tokens=False), strict=True
        ):
            yield text, [*encoding.ids, EOS]


def _in_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def size_of(tokenizer: "Tokenizer") -> int:
    """One more than the largest id: the rows an embedding needs, even where the ids have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _as_text_only(tokenizer: "Tokenizer") -> "Tokenizer":
    # A document that contains the four letters `</s>` must not end there: specials are for us,
    # never for text.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _vocabulary(path: Path) -> dict[str, int]:
    try:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"tokenizer.vocab_file={path} is not readable JSON ({error}); use GPT-2's vocab.json"
        ) from None
    if not isinstance(vocabulary, dict) or not all(
        type(number) is int for number in vocabulary.values()
    ):
        raise BadInput(
            f"tokenizer.vocab_file={path} does not map entries to numbers; use GPT-2's vocab.json"
        )
    found = [vocabulary.get(special) for special in SPECIALS]
    if all(number is None for number in found):
        shifted = {entry: number + len(SPECIALS) for entry, number in vocabulary.items()}
        vocabulary = dict(zip(SPECIALS, range(len(SPECIALS)), strict=True)) | shifted
    elif found != list(range(len(SPECIALS))):
        raise BadInput(
            f"tokenizer.vocab_file={path} has {' '.join(SPECIALS)} at {found} where OPT has 0 1 2 "
            "3; "
            "use GPT-2's vocab.json"
        )
    _check_complete(path, vocabulary)
    return vocabulary


def _check_complete(path: Path, vocabulary: dict[str, int]) -> None:
    """Check that every text has tokens of its own: the library drops a byte without an entry and
    says nothing."""
    from tokenizers.pre_tokenizers import ByteLevel  # noqa: PLC0415

    if absent := sorted(set(ByteLevel.alphabet()) - vocabulary.keys()):
        raise BadInput(
            f"tokenizer.vocab_file={path} lacks {len(absent)} of the 256 byte symbols "
            f"({' '.join(absent[:8])}"
            f"{' ...' if len(absent) > 8 else ''}), so text would be lost; use GPT-2's vocab.json"
        )
    entry_of: dict[int, str] = {}
    for entry, number in vocabulary.items():
        if not 0 <= number < IDS:
            raise BadInput(
                f"tokenizer.vocab_file={path} gives {entry!r} an id that is not between 0 and "
                f"{IDS - 1}; "
                "use GPT-2's vocab.json"
            )
        if (other := entry_of.setdefault(number, entry)) != entry:
            raise BadInput(
                f"tokenizer.vocab_file={path} gives {other!r} and {entry!r} the same id; use "
                "GPT-2's vocab.json"
            )


def _merges(path: Path, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise BadInput(
            f"tokenizer.merges_file={path} is not readable text ({error}); use GPT-2's merges.txt"
        ) from None
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise BadInput(
                f"tokenizer.merges_file={path} line {number} merges what tokenizer.vocab_file "
                "does not hold; "
                "use the two files of one tokenizer"
            )
        merges.append((left, right))
    return merges
