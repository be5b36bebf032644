"""`opt-train evaluate` and `opt-train generate`: what a checkpoint can do. They change nothing in
its run."""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opt_train.cli.chosen_model import choose_device, load_model
from opt_train.cli.progress import report_count
from opt_train.config.run_config import RunConfig
from opt_train.data import tokenizer
from opt_train.data.batches import ValidationSet, open_split
from opt_train.data.manifest import HELD_OUT, TRAIN, DatasetManifest, check_fits
from opt_train.evaluate.generate import Sampling
from opt_train.evaluate.generate import generate as generated
from opt_train.evaluate.perplexity import MeanLoss, perplexity
from opt_train.protocol.exits import DONE, BadInput
from opt_train.run.checkpoint_choice import CheckpointChoice

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from opt_train.evaluate.harness import Score

NEW_TOKENS = 64
"""Unless told otherwise, and the model has positions for them."""


def sets_named(
    data: Path, dataset: DatasetManifest, wanted: Sequence[str], sequence_length: int
) -> list[str]:
    """The validation sets to measure: those `wanted`, or all that have a whole sequence.

    Raises:
        BadInput: the data holds no such set.
    """
    held = {name: tokens for name, tokens in dataset.splits.items() if name != TRAIN}
    for name in wanted:
        if name not in held:
            raise BadInput(
                f"--set={name} is not in {data}, which holds {', '.join(held)}; "
                "`opt-train prepare` adds what data.validation_sets names"
            )
    return list(dict.fromkeys(wanted)) or [
        name for name, size in held.items() if size > sequence_length
    ]


def evaluate(
    run: Path, checkpoint: str, sets: Sequence[str], as_json: bool, data: Path | None = None
) -> int:
    """Print the perplexity of a checkpoint on validation sets of its run's data.

    Args:
        sets: their names; empty: all that the data holds and that are long enough for this run.
        data: prepared data, for imported weights.
    """
    subject = CheckpointChoice(run, checkpoint, data)
    folder, dataset = subject.dataset()
    config = subject.config
    length = config.data.sequence_length
    device = choose_device(subject)
    check_fits(dataset, vocab_size=config.model.vocab_size, sequence_length=length)
    opened = {
        name: ValidationSet(open_split(folder, name, verify=True), length, name)
        for name in sets_named(folder, dataset, sets, length)
    }
    model = load_model(subject, device, report_count("reading the checkpoint", "bytes"))
    measured = {
        name: perplexity(
            model,
            validation,
            micro_batch=config.train.micro_batch,
            device=device,
            progress=report_count(f"evaluated on {name}", "sequences"),
        )
        for name, validation in opened.items()
    }
    print((_as_json if as_json else _as_table)(subject, dataset, measured))
    return DONE


def _as_json(
    subject: CheckpointChoice, dataset: DatasetManifest, measured: Mapping[str, MeanLoss]
) -> str:
    payload = {
        "name": subject.name,
        "checkpoint": subject.checkpoint.path,
        "attempt": subject.checkpoint.attempt,
        "step": subject.checkpoint.step,
        "unigram_perplexity": dataset.unigram_perplexity,
        "sets": [
            {
                "name": name,
                "tokens": result.tokens,
                "loss": result.loss if math.isfinite(result.loss) else None,
                "perplexity": result.perplexity if math.isfinite(result.loss) else None,
            }
            for name, result in measured.items()
        ],
    }
    return json.dumps(payload, indent=2)


def _as_table(
    subject: CheckpointChoice, dataset: DatasetManifest, measured: Mapping[str, MeanLoss]
) -> str:
    width = max(len(name) for name in ("set", *measured))
    lines = [f"{subject.name} at step {subject.checkpoint.step}; loss in nats a token"]
    lines.append(f"{'set':{width}} {'tokens':>14} {'loss':>9} {'perplexity':>11}")
    for name, result in measured.items():
        lines.append(
            f"{name:{width}} {result.tokens:>14,} {result.loss:>9.4f} {result.perplexity:>11.2f}"
        )
    if HELD_OUT in measured:
        lines.append(
            f"a unigram model of the same data has {dataset.unigram_perplexity:.1f} on {HELD_OUT}"
        )
    return "\n".join(lines)


def evaluate_as_told(flags: argparse.Namespace) -> int:
    """Obey `opt-train evaluate` with its flags.

    Raises:
        BadInput: flags that do not go together.
    """
    if flags.harness is None:
        for flag in ("tasks", "limit"):
            if getattr(flags, flag) is not None:
                raise BadInput(f"--{flag} is for --harness alone; add --harness, or leave it out")
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
    names = [name for name in flags.harness.split(",") if name]
    return harness(
        flags.run,
        flags.checkpoint,
        names,
        flags.tasks,
        flags.limit,
        as_json=flags.json,
        data=flags.data,
    )


def harness(
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
    from opt_train.evaluate import harness as bridge
    from opt_train.evaluate.published import size_of
    from opt_train.exchange.exporting import export
    from opt_train.parallel.fsdp import TYPES

    version = bridge.check_installed()
    subject = CheckpointChoice(run, checkpoint, data)
    subject.tokenizer()  # a wrong one, or none, is said before any work
    config = subject.config
    size = size_of(config.model)
    tasks = bridge.load_tasks(names, definitions)
    device = choose_device(subject)
    with tempfile.TemporaryDirectory(prefix="opt-train-") as folder:
        export(
            config.model,
            subject.folder,
            subject.checkpoint.manifest_sha256,
            Path(folder, "exported"),
            dtype=config.precision.compute,
            tokenizer=subject.tokenizer_files(),
            verifying=report_count("verifying the checkpoint", "bytes"),
            writing=report_count("writing it for the harness", "bytes"),
        )
        scores = bridge.evaluate(
            Path(folder, "exported"),
            tasks,
            device=device,
            dtype=TYPES[config.precision.compute],
            length=config.data.sequence_length,
            batch=config.train.micro_batch,
            limit=limit,
        )
    print((_scores_as_json if as_json else _scores_as_table)(subject, version, scores, size, limit))
    return DONE


def _published(score: "Score", size: str | None) -> float | None:
    """What is published of the same task, asked in the same way."""
    from opt_train.evaluate.published import SHOTS, published

    same = not score.own and score.shots == SHOTS
    return published(size, score.task, score.metric) if same else None


def _scores_as_json(
    subject: CheckpointChoice,
    version: str,
    scores: Sequence["Score"],
    size: str | None,
    limit: int | None,
) -> str:
    from opt_train.evaluate.published import CONDITIONS, SOURCE

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
        "name": subject.name,
        "checkpoint": subject.checkpoint.path,
        "attempt": subject.checkpoint.attempt,
        "step": subject.checkpoint.step,
        "lm_eval": version,
        "limit": limit,
        "published": None
        if size is None
        else {"size": size, "source": SOURCE, "conditions": CONDITIONS},
        "results": rows,
    }
    return json.dumps(payload, indent=2)


def _scores_as_table(
    subject: CheckpointChoice,
    version: str,
    scores: Sequence["Score"],
    size: str | None,
    limit: int | None,
) -> str:
    from opt_train.evaluate.published import CONDITIONS, SOURCE

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
    lines = [f"{subject.name} at step {subject.checkpoint.step}, by lm_eval {version}"]
    for row in rows:
        cells = [f"{cell:{'<' if n < 2 else '>'}{widths[n]}}" for n, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    if limit is not None:
        lines.append(f"only the first {limit} documents of each task; published values are of all")
    if size is None:
        lines.append(
            f"{subject.name} has the shape of no OPT size with published values, so there is none "
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


def generate(
    run: Path,
    prompt: str,
    checkpoint: str,
    max_new_tokens: int | None,
    sampling: Sampling,
    as_json: bool,
    data: Path | None = None,
) -> int:
    """Print `prompt` and what a checkpoint makes of it, as it comes."""
    subject = CheckpointChoice(run, checkpoint, data)
    words = subject.tokenizer()
    # Training saw each document behind the end of another one: so a text begins.
    ids = [tokenizer.EOS, *words.encode(_checked(prompt), add_special_tokens=False).ids]
    count = _room_for(len(ids), max_new_tokens, subject.config)
    model = load_model(
        subject, choose_device(subject), report_count("reading the checkpoint", "bytes")
    )
    tokens = generated(
        model,
        ids,
        sampling,
        max_new_tokens=count,
        end=tokenizer.EOS,
        vocabulary=tokenizer.size_of(words),
    )
    if not as_json:
        print(prompt, end="", flush=True)
        for piece in _pieces(words, tokens):
            print(piece, end="", flush=True)
        print()
        return DONE
    new = list(tokens)
    payload = {
        "name": subject.name,
        "checkpoint": subject.checkpoint.path,
        "step": subject.checkpoint.step,
        "prompt": prompt,
        "text": words.decode(new),
        "tokens": new,
        "ended": len(new) < count,
    }
    print(json.dumps(payload, indent=2))
    return DONE


def _checked(prompt: str) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise BadInput("the prompt is not UTF-8; give it in the terminal's encoding") from None
    return prompt


def _room_for(prompt: int, max_new_tokens: int | None, config: RunConfig) -> int:
    """How many tokens to write behind a prompt of so many.

    Raises:
        BadInput: the model has no positions for them.
    """
    positions = config.model.positions
    if max_new_tokens is not None and max_new_tokens < 1:
        raise BadInput(f"--max-new-tokens={max_new_tokens} must be larger than 0")
    if prompt >= positions:
        raise BadInput(
            f"the prompt has {prompt} tokens, and the model has {positions} positions; give a "
            "shorter one"
        )
    count = min(NEW_TOKENS, positions - prompt) if max_new_tokens is None else max_new_tokens
    if prompt + count > positions:
        raise BadInput(
            f"--max-new-tokens={count} and the prompt's {prompt} are more than the model's "
            f"{positions} positions; "
            f"use {positions - prompt} or fewer"
        )
    if prompt + count > config.data.sequence_length:
        print(
            f"the model was trained on sequences of {config.data.sequence_length} tokens; a "
            "longer text may fall apart",
            file=sys.stderr,
        )
    return count


def _pieces(words: "Tokenizer", tokens: Iterable[int]) -> Iterable[str]:
    """The text of `tokens` as far as each one completes it: a character may take several."""
    ids: list[int] = []
    told = ""
    for token in tokens:
        ids.append(token)
        whole = words.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")
        yield whole[len(told) :]
        told = whole
    yield words.decode(ids)[len(told) :]
