"""Training that goes wrong on real ranks: seen, gone back from, put right, judged, told."""

import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest
from opt_logbook.record.run_directory import RunDirectory

from opt_train.protocol.exits import STOPPED
from tests.end_to_end import driving

STEPS = 420


def started(folder: Path, sick: dict[str, Any], *overrides: str) -> subprocess.Popen[str]:
    return driving.start(
        folder,
        f"train.steps={STEPS}",
        "cluster.rank_module=tests.end_to_end.sick_rank",
        "checkpoint.every_steps=200",
        "checkpoint.memory_every_steps=10",
        "checkpoint.memory_keep=10",
        "stability.mode=act",
        *overrides,
        environment={"SICK": json.dumps(sick)},
    )


def ends_well(folder: Path, sick: dict[str, Any], *overrides: str) -> RunDirectory:
    process = started(folder, sick, *overrides)
    try:
        assert driving.finish(process, folder, 240) == 0, driving.tail(folder)
    finally:
        driving.end(process, folder)
    run = driving.run_directory(folder)
    assert driving.of_kind(run, "failure_seen") == [], "no process ended"
    starts = [entry.event.rollback > 0 for entry in driving.of_kind(run, "attempt_started")]
    assert starts == [False, *[True] * (len(starts) - 1)], "each time in place"
    names_its_batches(run)
    return run


def names_its_batches(run: RunDirectory) -> None:
    """Each alarm's batch, by documents that are there to be looked at."""
    seen = [(e.attempt, e.step) for e in driving.of_kind(run, "instability_seen")]
    read = driving.of_kind(run, "batch_sources")
    assert [(entry.attempt, entry.step) for entry in read] == seen
    # Names of files have characters that Markdown wants escaped.
    story = (run.chronicle / "chronicle.md").read_text().replace("\\", "")
    for entry in read:
        assert entry.event.documents >= len(entry.event.sources) > 0
        shares = [known.share for known in entry.event.sources]
        assert shares == sorted(shares, reverse=True)
        for known in entry.event.sources:
            assert Path(known.source).is_file()
            assert f"{known.source} ({known.share:.1%})" in story


def last_losses(run: RunDirectory, first: int) -> float:
    """The mean loss of the newest attempt from the step `first` on."""
    (_, lines) = max(driving.metrics(run).items())
    return statistics.mean(line["loss"] for step, line in lines.items() if step >= first)


def answers(run: RunDirectory) -> list[tuple[str, str]]:
    return [(e.event.alarm, e.event.rung) for e in driving.of_kind(run, "instability_seen")]


@pytest.mark.slow
def test_a_learning_rate_that_jumps_is_lowered_by_as_much(tmp_path: Path) -> None:
    run = ends_well(tmp_path, {"rate": [200, 30.0]})
    assert answers(run) == [("update_jump", "replay"), ("update_jump", "lower_lr")]
    given = [e.event for e in driving.of_kind(run, "order_given")]
    [change] = given[1].parameters["changes"]
    assert 1 / 60 < change["factor"] < 1 / 15
    closed = [e.event.outcome for e in driving.of_kind(run, "instability_closed")]
    # Updates are as large as ever by the rate that they are made with: it is not given back.
    assert closed in (["helped"], ["helped", "kept"])
    story = (run.chronicle / "chronicle.md").read_text()
    assert "as large as usual; back to step" in story
    assert f"with the learning rate times {change['factor']:.2g}" in story
    assert "what was done about it has helped: the loss is " in story


@pytest.mark.slow
def test_a_learning_rate_too_high_from_the_start_is_put_right_from_the_beginning(
    tmp_path: Path,
) -> None:
    changes = ("train.steps=120", "optim.lr=3e-3", "optim.warmup_steps=20", "model.dropout=0.0")
    (tmp_path / "sick").mkdir()
    run = ends_well(tmp_path / "sick", {"rate": [0, 20.0]}, *changes)
    assert answers(run) == [("ceiling_at_start", "restart")]
    [first, second] = driving.of_kind(run, "attempt_started")
    assert (first.step, second.step, second.event.checkpoint) == (
        0,
        0,
        f"memory/{first.attempt}/step-00000000",
    )
    [given] = [e.event for e in driving.of_kind(run, "order_given")]
    [change] = given.parameters["changes"]
    assert 1 / 40 < change["factor"] < 1 / 10
    [closed] = driving.of_kind(run, "instability_closed")
    assert closed.event.outcome == "helped"
    story = (run.chronicle / "chronicle.md").read_text()
    assert "from the beginning, with the learning rate times" in story
    twin = ends_well(tmp_path / "twin", {}, *changes)
    assert answers(twin) == []
    assert last_losses(run, 100) == pytest.approx(last_losses(twin, 100), rel=0.03)


@pytest.mark.slow
def test_data_that_is_garbage_is_passed_over(tmp_path: Path) -> None:
    """In one go: what was gone back to finds the end of it before anything is trained on again."""
    first, last = 200, 225
    run = ends_well(tmp_path, {"garbage": [first, last]})
    assert [rung for _, rung in answers(run)] == ["replay"]
    [probed] = [e.event for e in driving.of_kind(run, "data_probed")]
    assert probed.verdict == "bad data"
    batch = 8
    assert (first - 8) * batch <= probed.bad_from <= first * batch
    assert (last + 1) * batch <= probed.bad_to <= (first + 2 * (last + 1 - first)) * batch
    # No more is left out: what lies between the state and the range is trained on.
    [_, given] = [e.event for e in driving.of_kind(run, "order_given")]
    [change] = given.parameters["changes"]
    left_out_from = (given.parameters["step"] + change["after"]) * batch
    assert probed.bad_from - batch < left_out_from <= first * batch
    assert left_out_from + change["samples"] == probed.bad_to
    assert [e.event.outcome for e in driving.of_kind(run, "instability_closed")] == ["helped"]
    story = (run.chronicle / "chronicle.md").read_text()
    assert "the data is bad: the state of step " in story
    assert f"from sample {probed.bad_from:,} to {probed.bad_to:,}" in story


@pytest.mark.slow
def test_labels_that_are_the_inputs_are_named_and_passed_over(tmp_path: Path) -> None:
    """The loss falls on them: whoever watches it alone sees nothing wrong."""
    run = ends_well(tmp_path, {"labels": [200, 209]})
    # A model of so few steps is as far off whether a label is the next token or the input: the loss
    # does not tell a probe where the data is bad, so it is passed over when it comes again.
    assert answers(run) in (
        [("broken_data", "replay")],
        [("broken_data", "replay"), ("broken_data", "skip")],
    )
    assert driving.of_kind(run, "data_probed")
    assert [e.event.outcome for e in driving.of_kind(run, "instability_closed")] == ["helped"]
    seen = driving.of_kind(run, "instability_seen")[0]
    assert seen.step == 202, "at the second of them, steps counted from 1"
    story = (run.chronicle / "chronicle.md").read_text()
    assert "100% of the labels are the inputs at their places; back to step" in story
    lines = driving.metrics(run)
    [*_, last] = lines
    assert max(line["batch_equal_labels"] for line in lines["1.00"].values()) == 1.0
    assert all(line["batch_equal_labels"] < 0.5 for line in lines[last].values())


@pytest.mark.slow
def test_what_cannot_be_put_right_is_saved_as_it_was_before_and_handed_over(tmp_path: Path) -> None:
    process = started(tmp_path, {"rate": [200, 0.01]})
    try:
        assert driving.finish(process, tmp_path, 240) == STOPPED, driving.tail(tmp_path)
    finally:
        driving.end(process, tmp_path)
    run = driving.run_directory(tmp_path)
    assert answers(run) == [("frozen", "replay"), ("frozen", "hand_over")]
    [closed] = driving.of_kind(run, "instability_closed")
    assert closed.event.outcome == "handed over"
    [*_, last] = driving.of_kind(run, "attempt_started")
    assert last.event.rollback
    [stopped] = driving.of_kind(run, "run_stopped")
    assert "a person must decide" in stopped.event.by
    assert stopped.event.saved_step == last.step
    assert last.step is not None
    assert last.step <= 190


@pytest.mark.slow
def test_a_loss_scale_that_has_collapsed_is_set_anew_in_place(tmp_path: Path) -> None:
    """In fp16, as the CPU computes it; what overflows is written into the gradients. Left alone the
    scale is 2^-24 behind it, and doubles once in 1,000 steps."""
    first, last, steps = 40, 79, 140
    scale, floor = 2.0**8, 2.0**-24
    run = ends_well(
        tmp_path,
        {"overflow": [first, last]},
        f"train.steps={steps}",
        "stability.horizon_steps=40",
        "precision.compute=fp16",
        "precision.loss_scale=megatron",
        f"precision.loss_scale_initial={scale}",
        f"precision.loss_scale_floor={floor}",
    )
    alarms, rungs = zip(*answers(run), strict=True)
    assert set(rungs) == {"rescale"}
    assert set(alarms) <= {"loss_scale_collapse", "loss_scale_floor"}
    assert 1 <= len(rungs) <= 5
    [closed] = driving.of_kind(run, "instability_closed")
    assert closed.event.outcome == "helped"
    given = [entry.event for entry in driving.of_kind(run, "order_given")]
    assert [(e.order, e.parameters["scale"], e.parameters["floor"]) for e in given] == [
        ("set_loss_scale", scale, 2.0**-5)
    ] * len(rungs)
    [lines] = driving.metrics(run).values()
    assert len(lines) == steps, "each step was trained once"
    overflows = [step for step, line in lines.items() if line["overflow"]]
    assert overflows == [*range(first + 1, last + 2)]
    assert lines[first]["loss_scale"] == scale
    assert lines[steps]["loss_scale"] >= 1.0, "of 2^8, at most one row of overflows below it"
    assert {line["loss_scale_floor"] for line in lines.values()} == {floor, 2.0**-5}
    assert lines[steps]["loss"] < lines[first]["loss"]
    story = (run.chronicle / "chronicle.md").read_text()
    assert "the loss scale is set to 256 and its floor to 0.03125, in place" in story
    assert "the loss scale set to 256 and the loss scale's floor at 0.03125: 8 steps" in story
