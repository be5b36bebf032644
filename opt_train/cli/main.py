"""The command `opt-train`: verbs and flags; with its `cli_*` neighbours the only place that knows
every room.

argparse owns verbs and flags, what is left are Hydra overrides. A user's mistake is one sentence
and exit 2. Each verb imports what it needs: `--help` answers at once, and `run`, which stays for
months, never loads torch.
"""

import argparse
import difflib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from opt_train.protocol.exits import BAD_INPUT, DONE, STOPPED, BadInput

if TYPE_CHECKING:
    from opt_train.config.run_config import RunConfig

INTERRUPTED, TERMINATED = 130, 143
"""What a shell reports for a program that Ctrl-C ended; nothing of it needs saving."""


@dataclass(frozen=True, slots=True)
class Verb:
    """One word after `opt-train`."""

    summary: str
    examples: tuple[str, ...]
    obey: Callable[[argparse.Namespace, list[str]], int]
    configured: bool
    """Takes Hydra overrides; otherwise the path of a run directory."""
    add_flags: Callable[[argparse.ArgumentParser], None] | None = None
    """Adds those that no other verb has."""
    about: tuple[str, str] = ("RUN", "run directory, such as runs/demo")
    """What a verb that is not configured takes: its name and meaning."""


# Configured verbs ---------------------------------------------------------------------------------


def _configured(verb: Callable[["RunConfig", list[str], Path | None], int]) -> Callable[..., int]:
    """What every configured verb does before its own work: compose, and obey `--cfg` and
    `--multirun`."""

    def obey(flags: argparse.Namespace, overrides: list[str]) -> int:
        jobs = _jobs(flags, overrides)
        if flags.cfg:
            return _print_configurations(jobs, flags.multirun)
        if flags.multirun:
            return _run_jobs(flags, jobs)
        [(job, config)] = jobs
        return verb(config, job, flags.config_dir)

    return obey


def _jobs(flags: argparse.Namespace, overrides: list[str]) -> list[tuple[list[str], "RunConfig"]]:
    """Each job's overrides and configuration; all of them are checked before any of them starts.

    Raises:
        BadInput: an override is wrong, in any of the jobs.
    """
    from opt_train.config.compose import compose, expand

    if flags.cfg not in (None, "job"):
        raise BadInput(f"--cfg={flags.cfg} is not possible; only --cfg=job is")
    if not flags.multirun:
        return [(overrides, _with_fault_plan_checked(compose(overrides, flags.config_dir)))]
    jobs = []
    for job in expand(overrides, flags.config_dir):
        jobs.append((job, _with_fault_plan_checked(compose(job, flags.config_dir))))
    if len({config.name for _, config in jobs}) == len(jobs):
        return jobs
    named = [
        (job, replace(config, name=f"{config.name}-{n}")) for n, (job, config) in enumerate(jobs)
    ]
    return [([*job, f"name='{config.name}'"], config) for job, config in named]


def _with_fault_plan_checked(config: "RunConfig") -> "RunConfig":
    from opt_train.faults import plan as faults

    faults.parse(config.faults.plan)
    return config


def _print_configurations(jobs: list[tuple[list[str], "RunConfig"]], multirun: bool) -> int:
    from opt_train.config.compose import to_yaml

    for number, (job, config) in enumerate(jobs):
        if multirun:
            print(f"{'---' + os.linesep if number else ''}# job {number}: {' '.join(job)}")
        print(to_yaml(config), end="")
    return DONE


def _run_jobs(flags: argparse.Namespace, jobs: list[tuple[list[str], "RunConfig"]]) -> int:
    """One job after another, each a process of its own; a failed job does not keep the next from
    running."""
    directory = ["--config-dir", str(flags.config_dir)] if flags.config_dir else []
    codes: list[int] = []
    for number, (job, config) in enumerate(jobs):
        print(f"job {number} of {len(jobs)}: {' '.join(job)}", flush=True)
        codes.append(_call([flags.verb, *directory, *job]))
        if codes[-1] in (STOPPED, INTERRUPTED, TERMINATED):
            print(f"stopped; the same command goes on with {config.name}")
            break
    for number, code in enumerate(codes):
        print(f"job {number} {jobs[number][1].name}: {'done' if code == DONE else f'exit {code}'}")
    return next((code for code in codes if code != DONE), DONE)


def _call(arguments: list[str]) -> int:
    """`opt-train` with `arguments` as a process of its own, with this one's terminal; its exit
    code.

    Ctrl-C reaches the child too, so this process only waits for the child's own answer; TERM and
    USR1, which reach this one alone, are handed on.
    """
    children: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, *_: object) -> None:
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        # -P: a file of the user's that is called datasets.py is not the library.
        child = subprocess.Popen([sys.executable, "-P", "-m", "opt_train.cli.main", *arguments])
        children.append(child)
        while True:
            try:
                code = child.wait()
            except KeyboardInterrupt:
                continue
            return code if code >= 0 else 128 - code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prepare(config: "RunConfig", _job: list[str], _config_directory: Path | None) -> int:
    from opt_train.data.manifest import check_fits
    from opt_train.data.prepare import prepare
    from opt_train.data.prepared import directory_of
    from opt_train.data.verify import verify_dataset

    directory = directory_of(config.data, config.tokenizer)
    manifest = prepare(config.data, config.tokenizer, lambda line: print(line, flush=True))
    check_fits(
        manifest, vocab_size=config.model.vocab_size, sequence_length=config.data.sequence_length
    )
    verify_dataset(directory)
    sets = "".join(f", {named.tokens:,} of the set {named.name}" for named in manifest.sets)
    print(
        f"{directory}: {manifest.train_tokens:,} training and "
        f"{manifest.validation_tokens:,} validation tokens{sets}, vocabulary "
        f"{manifest.vocab_size:,}"
    )
    return DONE


def _run(config: "RunConfig", job: list[str], config_directory: Path | None) -> int:
    from opt_train.cli.run import run

    directory = ["--config-dir", str(config_directory)] if config_directory else []
    return run(config, prepare=lambda: _call(["prepare", *directory, *job]))


def _train(config: "RunConfig", _job: list[str], _config_directory: Path | None) -> int:
    from opt_train.cli.train import train

    return train(config)


def _plan(flags: argparse.Namespace, overrides: list[str]) -> int:
    """Unlike `_configured`: a plan reads neither corpus nor tokenizer, and its flags hold for every
    job."""
    from opt_train.cli.plan import UNREAD, options_of, plan

    if flags.cfg:
        return _print_configurations(_jobs(flags, overrides), flags.multirun)
    return plan([config for _, config in _jobs(flags, [*UNREAD, *overrides])], options_of(flags))


def _add_plan_flags(parser: argparse.ArgumentParser) -> None:
    from opt_train.cli.plan import add_flags

    add_flags(parser)


# Verbs about a run --------------------------------------------------------------------------------


def _status(flags: argparse.Namespace, _rest: list[str]) -> int:
    from opt_train.cli.status import status

    return status(flags.run, as_json=flags.json)


def _stop(flags: argparse.Namespace, _rest: list[str]) -> int:
    from opt_train.cli.stop import stop

    return stop(flags.run)


def _checkpoints(flags: argparse.Namespace, _rest: list[str]) -> int:
    from opt_train.cli.checkpoints import checkpoints

    return checkpoints(flags.run, verify=flags.verify, as_json=flags.json)


def _evaluate(flags: argparse.Namespace, _rest: list[str]) -> int:
    from opt_train.cli.evaluate import evaluate_as_told

    return evaluate_as_told(flags)


def _generate(flags: argparse.Namespace, _rest: list[str]) -> int:
    from opt_train.cli.evaluate import generate
    from opt_train.evaluate.generate import Sampling

    sampling = Sampling(
        greedy=flags.greedy,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        seed=flags.seed,
    )
    return generate(
        flags.run,
        flags.prompt,
        flags.checkpoint,
        flags.max_new_tokens,
        sampling,
        as_json=flags.json,
        data=flags.data,
    )


def _add_checkpoints_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verify", action="store_true", help="read and hash every byte, not names and sizes alone"
    )


def _add_checkpoint_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        default="",
        metavar="STEP",
        help="a step or a path; by default the newest good one",
    )
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="prepared data, for imported weights alone"
    )


def _add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint_flag(parser)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="sets",
        metavar="NAME",
        help="a validation set, more than once for several; by default all that the data holds",
    )
    parser.add_argument(
        "--harness",
        nargs="?",
        const="",
        type=_task_names,
        metavar="TASK,...",
        help="instead of perplexity, what lm_eval (pip install 'opt-train[harness]') makes of it "
        "on these tasks, "
        "beside the released OPT of its size; by default those that have published values: "
        "lambada_openai, piqa, "
        "arc_easy, arc_challenge, winogrande, sciq. Their data come from huggingface.co, once. "
        "Stands behind RUN",
    )
    parser.add_argument(
        "--tasks",
        type=Path,
        metavar="PATH",
        help="with --harness: the YAML of a task of your own, or a folder of them; all in it, "
        "unless some are named",
    )
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="with --harness: the first N documents of each task, to try it out",
    )


def _task_names(text: str) -> str:
    """Tasks as `a,b`, and not the run, which `--harness` would swallow where it stands before
    it."""
    if not re.fullmatch(r"[\w.:,-]*", text) or (text and Path(text).is_dir()):
        raise argparse.ArgumentTypeError(
            f"{text} names no tasks; put RUN before --harness, and tasks behind it as a,b"
        )
    return text


def _add_generation_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help='text to go on with; "" begins a document')
    _add_checkpoint_flag(parser)
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="by default 64, if the model has room for them",
    )
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token always")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="below 1: bet on likely tokens"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest; 0: from all"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest with P in all",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="the same seed draws the same text"
    )


def _export(flags: argparse.Namespace, _rest: list[str]) -> int:
    from opt_train.cli.exchange import export_weights

    return export_weights(flags)


def _import(flags: argparse.Namespace, _rest: list[str]) -> int:
    from opt_train.cli.exchange import import_weights

    return import_weights(flags)


def _add_export_flags(parser: argparse.ArgumentParser) -> None:
    from opt_train.cli.exchange import add_export_flags

    add_export_flags(parser)


def _add_import_flags(parser: argparse.ArgumentParser) -> None:
    from opt_train.cli.exchange import add_import_flags

    add_import_flags(parser)


VERBS = {
    "prepare": Verb(
        "make token shards of a corpus, once",
        (
            "opt-train prepare experiment=demo",
            "opt-train prepare data=files data.corpus=texts data.name=texts",
        ),
        _configured(_prepare),
        configured=True,
    ),
    "run": Verb(
        "train under a supervisor, on a cluster or on this machine; the same command resumes",
        (
            "opt-train run experiment=demo",
            "opt-train run experiment=demo --cfg job",
            "opt-train run --multirun experiment=demo optim.lr=1e-3,3e-3",
        ),
        _configured(_run),
        configured=True,
    ),
    "train": Verb(
        "train without a supervisor: alone, or as torchrun starts it",
        (
            "opt-train train experiment=demo cluster.nodes=1 name=alone",
            "torchrun --standalone --nproc-per-node=2 -m opt_train.cli.main train experiment=demo "
            "name=two",
        ),
        _configured(_train),
        configured=True,
    ),
    "plan": Verb(
        "say what a run needs, before it starts: memory, communication, padding, time, disk",
        (
            "opt-train plan experiment=opt-175b",
            "opt-train plan experiment=opt-175b cluster.nodes=123 --allow-idle --json",
            "opt-train plan experiment=opt-1.3b --gpu H100 --mfu 0.42 --rehearse",
            "opt-train plan --multirun 'experiment=glob(opt-*)'",
        ),
        _plan,
        configured=True,
        add_flags=_add_plan_flags,
    ),
    "status": Verb(
        "say how a run is doing", ("opt-train status runs/demo",), _status, configured=False
    ),
    "stop": Verb(
        "ask a run to save and stop; `run` resumes it",
        ("opt-train stop runs/demo",),
        _stop,
        configured=False,
    ),
    "checkpoints": Verb(
        "list a run's checkpoints: what each is worth, and which one a restart would take",
        ("opt-train checkpoints runs/demo", "opt-train checkpoints runs/demo --verify --json"),
        _checkpoints,
        configured=False,
        add_flags=_add_checkpoints_flags,
    ),
    "evaluate": Verb(
        "measure a checkpoint's perplexity on the validation sets, or its scores on public tasks",
        (
            "opt-train evaluate runs/demo",
            "opt-train evaluate name=demo --checkpoint 120 --set validation --json",
            "opt-train evaluate runs/demo --harness",
            "opt-train evaluate runs/demo --harness=piqa,sciq --limit 100",
            "opt-train evaluate runs/demo --harness --tasks mine.yaml",
        ),
        _evaluate,
        configured=False,
        add_flags=_add_evaluation_flags,
        about=("RUN", "run directory, such as runs/demo, or a checkpoint's folder"),
    ),
    "generate": Verb(
        "let a checkpoint go on with a text",
        (
            'opt-train generate runs/demo "import os" --greedy',
            'opt-train generate runs/demo "def " --max-new-tokens 100 --temperature 0.8 --top-p '
            "0.9 --seed 1",
        ),
        _generate,
        configured=False,
        add_flags=_add_generation_flags,
        about=("RUN", "run directory, such as runs/demo, or a checkpoint's folder"),
    ),
    "export": Verb(
        "write a checkpoint's weights as a Hugging Face folder",
        (
            "opt-train export runs/demo --to demo-hf",
            "opt-train export name=demo --checkpoint 120 --to demo-hf --dtype fp16 "
            "--max-shard-size 2GB",
        ),
        _export,
        configured=False,
        add_flags=_add_export_flags,
        about=("RUN", "run directory, such as runs/demo, or a checkpoint's folder"),
    ),
    "import": Verb(
        "make a checkpoint of Hugging Face's or metaseq's OPT weights",
        (
            "opt-train import opt-125m-hf --to opt-125m",
            "opt-train import consolidated.pt --from metaseq --model opt-125m --to opt-125m",
        ),
        _import,
        configured=False,
        add_flags=_add_import_flags,
        about=("SOURCE", "a Hugging Face folder, or metaseq's consolidated file"),
    ),
}

EXITS = (
    "exit codes: 0 done, 1 the answer is no, 2 bad input, 3 a person must decide, 75 stopped "
    "with the state saved"
)


# Flags --------------------------------------------------------------------------------------------


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
        parser.add_argument("run", type=Path, metavar=verb.about[0], help=verb.about[1])
        if name != "stop":
            parser.add_argument("--json", action="store_true", help="print JSON for a program")
    if verb.add_flags is not None:
        verb.add_flags(parser)
    return parser


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


def _obey(arguments: Sequence[str]) -> int:
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
        raise BadInput(
            f"{name} is no verb; "
            + (f"did you mean {near[0]}?" if near else f"use {', '.join(VERBS)}")
        )
    parser = _parser_of(name)
    flags, unknown = parser.parse_known_intermixed_args(rest)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
        mend = f"did you mean {near[0]}?" if near else f"see `opt-train {name} --help`"
        raise BadInput(f"{unknown[0]} is no flag of opt-train {name}; {mend}")
    flags.verb = name
    return VERBS[name].obey(flags, flags.overrides if VERBS[name].configured else [])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: obey `arguments` (those of the process by default) and return the exit code."""
    try:
        code = _obey(sys.argv[1:] if arguments is None else arguments)
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
