"""The decoder against Hugging Face's independent implementation of OPT."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from opt_train.model.config import ModelConfig
from opt_train.model.decoder import OPT, Loss
from opt_train.model.init import initialise
from opt_train.model.loss import cross_entropy_sum
from opt_train.model.sizes import flops_per_token, parameter_count
from tests.model.twins import TINY, VARIANTS, hugging_face, twins


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    # Id 1 is Hugging Face's padding, whose embedding gets no gradient there.
    block = torch.randint(
        4, TINY.vocab_size, (3, TINY.positions + 1), generator=torch.Generator().manual_seed(7)
    )
    return block[:, :-1], block[:, 1:]


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_parameter_names_are_hugging_faces(config: ModelConfig) -> None:
    theirs = {
        name: tuple(parameter.shape) for name, parameter in hugging_face(config).named_parameters()
    }
    theirs.pop("lm_head.weight", None)
    assert {
        name: tuple(parameter.shape) for name, parameter in OPT(config).named_parameters()
    } == theirs


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_hugging_face(config: ModelConfig) -> None:
    ours, theirs = twins(config)
    tokens, _ = sample()
    assert (ours(tokens) - theirs(tokens).logits).abs().max().item() <= 1e-5


@pytest.mark.parametrize("weighted", [False, True], ids=["all tokens", "some weigh nothing"])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_gradients_equal_hugging_face(config: ModelConfig, weighted: bool) -> None:
    ours, theirs = twins(config)
    tokens, targets = sample()
    weights = torch.ones(tokens.shape)
    if weighted:
        weights[1, 40:] = 0.0
        weights[2] = 0.5
    loss = ours(tokens, targets, weights if weighted else None)
    assert isinstance(loss, Loss)
    loss.loss_sum.backward()
    losses = F.cross_entropy(
        theirs(tokens).logits.flatten(0, 1), targets.flatten(), reduction="none"
    )
    reference = (losses * weights.flatten()).sum()
    reference.backward()
    assert loss.loss_sum.item() == pytest.approx(reference.item(), rel=1e-6)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        expected = gradients[name]
        if name.endswith("k_proj.bias"):
            # It shifts all scores of a query alike: its gradient is nothing but rounding, and has
            # no relative error.
            assert max(parameter.grad.norm(), expected.norm()) <= 1e-6 * largest, name
        else:
            assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm(), name


def test_weightless_sequence_changes_neither_loss_nor_gradient() -> None:
    ours, _ = twins(TINY)
    tokens, targets = sample()
    ours(tokens[:2], targets[:2]).loss_sum.backward()
    expected = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    padded = ours(tokens, targets, torch.tensor([1.0, 1.0, 0.0]))
    padded.loss_sum.backward()
    for gradient, parameter in zip(expected, ours.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-5)


def test_sliced_loss_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice border that drops or doubles a token would go unnoticed in a loss of thousands of
    tokens."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(37, 16, generator=generator, dtype=torch.float32, requires_grad=True)
    embedding = torch.randn(50, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 50, (37,), generator=generator)
    weights = torch.rand(37, generator=generator)
    reference = (
        F.cross_entropy(F.linear(hidden, embedding), targets, reduction="none") * weights
    ).sum()
    expected = torch.autograd.grad(reference, (hidden, embedding))
    monkeypatch.setattr("opt_train.model.sizes.LOGITS_AT_ONCE", 50 * 5)
    total = cross_entropy_sum(hidden, embedding, targets, weights)
    found = torch.autograd.grad(total * 2.0, (hidden, embedding))
    torch.testing.assert_close(total, reference, rtol=1e-6, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other * 2.0, rtol=1e-5, atol=1e-5)


def test_gradient_is_scaled_before_fp16_loses_it() -> None:
    """Each logit's gradient is a tenth of fp16's smallest number; scaled once it is fp16, it would
    stay zero."""
    generator = torch.Generator().manual_seed(2)
    hidden, embedding = (
        torch.randn(rows, 16, generator=generator).half().requires_grad_() for rows in (7, 50)
    )
    targets = torch.randint(0, 50, (7,), generator=generator)
    weights = torch.full((7,), 2.0**-28)
    scale = torch.tensor(2.0**26)
    unscaled = torch.autograd.grad(
        cross_entropy_sum(hidden, embedding, targets, weights), (hidden, embedding)
    )
    assert all((gradient == 0).all() for gradient in unscaled)
    total = cross_entropy_sum(hidden, embedding, targets, weights, scale)
    found = torch.autograd.grad(total, (hidden, embedding))
    wide = [each.detach().float().requires_grad_() for each in (hidden, embedding)]
    losses = F.cross_entropy(F.linear(*wide), targets, reduction="none")
    torch.testing.assert_close(
        total, (losses * weights).sum(), rtol=1e-3, atol=0.0
    )  # the loss itself is not scaled
    expected = torch.autograd.grad((losses * weights * scale).sum(), wide)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=1e-2, atol=1e-3)


def test_second_backward_raises_instead_of_scaling_twice() -> None:
    """Backward scales its gradients where they lie, which it may do once."""
    hidden, embedding = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    total = cross_entropy_sum(hidden, embedding, torch.tensor([0, 1, 2]), torch.ones(3))
    (total * 2.0).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (total * 2.0).backward()


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_activation_norm_is_that_of_the_last_layer(config: ModelConfig) -> None:
    ours, theirs = twins(config)
    tokens, targets = sample()
    loss = ours(tokens, targets)
    captured: list[torch.Tensor] = []
    theirs.model.decoder.layers[-1].register_forward_hook(
        lambda _module, _inputs, output: captured.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    theirs(tokens)
    assert captured[0].shape[-1] == config.d_model
    assert loss.activation_squares.item() == pytest.approx(
        captured[0].square().sum().item(), rel=1e-5
    )


def test_dropout_acts_in_training_alone() -> None:
    model = OPT(replace(TINY, dropout=0.5))
    initialise(model, TINY, seed=0)
    tokens, _ = sample()
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_initial_weights_follow_the_recipe(config: ModelConfig) -> None:
    model = OPT(config)
    assert config.init_std == 0.006
    initialise(model, config, seed=0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert parameter.unique().tolist() == [1.0 if "layer_norm.weight" in name else 0.0], (
                name
            )
            continue
        expected = 0.006
        if name.endswith(("self_attn.out_proj.weight", "fc2.weight")):
            expected /= (2 * config.layers) ** 0.5
        assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(parameter.mean().item()) < 5 * expected / parameter.numel() ** 0.5, name


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    one, other, deeper = OPT(TINY), OPT(TINY), OPT(replace(TINY, layers=3))
    initialise(one, TINY, seed=0)
    torch.manual_seed(99)
    initialise(other, TINY, seed=1)
    initialise(deeper, TINY, seed=0)
    assert not torch.equal(
        one.model.decoder.embed_tokens.weight, other.model.decoder.embed_tokens.weight
    )
    assert torch.equal(
        one.model.decoder.layers[1].fc1.weight, deeper.model.decoder.layers[1].fc1.weight
    )
    assert not torch.equal(
        one.model.decoder.layers[0].fc1.weight, one.model.decoder.layers[1].fc1.weight
    )


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_parameter_count_is_the_modules(config: ModelConfig) -> None:
    assert parameter_count(config) == sum(
        parameter.numel() for parameter in OPT(config).parameters()
    )


def test_a_token_costs_six_operations_a_parameter_and_its_attention() -> None:
    assert flops_per_token(TINY, 64) == 6 * parameter_count(TINY) + 12 * 2 * 64 * 64
