"""Pieces of the sentences that users read about keys and values."""

import difflib
from collections.abc import Sequence


def shown(value: object) -> str:
    """`value` as a user would write it; empty text in quotes, or nobody would see it."""
    return '""' if value == "" else str(value)


def listed(items: Sequence[object], last: str = "or") -> str:
    """`1, 2 or 4`."""
    texts = [str(item) for item in items]
    if len(texts) == 1:
        return texts[0]
    return f"{', '.join(texts[:-1])} {last} {texts[-1]}"


def did_you_mean(word: str, candidates: Sequence[str]) -> str:
    """`; did you mean ...?` with the nearest candidate, or where to look them up."""
    near = difflib.get_close_matches(word, candidates, n=1, cutoff=0.5)
    # The right name in the wrong room, lr for optim.lr, is nearer than any other room's likeness.
    same = [c for c in candidates if c.rpartition(".")[2] == word.rpartition(".")[2]]
    if same and (not near or "." not in word):
        near = same[:1]
    if near:
        return f"; did you mean {near[0]}?"
    # A dozen names still read as a sentence.
    if len(candidates) <= 12:
        return f"; choose from {', '.join(candidates)}"
    return "; `opt-train run --cfg job` prints them all"
