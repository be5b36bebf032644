"""The files of a tokenizer, which travel with weights as they are."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from opt_train.checkpoint.durable_file import write_durably
from opt_train.data import tokenizer
from opt_train.data.config import TokenizerConfig
from opt_train.protocol.exits import BadInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
SETTINGS, SPECIALS = "tokenizer_config.json", "special_tokens_map.json"

NAMES = (TOKENIZER, VOCABULARY, MERGES, SETTINGS, SPECIALS, "added_tokens.json")
"""What Hugging Face's tokenizers of OPT consist of."""

# A limit, because files are copied through memory; GPT-2's have a megabyte or two.
LARGEST = 1 << 28

FOLDER = "tokenizer"
"""Where they lie in an imported checkpoint."""


def tokenizer_files(folder: Path) -> list[Path]:
    """Those that are in `folder`."""
    return [folder / name for name in NAMES if (folder / name).is_file()]


def copy(files: Iterable[Path], folder: Path) -> list[Path]:
    """Copies in `folder`, durable.

    Raises:
        BadInput: a file is too large to be a tokenizer's.
    """
    copies = []
    for path in files:
        if path.stat().st_size > LARGEST:
            raise BadInput(
                f"{path} has {path.stat().st_size} bytes, which is no tokenizer; remove it"
            )
        folder.mkdir(exist_ok=True)
        write_durably(folder / path.name, path.read_bytes())
        copies.append(folder / path.name)
    return copies


def add_settings(folder: Path, positions: int) -> None:
    """Make transformers' `AutoTokenizer` able to read a `tokenizer.json` that came without its
    settings."""
    if not (folder / TOKENIZER).is_file() or (folder / SETTINGS).exists():
        return
    start, pad, end, unknown = tokenizer.SPECIALS
    del start  # OPT never uses it: a document begins behind the end of another one
    named = {"bos_token": end, "eos_token": end, "unk_token": unknown, "pad_token": pad}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
    }
    for name, values in ((SETTINGS, settings), (SPECIALS, named)):
        write_durably(folder / name, (json.dumps(values, indent=2) + "\n").encode())


def configuration_of(folder: Path) -> TokenizerConfig | Path:
    """How to get the tokenizer in `folder`: its `tokenizer.json`, or GPT-2's two files.

    Raises:
        BadInput: there is none.
    """
    if (folder / TOKENIZER).is_file():
        return folder / TOKENIZER
    if (folder / VOCABULARY).is_file() and (folder / MERGES).is_file():
        return TokenizerConfig(
            vocab_file=str(folder / VOCABULARY), merges_file=str(folder / MERGES)
        )
    raise BadInput(f"{folder.parent} came without a tokenizer; name prepared data with --data")


def load(found: TokenizerConfig | Path) -> "Tokenizer":
    """A tokenizer from its `tokenizer.json`, or from GPT-2's two files.

    Raises:
        BadInput: a file is missing or damaged.
    """
    return tokenizer.load(found) if isinstance(found, Path) else tokenizer.from_files(found)


def same_ids(folder: Path, other: TokenizerConfig | Path) -> bool:
    """Whether each id means the same text by the tokenizer in `folder` and by another one.

    Raises:
        BadInput: either is missing or damaged.
    """
    return load(configuration_of(folder)).get_vocab() == load(other).get_vocab()
