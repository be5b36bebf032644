"""The chronicle must tell somebody who has not seen the code what broke, when, why, what was done
and what it cost."""

import math
import re
from pathlib import Path

import pytest
from opt_logbook.record import metrics
from opt_logbook.record.chain import read_bytes
from opt_logbook.record.events import (
    AttemptEnded,
    CheckpointCommitted,
    CheckpointRejected,
    CheckpointRetired,
    Entry,
    Event,
    Evidence,
    FailureSeen,
    IncidentClosed,
    IncidentDiagnosed,
    JournalDamaged,
    JournalMended,
    JournalStalled,
    LineageOpened,
    NodeFailed,
    Note,
    RunHalted,
    RunStopped,
    SupervisorStarted,
    Unknown,
    ValidationMeasured,
)
from opt_logbook.record.journal import Journal
from opt_logbook.record.lock import Lock
from opt_logbook.record.run_directory import RunDirectory
from opt_logbook.record.verify import verify
from opt_logbook.render.chronicle import Chronicle
from opt_logbook.render.plots import ALARM, ATTEMPT_COLOURS
from opt_logbook.render.render import render
from opt_logbook.story.fold import fold_story
from opt_logbook.story.sentences import Sentence

from tests.logbook.demo_run import NODES, DemoRun, metrics_line, write_demo


def markdown_of(run: RunDirectory) -> str:
    return render(run).markdown.read_text()


def half_a_run(path: Path) -> DemoRun:
    """Attempt 1.00 at step 60, its journal still open."""
    demo = DemoRun(path)
    demo.create()
    demo.start("1.00", 0, NODES, ("node-3",), reason="the run begins")
    demo.train(2, 60)
    return demo


def spoil(run: RunDirectory, old: bytes, new: bytes) -> None:
    """Damage the first line of the journal that says `old`."""
    data = run.journal.read_bytes()
    assert old in data
    run.journal.write_bytes(data.replace(old, new, 1))


def sentences_in(chronicle: Chronicle) -> list[Sentence]:
    incidents = [
        *chronicle.open_incidents,
        *(i for entry in chronicle.entries for i in entry.incidents),
    ]
    return [
        *(sentence for entry in chronicle.entries for sentence in entry.sentences),
        *(
            sentence
            for incident in incidents
            for section in incident.sections
            for sentence in section.sentences
        ),
        *chronicle.before,
    ]


def test_five_questions_about_the_lost_node_are_answered(demo: RunDirectory) -> None:
    text = markdown_of(demo)
    section = text[text.index("#### Incident 1") : text.index("**Attempt 1.01**")]
    assert "node-2 went silent: its agent's connection closed" in section, "what broke"
    assert "2026-11-22 14:03:4" in section
    assert "after step 60" in section, "when"
    assert "node_failure: a whole node was lost. Blame: hardware." in section, "why"
    assert "logs/1.00/node-1/rank0.log:41" in section, "with evidence"
    assert "node-3 took the place of node-2" in section, "what was done"
    assert "from the checkpoint of step 50" in section
    assert "10 steps (40,960 tokens) had to be done again" in section, "what it cost"
    assert "10.0 s from the failure" in section
    assert "Recovered: training went on in attempt 1.01" in section


def test_a_run_that_goes_on_for_more_steps_is_not_told_as_past_its_end(tmp_path: Path) -> None:
    """`train.steps=60 lineage=new` on a run of 40 was told as "60 of 40 steps"."""
    demo = DemoRun(tmp_path / "extended")
    demo.create(steps=40)
    demo.start("1.00", 0, NODES, ("node-3",), reason="the run begins")
    demo.train(2, 40)
    demo.append(LineageOpened(2, "c1", ("optim.lr: 0.1 -> 0.2", "train.steps: 40 -> 60")))
    demo.start("2.00", 40, NODES, ("node-3",), reason="the run goes on")
    demo.train(42, 60)
    text = markdown_of(demo.close())
    assert "60 of 60 steps" in text
    assert "on stdlib for 40 steps" in text
    assert "Lineage 2 made that 60 steps." in text


@pytest.mark.parametrize(
    ("difference", "steps"),
    [
        ((), None),
        (("optim.lr: 1 -> 2", "torch: 2.12.0 -> 2.13.0"), None),
        (("train.steps: 40 -> 60",), 60),
        (("train.steps: 40 -> many",), None),
        (("train.steps",), None),
    ],
)
def test_a_lineage_says_how_many_steps_only_where_it_changes_them(
    difference: tuple[str, ...], steps: int | None
) -> None:
    assert LineageOpened(2, "c1", difference).steps == steps


def test_the_top_tells_the_night_in_plain_words(demo: RunDirectory) -> None:
    text = markdown_of(demo)
    summary = text[text.index("## What happened") : text.index("| Status |")]
    for words in (
        "train opt-demo, a model of 3.68M parameters, on stdlib for 200 steps",
        "It finished after",
        "against 702.4 for a unigram model",
        "Two things broke on the way.",
        "a whole node was lost (node_failure). Blame: hardware.",
        "a process was killed and nobody owned up to it (killed). Blame: unknown.",
        "It cost 20 steps, which were done again, and 15.4 s",
        "nobody had to act",
    ):
        assert words in summary


def test_entries_stand_newest_first_under_dated_headings(demo: RunDirectory) -> None:
    chronicle = render(demo).chronicle
    assert [entry.name for entry in chronicle.entries] == ["1.02", "1.01", "1.00"]
    assert chronicle.entries[1].heading.endswith(
        "UTC · attempt 1.01 · restarted from step 50 of 1.00 · node_failure on node-2"
    )
    assert [[i.number for i in entry.incidents] for entry in chronicle.entries] == [[2], [1], []]


def test_every_sentence_can_be_traced_to_lines_of_the_journal(demo: RunDirectory) -> None:
    rendered = render(demo)
    for sentence in sentences_in(rendered.chronicle):
        assert sentence.lines, sentence.text
        assert set(sentence.lines) <= set(rendered.chronicle.journal_lines)
    page = rendered.page.read_text()
    lines = demo.journal.read_text().splitlines()
    for number, line in rendered.chronicle.journal_lines.items():
        assert lines[number - 1].startswith(line[:-1])
        assert f'id="J{number}"' in page


def test_every_line_of_the_journal_is_told_somewhere(demo: RunDirectory) -> None:
    chronicle = render(demo).chronicle
    assert sorted(chronicle.journal_lines) == list(
        range(1, len(demo.journal.read_bytes().splitlines()) + 1)
    )


def test_the_time_adds_up_and_later_notes_do_not_stretch_it(demo: RunDirectory) -> None:
    before = render(demo).chronicle
    spent = {name: seconds for name, seconds, _ in before.time_spent}
    assert spent["kept"] == pytest.approx(200 * 0.55)
    assert spent["redone"] == pytest.approx(30 * 0.55)
    assert spent["down"] == pytest.approx(8.9)
    with Lock.acquire(demo) as lock, Journal.open(demo, lock) as journal:
        journal.append(
            Entry(1795956185.0, "1.02", 200, Note("maria", "Looked at it a week later."))
        )
    after = render(demo).chronicle
    assert after.time_spent == before.time_spent
    assert after.as_of == "2026-11-29 12:43:05 UTC"
    assert any(
        sentence.text == "Looked at it a week later." for sentence in after.entries[0].sentences
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


def test_many_incidents_are_counted_at_the_top_and_told_below(tmp_path: Path) -> None:
    demo = half_a_run(tmp_path / "demo")
    for number in range(1, 10):
        cause = "killed" if number % 3 else "network"
        demo.append(FailureSeen(number, 1, "node-1", 0, "rank 0 is gone"), 60)
        demo.append(
            IncidentDiagnosed(number, cause, "unknown", "", 0.5, "node-1", 0, (), "restart"), 60
        )
        demo.start(f"1.{number:02d}", 50, NODES, (), reason=cause, incident=number)
        demo.append(IncidentClosed(number, "recovered", 10, 9.0, 4.0), 51)
    text = markdown_of(demo.run)
    assert "9 things broke on the way." in text
    assert "6 times killed (a process was killed and nobody owned up to it)." in text
    assert "3 times network (the network failed)." in text
    assert text.count("#### Incident") == 9


def test_the_demo_of_the_tests_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    first, second = write_demo(tmp_path / "a"), write_demo(tmp_path / "b")
    assert first.journal.read_bytes() == second.journal.read_bytes()


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


def test_a_rejected_checkpoint_is_told_once(tmp_path: Path) -> None:
    demo = half_a_run(tmp_path / "demo")
    demo.append(CheckpointRejected("checkpoints/a", "told by the attempt"))
    demo.append(FailureSeen(1, 1, "node-1", 0, "rank 0 is gone"), 60)
    demo.append(FailureSeen(2, 1, "node-2", 1, "rank 1 is gone"), 60)
    demo.append(CheckpointRejected("checkpoints/b", "told by incident 2"))
    text = markdown_of(demo.run)
    assert text.count("told by the attempt") == 1
    assert text.count("told by incident 2") == 1
    incident = text[text.index("#### Incident 2") : text.index("#### Incident 1")]
    assert "told by incident 2" in incident


def test_numbers_that_no_axis_and_no_calendar_has_do_not_stop_the_chronicle(tmp_path: Path) -> None:
    demo = half_a_run(tmp_path / "demo")
    huge = 10**400
    demo.append(FailureSeen(1, 1, "node-1", 0, "rank 0 is gone"), huge)
    demo.append(IncidentClosed(1, "recovered", huge, math.inf, math.nan), huge)
    demo.append(ValidationMeasured("validation", 4.0, 50.0, huge), huge)
    demo.append(CheckpointCommitted("checkpoints/x", "", huge, 1, math.inf, healthy=True), huge)
    demo.append(JournalStalled(math.nan))
    with demo.run.metrics_of("1.00").open("a") as file:
        file.write(f'{{"step":61,"loss":{huge},"time":1e300,"step_seconds":1e308}}\n')
        file.write(f'{{"step":{huge},"loss":4.0,"tokens":{huge}}}\n')
    assert len(render(demo.run).figures) == 3


def test_a_loss_that_was_no_number_breaks_the_curve(tmp_path: Path) -> None:
    pieces = []
    for name, loss in (("whole", 4.0), ("broken", math.nan)):
        demo = DemoRun(tmp_path / name)
        demo.create()
        demo.start("1.00", 0, NODES, (), reason="the run begins")
        for step in range(2, 40):
            line = metrics_line(step, demo.now + step)
            demo.metrics.append("1.00", {**line, "loss": loss if step == 20 else line["loss"]})
        svg = figures_of(demo.run)["wall_clock"]
        curves = re.findall(rf'<path d="([^"]*)"[^>]*stroke: {ATTEMPT_COLOURS[0]}', svg)
        pieces.append(max(curve.count("M ") for curve in curves))
    assert pieces == [1, 2]


def test_each_attempt_has_its_curve_and_each_time_without_training_its_shade(
    demo: RunDirectory,
) -> None:
    figures = figures_of(demo)
    for name in ("steps", "wall_clock"):
        for colour in ATTEMPT_COLOURS[:3]:
            curves = re.findall(rf'<path d="([^"]*)"[^>]*stroke: {colour}', figures[name])
            assert max(curve.count("L ") for curve in curves) > 20, f"{name}, {colour}"
        assert ATTEMPT_COLOURS[3] not in figures[name]
    shades = re.findall(rf"fill: {ALARM}; opacity: 0.16", figures["wall_clock"])
    assert len(shades) == 2


def test_snapshots_are_told_in_a_sentence_and_restarts_say_where_they_came_from(
    tmp_path: Path,
) -> None:
    demo = DemoRun(tmp_path / "demo")
    demo.create()
    demo.start("1.00", 0, NODES, (), reason="the run begins")
    for step in (10, 20, 30):
        for tier in ("memory", "node") if step == 20 else ("memory",):
            path = f"{tier}/1.00/step-{step:08d}"
            demo.append(
                CheckpointCommitted(
                    path, "ab", 44_300_000, 3, 0.2, healthy=True, tier=tier, world_size=2
                ),
                step,
            )
    demo.append(CheckpointRetired("memory/1.00/step-00000010"), 30)
    demo.append(FailureSeen(1, 1, "node-2", 1, "rank 1 is gone"), 33)
    demo.append(IncidentDiagnosed(1, "killed", "unknown", "", 0.9, "node-2", 1, (), "restart"), 33)
    demo.append(AttemptEnded(1, "failed"), 33)
    demo.append(
        CheckpointRejected(
            "memory/1.00/step-00000030", "no node that is left holds shard-00001.safetensors"
        ),
        30,
    )
    demo.latest = ("memory/1.00/step-00000020", "ab")
    demo.start("1.01", 20, NODES, (), reason="killed on node-2", incident=1)
    text = markdown_of(demo.run)
    for words in (
        "3 snapshots of 44.3 MB held in the nodes' memory, the newest at step 30.",
        "1 snapshot of 44.3 MB copied to the nodes' own disks, the newest at step 20.",
        "The snapshot in the nodes' memory memory/1.00/step-00000030 did not verify (no node that "
        "is left holds "
        "shard-00001.safetensors); an older one was looked for.",
        "from the snapshot in the nodes' memory of step 20 (memory/1.00/step-00000020)",
    ):
        assert words in text, words
    assert "older checkpoint" not in text, "snapshots come and go without a word"
    missing = {finding.file for finding in verify(demo.run)}
    assert missing == {f"{tier}/1.00/step-00000020/manifest.json" for tier in ("memory", "node")}
    demo.append(RunStopped("a person", -1))
    missing = {finding.file for finding in verify(demo.run)}
    assert missing == {"node/1.00/step-00000020/manifest.json"}, (
        "what was in memory went with the agents"
    )


def figures_of(run: RunDirectory) -> dict[str, str]:
    return {path.stem: path.read_text() for path in render(run).figures}


def test_sentences_agree_with_their_numbers(tmp_path: Path) -> None:
    demo = half_a_run(tmp_path / "demo")
    evidence = tuple(Evidence("", 0, f"sign {number}") for number in range(15))
    demo.append(JournalMended(1))
    for step in (70, 80):
        demo.append(CheckpointCommitted(f"checkpoints/{step}", "", 1, 1, 0.1, healthy=False), step)
    demo.append(FailureSeen(1, 1, "node-2", 1, "rank 1 is gone"), 60)
    demo.append(
        IncidentDiagnosed(1, "gpu_ecc", "hardware", "", 0.9, "node-2", 1, evidence, "restart"), 60
    )
    demo.append(NodeFailed("node-2", 1, "gpu_ecc"), 60)
    demo.append(IncidentClosed(1, "recovered", 0, 5.0, 4.0), 60)
    with demo.run.metrics_of("1.00").open("a") as file:
        file.write("no line\n")
    text = markdown_of(demo.run)
    for words in (
        "1 byte was cut off",
        "when steps 70 and 80 were saved",
        "It cost no step and 5.0 s, of which 4.0 s without training.",
        "1 metrics line could not be read and is left out",
        "on this evidence (the first 12 of 15):",
        "node-2 was taken out and is not used again.",
        "| Restarts | none |",
    ):
        assert words in text, words
    assert "more in the journal" not in text


def test_a_run_without_incidents_does_not_count_them_behind_its_restarts(tmp_path: Path) -> None:
    demo = half_a_run(tmp_path / "demo")
    demo.start("1.01", 50, NODES, (), reason="resumed")
    assert "| Restarts | 1 |" in markdown_of(demo.run)


def test_times_have_their_date_where_a_day_has_passed(tmp_path: Path) -> None:
    demo = half_a_run(tmp_path / "demo")
    demo.append(Note("maria", "the same day"), seconds=60.0)
    demo.append(Note("maria", "a day later"), seconds=86400.0)
    demo.append(FailureSeen(1, 1, "node-2", 1, "rank 1 is gone"), 60, seconds=60.0)
    demo.start("1.01", 50, NODES, (), reason="killed", incident=1)
    demo.append(IncidentClosed(1, "recovered", 10, 9.0, 4.0), 51)
    demo.train(52, 60)
    demo.finish()
    text = markdown_of(demo.run)
    assert re.search(r"Note by maria, 14:0\d:\d\d UTC:\*\* the same day", text)
    assert re.search(r"Note by maria, 2026-11-23 14:0\d:\d\d UTC:\*\* a day later", text)
    assert re.search(r"It finished after 1 d 00 h, at 2026-11-23 14:", text)
    assert re.search(r"\nAt 14:0\d:\d\d UTC, after step 60: Rank 1 is gone", text), (
        "the date of the end was shown"
    )
