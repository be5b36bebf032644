"""Which faults a demonstration or a test plants, and where."""

from dataclasses import dataclass
from typing import Annotated

from opt_train.protocol.keys import NOT_NEGATIVE, OPERATIONAL, TRAINING, Matches

GARBAGE = Matches(
    "([0-9]{1,9}-[0-9]{1,9})?", "{key}={value} is not <first>-<last>, such as {key}=100-118"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultsConfig:
    """A seeded fault plan, for demonstrations and tests."""

    plan: Annotated[str, OPERATIONAL] = ""
    """Comma-separated ``<kind>@<step>``: ``kill-node@60, kill-rank@120, stop-rank@90,
    kill-supervisor@150``; the seed chooses the victim. Empty: none."""
    seed: Annotated[int, NOT_NEGATIVE, OPERATIONAL] = 0
    garbage: Annotated[str, GARBAGE, TRAINING] = ""
    """``<first>-<last>``: the tokens of these batches, counted from 0 in the order of the data, are
    random: a damaged file. Empty: none."""

    @property
    def garbage_batches(self) -> range:
        if not self.garbage:
            return range(0)
        first, last = map(int, self.garbage.split("-"))
        return range(first, last + 1)
