"""The command says one clear sentence for bad input, and its exit code tells a script the
answer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from opt_logbook.cli import main
from opt_logbook.record.events import Entry, JournalRepaired, Note
from opt_logbook.record.inbox import waiting
from opt_logbook.record.journal import Journal, read
from opt_logbook.record.lock import Lock
from opt_logbook.record.run_directory import RunDirectory


def test_verify_of_a_whole_run_exits_0_and_names_its_head(
    demo: RunDirectory, capsys: pytest.CaptureFixture
) -> None:
    assert main(["verify", str(demo.path)]) == 0
    reading = read(demo.journal)
    assert capsys.readouterr().out == f"verified: {reading.line_count} lines, head {reading.head}\n"


def test_verify_of_a_spoilt_run_exits_1_and_names_the_line(
    demo: RunDirectory, capsys: pytest.CaptureFixture
) -> None:
    demo.journal.write_bytes(demo.journal.read_bytes().replace(b"node_failure", b"node_Failure", 1))
    assert main(["verify", str(demo.path)]) == 1
    assert capsys.readouterr().out.startswith("journal.jsonl:14: ")


@pytest.mark.parametrize(
    "words", [[], ["rendr", "run"], ["tail"], ["tail", "run", "-n", "x"], ["note", "--who", "run"]]
)
def test_a_mistyped_command_is_one_sentence_and_exit_2(
    words: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("logbook: ")
    assert "--help" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("verb", ["render", "verify", "note", "tail"])
def test_a_missing_run_is_one_sentence_and_exit_2(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["hello"] if verb == "note" else []
    for path in (tmp_path / "nothing", tmp_path):
        assert main([verb, str(path), *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("logbook: ")
        assert str(path) in error
        assert "journal.jsonl" in error
        assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [], "nothing was written"


def test_render_says_where_the_page_is(demo: RunDirectory, capsys: pytest.CaptureFixture) -> None:
    assert main(["render", str(demo.path)]) == 0
    page, text = capsys.readouterr().out.split()
    assert (Path(page).name, Path(text).name) == ("index.html", "chronicle.md")
    assert Path(page).exists()


def test_a_chronicle_that_cannot_be_written_is_one_sentence(
    demo: RunDirectory, capsys: pytest.CaptureFixture
) -> None:
    demo.chronicle.write_text("a file where the folder should be")
    assert main(["render", str(demo.path)]) == 2
    error = capsys.readouterr().err
    assert "chronicle" in error
    assert error.endswith("; mend it and try again\n")
    assert error.count("\n") == 1


def test_a_note_is_appended_where_nobody_holds_the_journal(demo: RunDirectory) -> None:
    with demo.journal.open("ab") as file:
        file.write(b'{"torn')
    assert main(["note", str(demo.path), "all", "is", "well", "--author", "maria"]) == 0
    events = [entry.event for entry in read(demo.journal).entries[-2:]]
    assert events == [JournalRepaired(6), Note("maria", "all is well")]
    assert main(["verify", str(demo.path)]) == 0
    Lock.acquire(demo).release()


def test_a_note_is_left_in_the_inbox_where_a_supervisor_writes(
    demo: RunDirectory, capsys: pytest.CaptureFixture
) -> None:
    before = demo.journal.read_bytes()
    with Lock.acquire(demo, leader=2):
        assert main(["note", str(demo.path), "hello", "--author", "maria"]) == 0
    assert demo.journal.read_bytes() == before
    assert [dropped.message for dropped in waiting(demo)] == [
        {"kind": "note", "author": "maria", "text": "hello"}
    ]
    assert "left for the supervisor" in capsys.readouterr().out


def test_a_note_beside_a_lone_training_does_not_promise_that_anybody_reads_it_now(
    demo: RunDirectory, capsys: pytest.CaptureFixture
) -> None:
    with Lock.acquire(demo):
        assert main(["note", str(demo.path), "hello", "--author", "maria"]) == 0
    assert capsys.readouterr().out == "left in the inbox; the next `opt-train run` journals it\n"
    assert len(waiting(demo)) == 1


def test_a_note_does_not_hide_damage_from_the_person_whom_the_supervisor_must_ask(
    demo: RunDirectory, capsys: pytest.CaptureFixture
) -> None:
    spoilt = demo.journal.read_bytes().replace(b"node_failure", b"node_Failure", 1) + b'{"torn'
    demo.journal.write_bytes(spoilt)
    assert main(["note", str(demo.path), "hello"]) == 2
    assert capsys.readouterr().err == (
        f"logbook: {demo.journal} is damaged (line 14); restore it from a copy, or start the run, "
        "which asks what to "
        "do, and note it then\n"
    )
    assert demo.journal.read_bytes() == spoilt, "nothing was written or cut"
    with Lock.acquire(demo) as lock, Journal.open(demo, lock) as journal:
        for event in journal.repairs:
            journal.append(Entry(1795356999.0, "", None, event))
    assert main(["note", str(demo.path), "hello"]) == 0


def test_an_empty_note_and_a_run_without_journal_are_refused(
    demo: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["note", str(demo.path), "  "]) == 2
    young = tmp_path / "young"
    young.mkdir()
    (young / "config.yaml").touch()
    assert main(["note", str(young), "hello"]) == 2
    assert "no journal yet" in capsys.readouterr().err


def test_tail_prints_the_newest_lines_for_people_and_for_programs(
    demo: RunDirectory, capsys: pytest.CaptureFixture
) -> None:
    assert main(["tail", str(demo.path), "-n", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "run_finished" in lines[1]
    assert main(["tail", str(demo.path), "-n", "1", "--json"]) == 0
    newest = json.loads(capsys.readouterr().out)
    assert newest == json.loads(demo.journal.read_bytes().splitlines()[-1])
    assert main(["tail", str(demo.path), "-n", "0"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["tail", str(demo.path), "-n", "-1"]) == 2


def test_tail_follows_a_living_journal_and_ends_quietly(demo: RunDirectory) -> None:
    command = [
        sys.executable,
        "-m",
        "opt_logbook.cli",
        "tail",
        str(demo.path),
        "-n",
        "1",
        "--follow",
        "--json",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as tail:
        try:
            assert tail.stdout is not None
            # Once it has shown the newest line, the note is new to it.
            assert json.loads(tail.stdout.readline())["kind"] == "run_finished"
            assert main(["note", str(demo.path), "fresh"]) == 0
            assert json.loads(tail.stdout.readline())["text"] == "fresh"
        finally:
            tail.send_signal(2)
        assert tail.communicate(timeout=20)[1] == ""
        assert tail.returncode == 0


def test_a_reader_that_has_seen_enough_gets_no_traceback(demo: RunDirectory) -> None:
    command = f"{sys.executable} -m opt_logbook.cli tail {demo.path} -n 999 --json"
    answer = subprocess.run(
        ["bash", "-c", f"{command} | head -n 1"], capture_output=True, text=True, check=True
    )
    assert answer.stderr == ""


def test_terminal_codes_in_a_note_do_not_reach_the_terminal(
    demo: RunDirectory, capsys: pytest.CaptureFixture
) -> None:
    main(["note", str(demo.path), "\x1b[2J\x1b]0;owned\x07 gone \u202e"])
    capsys.readouterr()
    for extra in ([], ["--json"]):
        main(["tail", str(demo.path), "-n", "1", *extra])
        shown = capsys.readouterr().out
        assert not set(shown) & {"\x1b", "\x07", "\u202e"}
