"""How far an update has moved the weights: against hand arithmetic, and over a sample alone."""

import math

import pytest
import torch

from opt_train.optim.update_ratio import SAMPLE, UpdateRatio


def ratio_of(measure: UpdateRatio) -> float:
    squares = measure.measure()
    assert squares is not None
    return math.sqrt(float(squares.update) / float(squares.weights))


def test_it_is_the_ratio_of_norms_over_all_tensors() -> None:
    weights = [torch.full((3,), 2.0), torch.full((2, 2), 1.0)]
    ratio = UpdateRatio(lambda: weights)
    assert ratio.measure() is None, "no step before"
    weights[0] += 0.5
    weights[1] -= 0.25
    # Four of 1 and three of 2 moved: 3 x 0.25 + 4 x 0.0625 over 3 x 4 + 4 x 1.
    assert ratio_of(ratio) == pytest.approx(math.sqrt(1.0 / 16.0))
    assert ratio_of(ratio) == 0.0, "a step that was skipped"


def test_a_large_tensor_is_sampled_from_end_to_end() -> None:
    size = 2 * SAMPLE - 1
    weights = torch.ones(size)
    ratio = UpdateRatio(lambda: [weights])
    ratio.measure()
    weights[-1] += 1.0
    squares = ratio.measure()
    assert squares is not None
    assert float(squares.weights) == SAMPLE
    assert float(squares.update) == 1.0, "its last element is one of the sample"


def test_of_an_update_by_adam_the_sample_tells_what_all_weights_do() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(200, 300))
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    ratio = UpdateRatio(lambda: [weight])
    ratio.measure()
    for _ in range(3):
        before = weight.detach().clone()
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        whole = float((weight.detach() - before).norm() / before.norm())
        assert ratio_of(ratio) == pytest.approx(whole, rel=0.1)


def test_an_engine_that_shows_no_weights_has_none() -> None:
    assert UpdateRatio(None).measure() is None
