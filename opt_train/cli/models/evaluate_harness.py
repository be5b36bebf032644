"""`opt-train evaluate --harness`: a checkpoint's scores on public tasks, beside what is published
of the released OPT of its size."""

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from opt_train.cli.models.chosen_model import choose_device
from opt_train.cli.progress import report_count
from opt_train.evaluate import harness
from opt_train.evaluate.harness import Score
from opt_train.evaluate.published import CONDITIONS, SHOTS, SOURCE, published, size_of
from opt_train.exchange.exporting import export
from opt_train.parallel.fsdp import TYPES
from opt_train.protocol.exits import DONE
from opt_train.run.checkpoint_choice import CheckpointChoice


def evaluate_tasks(
    run: Path,
    checkpoint: str,
    names: Sequence[str],
    definitions: Path | None,
    limit: int | None,
    as_json: bool,
    data: Path | None = None,
) -> int:
    """Print what EleutherAI's harness makes of a checkpoint, beside the released OPT of its size.

    The checkpoint is exported to a temporary folder, as `opt-train export` does it, and asked
    there.

    Args:
        names: tasks; empty: those that `definitions` has, or those with published values.
        definitions: the YAML of a task of one's own, or a folder of them.
        limit: documents of each task; None: all.
        data: prepared data, for imported weights; their tokenizer is taken.
    """
    version = harness.check_installed()
    choice = CheckpointChoice(run, checkpoint, data)
    choice.tokenizer()  # a wrong one, or none, ends it before any work
    config = choice.config
    size = size_of(config.model)
    tasks = harness.load_tasks(names, definitions)
    device = choose_device(choice)
    with tempfile.TemporaryDirectory(prefix="opt-train-") as folder:
        export(
            config.model,
            choice.folder,
            choice.checkpoint.manifest_sha256,
            Path(folder, "exported"),
            dtype=config.precision.compute,
            tokenizer=choice.tokenizer_files(),
            verifying=report_count("verifying the checkpoint", "bytes"),
            writing=report_count("writing it for the harness", "bytes"),
        )
        scores = harness.evaluate(
            Path(folder, "exported"),
            tasks,
            device=device,
            dtype=TYPES[config.precision.compute],
            length=config.data.sequence_length,
            batch=config.train.micro_batch,
            limit=limit,
        )
    render = _scores_as_json if as_json else _scores_as_table
    print(render(choice, version, scores, size, limit))
    return DONE


def _published(score: Score, size: str | None) -> float | None:
    """What is published of the same task, asked in the same way."""
    same = not score.own and score.shots == SHOTS
    return published(size, score.task, score.metric) if same else None


def _scores_as_json(
    choice: CheckpointChoice,
    version: str,
    scores: Sequence[Score],
    size: str | None,
    limit: int | None,
) -> str:
    rows = []
    for score in scores:
        known, finite = _published(score, size), math.isfinite(score.value)
        rows.append(
            {
                "task": score.task,
                "metric": score.metric,
                "shots": score.shots,
                "version": score.version,
                "documents": score.documents,
                "value": score.value if finite else None,
                "stderr": score.stderr,
                "published": known,
                "difference": score.value - known if known is not None and finite else None,
            }
        )
    payload = {
        "name": choice.name,
        "checkpoint": choice.checkpoint.path,
        "attempt": choice.checkpoint.attempt,
        "step": choice.checkpoint.step,
        "lm_eval": version,
        "limit": limit,
        "published": None
        if size is None
        else {"size": size, "source": SOURCE, "conditions": CONDITIONS},
        "results": rows,
    }
    return json.dumps(payload, indent=2)


def _scores_as_table(
    choice: CheckpointChoice,
    version: str,
    scores: Sequence[Score],
    size: str | None,
    limit: int | None,
) -> str:
    head = ("task", "metric", "shots", "value", "stderr", "published", "difference")
    rows = [head]
    for score in scores:
        known, digits = _published(score, size), 2 if "perplexity" in score.metric else 4
        rows.append(
            (
                score.task,
                score.metric,
                "" if score.shots is None else str(score.shots),
                f"{score.value:.{digits}f}",
                "" if score.stderr is None else f"{score.stderr:.{digits}f}",
                "" if known is None else f"{known:.{digits}f}",
                "" if known is None else f"{score.value - known:+.{digits}f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{choice.name} at step {choice.checkpoint.step}, by lm_eval {version}"]
    for row in rows:
        cells = [f"{cell:{'<' if n < 2 else '>'}{widths[n]}}" for n, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    if limit is not None:
        lines.append(f"only the first {limit} documents of each task; published values are of all")
    if size is None:
        lines.append(
            f"{choice.name} has the shape of no OPT size with published values, so there is none "
            "beside it"
        )
    elif any(_published(score, size) is not None for score in scores):
        versions = {
            score.task: score.version for score in scores if _published(score, size) is not None
        }
        lines.append(f"published: {size} in {SOURCE}; {CONDITIONS}")
        lines.append(
            "here: " + ", ".join(f"{task} version {number}" for task, number in versions.items())
        )
    else:
        lines.append(f"nothing is published here for {size} on these tasks")
    return "\n".join(lines)
