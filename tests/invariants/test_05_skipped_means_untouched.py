"""A skipped step leaves weights, moments and step counts as they were, to the bit; and deciding it
syncs nothing."""

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from opt_train.data.batches import MicroBatch
from opt_train.model.config import ModelConfig
from opt_train.model.decoder import Loss
from opt_train.optim.adamw import put_in_force, really_in_force
from opt_train.optim.clip import clip, local_part
from opt_train.optim.loss_scale import LossScale
from opt_train.optim.loss_scale_policy import policy_of
from opt_train.optim.outlier_guard import HISTORY
from opt_train.parallel.config import ParallelConfig, PrecisionConfig
from opt_train.parallel.engine import Engine, EngineSpec, loss_of
from opt_train.parallel.layout import Layout
from opt_train.parallel.make_engine import make_engine
from opt_train.train.orders import NoOrders, StopSignals
from opt_train.train.rank import start
from opt_train.train.step import Readback, read_batch, take_step
from opt_train.train.training import Training
from tests.optim.syncs import Syncs
from tests.train.rig import begin_alone, tiny_config

PRECISIONS = {
    "fp32": PrecisionConfig(compute="fp32"),
    "fp16": PrecisionConfig(compute="fp16"),
    "memory-efficient fp16": PrecisionConfig(compute="fp16", weights="fp16"),
}
CPU = torch.device("cpu")
TINY = ModelConfig(name="tiny", layers=2, heads=4, d_model=32, ffn=64, vocab_size=64, positions=16)
VALUES = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}


@pytest.fixture(autouse=True)
def world(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def trained(precision: PrecisionConfig) -> Engine:
    """A sharded model with two updates behind it, so that moments are not zero."""
    engine = make_engine(
        EngineSpec(
            model=TINY,
            precision=precision,
            parallel=ParallelConfig(),
            layout=Layout(1, 1, 1),
            device=CPU,
            values=VALUES,
            seed=0,
        )
    )
    for _ in range(2):
        backward(engine)
        update(engine)
    return engine


def backward(engine: Engine) -> None:
    block = torch.randint(0, TINY.vocab_size, (2, 17))
    engine.forward_backward([MicroBatch(block[:, :-1], block[:, 1:], torch.ones(2))])


def update(engine: Engine, tokens: float = 32.0) -> bool:
    decision = clip(engine.grad_norm(torch.tensor(tokens, dtype=torch.float64)), 1.0)
    put_in_force(engine.optimizer, VALUES)
    engine.apply(decision)
    return bool(decision.skip)


def everything(engine: Engine) -> dict[str, bytes]:
    """The bytes of all that training carries."""
    tensors = {}
    for name, parameter in engine.model.named_parameters():
        state = engine.optimizer.state[parameter]
        tensors[name] = local_part(parameter)
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{name}.{moment}"] = local_part(state[moment])
        tensors[f"{name}.step"] = state["step"]
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_gradient_changes_nothing(value: float, precision: PrecisionConfig) -> None:
    """Multiplying a step by 0 would leave NaN behind: 0 x NaN is NaN."""
    engine = trained(precision)
    before = everything(engine)
    backward(engine)
    engine.model.model.decoder.layers[1].fc1.weight.grad[3, 5] = value
    assert update(engine)
    assert everything(engine) == before
    assert really_in_force(engine.optimizer)["updates"] == 2
    # And the next step is as if the skipped one had never been.
    backward(engine)
    assert not update(engine)
    assert everything(engine) != before
    assert really_in_force(engine.optimizer)["updates"] == 3


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_batch_without_tokens_is_skipped(precision: PrecisionConfig) -> None:
    """A division by no tokens at all must not reach the weights."""
    engine = trained(precision)
    before = everything(engine)
    backward(engine)
    assert update(engine, tokens=0.0)
    assert everything(engine) == before


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_optimizer_path_never_waits_for_the_device(precision: PrecisionConfig) -> None:
    engine = trained(precision)
    scale = LossScale(policy_of(precision), CPU)
    backward(engine)
    tokens = torch.tensor(32.0, dtype=torch.float64)
    with Syncs() as syncs:
        decision = clip(engine.grad_norm(tokens, scale.scale), 1.0)
        put_in_force(engine.optimizer, VALUES)
        engine.apply(decision)
        scale.update(decision.skip)
    assert syncs.seen == []
    with Syncs() as syncs:
        decision.norm.item()
    assert len(syncs.seen) == 1  # the instrument works


class Noting(nn.Module):
    """A model that keeps what it is given."""

    inputs: tuple[Tensor, ...] = ()

    def forward(self, *inputs: Tensor) -> Loss:
        self.inputs = inputs[:3]
        return Loss(torch.zeros(()), torch.zeros(()))


def test_batches_go_to_a_gpu_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """From other memory CUDA may first let the device finish all that is queued: that is a wait no
    operation shows."""
    pinned: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    model = Noting()
    with FakeTensorMode():
        ids = torch.zeros(2, 16, dtype=torch.int64)
        batch = MicroBatch(ids, ids + 1, torch.ones(2))
        loss_of(model, batch, CPU)
        assert pinned == []
        loss_of(model, batch, torch.device("cuda", 0))
        assert [id(tensor) for tensor in pinned] == [
            id(batch.tokens),
            id(batch.targets),
            id(batch.weights),
        ]
        assert [tensor.device.type for tensor in model.inputs] == ["cuda"] * 3
        on_device = MicroBatch(*model.inputs)
        loss_of(model, on_device, torch.device("cuda", 0))
        assert len(pinned) == 3


def one_rank(folder: Path, precision: PrecisionConfig) -> Training:
    """A rank of the trainer itself, in this process."""
    probed = {"layer_norms_every": 3, "attention_logit_every": 3, "speed_probe_every": 3}
    config = tiny_config(folder, global_batch=4, **probed)
    config = replace(config, precision=precision, model=replace(TINY, vocab_size=512))
    config = replace(config, data=replace(config.data, sequence_length=16))
    begin = begin_alone(folder, config)
    return start(
        begin,
        lambda fact: None,
        NoOrders(),
        StopSignals(),
        lambda *_: dist.new_group(backend="gloo"),
    )


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_step_waits_for_the_device_at_one_place_alone(
    precision: PrecisionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the batch to the start of the word: at the readback, behind all that the step gives the
    device to do."""
    run = one_rank(tmp_path, precision)
    happened: list[str] = []

    def noting(owner: object, name: str, note: str) -> None:
        original = getattr(owner, name)

        def noted(*arguments: object, **named: object) -> object:
            happened.append(note)
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, noted)

    noting(Readback, "values", "the readback")
    noting(torch.Tensor, "tolist", "tolist")
    noting(torch.Tensor, "item", "item")
    noting(run.engine.optimizer, "step", "the update")
    noting(LossScale, "update", "the scale")
    take_step(run, *read_batch(run))  # what is done once, such as FSDP's set-up, is done
    for _ in range(2):  # the second of these steps, the third of all, has every probe
        happened.clear()
        micro_batches, seconds = read_batch(run)
        with Syncs() as syncs:
            take_step(run, micro_batches, seconds)
        assert syncs.seen == []
        assert happened == ["the update", "the scale", "the readback", "tolist"]
    run.stats.receive(before=run.state.step)
    assert run.stats.newest is not None
    assert None not in dataclasses.asdict(run.stats.newest).values()


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_outlier_changes_nothing_and_is_no_overflow(
    precision: PrecisionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the weights, nor the loss scale, nor what the next outlier is measured by."""
    run = one_rank(tmp_path, precision)
    for _ in range(2):
        take_step(run, *read_batch(run))
    run.stats.receive(before=run.state.step)
    state, scale = run.state, run.context.loss_scale.to_json()
    norm, loss = state.accepted_norms[-1], state.accepted_losses[-1]
    run.context.guard.restore([norm] * HISTORY, [loss] * HISTORY, 0)
    before, updates = everything(run.engine), state.updates
    forward_backward = run.engine.forward_backward

    def spoiled(*arguments: Any) -> Any:
        sums = forward_backward(*arguments)
        for parameter in run.engine.model.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(64.0)  # which fp16 holds
        return sums

    monkeypatch.setattr(run.engine, "forward_backward", spoiled)
    take_step(run, *read_batch(run))
    run.stats.receive(before=run.state.step)
    assert run.stats.newest is not None
    assert run.stats.newest.refused
    assert not run.stats.newest.overflow
    assert everything(run.engine) == before
    assert (state.updates, state.refused_in_row, state.floor_steps) == (updates, 1, 0)
    assert (state.accepted_norms[-1], state.accepted_losses[-1]) == (norm, loss)
    assert run.context.loss_scale.to_json()["scale"] == scale["scale"]
    monkeypatch.undo()
    take_step(run, *read_batch(run))
    take_step(run, *read_batch(run))
    run.stats.receive(before=run.state.step)
    assert state.refused_in_row == 0
    assert run.stats.newest.update_ratio > 0
