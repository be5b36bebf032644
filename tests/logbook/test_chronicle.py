"""The chronicle must tell somebody who has not seen the code what broke, when, why, what was done and what it cost."""

from pathlib import Path

import pytest
from opt_logbook.chronicle import Chronicle
from opt_logbook.events import (
    CheckpointRejected,
    Entry,
    FailureSeen,
    IncidentClosed,
    IncidentDiagnosed,
    JournalStalled,
    Note,
    RunHalted,
    RunStopped,
    SupervisorStarted,
    Unknown,
)
from opt_logbook.journal import Journal
from opt_logbook.lock import Lock
from opt_logbook.render import render
from opt_logbook.run_directory import RunDirectory
from opt_logbook.told import Said

from tests.logbook.demo_run import NODES, DemoRun, write_demo


def markdown_of(run: RunDirectory) -> str:
    return render(run).markdown.read_text()


def half_a_run(path: Path) -> DemoRun:
    """Attempt 1.00 at step 60, its journal still open."""
    demo = DemoRun(path)
    demo.create()
    demo.start("1.00", 0, NODES, ("node-3",), reason="the run begins")
    demo.train(2, 60)
    return demo


def said_in(chronicle: Chronicle) -> list[Said]:
    incidents = [*chronicle.open_incidents, *(i for entry in chronicle.entries for i in entry.incidents)]
    return [
        *(said for entry in chronicle.entries for said in entry.said),
        *(said for incident in incidents for section in incident.sections for said in section.said),
        *chronicle.before,
    ]


def test_five_questions_about_the_lost_node_are_answered(demo: RunDirectory) -> None:
    text = markdown_of(demo)
    told = text[text.index("#### Incident 1") : text.index("**Attempt 1.01**")]
    assert "node-2 went silent: its agent's connection closed" in told, "what broke"
    assert "2026-11-22 14:03:4" in told
    assert "after step 60" in told, "when"
    assert "node_failure: a whole node was lost. Blame: hardware." in told, "why"
    assert "logs/1.00/node-1/rank0.log:41" in told, "with evidence"
    assert "node-3 took the place of node-2" in told, "what was done"
    assert "from the checkpoint of step 50" in told
    assert "10 steps (40,960 tokens) had to be done again" in told, "what it cost"
    assert "10.0 s from the failure" in told
    assert "Recovered: training went on in attempt 1.01" in told


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
    for said in said_in(rendered.chronicle):
        assert said.lines, said.text
        assert set(said.lines) <= set(rendered.chronicle.journal_lines)
    page = rendered.page.read_text()
    lines = demo.journal.read_text().splitlines()
    for number, line in rendered.chronicle.journal_lines.items():
        assert lines[number - 1].startswith(line[:-1])
        assert f'id="J{number}"' in page


def test_every_line_of_the_journal_is_told_somewhere(demo: RunDirectory) -> None:
    chronicle = render(demo).chronicle
    assert sorted(chronicle.journal_lines) == list(range(1, len(demo.journal.read_bytes().splitlines()) + 1))


def test_the_time_adds_up_and_later_notes_do_not_stretch_it(demo: RunDirectory) -> None:
    before = render(demo).chronicle
    spent = {name: seconds for name, seconds, _ in before.time_spent}
    assert spent["kept"] == pytest.approx(200 * 0.55)
    assert spent["redone"] == pytest.approx(30 * 0.55)
    assert spent["down"] == pytest.approx(8.9)
    with Lock.acquire(demo) as lock, Journal.open(demo, lock) as journal:
        journal.append(Entry(1795956185.0, "1.02", 200, Note("maria", "Looked at it a week later.")))
    after = render(demo).chronicle
    assert after.time_spent == before.time_spent
    assert after.as_of == "2026-11-29 12:43:05 UTC"
    assert any(said.text == "Looked at it a week later." for said in after.entries[0].said)


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


def test_a_supervisor_that_died_in_the_middle_of_an_incident_leaves_a_readable_chronicle(tmp_path: Path) -> None:
    demo = half_a_run(tmp_path / "demo")
    demo.tell(FailureSeen(1, 1, "node-2", -1, "node-2 went silent"), 60)
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
    demo.tell(SupervisorStarted(2, "laptop", 4243, "0.1.0", resumed=True), 60, seconds=9.0)
    demo.tell(JournalStalled(12.5))
    assert "took over the run where the journal left it" in markdown_of(demo.run)
    assert "kept the journal waiting for 12.5 s" in markdown_of(demo.run)


def test_a_run_that_a_person_must_decide_about_asks_the_question_at_the_top(tmp_path: Path) -> None:
    demo = half_a_run(tmp_path / "demo")
    demo.tell(FailureSeen(1, 1, "node-1", 0, "rank 0 exited with 1"), 60)
    demo.tell(IncidentDiagnosed(1, "user_code", "software", "ValueError in loss", 0.9, "node-1", 0, (), "stop"), 60)
    demo.tell(CheckpointRejected("checkpoints/1.00/step-00000050", "model.safetensors: wrong sha256"))
    demo.tell(IncidentClosed(1, "halted", 0, 0.0, 0.0), 60)
    demo.tell(RunHalted("the same error came three times; is the loss function right?", "user_code"), 60)
    rendered = render(demo.run)
    text = rendered.markdown.read_text()
    assert rendered.chronicle.status == "halted"
    assert "a person must decide: The same error came three times; is the loss function right?" in text
    assert "model.safetensors: wrong sha256" in text
    assert "nobody had to act" not in text


def test_a_stopped_and_resumed_run_is_not_called_unattended(tmp_path: Path) -> None:
    demo = half_a_run(tmp_path / "demo")
    demo.tell(RunStopped("maria", 50), 60)
    assert "It was stopped by maria" in markdown_of(demo.run)
    demo.tell(SupervisorStarted(2, "laptop", 4243, "0.1.0", resumed=True))
    assert render(demo.run).chronicle.status == "open"


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
    demo.tell(Unknown("gpu_sang", {"tune": "ode"}), 60)
    assert "gpu_sang (a kind that this version does not know): tune ode." in markdown_of(demo.run)


def test_many_incidents_are_counted_at_the_top_and_told_below(tmp_path: Path) -> None:
    demo = half_a_run(tmp_path / "demo")
    for number in range(1, 10):
        cause = "killed" if number % 3 else "network"
        demo.tell(FailureSeen(number, 1, "node-1", 0, "rank 0 is gone"), 60)
        demo.tell(IncidentDiagnosed(number, cause, "unknown", "", 0.5, "node-1", 0, (), "restart"), 60)
        demo.start(f"1.{number:02d}", 50, NODES, (), reason=cause, incident=number)
        demo.tell(IncidentClosed(number, "recovered", 10, 9.0, 4.0), 51)
    text = markdown_of(demo.run)
    assert "9 things broke on the way." in text
    assert "6 times killed (a process was killed and nobody owned up to it)." in text
    assert "3 times network (the network failed)." in text
    assert text.count("#### Incident") == 9


def test_the_demo_of_the_tests_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    first, second = write_demo(tmp_path / "a"), write_demo(tmp_path / "b")
    assert first.journal.read_bytes() == second.journal.read_bytes()
