"""`opt-train evaluate` and `opt-train generate`: what a checkpoint can do. They change nothing in its run."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opt_train.cli_subject import Subject
from opt_train.config import RunConfig
from opt_train.data import tokenizer
from opt_train.data.batches import ValidationSet, open_split
from opt_train.data.manifest import HELD_OUT, TRAIN, DatasetManifest, check_fits
from opt_train.evaluate.generate import Sampling
from opt_train.evaluate.generate import generate as generated
from opt_train.evaluate.perplexity import Measured, perplexity
from opt_train.protocol.exits import DONE, BadInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NEW_TOKENS = 64
"""Unless told otherwise, and the model has positions for them."""

TELL_SECONDS = 5.0


def sets_named(data: Path, dataset: DatasetManifest, wanted: Sequence[str], sequence_length: int) -> list[str]:
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
    return list(dict.fromkeys(wanted)) or [name for name, size in held.items() if size > sequence_length]


def evaluate(run: Path, checkpoint: str, sets: Sequence[str], as_json: bool, data: Path | None = None) -> int:
    """Print the perplexity of a checkpoint on validation sets of its run's data.

    Args:
        sets: their names; empty: all that the data holds and that are long enough for this run.
        data: prepared data, for imported weights.
    """
    subject = Subject(run, checkpoint, data)
    folder, dataset = subject.dataset()
    config = subject.config
    length = config.data.sequence_length
    device = subject.device()
    check_fits(dataset, vocab_size=config.model.vocab_size, sequence_length=length)
    opened = {
        name: ValidationSet(open_split(folder, name, verify=True), length, name)
        for name in sets_named(folder, dataset, sets, length)
    }
    model = subject.load(device, telling("reading the checkpoint", "bytes"))
    measured = {
        name: perplexity(
            model,
            validation,
            micro_batch=config.train.micro_batch,
            device=device,
            progress=telling(f"evaluated on {name}", "sequences"),
        )
        for name, validation in opened.items()
    }
    print((_as_json if as_json else _as_table)(subject, dataset, measured))
    return DONE


def _as_json(subject: Subject, dataset: DatasetManifest, measured: Mapping[str, Measured]) -> str:
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


def _as_table(subject: Subject, dataset: DatasetManifest, measured: Mapping[str, Measured]) -> str:
    width = max(len(name) for name in ("set", *measured))
    lines = [f"{subject.name} at step {subject.checkpoint.step}; loss in nats a token"]
    lines.append(f"{'set':{width}} {'tokens':>14} {'loss':>9} {'perplexity':>11}")
    for name, result in measured.items():
        lines.append(f"{name:{width}} {result.tokens:>14,} {result.loss:>9.4f} {result.perplexity:>11.2f}")
    if HELD_OUT in measured:
        lines.append(f"a unigram model of the same data has {dataset.unigram_perplexity:.1f} on {HELD_OUT}")
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
    subject = Subject(run, checkpoint, data)
    words = subject.tokenizer()
    # Training saw each document behind the end of another one: so a text begins.
    ids = [tokenizer.EOS, *words.encode(_checked(prompt)).ids]
    count = _room_for(len(ids), max_new_tokens, subject.config)
    vocabulary = min(tokenizer.size_of(words), subject.config.model.vocab_size)
    model = subject.load(subject.device(), telling("reading the checkpoint", "bytes"))
    tokens = generated(model, ids, sampling, max_new_tokens=count, end=tokenizer.EOS, vocabulary=vocabulary)
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
        raise BadInput(f"the prompt has {prompt} tokens, and the model has {positions} positions; give a shorter one")
    count = min(NEW_TOKENS, positions - prompt) if max_new_tokens is None else max_new_tokens
    if prompt + count > positions:
        raise BadInput(
            f"--max-new-tokens={count} and the prompt's {prompt} are more than the model's {positions} positions; "
            f"use {positions - prompt} or fewer"
        )
    if prompt + count > config.data.sequence_length:
        print(
            f"the model was trained on sequences of {config.data.sequence_length} tokens; a longer text may fall apart",
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


def telling(what: str, unit: str) -> Callable[[int, int], None]:
    """Says on stderr, every few seconds, how far long work has come."""
    told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= TELL_SECONDS:
            told = time.monotonic()
            print(f"{what}: {done:,} of {total:,} {unit}", file=sys.stderr, flush=True)

    return tell
