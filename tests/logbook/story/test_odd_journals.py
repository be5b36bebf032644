"""A chronicle of a journal that is damaged, has no end or ends in a halt names what it lacks."""

from pathlib import Path

import pytest
from opt_logbook.record import metrics
from opt_logbook.record.chain import read_bytes
from opt_logbook.record.events import (
    CheckpointRejected,
    Event,
    FailureSeen,
    IncidentClosed,
    IncidentDiagnosed,
    JournalDamaged,
    JournalStalled,
    RunHalted,
    RunStopped,
    SupervisorStarted,
    Unknown,
)
from opt_logbook.record.run_directory import RunDirectory
from opt_logbook.render.render import render
from opt_logbook.story.fold import fold_story

from tests.logbook.chronicle_reading import (
    half_a_run,
    markdown_of,
    spoil,
)


def test_an_empty_run_says_so(tmp_path: Path) -> None:
    for prepare in (lambda: None, (tmp_path / "journal.jsonl").touch):
        prepare()
        rendered = render(RunDirectory(tmp_path))
        assert "no entries yet" in rendered.markdown.read_text()
        assert rendered.figures == ()
        assert rendered.chronicle.status == "empty"


def test_a_run_that_still_goes_on_says_where_it_was(tmp_path: Path) -> None:
    demo = half_a_run(tmp_path / "demo")
    rendered = render(demo.run)
    text = rendered.markdown.read_text()
    assert rendered.chronicle.status == "open"
    assert "The journal has no end" in text
    assert "attempt 1.00 was at step 60" in text
    assert "Nothing broke." in text


def test_a_supervisor_that_died_in_the_middle_of_an_incident_leaves_a_readable_chronicle(
    tmp_path: Path,
) -> None:
    demo = half_a_run(tmp_path / "demo")
    demo.append(FailureSeen(1, 1, "node-2", -1, "node-2 went silent"), 60)
    rendered = render(demo.run)
    assert [incident.number for incident in rendered.chronicle.open_incidents] == [1]
    text = rendered.markdown.read_text()
    for words in (
        "It has not been diagnosed.",
        "Nothing yet.",
        "Not known yet",
        "Open when the journal was last written",
    ):
        assert words in text
    demo.append(SupervisorStarted(2, "laptop", 4243, "0.1.0", resumed=True), 60, seconds=9.0)
    demo.append(JournalStalled(12.5))
    assert "took over the run where the journal left it" in markdown_of(demo.run)
    assert "kept the journal waiting for 12.5 s" in markdown_of(demo.run)


def test_a_run_that_a_person_must_decide_about_asks_the_question_at_the_top(tmp_path: Path) -> None:
    demo = half_a_run(tmp_path / "demo")
    demo.append(FailureSeen(1, 1, "node-1", 0, "rank 0 exited with 1"), 60)
    demo.append(
        IncidentDiagnosed(
            1, "user_code", "software", "ValueError in loss", 0.9, "node-1", 0, (), "stop"
        ),
        60,
    )
    demo.append(
        CheckpointRejected("checkpoints/1.00/step-00000050", "model.safetensors: wrong sha256")
    )
    demo.append(IncidentClosed(1, "halted", 0, 0.0, 0.0), 60)
    demo.append(
        RunHalted("the same error came three times; is the loss function right?", "user_code"), 60
    )
    rendered = render(demo.run)
    text = rendered.markdown.read_text()
    assert rendered.chronicle.status == "halted"
    assert (
        "a person must decide: The same error came three times; is the loss function right?" in text
    )
    assert "model.safetensors: wrong sha256" in text
    assert "nobody had to act" not in text


def test_a_stopped_and_resumed_run_is_not_called_unattended(tmp_path: Path) -> None:
    demo = half_a_run(tmp_path / "demo")
    demo.append(RunStopped("maria", 50), 60)
    assert "It was stopped by maria" in markdown_of(demo.run)
    demo.append(SupervisorStarted(2, "laptop", 4243, "0.1.0", resumed=True))
    assert render(demo.run).chronicle.status == "open"
    demo.lose_node()
    demo.train(52, 200)
    demo.finish()
    text = markdown_of(demo.run)
    assert "It finished after" in text
    assert "nobody had to act" not in text


@pytest.mark.parametrize(
    "event",
    [
        SupervisorStarted(2, "laptop", 4243, "0.1.0", resumed=True),
        JournalDamaged(3, "its hash does not fit"),
        RunHalted("go on?", "unknown"),
        None,
    ],
)
def test_a_run_that_somebody_had_to_help_is_not_called_unattended(
    tmp_path: Path, event: Event | None
) -> None:
    demo = half_a_run(tmp_path / "demo")
    demo.lose_node()
    if event is not None:
        demo.append(event)
    demo.train(52, 200)
    demo.finish()
    if event is None:
        assert "nobody had to act" in markdown_of(demo.run), (
            "which shows that the others' event made the difference"
        )
        spoil(demo.run, b"the last step is near", b"the last step is nigh")
    assert "nobody had to act" not in markdown_of(demo.run)


def test_a_damaged_and_torn_journal_is_told_and_its_rest_stands(demo: RunDirectory) -> None:
    text = demo.journal.read_bytes()
    demo.journal.write_bytes(text.replace(b"went silent", b"went violet", 1) + b'{"seq":42,"ti')
    rendered = render(demo)
    shown = rendered.markdown.read_text()
    assert "Line 12 of the journal does not verify and had to be left out" in shown
    assert "torn (13 bytes)" in shown
    assert "The line of the journal that told the first sign is missing." in shown
    assert "went violet" not in shown
    assert len(rendered.chronicle.entries) == 3
    demo.journal.write_bytes(b"".join(text.splitlines(keepends=True)[1:]))
    assert "its first line is missing" in markdown_of(demo)


def test_kinds_of_a_newer_version_are_shown_not_dropped(tmp_path: Path) -> None:
    demo = half_a_run(tmp_path / "demo")
    demo.append(Unknown("gpu_sang", {"tune": "ode"}), 60)
    assert "gpu_sang (a kind that this version does not know): tune ode." in markdown_of(demo.run)


def test_an_attempt_whose_first_line_is_damaged_keeps_its_lines_and_its_steps(
    demo: RunDirectory,
) -> None:
    whole = render(demo).chronicle
    spoil(demo, b'"reason":"node_failure on node-2"', b'"reason":"node_failure on node-7"')
    chronicle = render(demo).chronicle
    assert [entry.name for entry in chronicle.entries] == ["1.02", "1.01", "1.00"]
    heading, steps = chronicle.entries[1].heading, chronicle.entries[1].contents[2]
    assert heading.endswith("attempt 1.01 · its first line is missing from the journal")
    assert steps == "50 to 120"
    assert [[i.number for i in entry.incidents] for entry in chronicle.entries] == [[2], [1], []]
    assert chronicle.time_spent == whole.time_spent
    assert chronicle.entries[2].sentences == whole.entries[2].sentences, (
        "nothing of it is told of the attempt before"
    )
    assert [
        sentence for sentence in whole.entries[1].sentences if "Ran on" not in sentence.text
    ] == list(chronicle.entries[1].sentences)


def test_metrics_without_a_journal_can_be_rendered(demo: RunDirectory) -> None:
    demo.journal.write_bytes(b"")
    rendered = render(demo)
    assert rendered.chronicle.status == "empty"
    assert rendered.figures == ()


def test_an_incident_that_ended_with_the_run_is_not_said_to_have_brought_training_back(
    tmp_path: Path,
) -> None:
    demo = half_a_run(tmp_path / "demo")
    for number, lost, seconds, down in ((1, 0, 5.0, 5.0), (2, 1, 9.0, 4.0)):
        demo.append(FailureSeen(number, 1, "node-1", 0, "rank 0 exited with 1"), 60)
        demo.append(IncidentClosed(number, "halted", lost, seconds, down), 60, seconds=seconds)
        demo.append(RunHalted(f"question {number}?", "user_code"), 60)
        demo.append(SupervisorStarted(number + 1, "laptop", 4243, "0.1.0", resumed=True))
    text = markdown_of(demo.run)
    assert "- Training did not go on; 5.0 s until the run halted." in text
    assert "- The work of 1 step (4,096 tokens) was lost." in text
    assert (
        "- Training went on after 4.0 s, but was not yet back where it had been 9.0 s after the "
        "failure, when the run "
        "halted." in text
    )
    assert "training was back where" not in text
    assert "No step had to be done again" not in text


def test_each_halted_incident_has_the_question_of_its_own_halt(tmp_path: Path) -> None:
    demo = half_a_run(tmp_path / "demo")
    for number in (1, 2):
        demo.append(FailureSeen(number, 1, "node-1", 0, "rank 0 exited with 1"), 60)
        demo.append(IncidentClosed(number, "halted", 0, 1.0, 1.0), 60)
        demo.append(RunHalted(f"question {number}?", "user_code"), 60)
    outcomes = [
        incident.sections[-1].sentences[0].text
        for incident in render(demo.run).chronicle.open_incidents
    ]
    assert outcomes == [f"Halted; a person must decide: Question {number}?" for number in (2, 1)]


def test_two_incidents_at_once_do_not_stop_training_twice(tmp_path: Path) -> None:
    demo = half_a_run(tmp_path / "demo")
    demo.append(FailureSeen(1, 1, "node-1", 0, "rank 0 is gone"), 60)
    demo.append(FailureSeen(2, 1, "node-2", 1, "rank 1 is gone"), 60, seconds=4.0)
    demo.append(IncidentClosed(1, "stopped", 0, 10.0, 10.0), 60, seconds=6.0)
    demo.append(IncidentClosed(2, "stopped", 0, 6.0, 6.0), 60)
    demo.append(RunStopped("maria", 50), 60)
    spent = {name: seconds for name, seconds, _ in render(demo.run).chronicle.time_spent}
    assert spent["down"] == pytest.approx(10.0)


@pytest.mark.parametrize("missing", [(), (1,), (1, 7), (7, 18, 28), (12, 24)])
def test_the_time_spent_sums_to_the_wall_clock_whatever_is_missing(
    demo: RunDirectory, missing: tuple[int, ...]
) -> None:
    lines = demo.journal.read_bytes().splitlines(keepends=True)
    for number in missing:
        lines[number - 1] = lines[number - 1].replace(b'"kind":"', b'"kind":"X')
    demo.journal.write_bytes(b"".join(lines))
    data = demo.journal.read_bytes()
    reading = read_bytes(data)
    story = fold_story(reading, metrics.read(demo))
    totals = story.totals
    assert min(totals.kept, totals.redone, totals.down, totals.other) >= 0
    assert totals.kept + totals.redone + totals.down + totals.other == pytest.approx(totals.wall)


def test_an_attempt_with_metrics_is_not_said_to_have_done_nothing(demo: RunDirectory) -> None:
    spoil(
        demo,
        b'"kind":"training_began","attempt":"1.01"',
        b'"kind":"training_Began","attempt":"1.01"',
    )
    assert "No step of it was done." not in markdown_of(demo)
