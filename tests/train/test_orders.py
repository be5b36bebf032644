"""The control pipe: commands and orders in pieces, rubbish, an agent that dies; signals that only
vote."""

import os
import signal
import threading

import pytest

from opt_train.protocol.commands import Begin
from opt_train.protocol.framing import to_line
from opt_train.protocol.orders import SaveAndStop
from opt_train.train.orders import AgentGone, ControlPipe, StopSignals
from tests.train.lr_factor import LrFactor

BEGIN = Begin(
    generation=1,
    attempt="1.00",
    node="n0",
    slot=0,
    rank=0,
    world_size=1,
    local_rank=0,
    store_host="",
    store_port=0,
    config_path="",
    config_sha256="",
    run_directory="",
    checkpoint=None,
    manifest_sha256=None,
    order_number=0,
)


def test_orders_behind_begin_in_one_piece_are_kept() -> None:
    reader, writer = os.pipe()
    control = ControlPipe(reader)
    os.write(writer, to_line(BEGIN) + to_line(LrFactor(1, "because", 0.5)))
    assert control.wait_for_begin() == BEGIN
    assert control.poll() == [LrFactor(1, "because", 0.5)]
    assert control.poll() == []


def test_line_that_comes_in_pieces_is_one_order() -> None:
    reader, writer = os.pipe()
    control = ControlPipe(reader)
    line = to_line(SaveAndStop(7, "the scheduler's limit is near"))
    os.write(writer, line[:10])
    assert control.poll() == []
    os.write(writer, line[10:])
    assert control.poll() == [SaveAndStop(7, "the scheduler's limit is near")]


def test_rubbish_does_not_end_training(capfd: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    control = ControlPipe(reader)
    os.write(writer, b'not json\n{"kind":"of_the_future"}\n' + to_line(LrFactor(2, "x", 0.5)))
    assert control.poll() == [LrFactor(2, "x", 0.5)]
    assert "control pipe" in capfd.readouterr().out


def test_agent_that_dies_is_noticed() -> None:
    reader, writer = os.pipe()
    control = ControlPipe(reader)
    os.close(writer)
    with pytest.raises(AgentGone):
        control.poll()


def test_agent_that_dies_before_begin_ends_the_wait() -> None:
    reader, writer = os.pipe()
    threading.Timer(0.1, os.close, [writer]).start()
    assert ControlPipe(reader).wait_for_begin() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_is_a_vote_and_no_death(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        signals = StopSignals()
        signals.listen()
        assert not signals.received
        os.kill(os.getpid(), number)
        assert signals.received == number.name
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
