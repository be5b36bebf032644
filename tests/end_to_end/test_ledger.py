"""A new run that takes the ledger of a disturbed one is its surviving line, to the bit."""

import json
import subprocess
from pathlib import Path

import pytest
from opt_logbook.record import inbox
from opt_logbook.record.run_directory import RunDirectory

from tests.end_to_end import driving
from tests.train.rig import tensors_in

STEPS = 260
KEYS = (
    f"train.steps={STEPS}",
    "cluster.buffer_nodes=0",
    f"checkpoint.every_steps={STEPS}",
    "checkpoint.memory_every_steps=10",
    "checkpoint.memory_keep=6",
)


def last_save(run: RunDirectory) -> dict[tuple[str, str], str]:
    [folder] = run.checkpoints.glob(f"*/step-{STEPS:08d}")
    return tensors_in(folder)


def disturbed(folder: Path) -> RunDirectory:
    """A run whose rate is cut, whose clipping changes and whose data is passed over in part, and
    that then goes back in place behind all of it, under a lower rate still."""
    process = driving.start(folder, *KEYS)
    run = driving.run_directory(folder)

    def ask(orders: int, **changes: float) -> None:
        message = {"kind": "intervene", "by": "ada", "why": "a test", "changes": changes}
        inbox.drop(run, message)
        driving.wait_for(
            lambda: len(driving.of_kind(run, "order_ended")) == orders, 60, process, folder
        )

    try:
        driving.wait_for(lambda: driving.newest_step(run) >= 12, 120, process, folder)
        ask(1, lr_scale=0.5)
        ask(3, clip=0.2, skip_batches=3)
        ask(4, roll_back=driving.newest_step(run) - 5, lr_scale=0.5, skip_batches=2)
        assert driving.finish(process, folder, 120) == 0, driving.tail(folder)
    finally:
        driving.end(process, folder)
    return run


def again(folder: Path, *overrides: str) -> RunDirectory:
    process = driving.start(folder, *KEYS, *overrides)
    try:
        assert driving.finish(process, folder, 120) == 0, driving.tail(folder)
    finally:
        driving.end(process, folder)
    return driving.run_directory(folder)


@pytest.mark.slow
def test_the_ledger_of_a_disturbed_run_gives_its_surviving_line(tmp_path: Path) -> None:
    before = disturbed(tmp_path / "before")
    [back] = [e for e in driving.of_kind(before, "attempt_started") if e.event.rollback]
    assert driving.of_kind(before, "failure_seen") == []
    given_up = driving.metrics(before)["1.00"]
    assert back.step is not None
    assert max(given_up) > back.step, "there is something that the new run does not repeat"

    after = again(tmp_path / "after", f"ledger={before.path}")
    assert [e.event.kind for e in driving.of_kind(after, "attempt_started")] == ["attempt_started"]
    assert driving.of_kind(after, "order_given") == []
    assert last_save(after) == last_save(before)
    repeated, lines = driving.metrics(after)["1.00"], driving.metrics(before)["1.01"]
    for step, line in lines.items():
        for key in ("loss", "grad_norm", "grad_norm_clipped", "lr", "samples", "updates"):
            assert line[key] == repeated[step][key], (key, step)
    # What makes the test one: nothing at first, and all of what was left out at last.
    assert (repeated[1]["samples"], repeated[STEPS]["samples"]) == (8, 8 * STEPS + 40)

    # Each attempt's batches are those that it trained on then, under what was ordered by then.
    for attempt, step in (("1.00", 1), ("1.00", max(given_up)), ("1.01", STEPS), ("", STEPS)):
        shown = subprocess.run(
            driving.command(
                *("batch", str(before.path), "--step", str(step), "--attempt", attempt, "--json")
            ),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        batch = json.loads(shown.stdout)
        line = driving.metrics(before)[attempt or "1.01"][step]
        assert batch["attempt"] == line["attempt"]
        assert batch["position"] + 8 == line["samples"]
        assert sum(document["share"] for document in batch["documents"]) == pytest.approx(1)
        assert sum(document["tokens"] for document in batch["documents"]) == 8 * 64
        # What the loop saw of the batch, and what is read again now.
        entropy = batch["checks"]["token_entropy"]
        assert line["batch_token_entropy"] == pytest.approx(entropy, rel=1e-4)
        equal = batch["checks"]["equal_labels"] / (8 * 64)
        assert line["batch_equal_labels"] == pytest.approx(equal, rel=1e-4)

    [created] = driving.of_kind(after, "run_created")
    assert created.event.ledger_of == str(before.path)
    assert created.event.ledger_difference == ()
    assert [known["order"]["kind"] for known in created.event.ledger] == [
        *("scale_lr", "set_clip", "skip_samples", "scale_lr", "skip_samples")
    ]
    story = (after.chronicle / "chronicle.md").read_text()
    assert f"It trains under the ledger of {before.path} from the start: 5 orders" in story
    shown = subprocess.run(
        driving.command("ledger", str(after.path), "--json"),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    told = json.loads(shown.stdout)
    assert told["ledger_of"] == str(before.path)
    assert told["ledger"] == json.loads(json.dumps([dict(k) for k in created.event.ledger]))
