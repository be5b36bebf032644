"""How the chronicle says times, durations, numbers and causes. Independent of locale and time
zone."""

import math
import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from opt_logbook.record.events import HELD_OUT

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

CAUSES = {
    "gpu_ecc": "a GPU's memory failed (ECC error)",
    "gpu_lost": "a GPU was lost",
    "gpu_fault": "a GPU failed",
    "silent_corruption": "a device computed wrongly without saying so",
    "node_failure": "a whole node was lost",
    "straggler": "one node was much slower than the others",
    "illegal_access": "the program touched memory that was not its own",
    "gpu_oom": "a GPU ran out of memory",
    "user_code": "the program itself failed",
    "host_oom": "a node ran out of memory",
    "network": "the network failed",
    "collective_timeout": "ranks waited for one another until the time ran out",
    "hang": "training hung",
    "killed": "a process was killed and nobody owned up to it",
    "storage": "storage failed",
    "corrupt_checkpoint": "a checkpoint was corrupt",
    "data": "the training data could not be read",
    "config": "the configuration was wrong",
    "loss_scale_floor": "the loss scale fell to its floor",
    "loss_nan": "the loss was no number any more",
    "loss_spike": "the loss jumped",
    "drift": "training drifted out of its healthy range",
    "plateau": "the loss stopped falling",
    "preemption": "the scheduler took the nodes back",
    "stopped": "a person stopped it",
    "none": "nothing failed, the supervisor was another one",
    "unknown": "the cause is not known",
}
"""Cause labels in words that somebody who has not seen the code understands: as many as whoever
writes the journal has (opt_train/diagnosis/causes.py), which a test sees to."""

# The sequences that colour and move; the escape character of any other is replaced as a control.
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
# Controls of both sets; the marks with which a text shows in another order than it has
# (CVE-2021-42574, "Trojan Source"); the line separators; lone surrogates, which no UTF-8 has.
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """`text` on one line, without colour codes, control characters and marks that turn the reading
    direction."""
    return _UNPRINTABLE.sub("\ufffd", _ANSI.sub("", text).replace("\t", "    ").replace("\n", " "))


def moment(seconds: float) -> str:
    """``2026-11-22 14:03:05 UTC``."""
    try:
        return f"{(_EPOCH + timedelta(seconds=int(seconds))):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, ValueError):  # no calendar has it, or it is no number
        return "an unknown time"


def clock(seconds: float, shown: float | None) -> str:
    """``14:03:05 UTC``, with the date where it is not that of `shown`, the time that the reader saw
    last."""
    text = moment(seconds)
    if shown is not None and moment(shown)[:11] == text[:11]:
        return text.partition(" ")[2]
    return text


def duration(seconds: float) -> str:
    """``4.5 s``, ``2 min 05 s``, ``3 h 12 min``, ``2 d 03 h``."""
    if not math.isfinite(seconds):
        return "an unknown time"
    # 59.95 would be shown as 60.0 s.
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours:02d} h"


def short(number: float) -> str:
    """``819k``, ``3.7M``, ``175B``."""
    number = _as_float(number)
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # From here on three digits round to the next unit: 999,500 would be 1e+03k.
        if number >= size * 0.9995:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def many(number: int, thing: str) -> str:
    """``1 step``, ``2,000 steps``."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


TIERS = {
    "shared": "checkpoint",
    "memory": "snapshot in the nodes' memory",
    "node": "snapshot on the nodes' own disks",
}
"""What the reader calls a checkpoint, by where its files are."""


def perplexity_on(validation_set: str) -> str:
    """``Validation perplexity``, or ``Perplexity on web`` for a set of that name."""
    return (
        "Validation perplexity" if validation_set == HELD_OUT else f"Perplexity on {validation_set}"
    )


def byte_size(number: int) -> str:
    """``44.3 MB``."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size * 0.9995:
            return f"{_as_float(number) / size:.3g} {unit}"
    return many(number, "byte")


def _as_float(number: float) -> float:
    """A damaged line may hold an integer of hundreds of digits; it is infinite for us."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def listed(things: Iterable[object]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    names = [str(thing) for thing in things]
    if not names:
        return "nothing"
    if len(names) == 1:
        return names[0]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def listed_briefly(things: Iterable[object], most: int = 12) -> str:
    """The same, with the middle of a long list left out."""
    names = [str(thing) for thing in things]
    if len(names) <= most:
        return listed(names)
    return f"{', '.join(names[: most - 2])}, … and {names[-1]} ({len(names)} in all)"


def sentence(text: str) -> str:
    """`text` as a sentence: it begins with a capital where it begins with a word, and ends with a
    point."""
    text = text.strip()
    if not text:
        return ""
    first = text.split(maxsplit=1)[0]
    # A name such as node-2 or rank0.log keeps its small letter.
    capital = text[0].upper() + text[1:] if first.isalpha() else text
    return capital if capital.endswith((".", "!", "?")) else capital + "."
