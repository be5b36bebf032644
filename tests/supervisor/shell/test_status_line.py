"""What stands on the terminal, and that a terminal which takes nothing makes nobody wait."""

import contextlib
import io
import os
import pty
import select
import threading
import time

from opt_train.simulation.world import World
from opt_train.supervisor.effects import Show
from opt_train.supervisor.inputs import MetricsReceived, Tick
from opt_train.supervisor.shell.status_line import StatusLine, describe


def show(step: int = 120, stage: str = "training", incident: str = "") -> Show:
    return Show(stage, step, 200, 4.1234, 12345.6, 2, 1, "1.01", incident)


def test_the_line_says_what_a_person_asks_first() -> None:
    line = describe(show(incident="node_failure: node-2 is gone"))
    for part in (
        "training",
        "step 120/200",
        "loss 4.123",
        "12,346 tokens/s",
        "nodes 2+1",
        "1.01",
        "node-2 is gone",
    ):
        assert part in line


def test_a_loss_that_is_no_number_is_shown_and_does_not_end_the_line() -> None:
    """NaN travels as a word: formatting it as a number ended the thread that writes, for the rest
    of the run."""
    world = World()
    world.start_supervisor()
    world.until_step(2)
    assert world.replayed.live is not None
    world.feed(MetricsReceived("n0", world.replayed.live.generation, {"step": 3, "loss": "NaN"}))
    world.now += 1
    world.feed(Tick())
    shown = [effect for effect in world.effects if isinstance(effect, Show)][-1]
    assert "loss nan" in describe(shown)


def test_text_from_a_log_cannot_command_the_terminal() -> None:
    line = describe(show(incident="boom \x1b]0;evil\x07 \x1b[2J\r\nmore\u202e"))
    assert all(character.isprintable() for character in line)


def test_without_a_terminal_there_is_a_line_an_interval_and_one_at_each_change() -> None:
    stream = io.StringIO()
    status = StatusLine(stream, interval_seconds=30.0)
    for step in range(20):
        status.show(show(step))
        time.sleep(0.01)
    status.show(show(21, stage="failing"))
    time.sleep(0.5)
    status.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) <= 4, "a log file is flooded"
    assert lines[0].startswith("training")
    assert lines[-1].startswith("failing")


def read_until(terminal: int, wanted: str, seconds: float = 20.0) -> str:
    """What is drawn on `terminal` until `wanted` is; without a word to wait for, what is there
    already."""
    deadline = time.monotonic() + (seconds if wanted else 0.0)
    drawn = ""
    while not wanted or wanted not in drawn:
        if not select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
            assert not wanted, f"{wanted!r} was not drawn: {drawn!r}"
            break
        drawn += os.read(terminal, 65536).decode()
    return drawn


def test_a_terminal_sees_one_line_redrawn() -> None:
    primary, secondary = pty.openpty()
    drawn = ""
    with os.fdopen(secondary, "w") as stream:
        status = StatusLine(stream, interval_seconds=30.0)
        for step in (1, 2, 3):
            status.show(show(step))
            drawn += read_until(primary, f"step {step}/200")
        status.add_line("the journal cannot be written")
        drawn += read_until(primary, "the journal cannot be written")
        status.close()
        drawn += read_until(primary, "")
    os.close(primary)
    assert drawn.count("\n") <= 2
    assert [f"step {n}/200" in drawn for n in (1, 2, 3)] == [True] * 3
    assert "the journal cannot be written" in drawn


def test_a_terminal_that_takes_nothing_makes_nobody_wait() -> None:
    read, write = os.pipe()
    stream = os.fdopen(write, "w")
    os.set_blocking(write, True)
    try:
        os.set_blocking(write, False)
        try:
            while True:
                os.write(write, b"x" * 65536)
        except BlockingIOError:
            os.set_blocking(write, True)
        status = StatusLine(stream, interval_seconds=0.01)
        began = time.monotonic()
        for step in range(1000):
            status.show(show(step))
            status.add_line(f"sentence {step}")
        assert time.monotonic() - began < 10.0
        closing = threading.Thread(target=status.close)
        closing.start()
        closing.join(5.0)
        assert not closing.is_alive()
    finally:
        os.close(read)  # the writer, stuck until now, gets an error and ends
        time.sleep(0.2)
        with contextlib.suppress(OSError):
            stream.close()
