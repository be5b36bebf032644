"""The run that a verb is about, as its user gives it: the path of its directory, or `name=NAME`,
which stands for the one that `opt-train run name=NAME` would use."""

import difflib
from dataclasses import replace
from pathlib import Path

from opt_logbook.record.run_directory import RunDirectory

from opt_train.config.run_config import FOLDER_NAME, RunConfig
from opt_train.protocol.exits import BadInput
from opt_train.run.report.run_report import is_run

NAME = "name="


def run_path(word: str) -> Path:
    """The path of the run directory that `word` means.

    Raises:
        BadInput: there is no run of that name.
    """
    if not word.startswith(NAME):
        return Path(word)
    # As for Hydra: a name of digits alone has to be quoted there.
    name = word.removeprefix(NAME).strip("\"'")
    if not FOLDER_NAME.allows(name):
        raise BadInput(FOLDER_NAME.refusal("name", name))
    path = replace(RunConfig(), name=name).run_path
    if is_run(RunDirectory(path)):
        return path
    # However far: of a handful of runs even a poor guess shows what a name looks like here.
    near = difflib.get_close_matches(name, _runs_beside(path), n=1, cutoff=0.0)
    mend = f"the nearest name there is {near[0]}" if near else f"{path.parent} holds no run"
    raise BadInput(
        f"{word} has no run directory {path}; {mend}, and a run of another runs= is given by its "
        "path"
    )


def _runs_beside(path: Path) -> list[str]:
    if not path.parent.is_dir():
        return []
    return [other.name for other in path.parent.iterdir() if is_run(RunDirectory(other))]
