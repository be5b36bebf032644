"""The name of an attempt: `12.43`, lineage and count. A string everywhere; ordered as two
integers."""

import re
from dataclasses import dataclass
from typing import Self

_FORM = re.compile(r"([1-9][0-9]*)\.([0-9]{2,})")


@dataclass(frozen=True, slots=True, order=True)
class AttemptId:
    """`lineage` counts from 1, `number` from 0 and is written with at least two digits."""

    lineage: int
    number: int

    def __str__(self) -> str:
        return f"{self.lineage}.{self.number:02d}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The attempt that `text` names.

        Raises:
            ValueError: `text` is not of the form `12.43`.
        """
        match = _FORM.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not an attempt like 1.00 or 12.43")
        return cls(int(match[1]), int(match[2]))

    def next(self) -> "AttemptId":
        """The attempt after this one in the same lineage."""
        return AttemptId(self.lineage, self.number + 1)
