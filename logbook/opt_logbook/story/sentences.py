"""The smallest piece of the chronicle: a sentence, and the journal lines that back it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sentence:
    """One or two sentences of plain text. Whoever shows it escapes it."""

    text: str
    lines: tuple[int, ...] = ()
    """Journal lines it rests on."""
    author: str = ""
    """Set: a person's note, in the person's words."""
