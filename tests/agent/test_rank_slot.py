"""A rank slot whose processes do not come up."""

import asyncio
from typing import Any

import pytest
from opt_logbook.record.run_directory import RunDirectory

from opt_train.agent import rank_slot as slots
from opt_train.agent.rank_log import LogCopies
from opt_train.agent.rank_slot import RankSlot
from tests.agent.snapshots.stores import play

pytestmark = pytest.mark.timeout(90)


def test_warm_ranks_are_still_tried_after_a_night_in_which_all_died(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_BACKOFF_SECONDS_MAX", 0.01)

    async def scene() -> None:
        changes: list[Any] = []
        slot = RankSlot(
            0,
            ("false",),
            {},
            run,
            run.logs / "warm" / "node-1",
            LogCopies(run),
            add_fact=lambda _: None,
            add_metrics=lambda _: None,
            keep_snapshot=lambda *_: None,
            changed=lambda: changes.append(slot.state().stage),
        )
        slot._warm_ranks_lost = 1100  # at most 30 s apart
        slot.open()
        while changes.count("warming") < 3:
            await asyncio.sleep(0.01)
        await slot.close()

    play(scene(), seconds=10.0)
