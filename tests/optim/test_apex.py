"""NVIDIA's apex, with a stand-in for it (`stand_ins/`): a stranger of its name must not be taken
for it, and its optimizer must keep our contract. What NVIDIA's own kernels compute is not tested
here."""

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from opt_train.checkpoint.tensors import put_back, tensors_of
from opt_train.config.compose import compose
from opt_train.config.difference import kind_of
from opt_train.model.config import ModelConfig
from opt_train.model.decoder import OPT, Loss
from opt_train.model.init import initialise
from opt_train.optim import adamw, apex
from opt_train.optim.adamw import apply, make_optimizer, put_in_force, really_in_force
from opt_train.optim.apex import Apex, ApexAdamW, NoApex, choose, find, fuse_layer_norms
from opt_train.protocol.exits import BadInput
from tests.optim.syncs import Syncs

STAND_INS = Path(__file__).with_name("stand_ins")
VALUES = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
YES, NO = torch.tensor(1.0), torch.tensor(0.0)


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """No test knows what another one found, imported or warned of."""

    def forget() -> None:
        find.cache_clear()
        apex._warn_once.cache_clear()
        for name in [
            name for name in sys.modules if name.partition(".")[0] in ("apex", *apex.EXTENSIONS)
        ]:
            del sys.modules[name]
        importlib.invalidate_caches()

    forget()
    yield
    forget()


@pytest.fixture
def nvidias(monkeypatch: pytest.MonkeyPatch) -> Apex:
    """The stand-in for NVIDIA's apex, installed."""
    monkeypatch.syspath_prepend(STAND_INS / "nvidia")
    found = find()
    assert isinstance(found, Apex)
    return found


# Which apex it is ---------------------------------------------------------------------------------


def copied(folder: Path, source: str, *without: str) -> Path:
    """The modules of a stand-in, some of them left out."""
    for path in (STAND_INS / source).rglob("*.py"):
        name = path.relative_to(STAND_INS / source)
        if name.as_posix() not in without:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(path.read_text())
    return folder


def test_nvidias_is_known_by_its_symbols(nvidias: Apex) -> None:
    assert nvidias.fused_adam.__module__ == "apex.optimizers"
    assert nvidias.fused_layer_norm.__module__ == "apex.normalization"
    assert choose("auto", CUDA) is choose("apex", CUDA) is nvidias


def test_none_at_all_is_no_surprise(caplog: pytest.LogCaptureFixture) -> None:
    assert find() == NoApex("NVIDIA's apex is not installed", is_surprising=False)
    assert choose("auto", CUDA) is None
    assert caplog.records == []
    with pytest.raises(BadInput) as refused:
        choose("apex", CUDA)
    assert str(refused.value) == (
        "optim.fused=apex, but NVIDIA's apex is not installed; build NVIDIA's from "
        "github.com/NVIDIA/apex with its "
        "CUDA extensions (PyPI's apex is another package), or use optim.fused=auto"
    )


def test_pypis_apex_is_reported_once_and_neither_used_nor_imported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(STAND_INS / "pypi")
    with caplog.at_level(logging.WARNING):
        assert choose("auto", CUDA) is None
        assert choose("auto", CUDA) is None
    assert caplog.messages == [
        "apex is not used, but torch's fused AdamW and LayerNorm: the installed apex is not "
        "NVIDIA's but another "
        "package of that name"
    ]
    assert "apex" not in sys.modules
    with pytest.raises(
        BadInput,
        match=r"^optim.fused=apex, but the installed apex is not NVIDIA's but another package",
    ):
        choose("apex", CUDA)


def adam_lacks(folder: Path) -> None:
    (folder / "apex" / "optimizers" / "__init__.py").write_text("class FusedLAMB: ...\n")


def other_torch(folder: Path) -> None:
    (folder / "apex" / "normalization" / "__init__.py").write_text(
        "raise ImportError('undefined symbol: _ZN3c10')\n"
    )


def nothing(_: Path) -> None:
    """Left as it is."""


@pytest.mark.parametrize(
    ("without", "damage", "why"),
    [
        (("amp_C.py",), nothing, "the installed apex was built without amp_C"),
        (
            ("amp_C.py", "fused_layer_norm_cuda.py"),
            nothing,
            "the installed apex was built without amp_C and fused_layer_norm_cuda",
        ),
        (
            (),
            adam_lacks,
            "the installed apex cannot be imported (AttributeError: module 'apex.optimizers' has "
            "no "
            "attribute 'FusedAdam')",
        ),
        (
            (),
            other_torch,
            "the installed apex cannot be imported (ImportError: undefined symbol: _ZN3c10)",
        ),
    ],
)
def test_half_an_apex_is_reported_and_not_used(
    without: tuple[str, ...],
    damage: Callable[[Path], None],
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage(copied(tmp_path, "nvidia", *without))
    monkeypatch.syspath_prepend(tmp_path)
    assert choose("auto", CUDA) is None
    assert caplog.messages == [f"apex is not used, but torch's fused AdamW and LayerNorm: {why}"]


def test_on_a_cpu_nobody_looks_for_it(nvidias: Apex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apex, "find", lambda: pytest.fail("looked"))
    assert choose("auto", CPU) is choose("torch", CPU) is choose("torch", CUDA) is None
    with pytest.raises(
        BadInput,
        match=r"^optim.fused=apex works on a GPU alone, and this is a cpu; use optim.fused=auto",
    ):
        choose("apex", CPU)
    assert isinstance(make_optimizer(layers(), VALUES, "auto"), torch.optim.AdamW)


def test_the_key_may_change_at_any_restart_and_takes_nothing_else() -> None:
    assert kind_of("optim.fused") == "operational"
    with pytest.raises(
        BadInput, match=r"^optim.fused=nvidia is not possible; use auto or torch or apex$"
    ):
        compose(["optim.fused=nvidia"])
    with pytest.raises(
        BadInput,
        match=r"^optim.fused=apex updates fp32 weights, not those of precision.weights=fp16",
    ):
        compose(["optim.fused=apex", "precision=fp16-memory-efficient"])


# AdamW --------------------------------------------------------------------------------------------


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), nn.LayerNorm(16), nn.Linear(16, 4))


def gradients(model: nn.Module, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = (
            torch.randn(parameter.shape, generator=generator) * 10.0 ** (step % 4 - 3) * scale
        )


def made(nvidias: Apex, monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> ApexAdamW:
    """What `make_optimizer` makes where apex is chosen."""
    with monkeypatch.context() as patch:
        patch.setattr(adamw, "choose", lambda wanted, device: nvidias)
        optimizer = make_optimizer(model, VALUES)
    assert isinstance(optimizer, ApexAdamW)
    return optimizer


@pytest.fixture
def make(nvidias: Apex, monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], ApexAdamW]:
    return functools.partial(made, nvidias, monkeypatch)


Make = Callable[[nn.Module], ApexAdamW]


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [
        t.detach().clone() for p in model.parameters() for t in (p, *optimizer.state[p].values())
    ]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_it_updates_as_torchs_adamw_does(make: Make) -> None:
    ours, theirs = layers(), layers()
    optimizer, reference = make(ours), make_optimizer(theirs, VALUES)
    for step in range(50):
        gradients(ours, step)
        gradients(theirs, step)
        apply(optimizer, NO)
        apply(reference, NO)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)
        assert (
            optimizer.state[one].keys()
            == reference.state[other].keys()
            == {"step", "exp_avg", "exp_avg_sq"}
        )
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                optimizer.state[one][name], reference.state[other][name], rtol=2e-6, atol=1e-7
            )
        assert optimizer.state[one]["step"] == reference.state[other]["step"] == 50
    assert all(parameter.grad is None for parameter in ours.parameters())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1.0])
def test_a_skipped_step_leaves_everything_untouched_to_the_bit(make: Make, value: float) -> None:
    model = layers()
    optimizer = make(model)
    for step in range(3):
        gradients(model, step)
        apply(optimizer, NO)
        before = state_of(model, optimizer)
        gradients(model, step, scale=value)
        apply(optimizer, YES, torch.tensor(value))
        assert same(state_of(model, optimizer), before)


def test_a_skipped_step_is_as_if_it_had_not_been(make: Make) -> None:
    """Bias correction too: the first step may be skipped, two in a row, and the last."""
    plain, skipping = layers(), layers()
    straight, optimizer = make(plain), make(skipping)
    number = 0
    for skip in (YES, NO, YES, YES, NO, NO, YES):
        gradients(skipping, number, scale=torch.nan if skip else 1.0)
        apply(optimizer, skip)
        if not skip:
            gradients(plain, number)
            apply(straight, NO)
            number += 1
        assert same(state_of(skipping, optimizer), state_of(plain, straight))
    assert really_in_force(optimizer)["updates"] == 3


def test_fused_adam_by_itself_would_miscount(nvidias: Apex) -> None:
    """Why `_dummy_overflow_buf` is written to: the stand-in counts as NVIDIA's source does."""
    parameters = [torch.ones(2), torch.ones(2)]
    by_itself = nvidias.fused_adam([{"params": [p]} for p in parameters], capturable=True)
    for skip in (NO, YES):
        for parameter in parameters:
            parameter.grad = torch.ones(2)
        by_itself.step(grad_scaler=apex._ScalerAnswers(skip, None))
    assert [int(group["step"]) for group in by_itself.param_groups] == [2, 1]


def test_the_host_waits_for_nothing(make: Make) -> None:
    model = layers()
    optimizer = make(model)
    gradients(model, 0)
    with Syncs() as syncs:
        apply(optimizer, YES, torch.tensor(0.5))
        gradients(model, 1)
        put_in_force(optimizer, {**VALUES, "lr": 2e-2})
        apply(optimizer, NO, torch.tensor(0.5))
    assert syncs.seen == []


def test_the_factor_is_the_gradients(make: Make) -> None:
    """Average, clipping and loss scale arrive as one factor, which the kernel applies: to the bit
    for powers of two."""
    scaled, plain = layers(), layers()
    one, other = make(scaled), make(plain)
    for step in range(5):
        gradients(scaled, step, scale=1024.0)
        gradients(plain, step)
        apply(one, NO, torch.tensor(1 / 1024))
        apply(other, NO)
    assert same(state_of(scaled, one), state_of(plain, other))


@pytest.mark.parametrize("factor", [3.0e-7, 0.7311, 1.9999999, 123456.7])
def test_the_factor_survives_two_reciprocals(factor: float) -> None:
    given = torch.tensor(factor)
    decision = apex._ScalerAnswers(NO, given)
    assert torch.equal(decision._get_scale_async().double().reciprocal().float(), given)


def test_what_is_put_in_force_holds_from_the_next_step_on(make: Make) -> None:
    ours, theirs = layers(), layers()
    optimizer, reference = make(ours), make_optimizer(theirs, VALUES)
    changed = {"lr": 3e-2, "beta1": 0.5, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.3}
    for step, values in enumerate([VALUES, changed, VALUES, changed]):
        for each, model in ((optimizer, ours), (reference, theirs)):
            gradients(model, step)
            put_in_force(each, values)
            apply(each, NO)
        assert really_in_force(optimizer) == {**values, "updates": step + 1}
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=5e-6, atol=5e-6)


class Ragged(nn.Module):
    """A rank's part of a model: of some parameters, and of all vectors, it holds nothing."""

    def __init__(self, vectors: int) -> None:
        super().__init__()
        shapes = [(2, 3), (0, 3), (4, 1), (0, 5), (vectors,), (0,)]
        self.parts = nn.ParameterList(nn.Parameter(torch.ones(shape)) for shape in shapes)


@pytest.mark.parametrize("vectors", [3, 0])
def test_parts_without_elements_are_counted_and_not_handed_over(make: Make, vectors: int) -> None:
    model = Ragged(vectors)
    optimizer = make(model)
    for skip in (NO, YES, NO):
        gradients(model, 1)
        apply(optimizer, skip)
    assert really_in_force(optimizer)["updates"] == 2
    assert len(optimizer._fused.state) == sum(bool(p.numel()) for p in model.parameters()), (
        "it grows step by step"
    )
    assert all(not torch.equal(p, torch.ones_like(p)) for p in model.parameters() if p.numel())


def test_a_rank_that_holds_nothing_still_counts(make: Make) -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(0, 3)), nn.Parameter(torch.ones(0))])
    optimizer = make(model)
    gradients(model, 0)
    apply(optimizer, NO)
    assert really_in_force(optimizer)["updates"] == 1


# Sharded, and saved -------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def sharded() -> nn.Module:
    model = layers()
    mesh = dist.init_device_mesh("cpu", (1,))
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(8, 24, generator=torch.Generator().manual_seed(step))
        model(inputs).square().sum().backward()
        apply(optimizer, NO)


@pytest.mark.usefixtures("world")
def test_sharded_parameters_are_updated_where_they_lie(make: Make) -> None:
    """The first forward pass may move the shards: nothing may be kept of where they lay before."""
    ours, theirs = sharded(), sharded()
    optimizer, reference = make(ours), make_optimizer(theirs, VALUES)
    train(ours, optimizer, range(6))
    train(theirs, reference, range(6))
    for name, tensor in tensors_of(ours, optimizer).items():
        torch.testing.assert_close(
            tensor, tensors_of(theirs, reference)[name], rtol=2e-5, atol=2e-6
        )


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("saved_by", ["torch", "apex"])
def test_a_checkpoint_of_one_is_gone_on_with_by_the_other(make: Make, saved_by: str) -> None:
    before, after = (
        (functools.partial(make_optimizer, values=VALUES), make)
        if saved_by == "torch"
        else (make, functools.partial(make_optimizer, values=VALUES))
    )
    model = sharded()
    optimizer = before(model)
    train(model, optimizer, range(4))
    saved = {name: tensor.clone() for name, tensor in tensors_of(model, optimizer).items()}
    again = sharded()
    other = after(again)
    train(again, other, range(2))  # a rollback restores into what has stepped already
    assert tensors_of(again, other).keys() == saved.keys()
    put_back(again, other, saved)
    for name, tensor in tensors_of(again, other).items():
        assert (tensor.dtype, tensor.shape) == (saved[name].dtype, saved[name].shape)
        torch.testing.assert_close(tensor, saved[name], rtol=0, atol=0)
    train(model, optimizer, range(4, 8))
    train(again, other, range(4, 8))
    assert really_in_force(other)["updates"] == 8
    for name, tensor in tensors_of(again, other).items():
        torch.testing.assert_close(tensor, tensors_of(model, optimizer)[name], rtol=2e-5, atol=2e-6)


# LayerNorm ----------------------------------------------------------------------------------------

SMALL = ModelConfig(
    name="small", layers=2, heads=2, d_model=16, ffn=32, vocab_size=64, positions=16, dropout=0.0
)


@pytest.mark.parametrize("layer_norm", ["pre", "post"])
def test_layer_norms_are_exchanged_under_their_names(nvidias: Apex, layer_norm: str) -> None:
    config = replace(SMALL, layer_norm=layer_norm)
    torch.manual_seed(0)
    plain, fused = OPT(config), OPT(config)
    fused.load_state_dict(plain.state_dict())
    parameters = dict(fused.named_parameters())
    fuse_layer_norms(fused, nvidias)
    assert dict(fused.named_parameters()) == parameters, "the very same tensors, in the same order"
    exchanged = [
        module for module in fused.modules() if isinstance(module, nvidias.fused_layer_norm)
    ]
    assert len(exchanged) == 2 * config.layers + (layer_norm == "pre")
    assert not any(isinstance(module, nn.LayerNorm) for module in fused.modules())
    tokens = torch.arange(16)[None] % 64
    assert torch.equal(fused(tokens), plain(tokens))


def test_layer_norms_of_a_model_without_contents_stay_without(nvidias: Apex) -> None:
    with torch.device("meta"):
        model = OPT(SMALL).to(torch.float16)
    fuse_layer_norms(model, nvidias)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float16)}


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("layer_norm", ["pre", "post"])
def test_every_layer_norm_gets_one_type_under_mixed_precision(
    nvidias: Apex, layer_norm: str
) -> None:
    """The kernels take input and parameters of one type alone: what FSDP gathers and what the
    embedding gives."""
    config = replace(SMALL, layer_norm=layer_norm)
    with torch.device("meta"):
        model = OPT(config)
    fuse_layer_norms(model, nvidias)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh("cpu", (1,))
    for module in (*model.model.decoder.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    model.to_empty(device=CPU)
    initialise(model, config, seed=0)
    tokens = torch.arange(16)[None] % 64
    loss = model(tokens, tokens)
    assert isinstance(loss, Loss)
    loss.loss_sum.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
