"""The command `opt-train`: its parser, its verbs' dispatch, and what an error is to the shell.

argparse owns verbs and flags, what is left are Hydra overrides. A user's mistake is one sentence
and exit 2, so that scripts need not read what is printed. `verbs.py` has the table; each verb has a
module of its own.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from opt_train.cli.jobs import run_jobs
from opt_train.cli.verbs import RUN, RUN_OR_FOLDER, VERBS
from opt_train.protocol.exits import BAD_INPUT, DONE, INTERRUPTED, BadInput

EXITS = (
    "exit codes: 0 done, 1 the answer is no, 2 bad input, 3 a person must decide, 75 stopped "
    "with the state saved"
)


class _Parser(argparse.ArgumentParser):
    """argparse, with mistakes as sentences."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; see `{self.prog} --help`")


def _parser_of(name: str) -> argparse.ArgumentParser:
    verb = VERBS[name]
    parser = _Parser(
        prog=f"opt-train {name}",
        description=verb.summary[0].upper() + verb.summary[1:] + ".",
        epilog="examples:\n"
        + "".join(f"  {example}\n" for example in verb.examples)
        + f"\n{EXITS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if verb.configured:
        parser.add_argument(
            "overrides",
            nargs="*",
            metavar="KEY=VALUE",
            help="configuration (docs/configuration.md)",
        )
        parser.add_argument(
            "--cfg", metavar="job", help="print the resolved configuration and exit"
        )
        parser.add_argument(
            "-m", "--multirun", action="store_true", help="try every combination of key=a,b"
        )
        parser.add_argument(
            "--config-dir", type=Path, metavar="FOLDER", help="a folder with groups of your own"
        )
    else:
        # What is no run is no name of one either, such as the source of an import.
        kind = _run_path if verb.about in (RUN, RUN_OR_FOLDER) else Path
        parser.add_argument("run", type=kind, metavar=verb.about[0], help=verb.about[1])
        if verb.has_json:
            parser.add_argument("--json", action="store_true", help="print JSON for a program")
    if verb.has_flags:
        verb.load().add_flags(parser)
    return parser


def _run_path(word: str) -> Path:
    # Imported when a run is given: `--help` needs neither configuration nor record.
    from opt_train.cli.run_argument import run_path

    return run_path(word)


def _help() -> str:
    verbs = "".join(f"  {name:12} {verb.summary}\n" for name, verb in VERBS.items())
    return (
        "usage: opt-train VERB [flags] [KEY=VALUE ...]\n\n"
        "Pretrain OPT-style language models, and keep the run alive.\n\n"
        f"verbs:\n{verbs}\n"
        "examples:\n  opt-train run experiment=demo\n  opt-train status runs/demo\n  opt-train "
        "run --help\n\n"
        f"{EXITS}\n"
    )


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help(), end="")
        return DONE if arguments else BAD_INPUT
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("opt-train"))
        return DONE
    name, *rest = arguments
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        fix = f"did you mean {near[0]}?" if near else f"use {', '.join(VERBS)}"
        raise BadInput(f"{name} is no verb; {fix}")
    parser = _parser_of(name)
    flags, unknown = parser.parse_known_intermixed_args(rest)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
        fix = f"did you mean {near[0]}?" if near else f"see `opt-train {name} --help`"
        raise BadInput(f"{unknown[0]} is no flag of opt-train {name}; {fix}")
    flags.verb = name
    verb = VERBS[name]
    if verb.composes:
        return run_jobs(flags, lambda job: int(verb.load().run(job)))
    return int(verb.load().run(flags))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: obey `arguments` (those of the process by default) and return the exit code."""
    try:
        code = _dispatch(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return code
    except BadInput as error:
        print(f"opt-train: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as in `| head`; the interpreter must not complain at
        # exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        if error.filename is None:  # no file that a person could mend: a mistake of ours
            raise
        print(
            f"opt-train: {error.filename}: {error.strerror}; mend it and try again", file=sys.stderr
        )
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
