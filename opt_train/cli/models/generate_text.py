"""What `opt-train generate` does once its flags are read: go on with a text, as it comes."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

from opt_train.cli.models.chosen_model import choose_device, load_model
from opt_train.cli.progress import report_count
from opt_train.config.run_config import RunConfig
from opt_train.data import tokenizer
from opt_train.evaluate.generate import Sampling, generate
from opt_train.protocol.exits import DONE, BadInput
from opt_train.run.checkpoint_choice import CheckpointChoice

NEW_TOKENS = 64
"""Without `--max-new-tokens`, where the model has positions for them."""


def continue_text(
    run: Path,
    prompt: str,
    checkpoint: str,
    max_new_tokens: int | None,
    sampling: Sampling,
    as_json: bool,
    data: Path | None = None,
) -> int:
    """Print `prompt` and what a checkpoint makes of it, as it comes."""
    choice = CheckpointChoice(run, checkpoint, data)
    words = choice.tokenizer()
    # Training saw each document behind the end of another one: so a text begins.
    ids = [tokenizer.EOS, *words.encode(_checked(prompt), add_special_tokens=False).ids]
    count = _room_for(len(ids), max_new_tokens, choice.config)
    model = load_model(
        choice, choose_device(choice), report_count("reading the checkpoint", "bytes")
    )
    tokens = generate(
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
        "name": choice.name,
        "checkpoint": choice.checkpoint.path,
        "step": choice.checkpoint.step,
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


def _pieces(words: Tokenizer, tokens: Iterable[int]) -> Iterable[str]:
    """The text of `tokens` as far as each one completes it: a character may take several."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        whole = words.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")
        yield whole[len(shown) :]
        shown = whole
    yield words.decode(ids)[len(shown) :]
