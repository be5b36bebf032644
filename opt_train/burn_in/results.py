"""What a test program found: printed as one line of JSON by whoever measured, read by whoever
decides."""

import contextlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum


class BurnInTest(StrEnum):
    """What is tested of a node."""

    PROGRAM = "program"
    """Whether the test program itself came to its end."""
    MATMUL = "matmul"
    GPU_MEMORY = "gpu memory"
    HOST_MEMORY = "host memory"
    DISK = "disk"
    SHARED = "shared file system"
    CORES = "cores"
    CLOCK = "clock"
    PAIR = "all-reduce"


@dataclass(frozen=True, slots=True)
class BurnInResult:
    """One test of one part of a node."""

    test: str
    part: str = ""
    """Which of several: ``slot 3 (NVIDIA A100-SXM4-80GB)``, ``with n2``; empty: there is one."""
    value: float | None = None
    """What was measured; None: nothing could be."""
    unit: str = ""
    fingerprint: str = ""
    """Of what was computed: parts of the same kind that compute the same have the same."""
    remark: str = ""
    trouble: str = ""
    """What is wrong, a sentence; empty: nothing is."""
    cause: str = ""
    """Of the trouble: a label of docs/causes.md."""
    detail: str = ""
    """Of the cause, where the table of responses has a row for it."""


@dataclass(frozen=True, slots=True)
class NodeReport:
    """Everything that one node's test program found."""

    node: str
    ended: float
    """By the node's own clock, Unix seconds, when it printed this."""
    results: tuple[BurnInResult, ...]


def to_line(results: Iterable[BurnInResult]) -> str:
    """The results as one line of JSON, for `results_of`."""
    return json.dumps([asdict(result) for result in results])


def results_of(output: str) -> tuple[BurnInResult, ...]:
    """The results in a program's output; libraries may have printed before and behind them.

    Raises:
        ValueError: there are none.
    """
    for line in reversed(output.splitlines()):
        with contextlib.suppress(ValueError, TypeError):
            return tuple(BurnInResult(**fields) for fields in json.loads(line))
    raise ValueError("it printed no results")


def report_line(report: NodeReport) -> str:
    """The report as one line of JSON, for `report_of`."""
    return json.dumps(asdict(report))


def report_of(output: str) -> NodeReport:
    """The report in a program's output; others may have printed before and behind it.

    Raises:
        ValueError: there is none.
    """
    for line in reversed(output.splitlines()):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            fields = json.loads(line)
            results = tuple(BurnInResult(**result) for result in fields["results"])
            return NodeReport(str(fields["node"]), float(fields["ended"]), results)
    raise ValueError("it printed no report")
