"""Named validation sets as a user writes them: `name=corpus` pairs in `data.validation_sets`.
Standard library only."""

import re

from opt_train.data.config import DataConfig
from opt_train.data.manifest import SPLITS
from opt_train.protocol.exits import BadInput

_NAME = re.compile(r"[a-z0-9_-]{1,40}")


def named_sets(data: DataConfig) -> dict[str, str]:
    """Each set's name and corpus, in the order written.

    Raises:
        BadInput: a pair is none, or a name is impossible, taken or given twice.
    """
    sets: dict[str, str] = {}
    if not data.validation_sets.strip():
        return sets
    for pair in data.validation_sets.split(","):
        name, _, corpus = (part.strip() for part in pair.partition("="))
        if not corpus:
            raise BadInput(
                f"data.validation_sets: {pair.strip()!r} is not name=corpus; "
                "write a name and a file, folder or glob without commas, as web=texts/web"
            )
        if not _NAME.fullmatch(name):
            raise BadInput(
                f"data.validation_sets: {name!r} names no set; use small letters, digits, dashes "
                "and underscores, "
                "40 at most"
            )
        if name in SPLITS:
            raise BadInput(
                f"data.validation_sets: {name} is a part of the corpus itself; choose another name"
            )
        if name in sets:
            raise BadInput(
                f"data.validation_sets names {name} twice; give each set a name of its own"
            )
        sets[name] = corpus
    return sets
