"""How far the supervisor goes about each alarm, as the configuration says it."""

from dataclasses import replace

import pytest

from opt_train.config.run_config import RunConfig
from opt_train.protocol.exits import BadInput
from opt_train.stability.config import StabilityConfig
from opt_train.stability.ladder import LADDER
from opt_train.supervisor.config import SupervisorConfig
from opt_train.supervisor.modes import Mode
from opt_train.supervisor.stability_modes import ADVISE_ONLY, mode_of, modes_of


def config(mode: str, modes: str = "", supervisor: str = "act") -> RunConfig:
    return replace(
        RunConfig(),
        stability=StabilityConfig(mode=mode, modes=modes),
        supervisor=SupervisorConfig(mode=supervisor),
    )


def test_what_may_be_no_trouble_is_only_spoken_of() -> None:
    acting = {alarm for alarm in LADDER if mode_of(RunConfig(), alarm) is Mode.ACT}
    assert acting == LADDER.keys() - ADVISE_ONLY
    assert {"falls_too_well", "plateau", "held_out_gap", "ceiling"} == ADVISE_ONLY
    assert mode_of(config("observe"), "falls_too_well") is Mode.OBSERVE
    assert mode_of(config("advise", "falls_too_well=act"), "falls_too_well") is Mode.ACT


def test_a_rung_goes_before_its_alarm_and_the_supervisor_before_all() -> None:
    given = config("advise", "rise=act, rise/skip = observe")
    assert mode_of(given, "rise") is mode_of(given, "rise", "replay") is Mode.ACT
    assert mode_of(given, "rise", "skip") is Mode.OBSERVE
    assert mode_of(given, "outliers", "skip") is Mode.ADVISE
    assert mode_of(config("act", "rise=act", "advise"), "rise") is Mode.ADVISE


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rise", "'rise' is not alarm=mode"),
        ("ries=act", "'ries' is no alarm; did you mean rise"),
        ("rise/replya=act", "'replya' is no rung; did you mean replay"),
        ("rise=acts", "'acts' is no mode of rise; did you mean act"),
        ("rise=act,rise=advise", "names rise twice"),
    ],
)
def test_a_mistake_is_named(text: str, words: str) -> None:
    with pytest.raises(BadInput) as raised:
        modes_of(text)
    assert words in str(raised.value)
