"""`opt-train evaluate`: how good a checkpoint is, by perplexity or by public tasks. It changes
nothing in its run."""

import argparse
import re
from pathlib import Path

from opt_train.cli.checkpoint_flag import add_checkpoint_flag, add_data_flag
from opt_train.protocol.exits import BadInput


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `opt-train evaluate`."""
    add_checkpoint_flag(parser)
    add_data_flag(parser)
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


def run(flags: argparse.Namespace) -> int:
    """Obey `opt-train evaluate` with its flags.

    Raises:
        BadInput: flags that do not go together.
    """
    if flags.harness is None:
        for flag in ("tasks", "limit"):
            if getattr(flags, flag) is not None:
                raise BadInput(f"--{flag} is for --harness alone; add --harness, or leave it out")
        # Imported here, as torch takes seconds that `--help` and a wrong flag need not wait for.
        from opt_train.cli.models.evaluate_perplexity import evaluate

        return evaluate(
            flags.run, flags.checkpoint, flags.sets, as_json=flags.json, data=flags.data
        )
    if flags.sets:
        raise BadInput(
            f"--set={flags.sets[0]} is for perplexity, and --harness measures tasks; leave one of "
            "them out"
        )
    if flags.limit is not None and flags.limit < 1:
        raise BadInput(f"--limit={flags.limit} must be larger than 0")
    from opt_train.cli.models.evaluate_harness import evaluate_tasks

    names = [name for name in flags.harness.split(",") if name]
    return evaluate_tasks(
        flags.run,
        flags.checkpoint,
        names,
        flags.tasks,
        flags.limit,
        as_json=flags.json,
        data=flags.data,
    )
