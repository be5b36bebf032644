"""What becomes of a node beyond one failure is told in words."""

import pytest
from opt_logbook.record.events import Entry, Event
from opt_logbook.record.node_events import (
    ActionWithheld,
    LemonCleared,
    LemonNoted,
    LemonPassedOver,
    NodeReturned,
)
from opt_logbook.story.attempt import describe_entries

WHY = "3 x gpu_ecc (uncontained) in 20 days, in runs a, b"


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (LemonNoted("n7", 2.4, WHY, ()), f"n7 is a repeat offender: {WHY}."),
        (LemonCleared("n7", 0.9), "n7 is no repeat offender any more."),
        (
            LemonPassedOver("n7", "n9"),
            "n7, a repeat offender, was passed over: n9 took its place.",
        ),
        (NodeReturned("n7", 5, 61.0), "n7 passed its preflight (5 tests) and stood by again."),
        (
            ActionWithheld("grow", ("n9",), "advise", "nothing is done in mode advise"),
            "Nothing is done in mode advise.",
        ),
    ],
)
def test_each_kind_has_its_sentence(event: Event, told: str) -> None:
    [sentence] = describe_entries([Entry(1.8e9, "1.00", 7, event, seq=3)], None)
    assert sentence.text.endswith(f": {told}")
    assert sentence.lines == (3,)
