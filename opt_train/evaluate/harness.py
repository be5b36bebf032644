"""EleutherAI's lm-evaluation-harness on a model that was written as a Hugging Face folder.

Reading tasks, prompts, scoring and statistics are the harness's own, and so is the model's class:
transformers'. What stands here asks for it and turns its troubles into sentences
(docs/decisions/lm_eval.md).
"""

import contextlib
import difflib
import importlib
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from opt_train.evaluate.published import TASKS
from opt_train.protocol.exits import BadInput

NEEDED = ("lm_eval", "accelerate", "transformers")

FOLDERS = ("lambada", "piqa", "arc", "winogrande", "sciq")
"""Where the harness keeps `TASKS`. Its list of all 14,000 takes twenty seconds to read; most who
call need these."""


RESAMPLES = 10_000
"""For the standard error of a perplexity, in this process. The harness would take 100,000 and fork
a process for each core; forked beside torch's threads these have been seen to wait for ever."""


@dataclass(frozen=True, slots=True)
class Task:
    """One that is ready to be asked: its data are here."""

    name: str
    parts: tuple[Any, ...]
    """`lm_eval`'s Group of that name, or its Task, or the Tasks of a tag."""
    own: bool
    """Defined by a file of the user's, whatever it is called."""


@dataclass(frozen=True, slots=True)
class Score:
    """One number that the harness gives."""

    task: str
    metric: str
    """With the name of the harness's filter, where it is not the usual one."""
    value: float
    stderr: float | None
    shots: int | None
    version: str
    documents: int | None
    own: bool


def check_installed() -> str:
    """The harness's version.

    Raises:
        BadInput: it is not installed, or something it needs is not.
    """
    for name in NEEDED:
        try:
            # Asked of the metadata, because importing these takes seconds.
            version(name)
        except PackageNotFoundError:
            raise BadInput(
                f"--harness needs {name}; install it: pip install 'opt-train[harness]'"
            ) from None
    return version("lm_eval")


def load_tasks(names: Sequence[str], definitions: Path | None) -> list[Task]:
    """The tasks of these names, with their data; without names those of `definitions`, or `TASKS`.

    Args:
        definitions: a task's YAML, or a folder of them; they come before the harness's own.

    Raises:
        BadInput: a task is unknown, wrong, or its data cannot be had.
    """
    with _quiet(), contextlib.redirect_stdout(sys.stderr):
        defined = _Defined({}, list(TASKS)) if definitions is None else _defined(definitions)
        wanted = list(dict.fromkeys(names)) or defined.names
        others = [name for name in wanted if name not in defined.specs]
        manager = _manager_of(others) if others else None
        tasks = [
            _load(*defined.specs[name], name, own=True)
            if name in defined.specs
            else _load(manager, name, name, own=False)
            for name in wanted
        ]
        try:
            _manager().load([part for task in tasks for part in task.parts])
        except ValueError as error:
            raise BadInput(
                f"--harness={','.join(wanted)} names a task twice ({_line(error)}); leave one out"
            ) from None
    return tasks


def evaluate(
    folder: Path,
    tasks: Sequence[Task],
    *,
    device: torch.device,
    dtype: torch.dtype,
    length: int,
    batch: int,
    limit: int | None,
) -> list[Score]:
    """Ask the model in `folder`, which `export` wrote.

    Texts are tokenized without a `</s>` in front, as by the harness when the published numbers were
    made; an empty context is a `</s>`.

    Args:
        dtype: to compute in; probabilities are summed in fp32.
        length: tokens; of a longer text the end is taken.
        batch: sequences at once.
        limit: documents of each task; None: all.
    """
    # The harness, and what it imports, print some of their progress; standard output is for the
    # answer.
    with _quiet(), _in_one_process(), contextlib.redirect_stdout(sys.stderr):
        classes = importlib.import_module("lm_eval.models.huggingface")
        evaluator = importlib.import_module("lm_eval.evaluator")
        # It would ask git for the version of whatever lies in the working directory, and git would
        # complain.
        vars(evaluator)["get_git_commit_hash"] = lambda: None
        model = classes.HFLM(
            pretrained=str(folder),
            backend="causal",
            device=str(device),
            dtype=dtype,
            # bf16 keeps 8 bits: the log-probabilities of close answers would tie.
            softmax_dtype=torch.float32,
            batch_size=batch,
            max_length=length,
            add_bos_token=False,
        )
        answer = evaluator.simple_evaluate(
            model=model,
            tasks=[part for task in tasks for part in task.parts],
            limit=limit,
            log_samples=False,
            bootstrap_iters=RESAMPLES,
            task_manager=_manager(),
        )
    own = {name for task in tasks if task.own for part in task.parts for name in _names_in(part)}
    return [score for name in answer["results"] for score in _scores(answer, name, own=name in own)]


def _scores(answer: Mapping[str, Any], name: str, *, own: bool) -> Iterator[Score]:
    result = answer["results"][name]
    documents = answer["n-samples"].get(name, {}).get("effective")
    for key, value in result.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = result.get(f"{metric}_stderr,{kind}")
        yield Score(
            task=name,
            metric=metric if kind == "none" else f"{metric} ({kind})",
            value=float(value),
            stderr=float(stderr)
            if isinstance(stderr, int | float) and math.isfinite(stderr)
            else None,
            shots=answer["n-shot"].get(name),
            version=str(answer["versions"].get(name)),
            documents=documents,
            own=own,
        )


def _names_in(task: Any) -> list[str]:
    """Of a task, or of a group and all in it."""
    if not hasattr(task, "get_all_tasks"):
        return [task.task_name]
    return [
        task.name,
        *(one.task_name for one in task.get_all_tasks()),
        *(one.name for one in task.get_all_groups()),
    ]


def _manager(*folders: Path) -> Any:
    """Finds tasks in these folders."""
    managers = importlib.import_module("lm_eval.tasks")
    return managers.TaskManager(include_defaults=False, include_path=list(folders))


@dataclass(frozen=True, slots=True)
class _Defined:
    """What `--tasks` defines."""

    specs: Mapping[str, tuple[Any, str]]
    """By name: who loads it, and under which name."""
    names: list[str]
    """Those to take where none is named: no groups, whose tasks are there too."""


def _defined(path: Path) -> _Defined:
    if path.is_dir():
        manager = _manager(path.absolute())
        if not manager.all_subtasks:
            raise BadInput(f"--tasks={path} holds no task; put a YAML there that has a key task")
        return _Defined({name: (manager, name) for name in manager.all_tasks}, manager.all_subtasks)
    if not path.is_file():
        raise BadInput(
            f"--tasks={path} is neither a file nor a folder; name a task's YAML, or a folder of "
            "them"
        )
    reader = importlib.import_module("lm_eval.tasks._yaml_loader")
    try:
        values = reader.load_yaml(path, resolve_func=False)
    except Exception as error:
        raise BadInput(
            f"--tasks={path} cannot be read as a task ({_line(error)}); mend it"
        ) from None
    name = values.get("group") or values.get("task")
    if not isinstance(name, str):
        raise BadInput(f"--tasks={path} holds no task; give it a key task with the task's name")
    return _Defined({name: (_manager(), str(path.absolute()))}, [name])


def _manager_of(names: Sequence[str]) -> Any:
    """The harness's list of tasks, as far as it is needed.

    Raises:
        BadInput: a name is not in it.
    """
    managers = importlib.import_module("lm_eval.tasks")
    root = Path(str(managers.__file__)).parent
    manager = _manager(*(root / folder for folder in FOLDERS))
    if not set(names) <= set(manager.all_tasks):
        print("reading the harness's list of all tasks", file=sys.stderr, flush=True)
        manager = managers.TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            fix = f"did you mean {near[0]}?" if near else "`lm_eval ls tasks` lists them"
            raise BadInput(f"{name} is no task of lm_eval {version('lm_eval')}; {fix}")
    return manager


def _load(manager: Any, spec: str, name: str, *, own: bool) -> Task:
    print(f"{name}: getting its data", file=sys.stderr, flush=True)
    try:
        loaded = manager.load([spec])
        for task in loaded["tasks"].values():
            # One document shows whether the task fits its data, before a model is written for it.
            task.build_all_requests(limit=1, rank=0, world_size=1)
    except OSError as error:
        raise BadInput(
            f"the data set of task {name} cannot be had here ({_line(error)}); "
            + (
                "mend dataset_path or dataset_kwargs in its YAML"
                if own
                else "let this run once where huggingface.co "
                "answers and bring its HF_HOME along, or name tasks that have their data with "
                "--tasks"
            )
        ) from None
    except Exception as error:
        raise BadInput(
            f"task {name} cannot be loaded ({type(error).__name__}: {_line(error)}); "
            + ("mend its YAML" if own else "give other tasks")
        ) from None
    for task in loaded["tasks"].values():
        # Such tasks execute what the model writes, and nothing that is read is executed (invariant
        # 13).
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise BadInput(
                f"task {name} runs code that a model writes, or shows it pictures; leave it out"
            )
    group = loaded["groups"].get(name)
    return Task(name, tuple(loaded["tasks"].values()) if group is None else (group,), own)


def _line(error: Exception) -> str:
    """The first line of what it says."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:300]


@contextlib.contextmanager
def _in_one_process() -> Iterator[None]:
    """Without processes beside this one, in the harness's own way."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the hub's lines on each retry: what comes of it is said in one sentence."""
    names = ("huggingface_hub", "datasets")
    for name in names:
        importlib.import_module(name)  # which sets the level of its logger
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
