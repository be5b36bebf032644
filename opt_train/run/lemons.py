"""Repeat offenders: nodes and GPUs that have failed again and again, over all runs of a site.

A few machines cause much of the trouble, and a scheduler hands them out again: "lemon nodes"
(Kokolis et al. 2024, arXiv 2410.21680). Each time a run takes a node out for bad hardware, that is
an offence (`Offence`), on record for all runs. An offence counts for the GPU that failed, wherever
it is built in now, and for the node where no GPU is known; it counts for less as time goes by, half
after each half-life. Pure: who reads and writes the record is `supervisor/shell/lemon_record.py`.
"""

from collections import Counter
from collections.abc import Collection, Iterable

from opt_logbook.record.hardware import Offence

from opt_train.diagnosis.causes import DETAILS, Blame, blame_of, cause_named

DAY = 86400.0
TEXT_CHARACTERS_MAX = 200
"""Of a detail, or whatever else an offence says: of a longer one the beginning."""


def is_offence(cause: str) -> bool:
    """Whether a node that is taken out for `cause` is to be remembered."""
    return blame_of(cause) == Blame.HARDWARE


def offences_of(
    node: str, gpus: Collection[str], offences: Iterable[Offence]
) -> tuple[Offence, ...]:
    """What `node` has on record now, with the GPUs of these UUIDs in it; no UUID: they are not
    known, and what its GPUs did is taken for its own."""

    def counts(offence: Offence) -> bool:
        if offence.gpu and gpus:
            # Moved to another node a GPU keeps its record; exchanged, it takes it along.
            return offence.gpu in gpus
        return offence.node == node

    return tuple(offence for offence in offences if counts(offence))


def score(offences: Iterable[Offence], now: float, half_life_days: float) -> float:
    """Each offence of this moment is 1, one that is a half-life old 1/2, and so on."""
    # A clock that is behind another one's makes no offence worse than a new one.
    ages = (max(0.0, now - offence.time) / DAY for offence in offences)
    return sum((float(0.5 ** (age / half_life_days)) for age in ages), 0.0)


def described(offences: Collection[Offence], now: float) -> str:
    """``3 x gpu_ecc (uncontained) in 20 days, in runs a, b``."""
    kinds = Counter(map(_kind, offences))
    what = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
    # Of one failure an hour ago nobody wants to read "in 0 days".
    days = max(1, round((now - min(offence.time for offence in offences)) / DAY))
    runs = list(dict.fromkeys(offence.run for offence in offences))
    return (
        f"{what} in {days} day{'s' if days > 1 else ''}, in run{'s' if len(runs) > 1 else ''} "
        f"{', '.join(runs)}"
    )


def _kind(offence: Offence) -> str:
    # Other details are words for a person, and differ each time.
    known = offence.detail in DETAILS.get(cause_named(offence.cause), ())
    return f"{offence.cause} ({offence.detail})" if known else offence.cause


def worst_first(
    offences: Collection[Offence], now: float, half_life_days: float, least: float
) -> tuple[str, ...]:
    """Names of nodes whose score is `least` or more, as far as names tell."""
    # Before there is an allocation nobody can say which GPUs a node has now.
    scores = {
        node: score(offences_of(node, (), offences), now, half_life_days)
        for node in sorted({offence.node for offence in offences})
    }
    return tuple(sorted((n for n, s in scores.items() if s >= least), key=lambda n: -scores[n]))
