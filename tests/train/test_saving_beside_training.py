"""A checkpoint written while training goes on holds the step at which it was begun, and training
does not wait."""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch
import torch.distributed as dist

from opt_train.checkpoint import background
from opt_train.checkpoint.background import BackgroundSave, Staging
from opt_train.checkpoint.manifest import CheckpointError
from opt_train.checkpoint.save import save
from opt_train.config.run_config import RunConfig
from opt_train.protocol.facts import Phase, SaveFailed, ShardsSaved
from opt_train.protocol.framing import Message
from opt_train.train.loop import train
from opt_train.train.orders import NoOrders, StopSignals
from opt_train.train.rank import start
from opt_train.train.step import read_batch, take_step
from opt_train.train.training import Training
from tests.train.rig import begin_alone, tensors_in, tiny_config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def world(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def lone(folder: Path, config: RunConfig) -> tuple[Training, list[Message]]:
    facts: list[Message] = []
    begin = begin_alone(folder, config)
    run = start(
        begin, facts.append, NoOrders(), StopSignals(), lambda *_: dist.new_group(backend="gloo")
    )
    return run, facts


def saving_config(folder: Path, *, asynchronous: bool) -> RunConfig:
    config = tiny_config(folder, steps=6)
    return replace(
        config, checkpoint=replace(config.checkpoint, every_steps=2, asynchronous=asynchronous)
    )


def test_the_same_bytes_as_a_save_that_training_waits_for(tmp_path: Path) -> None:
    saved = []
    for asynchronous in (True, False):
        folder = tmp_path / f"{asynchronous}"
        folder.mkdir()
        run, facts = lone(folder, saving_config(folder, asynchronous=asynchronous))
        assert train(run).code == 0
        saved.append(
            {
                fact.step: tensors_in(Path(fact.folder))
                for fact in facts
                if isinstance(fact, ShardsSaved)
            }
        )
    assert list(saved[0]) == [2, 4, 6]
    assert saved[0] == saved[1]


def test_what_changes_after_the_copy_does_not_reach_the_disk(tmp_path: Path) -> None:
    """40 MB, so that whoever did not wait for the copy would be seen in it."""
    tensors = {f"model.{n}": torch.full((1_000_000,), float(n)) for n in range(10)}
    (tmp_path / "run").mkdir()
    plain = tmp_path / "run" / "1.00" / "step-00000001"
    save(tensors, {}, plain)
    staging = Staging(CPU)
    for step in (2, 3):  # in memory that is new, and in memory that a save has used
        folder = tmp_path / "run" / "1.00" / f"step-{step:08d}"
        begun = BackgroundSave(step, staging, tensors, {}, folder, dist.new_group(backend="gloo"))
        begun.wait_copied()
        for tensor in tensors.values():
            tensor.fill_(-1.0)
        assert len(begun.files()) == 2
        assert tensors_in(folder) == tensors_in(plain)
        assert begun.seconds > 0
        for number, tensor in enumerate(tensors.values()):
            tensor.fill_(float(number))


def test_an_update_waits_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = lone(tmp_path, saving_config(tmp_path, asynchronous=True))
    take_step(run, *read_batch(run))
    happened = []
    copied: Future[dict[str, torch.Tensor]] = Future()
    monkeypatch.setattr(Staging, "start", lambda *_: copied)
    run.checkpoints.begin()
    backward, update = run.engine.forward_backward, run.engine.apply

    def computing(*arguments: object) -> object:
        happened.append("backward")
        result = backward(*arguments)  # type: ignore[arg-type]
        copied.set_result({name: tensor.clone() for name, tensor in run.engine.tensors().items()})
        return result

    def updating(*arguments: object) -> None:
        happened.append("update" if copied.done() else "update before the copy")
        update(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(run.engine, "forward_backward", computing)
    monkeypatch.setattr(run.engine, "apply", updating)
    take_step(run, *read_batch(run))
    assert happened == ["backward", "update"]
    run.checkpoints.end()
    assert run.checkpoints.saved_step == 1


def test_training_goes_on_while_a_file_system_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the next save waits, and says so with its phase."""
    goes_on = Event()
    written = background.save

    def stalled(*arguments: object, **named: object) -> object:
        goes_on.wait(50)
        return written(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(background, "save", stalled)
    run, facts = lone(tmp_path, saving_config(tmp_path, asynchronous=True))
    for _ in range(4):
        run.stats.receive(before=run.state.step - 1)
        assert run.obey() is None
        take_step(run, *read_batch(run))
        if run.state.step == 1:
            run.checkpoints.begin()
    assert run.checkpoints.is_writing
    assert not any(
        isinstance(fact, ShardsSaved) or fact == Phase("checkpoint", run.state.step)
        for fact in facts
    )
    goes_on.set()
    assert run.checkpoints.save()
    assert [fact.step for fact in facts if isinstance(fact, ShardsSaved)] == [1, 4]
    assert Phase("checkpoint", 4) in facts


def test_its_end_is_reported_at_a_boundary_without_being_waited_for(tmp_path: Path) -> None:
    run, facts = lone(tmp_path, saving_config(tmp_path, asynchronous=True))
    take_step(run, *read_batch(run))
    run.checkpoints.begin()
    deadline = time.monotonic() + 50
    while run.checkpoints.is_writing:
        assert time.monotonic() < deadline
    for _ in range(2):  # the word of the first of them says so
        assert not any(isinstance(fact, ShardsSaved) for fact in facts)
        take_step(run, *read_batch(run))
        run.stats.receive(before=run.state.step - 1)
        assert run.obey() is None
    assert [fact.step for fact in facts if isinstance(fact, ShardsSaved)] == [1]
    assert not any(isinstance(fact, Phase) and fact.phase == "checkpoint" for fact in facts)


def test_a_save_that_fails_beside_training_is_reported_and_the_next_one_is_made(
    tmp_path: Path,
) -> None:
    run, facts = lone(tmp_path, saving_config(tmp_path, asynchronous=True))
    take_step(run, *read_batch(run))
    checkpoints = Path(run.context.begin.run_directory) / "checkpoints"
    checkpoints.write_text("a file where the folder should be")
    run.checkpoints.begin()
    run.checkpoints.end()
    assert [fact.step for fact in facts if isinstance(fact, SaveFailed)] == [1]
    checkpoints.unlink()
    take_step(run, *read_batch(run))
    assert run.checkpoints.save()
    assert [fact.step for fact in facts if isinstance(fact, ShardsSaved)] == [2]


def test_a_state_that_cannot_be_copied_fails_the_save_and_not_the_run(tmp_path: Path) -> None:
    class Full(Staging):
        def start(self, tensors: object) -> Future[dict[str, torch.Tensor]]:
            failed: Future[dict[str, torch.Tensor]] = Future()
            failed.set_exception(MemoryError("no room for a copy"))
            return failed

    folder = tmp_path / "run" / "1.00" / "step-00000001"
    begun = BackgroundSave(
        1, Full(CPU), {"model.a": torch.zeros(2)}, {}, folder, dist.new_group(backend="gloo")
    )
    begun.wait_copied()
    with pytest.raises(
        CheckpointError, match=r"step-00000001 was not saved: the state was not copied: no room"
    ):
        begun.files()
    assert not folder.exists()
