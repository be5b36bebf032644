"""Facts down a real pipe: whole lines, in order, never a wait."""

import os
import subprocess
import sys
import time

import pytest

from opt_train.protocol.facts import ExitNotice, InForce, Metrics, Phase, Progress, SaveFailed
from opt_train.protocol.framing import MAX_FACT_BYTES, Message, from_line
from opt_train.train.fact_pipe import FactPipe, fitting_line


def read_all(fd: int) -> list[Message]:
    os.set_blocking(fd, True)
    data = b""
    while piece := os.read(fd, 1 << 16):
        data += piece
    return [from_line(line) for line in data.splitlines()]


def fill(pipe: FactPipe) -> int:
    """Tell metrics until some are dropped; returns how many got through."""
    published = 0
    while not pipe.dropped_metrics:
        pipe.publish(Metrics({"step": published, "padding": "x" * 500}))
        published += 1
    return published - 1


def test_full_pipe_drops_metrics_and_keeps_facts_in_order() -> None:
    reader, writer = os.pipe()
    pipe = FactPipe(writer)
    through = fill(pipe)
    pipe.publish(SaveFailed(1, "first"))
    pipe.publish(SaveFailed(2, "second"))
    # Room for a metrics line, but facts wait in front of it and it must not overtake them.
    os.read(reader, MAX_FACT_BYTES * 2)
    pipe.publish(ExitNotice(0, 3, "done"))
    assert pipe.dropped_metrics == 1
    os.set_blocking(reader, False)
    pipe.close(timeout_seconds=0.1)
    rest = read_all_tail(reader)
    assert [fact.reason for fact in rest if not isinstance(fact, Metrics)] == [
        "first",
        "second",
        "done",
    ]
    assert isinstance(rest[-1], ExitNotice)
    assert rest[-1].dropped_metrics == 1
    assert through > 20


def read_all_tail(fd: int) -> list[Message]:
    """What is left after a read that may have cut a line."""
    os.set_blocking(fd, True)
    data = b""
    while piece := os.read(fd, 1 << 16):
        data += piece
    return [from_line(line) for line in data.splitlines()[1:]]


def test_phases_that_nobody_reads_do_not_pile_up() -> None:
    reader, writer = os.pipe()
    pipe = FactPipe(writer)
    fill(pipe)
    for step in range(10_000):
        pipe.publish(Phase("step", step))
        pipe.publish(Phase("waiting", step))
    for done in range(10_000):
        pipe.publish(Progress(done, 10_000))
    os.set_blocking(reader, False)
    os.read(reader, 1 << 20)
    pipe.close()
    published = [fact for fact in read_all(reader) if not isinstance(fact, Metrics)]
    assert published == [Phase("waiting", 9_999), Progress(9_999, 10_000)]


def test_telling_and_closing_wait_for_nobody() -> None:
    reader, writer = os.pipe()
    pipe = FactPipe(writer)
    fill(pipe)
    began = time.monotonic()
    for number in range(1000):
        pipe.publish(SaveFailed(number, "x" * 1000))
    assert time.monotonic() - began < 30.0
    began = time.monotonic()
    pipe.close(timeout_seconds=0.3)
    assert 0.25 < time.monotonic() - began < 4.5, "not the 5 s of its default"
    os.close(reader)


def test_reader_that_is_gone_kills_nobody() -> None:
    reader, writer = os.pipe()
    pipe = FactPipe(writer)
    os.close(reader)
    pipe.publish(Phase("step", 1))
    pipe.publish(ExitNotice(0, 1, "done"))
    assert pipe.reader_gone
    pipe.close()


@pytest.mark.parametrize("text", ["x" * 100_000, "€" * 50_000, '"\\\n' * 50_000])
def test_long_reason_is_cut_honestly(text: str) -> None:
    line = fitting_line(ExitNotice(1, 5, text))
    assert len(line) <= MAX_FACT_BYTES
    reason = from_line(line).reason
    kept, _, tail = reason.rpartition(" ... (")
    assert text.startswith(kept)
    assert len(kept) > 100
    assert tail == f"{len(text) - len(kept)} more characters are cut off)"


def test_short_reason_is_left_alone() -> None:
    assert from_line(fitting_line(SaveFailed(5, "disk full"))) == SaveFailed(5, "disk full")


def test_fact_that_cannot_be_cut_is_refused_rather_than_torn() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        fitting_line(InForce({"x": "y" * 5000}))


def test_non_finite_numbers_survive() -> None:
    fact = from_line(fitting_line(Metrics({"loss": float("nan"), "grad_norm": float("inf")})))
    assert dict(fact.line) == {"loss": "NaN", "grad_norm": "Infinity"}


def test_a_log_on_a_full_disk_does_not_end_training() -> None:
    program = (
        "from opt_train.train.fact_pipe import log_line; log_line('a step'); open(2, "
        "'w').write('went on')"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=True,
        )
    assert done.stderr == "went on"
