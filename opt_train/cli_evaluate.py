"""`opt-train evaluate` and `opt-train generate`: what a run's checkpoint can do. They change nothing in the run."""

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from opt_logbook.run_directory import RunDirectory

from opt_train.checkpoint.manifest import CheckpointError
from opt_train.cli_about import About
from opt_train.cli_run import check_same_data
from opt_train.config import RunConfig, from_json
from opt_train.data import tokenizer
from opt_train.data.batches import ValidationSet, open_split
from opt_train.data.manifest import HELD_OUT, TOKENIZER_FILE, TRAIN, DatasetManifest, check_fits
from opt_train.evaluate.generate import Sampling
from opt_train.evaluate.generate import generate as generated
from opt_train.evaluate.load import device_of, load_model
from opt_train.evaluate.perplexity import Measured, perplexity
from opt_train.model.decoder import OPT
from opt_train.protocol.exits import DONE, BadInput
from opt_train.supervisor.state import Checkpoint

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NEW_TOKENS = 64
"""Unless told otherwise, and the model has positions for them."""

TELL_SECONDS = 5.0


class Subject:
    """A run's checkpoint that is to be evaluated."""

    def __init__(self, run: Path, wanted: str) -> None:
        """Find it.

        Args:
            run: its directory, or `name=` and the name of a run under `runs`.
            wanted: a step, or a path as `opt-train checkpoints` prints it; empty: the newest good one.

        Raises:
            BadInput: there is no such run or checkpoint, or the run's configuration or data cannot be read.
        """
        word = str(run)
        named = word.startswith("name=")
        self.run = RunDirectory(Path(RunConfig().runs, word.removeprefix("name=")) if named else run)
        about = About(self.run)
        self.name = about.created.name
        self.config = self._read_configuration()
        self.checkpoint = self._choose(about, wanted)
        self.data = Path(self.config.data.directory)
        self.dataset = DatasetManifest.read(self.data)
        check_same_data(self.run, self.dataset)
        self.device = device_of(self.config)
        if self.config.train.threads:
            torch.set_num_threads(self.config.train.threads)

    def _read_configuration(self) -> RunConfig:
        try:
            return from_json(self.run.config_json)
        except (OSError, ValueError, BadInput) as error:
            raise BadInput(f"{self.run.config_json} cannot be read ({error}); restore it from a copy") from None

    def _choose(self, about: About, wanted: str) -> Checkpoint:
        if not wanted:
            newest = about.state.newest_good()
            if newest is None:
                raise BadInput(f"{self.run.path} has no good checkpoint yet; wait until it has saved one")
            return newest
        by_step = [one for one in about.state.chain() if str(one.step) == wanted]
        by_path = [one for one in about.state.checkpoints if Path(wanted) in (Path(one.path), self.run.path / one.path)]
        for one in (*by_step, *by_path):
            return one
        raise BadInput(
            f"--checkpoint={wanted} is not in {self.run.path}; `opt-train checkpoints {self.run.path}` lists them"
        )

    def sets_named(self, wanted: Sequence[str]) -> list[str]:
        """The validation sets to measure: those `wanted`, or all that have a whole sequence.

        Raises:
            BadInput: the data holds no such set.
        """
        held = {name: tokens for name, tokens in self.dataset.splits.items() if name != TRAIN}
        for name in wanted:
            if name not in held:
                raise BadInput(
                    f"--set={name} is not in {self.data}, which holds {', '.join(held)}; "
                    "`opt-train prepare` adds what data.validation_sets names"
                )
        return list(dict.fromkeys(wanted)) or [n for n, size in held.items() if size > self.config.data.sequence_length]

    def load(self) -> OPT:
        """The model.

        Raises:
            BadInput: the checkpoint is damaged, or has gone meanwhile.
        """
        folder = self.run.path / self.checkpoint.path
        telling = _telling("reading the checkpoint", "bytes")
        try:
            return load_model(self.config, folder, self.checkpoint.manifest_sha256, self.device, telling)
        except CheckpointError as error:
            raise BadInput(f"{error}; give another --checkpoint of `opt-train checkpoints {self.run.path}`") from None

    def tokenizer(self) -> "Tokenizer":
        """The run's own.

        Raises:
            BadInput: it is missing, or another one than the data was prepared with.
        """
        path = self.data / TOKENIZER_FILE
        loaded = tokenizer.load(path)
        if hashlib.sha256(path.read_bytes()).hexdigest() != self.dataset.tokenizer_sha256:
            raise BadInput(f"{path} has changed since the data was prepared; restore it, or prepare the data again")
        return loaded


def evaluate(run: Path, checkpoint: str, sets: Sequence[str], as_json: bool) -> int:
    """Print the perplexity of a run's checkpoint on validation sets of the run's data.

    Args:
        sets: their names; empty: all that the data holds and that are long enough for this run.
    """
    subject = Subject(run, checkpoint)
    config = subject.config
    length = config.data.sequence_length
    check_fits(subject.dataset, vocab_size=config.model.vocab_size, sequence_length=length)
    opened = {
        name: ValidationSet(open_split(subject.data, name, verify=True), length, name)
        for name in subject.sets_named(sets)
    }
    model = subject.load()
    measured = {
        name: perplexity(
            model,
            validation,
            micro_batch=config.train.micro_batch,
            device=subject.device,
            progress=_telling(f"evaluated on {name}", "sequences"),
        )
        for name, validation in opened.items()
    }
    print(_as_json(subject, measured) if as_json else _as_table(subject, measured))
    return DONE


def _as_json(subject: Subject, measured: Mapping[str, Measured]) -> str:
    payload = {
        "name": subject.name,
        "checkpoint": subject.checkpoint.path,
        "attempt": subject.checkpoint.attempt,
        "step": subject.checkpoint.step,
        "unigram_perplexity": subject.dataset.unigram_perplexity,
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


def _as_table(subject: Subject, measured: Mapping[str, Measured]) -> str:
    width = max(len(name) for name in ("set", *measured))
    lines = [f"{subject.name} at step {subject.checkpoint.step}; loss in nats a token"]
    lines.append(f"{'set':{width}} {'tokens':>14} {'loss':>9} {'perplexity':>11}")
    for name, result in measured.items():
        lines.append(f"{name:{width}} {result.tokens:>14,} {result.loss:>9.4f} {result.perplexity:>11.2f}")
    if HELD_OUT in measured:
        lines.append(f"a unigram model of the same data has {subject.dataset.unigram_perplexity:.1f} on {HELD_OUT}")
    return "\n".join(lines)


def generate(
    run: Path, prompt: str, checkpoint: str, max_new_tokens: int | None, sampling: Sampling, as_json: bool
) -> int:
    """Print `prompt` and what a run's checkpoint makes of it, as it comes."""
    subject = Subject(run, checkpoint)
    words = subject.tokenizer()
    # Training saw each document behind the end of another one: so a text begins.
    ids = [tokenizer.EOS, *words.encode(_checked(prompt)).ids]
    count = _room_for(len(ids), max_new_tokens, subject.config)
    vocabulary = min(tokenizer.size_of(words), subject.config.model.vocab_size)
    tokens = generated(subject.load(), ids, sampling, max_new_tokens=count, end=tokenizer.EOS, vocabulary=vocabulary)
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


def _telling(what: str, unit: str) -> Callable[[int, int], None]:
    """Says on stderr, every few seconds, how far long work has come."""
    told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= TELL_SECONDS:
            told = time.monotonic()
            print(f"{what}: {done:,} of {total:,} {unit}", file=sys.stderr, flush=True)

    return tell
