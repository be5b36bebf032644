"""The command `logbook`: render, verify, note, tail. Exit 0 done, 1 the answer is no, 2 bad input
in one sentence."""

import argparse
import getpass
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from opt_logbook.record import inbox
from opt_logbook.record.codec import fields_of, kind_of, time_to_text
from opt_logbook.record.events import Entry, JournalDamaged, Note
from opt_logbook.record.journal import Journal, read, read_head, repairs_of
from opt_logbook.record.lock import Lock, LockHeld
from opt_logbook.record.run_directory import RunDirectory
from opt_logbook.record.verify import verify
from opt_logbook.story.format import listed_briefly, printable

DONE, NO, BAD_INPUT = 0, 1, 2
# Polled: inotify sees nothing of what another host writes over NFS.
FOLLOW_SECONDS = 0.5


class UsageError(Exception):
    """What a user gave cannot work; the message is one sentence that names the file and the fix."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    chosen = argparse.Namespace(run="")
    try:
        _parser().parse_args(arguments, chosen)
        command: Callable[[argparse.Namespace], int] = chosen.command
        return command(chosen)
    except UsageError as error:
        print(f"logbook: {error}", file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:
        # The reader, `head` for example, has seen enough. Python must not complain when it flushes
        # at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        return DONE
    except OSError as error:
        print(
            f"logbook: {error.filename or chosen.run}: {error.strerror or error}; mend it and try "
            "again",
            file=sys.stderr,
        )
        return BAD_INPUT


class _LogbookParser(argparse.ArgumentParser):
    """argparse, with mistakes as sentences."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _LogbookParser(
        prog="logbook",
        description="Read, check and annotate the journal of a run.",
        epilog="exit codes: 0 done, 1 the answer is no, 2 bad input",
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(
        name: str, command: Callable[[argparse.Namespace], int], summary: str
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=summary, description=summary)
        sub.add_argument(
            "run", metavar="RUN", type=Path, help="the run's folder, for example runs/demo"
        )
        sub.set_defaults(command=command)
        return sub

    verb("render", _render, "Write the chronicle: RUN/chronicle/index.html and chronicle.md.")
    verb(
        "verify", _verify, "Say whether the journal and what it points to are whole; exit 1 if not."
    )
    note = verb("note", _note, "Add a note to the journal; it will stand in the chronicle.")
    note.add_argument("text", metavar="TEXT", nargs="+")
    note.add_argument("--author", default="", help="whose note it is; by default the user's name")
    tail = verb("tail", _tail, "Print the journal's newest lines.")
    tail.add_argument(
        "-n", dest="count", metavar="LINES", type=int, default=20, help="how many (default 20)"
    )
    tail.add_argument(
        "-f", "--follow", action="store_true", help="go on with new ones as they come"
    )
    tail.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser


def _run_of(chosen: argparse.Namespace) -> RunDirectory:
    run = RunDirectory(chosen.run)
    if not run.path.is_dir():
        raise UsageError(
            f"there is no run at {run.path}; give the folder that holds journal.jsonl, such as "
            "runs/demo"
        )
    if not any(path.exists() for path in (run.journal, run.config, run.config_json, run.metrics)):
        raise UsageError(
            f"{run.path} is no run: it holds no journal.jsonl; give the folder of one, such as "
            "runs/demo"
        )
    return run


def _render(chosen: argparse.Namespace) -> int:
    # matplotlib takes half a second to import; the other verbs need not wait for it.
    from opt_logbook.render.render import render  # noqa: PLC0415

    rendered = render(_run_of(chosen))
    print(rendered.page)
    print(rendered.markdown)
    return DONE


def _verify(chosen: argparse.Namespace) -> int:
    run = _run_of(chosen)
    defects = verify(run)
    for defect in defects:
        print(defect)
    if defects:
        return NO
    reading = read(run.journal)
    print(f"verified: {reading.line_count} lines, head {reading.head}")
    return DONE


def _note(chosen: argparse.Namespace) -> int:
    run = _run_of(chosen)
    text = " ".join(chosen.text).strip()
    if not text:
        raise UsageError("the note is empty; write what should stand in the chronicle")
    author = chosen.author or _user()
    try:
        # With no fencing number: agents obey none below the highest they have seen, so a note must
        # not raise it.
        with Lock.acquire(run) as lock:
            _append_note(run, lock, Note(author, text))
    except LockHeld as refusal:
        try:
            inbox.drop(run, {"kind": "note", "author": author, "text": text})
        except ValueError as error:
            raise UsageError(f"the note cannot be left: {error}") from None
        if refusal.holder.leader == 0:
            # A lone `opt-train train` reads no inbox.
            print("left in the inbox; the next `opt-train run` journals it")
        else:
            where = f"process {refusal.holder.pid} on {refusal.holder.host}"
            print(f"left for the supervisor ({where}), who journals it in a moment")
    return DONE


def _append_note(run: RunDirectory, lock: Lock, note: Note) -> None:
    if not run.journal.exists():
        raise UsageError(f"{run.path} has no journal yet; start the run first")
    damaged = [
        e.line
        for e in repairs_of(read(run.journal), read_head(run))
        if isinstance(e, JournalDamaged)
    ]
    if damaged:
        # Journalled here, the damage would count as known, and the supervisor would not ask about
        # it any more.
        lines = f"line {damaged[0]}" if len(damaged) == 1 else f"lines {listed_briefly(damaged)}"
        raise UsageError(
            f"{run.journal} is damaged ({lines}); restore it from a copy, or start the run, which "
            "asks what to do, and "
            "note it then"
        )
    with Journal.open(run, lock) as journal:
        last = journal.entries[-1] if journal.entries else None
        attempt, step = (last.attempt, last.step) if last else ("", None)
        for event in journal.repairs:
            journal.append(Entry(time.time(), attempt, step, event))
        entry = journal.append(Entry(time.time(), attempt, step, note))
    print(f"noted as journal line {entry.seq}")


def _tail(chosen: argparse.Namespace) -> int:
    run = _run_of(chosen)
    if chosen.count < 0:
        raise UsageError(f"-n {chosen.count} is less than no lines; give 0 or more")
    entries = read(run.journal).entries
    seen = entries[-1].seq if entries else 0
    _print(
        # `entries[-count:]` would be all of them for 0.
        entries[len(entries) - chosen.count :] if chosen.count < len(entries) else entries,
        chosen.json,
    )
    while chosen.follow:
        time.sleep(FOLLOW_SECONDS)
        # The whole journal again: damage in an old line changes which of the later ones verify.
        fresh = tuple(entry for entry in read(run.journal).entries if entry.seq > seen)
        _print(fresh, chosen.json)
        seen = fresh[-1].seq if fresh else seen
    return DONE


def _print(entries: Sequence[Entry], as_json: bool) -> None:
    for entry in entries:
        own = fields_of(entry.event) | dict(entry.extra)
        head = {
            "seq": entry.seq,
            "time": time_to_text(entry.time),
            "kind": kind_of(entry.event),
            "attempt": entry.attempt,
            "step": entry.step,
        }
        if as_json:
            print(json.dumps(head | own | {"hash": entry.hash}), flush=True)
        else:
            step = "" if entry.step is None else f"step {entry.step}"
            shown = "  ".join(f"{key}={_plainly(value)}" for key, value in own.items())
            line = (
                f"{entry.seq:>5}  {head['time']}  {entry.attempt:<6} {step:<10} "
                f"{head['kind']:<20} {shown}"
            )
            # A log line in the journal may hold terminal escapes, and must not be obeyed here
            # (invariant 13); in JSON they are escaped.
            print(printable(line).rstrip(), flush=True)


def _plainly(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user number without a name, as in many containers
        return f"user {os.getuid()}"


if __name__ == "__main__":
    sys.exit(main())
