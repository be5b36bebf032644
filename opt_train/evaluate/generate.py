"""Text that a model writes: one token after another, the likeliest or a drawn one."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opt_train.model.cache import KeyValueCache
from opt_train.model.decoder import OPT
from opt_train.protocol.exits import BadInput


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen. The cuts apply in this order: temperature, `top_k`, `top_p`."""

    greedy: bool = False
    """The likeliest token always; nothing else counts then."""
    temperature: float = 1.0
    """Logits are divided by it: below 1 likely tokens become likelier still."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens that together have this probability (Holtzman et al. 2020, arXiv
    1904.09751)."""
    seed: int = 0
    """The same seed draws the same tokens."""

    def __post_init__(self) -> None:
        # torch's generators take a signed 64-bit seed.
        if not 0 <= self.seed < 2**63:
            raise BadInput(f"--seed={self.seed} must not be negative and be below 2**63")
        if self.greedy:
            return
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise BadInput(
                f"--temperature={self.temperature:g} must be larger than 0; --greedy takes the "
                "likeliest token"
            )
        if self.top_k < 0:
            raise BadInput(f"--top-k={self.top_k} must not be negative; 0 draws from all tokens")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"--top-p={self.top_p:g} must be larger than 0 and at most 1")


def generate(
    model: OPT,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    end: int | None = None,
    vocabulary: int | None = None,
) -> Iterator[int]:
    """The ids that follow `prompt`, each as soon as it is chosen.

    Args:
        model: in one piece, in evaluation mode.
        prompt: at least one id; with `max_new_tokens` no more than the model's positions.
        end: stop before this id.
        vocabulary: ids from here on are rows of the embedding that no token has; they are never
            chosen.

    Raises:
        BadInput: the model's output is not finite.
    """
    assert 0 < len(prompt) <= model.config.positions - max_new_tokens
    device = model.model.decoder.embed_tokens.weight.device
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = KeyValueCache(model.config.layers, len(prompt) + max_new_tokens)
    new = list(prompt)
    for _ in range(max_new_tokens):
        # Entered anew for each token: between two of them the caller's own code runs.
        with torch.inference_mode():
            [logits] = model.next_logits(torch.tensor([new], device=device), cache)
            token = choose(logits[:vocabulary], sampling, generator)
        if token == end:
            return
        yield token
        new = [token]


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One id.

    Args:
        logits: [vocabulary], on any device; the drawing is done on the CPU, so that a seed means
            the same everywhere.

    Raises:
        BadInput: a logit is not finite.
    """
    logits = logits.float().cpu()
    if not logits.isfinite().all():
        raise BadInput(
            "the model's output is not finite: its weights have diverged; give an earlier "
            "--checkpoint"
        )
    if sampling.greedy:
        return int(logits.argmax())
    # The largest first becomes 0, so that no temperature makes it infinite; in fp32 the running sum
    # below would reach 1 before the last of 50,000 tokens.
    logits = logits.double()
    scaled, ids = ((logits - logits.max()) / sampling.temperature).sort(
        descending=True, stable=True
    )
    if sampling.top_k:
        scaled = scaled[: sampling.top_k]
    probabilities = scaled.softmax(dim=0)
    # A token stays if those before it do not yet have `top_p`: the likeliest always does.
    before = probabilities.cumsum(dim=0) - probabilities
    probabilities = probabilities[before < sampling.top_p]
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
