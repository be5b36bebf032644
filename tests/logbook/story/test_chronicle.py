"""The chronicle must tell somebody who has not seen the code what broke, when, why, what was done
and what it cost."""

import re
from pathlib import Path

import pytest
from opt_logbook.record.events import (
    AttemptEnded,
    CheckpointCommitted,
    CheckpointRejected,
    CheckpointRetired,
    Entry,
    Evidence,
    FailureSeen,
    IncidentClosed,
    IncidentDiagnosed,
    JournalRepaired,
    LineageOpened,
    NodeFailed,
    Note,
    RunStopped,
)
from opt_logbook.record.journal import Journal
from opt_logbook.record.lock import Lock
from opt_logbook.record.run_directory import RunDirectory
from opt_logbook.record.verify import verify
from opt_logbook.render.render import render

from tests.logbook.chronicle_reading import (
    half_a_run,
    markdown_of,
    sentences_in,
)
from tests.logbook.demo_run import NODES, DemoRun, write_demo


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


def test_sentences_agree_with_their_numbers(tmp_path: Path) -> None:
    demo = half_a_run(tmp_path / "demo")
    evidence = tuple(Evidence("", 0, f"sign {number}") for number in range(15))
    demo.append(JournalRepaired(1))
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
