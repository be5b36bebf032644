"""Generation against Hugging Face's, and the cache against having none."""

import pytest
import torch

from opt_train.evaluate.generate import Sampling, choose, generate
from opt_train.model.cache import KeyValueCache
from opt_train.model.config import ModelConfig
from opt_train.protocol.exits import BadInput
from tests.model.twins import TINY, VARIANTS, twins

PROMPT = [2, 17, 300, 45, 8]
GREEDY = Sampling(greedy=True)
LARGE = 0.3
"""Weights of this size make texts of many tokens; with small ones a tied head repeats its input."""


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_greedy_writes_what_hugging_face_writes(config: ModelConfig) -> None:
    ours, theirs = twins(config, LARGE)
    written = theirs.generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=40, eos_token_id=None
    )
    found = list(generate(ours, PROMPT, GREEDY, max_new_tokens=40))
    assert len(set(found)) >= 5, "a text that repeats one token shows little"
    assert found == written[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_a_cache_does_not_change_the_logits(config: ModelConfig) -> None:
    """In pieces of several lengths: the mask of a piece in the middle is easily one token off."""
    ours, _ = twins(config)
    tokens = torch.randint(
        4, config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(2)
    )
    with torch.no_grad():
        whole = ours(tokens)
        cache = KeyValueCache(config.layers, capacity=40)
        for piece in tokens.split([7, 1, 1, 13, 2, 16], dim=1):
            logits = ours.next_logits(piece, cache)
            torch.testing.assert_close(logits, whole[:, cache.length - 1], rtol=1e-5, atol=1e-5)
    assert cache.length == 40


def test_the_end_token_ends_the_text_and_is_no_part_of_it() -> None:
    ours, _ = twins(TINY, LARGE)
    free = list(generate(ours, PROMPT, GREEDY, max_new_tokens=20))
    end = free[7]
    assert (
        list(generate(ours, PROMPT, GREEDY, max_new_tokens=20, end=end)) == free[: free.index(end)]
    )


def test_a_text_may_fill_the_models_positions() -> None:
    ours, _ = twins(TINY, LARGE)
    count = TINY.positions - len(PROMPT)
    assert len(list(generate(ours, PROMPT, GREEDY, max_new_tokens=count))) == count


def test_rows_without_a_token_are_never_chosen() -> None:
    ours, _ = twins(TINY, LARGE)
    assert max(generate(ours, PROMPT, GREEDY, max_new_tokens=30)) >= 100
    for sampling in (GREEDY, Sampling(temperature=5.0)):
        assert max(generate(ours, PROMPT, sampling, max_new_tokens=30, vocabulary=100)) < 100


def test_the_same_seed_draws_the_same_tokens() -> None:
    ours, _ = twins(TINY, LARGE)

    def text(seed: int) -> list[int]:
        return list(generate(ours, PROMPT, Sampling(seed=seed, temperature=1.5), max_new_tokens=20))

    first = text(1)
    torch.manual_seed(99)
    assert text(1) == first
    assert text(2) != first


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=1, temperature=3.0),
        Sampling(top_p=1e-6),
        Sampling(top_p=1e-9),
        Sampling(temperature=1e-40),
        Sampling(temperature=5e-324),
    ],
)
def test_a_draw_from_one_token_is_greedy(sampling: Sampling) -> None:
    ours, _ = twins(TINY, LARGE)
    assert list(generate(ours, PROMPT, sampling, max_new_tokens=20)) == list(
        generate(ours, PROMPT, GREEDY, max_new_tokens=20)
    )


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(temperature=0.5), [0.6849, 0.2466, 0.0616, 0.0068]),
        (Sampling(top_k=2), [0.625, 0.375, 0.0, 0.0]),
        (Sampling(top_k=9), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(top_p=0.79), [0.625, 0.375, 0.0, 0.0]),
        (Sampling(top_p=0.81), [0.5263, 0.3158, 0.1579, 0.0]),
        # The cut by number comes first: of 0.625 and 0.375 the first alone has 0.6.
        (Sampling(top_k=2, top_p=0.6), [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(
    sampling: Sampling, expected: list[float]
) -> None:
    order = [2, 0, 3, 1]
    logits = torch.empty(4)
    logits[order] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([choose(logits, sampling, generator) for _ in range(4000)])
    found = [(draws == token).float().mean().item() for token in order]
    assert found == pytest.approx(expected, abs=0.03)
    assert [share > 0 for share in found] == [share > 0 for share in expected]


def test_the_least_likely_tokens_of_a_large_vocabulary_can_be_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the running sum is rounded up to 1 too early, the tokens behind are never drawn."""
    sizes: list[int] = []

    def draw(
        probabilities: torch.Tensor, count: int, *, generator: torch.Generator
    ) -> torch.Tensor:
        sizes.append(len(probabilities))
        return torch.zeros(count, dtype=torch.long)

    monkeypatch.setattr(torch, "multinomial", draw)
    logits = 3 * torch.randn(50_272, generator=torch.Generator().manual_seed(0))
    choose(logits, Sampling(), torch.Generator())
    assert sizes == [len(logits)]


def test_what_cannot_be_drawn_from_is_refused() -> None:
    for values in (
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"seed": -1},
        {"seed": 2**63},
    ):
        with pytest.raises(BadInput, match=f"^--{next(iter(values)).replace('_', '-')}=.* must"):
            Sampling(**values)
    Sampling(greedy=True, temperature=0.0, top_k=-1, top_p=0.0)
    with pytest.raises(BadInput, match="not finite"):
        choose(torch.tensor([0.0, float("nan")]), GREEDY, torch.Generator())
