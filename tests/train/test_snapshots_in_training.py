"""Snapshots beside training: the state of their step to the bit, published once, and training
neither waits nor changes."""

import dataclasses
import hashlib
import json
import math
import os
import resource
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load

from opt_train.checkpoint import manifest
from opt_train.checkpoint.commit import build_manifest, commit_manifest
from opt_train.checkpoint.manifest import Manifest
from opt_train.checkpoint.snapshot import Snapshot, Snapshots
from opt_train.config.run_config import RunConfig
from opt_train.protocol.exits import STOPPED
from opt_train.protocol.facts import MemoryFile, Phase, ShardsSaved, SnapshotTaken
from opt_train.protocol.framing import Message, to_line
from opt_train.protocol.orders import SaveAndStop
from opt_train.train.loop import train
from opt_train.train.orders import ControlPipe, NoOrders, OrderSource, StopSignals
from opt_train.train.rank import start
from opt_train.train.resume import own_file
from opt_train.train.step import read_batch, take_step
from opt_train.train.training import Training
from tests.train.rig import World, begin_alone, sha256_of, tensors_in, tiny_config


@pytest.fixture
def world(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def with_snapshots(config: RunConfig, every: int, saves: int = 0, keep: int = 2) -> RunConfig:
    changed = replace(
        config.checkpoint, memory_every_steps=every, every_steps=saves, memory_keep=keep
    )
    return replace(config, checkpoint=changed)


@dataclasses.dataclass
class Agent:
    """One rank in this process, with an agent's ends of its pipes; it holds what is published, at
    once."""

    run: Training
    orders_fd: int
    facts: list[Message] = dataclasses.field(default_factory=list)
    held: dict[int, dict[str, bytes]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        folder: Path,
        config: RunConfig,
        orders: OrderSource | None = None,
        checkpoint: Path | None = None,
    ) -> "Agent":
        folder.mkdir(exist_ok=True)
        read_end, write_end = os.pipe()
        agent = cls.__new__(cls)
        agent.orders_fd, agent.facts, agent.held = write_end, [], {}
        begin = begin_alone(folder, config)
        if checkpoint is not None:
            sha256 = sha256_of(checkpoint / manifest.MANIFEST)
            begin = replace(begin, checkpoint=str(checkpoint), manifest_sha256=sha256)
        agent.run = start(
            begin,
            agent.receive,
            orders or ControlPipe(read_end),
            StopSignals(),
            lambda *_: dist.new_group(backend="gloo"),
        )
        return agent

    def receive(self, fact: Message) -> None:
        self.facts.append(fact)
        if isinstance(fact, SnapshotTaken):
            assert fact.step not in self.held, "published twice"
            self.held[fact.step] = {file.path: content(os.getpid(), file) for file in fact.files}

    def published(self, kind: type[Message]) -> list[int]:
        found: list[Any] = [fact for fact in self.facts if isinstance(fact, kind)]
        return [fact.step for fact in found]

    def step(self) -> None:
        self.run.stats.receive(before=self.run.state.step - 1)
        assert self.run.obey() is None
        take_step(self.run, *read_batch(self.run))


def content(pid: int, file: MemoryFile) -> bytes:
    """What an agent reads through the rank's descriptor, verified."""
    found = Path(f"/proc/{pid}/fd/{file.fd}").read_bytes()
    assert (len(found), hashlib.sha256(found).hexdigest()) == (file.bytes, file.sha256)
    return found


@pytest.mark.usefixtures("world")
def test_snapshots_hold_what_a_save_of_their_step_holds_and_change_nothing(tmp_path: Path) -> None:
    """Accumulated gradients and an evaluation lie before some of them."""
    config = tiny_config(tmp_path, steps=8, validate_every=4)
    agent = Agent.of(tmp_path / "with", with_snapshots(config, 2, saves=2))
    assert train(agent.run).code == 0
    without = Agent.of(tmp_path / "without", with_snapshots(config, 0, saves=2))
    assert train(without.run).code == 0
    assert set(agent.held) >= {0, 2, 4, 6}
    assert not without.held
    saved = {fact.step: Path(fact.folder) for fact in agent.facts if isinstance(fact, ShardsSaved)}
    plain = {
        fact.step: Path(fact.folder) for fact in without.facts if isinstance(fact, ShardsSaved)
    }
    # Nobody saves what a run begins with.
    begun = json.loads(agent.held.pop(0)["state.json"])
    assert begun["counters"] == dict.fromkeys(("step", "updates", "samples", "tokens"), 0)
    for step, files in agent.held.items():
        assert tensors_in(saved[step]) == tensors_in(plain[step])
        ours, theirs = load(files["shard-00000.safetensors"]), shard_in(saved[step])
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        state = json.loads(files["state.json"])
        assert (state.pop("parts"), state.pop("world_size")) == ("own", 1)
        assert state == json.loads((saved[step] / "state.json").read_text())
        assert state["counters"]["updates"] == step


def shard_in(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load(file.read_bytes())


@pytest.mark.usefixtures("world")
def test_a_lone_rank_takes_none(tmp_path: Path) -> None:
    agent = Agent.of(
        tmp_path / "run", with_snapshots(tiny_config(tmp_path, steps=2), 1), NoOrders()
    )
    assert train(agent.run).code == 0
    assert not agent.held


@pytest.mark.usefixtures("world")
def test_a_state_that_is_not_well_is_left_out(tmp_path: Path) -> None:
    """The ring holds the last ones that were well."""
    agent = Agent.of(tmp_path / "run", with_snapshots(tiny_config(tmp_path), 1))
    run = agent.run
    agent.step()
    run.stats.receive(before=1)
    run.state.floor_steps = 1
    run.snapshots.begin()
    run.state.floor_steps = 0
    run.state.losses.append(math.nan)
    run.snapshots.begin()
    assert run.snapshots.under_way is None
    run.state.losses.append(1.0)
    run.snapshots.begin()
    run.snapshots.end()
    assert agent.published(SnapshotTaken) == [1]


@pytest.mark.usefixtures("world")
def test_its_end_is_reported_at_a_boundary_without_being_waited_for(tmp_path: Path) -> None:
    agent = Agent.of(tmp_path / "run", with_snapshots(tiny_config(tmp_path), 1))
    agent.step()
    agent.run.snapshots.begin()
    assert agent.run.snapshots.under_way is not None
    assert agent.run.snapshots.under_way.wait(50.0)
    assert not agent.held
    agent.step()
    assert agent.published(SnapshotTaken) == [1]
    agent.step()
    assert agent.published(SnapshotTaken) == [1]
    assert Phase("checkpoint", 1) not in agent.facts


@pytest.mark.usefixtures("world")
def test_an_update_waits_for_the_copy_and_the_next_snapshot_for_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = Agent.of(tmp_path / "run", with_snapshots(tiny_config(tmp_path), 1))
    run, happened, snapshot = agent.run, [], Snapshot(1)
    agent.step()
    monkeypatch.setattr(Snapshots, "begin", lambda *_: snapshot)
    run.snapshots.begin()
    backward, update = run.engine.forward_backward, run.engine.apply

    def computing(*arguments: object) -> object:
        happened.append("backward")
        result = backward(*arguments)  # type: ignore[arg-type]
        snapshot._copied.set()
        return result

    def updating(*arguments: object) -> None:
        happened.append("update" if snapshot._copied.is_set() else "update before the copy")
        update(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(run.engine, "forward_backward", computing)
    monkeypatch.setattr(run.engine, "apply", updating)
    agent.step()
    assert happened == ["backward", "update"]
    assert not agent.published(SnapshotTaken)
    entered = agent.run.context.publish

    def hashed_meanwhile(fact: Message) -> None:
        entered(fact)
        if fact == Phase("checkpoint", 2):
            snapshot._done.set_result(())

    run.context.publish = hashed_meanwhile
    run.snapshots.begin()
    assert agent.published(SnapshotTaken) == [1]


@pytest.mark.usefixtures("world")
def test_without_memory_training_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    agent = Agent.of(tmp_path / "run", with_snapshots(tiny_config(tmp_path, steps=4), 2))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, before[1]))
    try:
        for _ in range(2):
            agent.step()
        agent.run.snapshots.begin()
        agent.run.snapshots.end()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines = [line for line in capfd.readouterr().out.splitlines() if "snapshot" in line]
    assert lines == ["no memory for the snapshot of step 2: File too large; training goes on"]
    assert train(agent.run).code == 0
    assert agent.published(SnapshotTaken) in ([], [4])
    assert agent.published(ShardsSaved) == [4]


@pytest.mark.usefixtures("world")
def test_who_asks_for_a_stop_gets_a_snapshot_first(tmp_path: Path) -> None:
    agent = Agent.of(tmp_path / "run", with_snapshots(tiny_config(tmp_path, steps=100), 50))
    os.write(agent.orders_fd, to_line(SaveAndStop(1, "a test wants it")))
    leaving = train(agent.run)
    assert leaving.code == STOPPED
    assert agent.published(SnapshotTaken) == [0, leaving.step]
    assert agent.published(ShardsSaved) == [leaving.step]
    kinds = [type(fact) for fact in agent.facts]
    assert kinds.index(SnapshotTaken) < kinds.index(ShardsSaved)


@pytest.mark.usefixtures("world")
def test_the_snapshot_of_the_step_that_a_signal_stops_at_is_the_last_one(tmp_path: Path) -> None:
    """Also where it is one of those of every so many steps, which was begun before anybody saw that
    the ranks stop."""
    agent = Agent.of(tmp_path / "run", with_snapshots(tiny_config(tmp_path, steps=100), 1))
    for _ in range(4):
        agent.step()
        agent.run.snapshots.take_if_due(agent.run.state)
    agent.run.signals.received = "SIGTERM"
    leaving = train(agent.run)
    assert leaving.code == STOPPED
    taken = [fact for fact in agent.facts if isinstance(fact, SnapshotTaken)]
    assert [fact.step for fact in taken] == [*range(1, leaving.step + 1)]
    assert [fact.step for fact in taken if fact.is_last] == [leaving.step]


def commit(files: Mapping[str, bytes], step: int, folder: Path, config_sha256: str) -> Path:
    """The supervisor's part; all files in one folder."""
    folder.mkdir(parents=True)
    for name, found in files.items():
        (folder / name).write_bytes(found)
    named = {name: (len(found), hashlib.sha256(found).hexdigest()) for name, found in files.items()}
    commit_manifest(
        folder, build_manifest(folder, "1.00", step, named, config_sha256=config_sha256)
    )
    return folder


@pytest.mark.usefixtures("world")
def test_what_was_restored_from_memory_is_not_yet_saved(tmp_path: Path) -> None:
    """A stop before the first step must not leave the only copy in memory that goes away."""
    config = with_snapshots(tiny_config(tmp_path, steps=100), 50)
    first = Agent.of(tmp_path / "first", config)
    first.step()
    first.run.snapshots.begin()
    first.run.snapshots.end()
    folder = commit(first.held[1], 1, tmp_path / "memory", first.run.context.begin.config_sha256)
    second = Agent.of(tmp_path / "second", config, checkpoint=folder)
    assert second.run.state.step == 1
    assert second.run.checkpoints.save()
    assert second.published(ShardsSaved) == [1]
    saved = next(Path(fact.folder) for fact in second.facts if isinstance(fact, ShardsSaved))
    assert shard_in(saved).keys() == load(first.held[1]["shard-00000.safetensors"]).keys()


@pytest.mark.usefixtures("world")
def test_a_run_that_goes_on_from_memory_saves_that_first(tmp_path: Path) -> None:
    """The save of that step, or of one shortly before, may have been lost with the ranks; the next
    is far away."""
    config = with_snapshots(tiny_config(tmp_path, steps=10), 4, saves=4)
    first = Agent.of(tmp_path / "first", config)
    assert train(first.run).code == 0
    saved = {fact.step: Path(fact.folder) for fact in first.facts if isinstance(fact, ShardsSaved)}
    folder = commit(first.held[4], 4, tmp_path / "memory", first.run.context.begin.config_sha256)
    second = Agent.of(tmp_path / "second", config, checkpoint=folder)
    assert train(second.run).code == 0
    assert second.published(ShardsSaved) == [4, 8, 10]
    again = {fact.step: Path(fact.folder) for fact in second.facts if isinstance(fact, ShardsSaved)}
    assert all(tensors_in(again[step]) == tensors_in(saved[step]) for step in (4, 8, 10))
    files = {file.name: file.read_bytes() for file in saved[4].iterdir()}
    folder = commit(files, 4, tmp_path / "checkpoint", first.run.context.begin.config_sha256)
    third = Agent.of(tmp_path / "third", config, checkpoint=folder)
    assert train(third.run).code == 0
    assert third.published(ShardsSaved) == [8, 10]


@pytest.mark.usefixtures("world")
def test_its_own_file_is_for_a_rank_that_is_spread_as_the_one_that_wrote_it(tmp_path: Path) -> None:
    begin = replace(
        begin_alone(tmp_path, tiny_config(tmp_path)), checkpoint="/there", world_size=4, rank=2
    )
    state = {"parts": "own", "world_size": 4}
    own = Manifest("1.00", 1, {}, state, config_sha256=begin.config_sha256)
    assert own_file(begin, own) == Path("/there/shard-00002.safetensors")
    assert own_file(begin, replace(own, config_sha256="other")) is None
    assert own_file(begin, replace(own, state={**state, "world_size": 2})) is None
    assert own_file(begin, replace(own, state={"world_size": 4})) is None
    assert own_file(replace(begin, checkpoint=None), own) is None


class Held:
    """What the agents of a world hold, read as soon as it is published."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.files: dict[int, dict[str, bytes]] = {}

    def take(self) -> None:
        for rank in self.world.ranks:
            for fact in rank.published(SnapshotTaken):
                held = self.files.setdefault(fact.step, {})
                for file in fact.files:
                    if file.path not in held:
                        held[file.path] = content(rank.process.pid, file)


def test_two_ranks_go_on_from_memory_bit_for_bit(tmp_path: Path) -> None:
    """Each rank reads the file that it has written itself; here they lie in one folder."""
    config = with_snapshots(tiny_config(tmp_path, steps=24), 4, keep=6)
    with World(tmp_path, config) as first:
        first.begin()
        held = Held(first)

        def both_hold() -> bool:
            held.take()
            return len(held.files.get(4, {})) == 3

        first.wait(both_hold, "the snapshot of step 4")
        first.finish()
        losses = {step: line["loss"] for step, line in first.ranks[0].metrics.items()}
        reference = tensors_in(Path(first.ranks[0].published(ShardsSaved)[-1].folder))
    config_sha256 = sha256_of(tmp_path / "run" / "config.json")
    folder = commit(
        held.files[4], 4, tmp_path / "run" / "memory" / "1.00" / "step-00000004", config_sha256
    )
    with World(tmp_path, config) as second:
        second.begin(attempt="1.01", generation=2, checkpoint=folder)
        second.finish()
        again = {step: line["loss"] for step, line in second.ranks[0].metrics.items()}
        assert list(again) == list(range(5, 25))
        assert again == {step: losses[step] for step in again}
        assert tensors_in(Path(second.ranks[0].published(ShardsSaved)[-1].folder)) == reference
