"""The chain of hashes through a journal's lines: which verify, which are damaged, and what is torn
off the end. Pure functions over bytes.

Theory of operation. Each line ends in the hash of the line before it and of its own bytes, so a
line verifies if it follows from what came before. A strict chain would end at the first flipped bit
and throw away a month of journal behind it. So after a line that does not verify the search goes on
with a few *candidates*: hashes that the next line may follow from.

- A bit of the line's content flipped: its hash still stands at its end, and the next line follows
  from that.
- A bit of the hash flipped: the next line follows from the hash that the content really has.
- A newline came in, or a foreign line: the next follows from the line before the damage.

The first line that verifies by any of them settles which it was, and the chain is single again.
Damage is thus confined to the lines that have it, and each is reported with its number.
"""

from dataclasses import dataclass
from typing import NamedTuple

from opt_logbook.record.codec import GENESIS, CodecError, decode, digest, parse, split
from opt_logbook.record.events import Entry

_CANDIDATES_MAX = 12
"""Hashes a line may follow from, after damage. A flipped bit needs 4 at most; where that is not
enough whole stretches are gone, and trying more of them costs a hash a line each."""

_HEX_DIGITS = frozenset("0123456789abcdef")


class Damage(NamedTuple):
    """A line (counted from 1) that does not verify, and why."""

    line: int
    why: str


@dataclass(frozen=True, slots=True)
class Head:
    """The newest line: its number and its hash. As text `seq hash`."""

    seq: int
    hash: str

    def __str__(self) -> str:
        return f"{self.seq} {self.hash}"

    @classmethod
    def parse(cls, text: str) -> "Head":
        """The head that `text` names.

        Raises:
            ValueError: `text` is not a number and a hash.
        """
        seq, hash_ = text.split()
        if len(hash_) != len(GENESIS):
            raise ValueError(f"{text!r} does not end in a hash")
        return cls(int(seq), hash_)


NO_LINE = Head(0, GENESIS)
"""The head of an empty journal."""


@dataclass(frozen=True, slots=True)
class Chain:
    """What verifying the bytes of a journal found. Lines count from 1."""

    good: tuple[int, ...]
    """Numbers of the lines that verify."""
    damaged: tuple[Damage, ...]
    lines: tuple[bytes, ...]
    """All whole lines, without newlines, damaged ones included."""
    torn_bytes: int
    """Length of the torn last line, 0 where there is none."""
    follow: str
    """The hash that the next line to be appended follows from."""


def check(data: bytes) -> Chain:
    """Which lines verify. A last line that is unterminated or no JSON is torn; any other failure is
    damage."""
    end = data.rfind(b"\n") + 1
    lines = data[:end].split(b"\n")[:-1]
    torn_bytes = len(data) - end
    # The file system may have written a block of zeros where a line should end: the newline is
    # there and the line is not.
    if not torn_bytes and lines and _is_torn(lines[-1]):
        torn_bytes = len(lines.pop()) + 1
    good: list[int] = []
    damaged: list[Damage] = []
    candidates = [GENESIS]
    for number, line in enumerate(lines, 1):
        parts = split(line)
        if parts is not None and any(digest(c, parts[0]) == parts[1] for c in candidates):
            good.append(number)
            candidates = [parts[1]]
        else:
            why = "it does not end in a hash"
            if parts:
                why = "its hash does not fit its content and the line before"
            damaged.append(Damage(number, why))
            candidates = _after_damage(line, candidates)
    # The next line must follow from something even where the last one is damaged: from the
    # likeliest.
    return Chain(tuple(good), tuple(damaged), tuple(lines), torn_bytes, candidates[0])


@dataclass(frozen=True, slots=True)
class Reading:
    """A journal as read."""

    entries: tuple[Entry, ...]
    """Those that verify, in order."""
    lines: tuple[int, ...]
    """The line number of each entry. It is the entry's `seq` too, unless damage split or merged
    lines."""
    damaged: tuple[Damage, ...]
    torn_bytes: int
    line_count: int
    """Whole lines, damaged ones included; a torn one would be the next."""
    good_bytes: int
    """Length of the file without the torn line."""
    head: Head
    """What the next line follows from."""
    hashes: frozenset[str]
    """The hashes that the lines state, damaged ones included."""


def read_bytes(data: bytes) -> Reading:
    """The journal in `data`, verified and decoded."""
    chain = check(data)
    entries: list[Entry] = []
    lines: list[int] = []
    damaged = list(chain.damaged)
    for number in chain.good:
        try:
            entries.append(decode(chain.lines[number - 1]))
            lines.append(number)
        except CodecError as error:
            damaged.append(Damage(number, f"it verifies but cannot be read: {error}"))
    # Damaged lines at the end had numbers too, and none may be given out twice.
    trailing = len(chain.lines) - (lines[-1] if lines else 0)
    return Reading(
        entries=tuple(entries),
        lines=tuple(lines),
        damaged=tuple(sorted(damaged)),
        torn_bytes=chain.torn_bytes,
        line_count=len(chain.lines),
        good_bytes=len(data) - chain.torn_bytes,
        head=Head((entries[-1].seq if entries else 0) + trailing, chain.follow),
        hashes=frozenset(parts[1] for parts in map(split, chain.lines) if parts),
    )


def _is_torn(line: bytes) -> bool:
    try:
        parse(line)
    except CodecError:
        return True
    return False


def _after_damage(line: bytes, candidates: list[str]) -> list[str]:
    """Hashes the line behind a damaged one may follow from, likeliest first.

    The stated one, if a field was damaged; the computed one, if the hash was; and those before, if
    the line is foreign or a piece of a line that a damaged byte split in two.
    """
    parts = split(line)
    # Where the hash begins is not known: by position, and by what looks like the mark.
    # 75: the mark's 9 bytes, 64 digits, a quote and a brace.
    bodies = {line[:-75], line[: line.rfind(b',"hash":')]}
    if parts is not None:
        bodies = {parts[0]}
    # Each costs a sha256 of the line (1.8 GB/s a core), so the likeliest three alone. Sorted, since
    # the order of a set of bytes changes with the hash seed (invariant 12).
    computed = [digest(c, b) for c in candidates[:3] for b in sorted(bodies)]
    stated = line[-66:-2].decode("ascii", "replace")
    if len(stated) == len(GENESIS) and set(stated) <= _HEX_DIGITS:
        return [stated, *candidates[:4], *computed][:_CANDIDATES_MAX]
    return (computed + candidates)[:_CANDIDATES_MAX]
