"""How the ranks of a generation find each other. Nobody guesses a port."""

from datetime import timedelta

import torch
import torch.distributed as dist

# torch.distributed re-exports it, but not to type checkers.
from torch._C._distributed_c10d import PrefixStore

from opt_train.config.run_config import RunConfig
from opt_train.host.interface import address_of_interface
from opt_train.parallel.store import bind_store, reach_store
from opt_train.protocol.commands import Begin
from opt_train.protocol.exits import BadInput
from opt_train.protocol.facts import Store
from opt_train.train.fact_pipe import Publish


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The rank's device, made current where it is a GPU.

    Raises:
        BadInput: `train.device` is unknown, or there is no such device.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise BadInput(f"train.device={wanted!r} must be auto, cpu or cuda.")
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise BadInput(
            f"train.device={wanted}: local rank {local_rank} has no GPU, the node shows "
            f"{torch.cuda.device_count()}; "
            "use fewer cluster.slots_per_node or train.device=cpu."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def join(
    begin: Begin, config: RunConfig, device: torch.device, publish: Publish
) -> dist.ProcessGroup:
    """Join the generation's world; returns a CPU group beside it, for the step stats.

    Rank 0 binds the store on a free port and publishes it; the others were given host and port.
    Keys carry the generation, so a rank of an older one can never meet this one.
    """
    # torch's own is half an hour, for which one rank's exception leaves the others in a collective.
    timeout = timedelta(seconds=config.train.collective_timeout_seconds)
    # Rank 0 listens on the interface of the collectives, where all nodes reach it.
    host = begin.store_host or address_of_interface(config.cluster.collectives_interface)
    is_rank_zero = begin.rank == 0
    if is_rank_zero:
        store = bind_store(host, timeout)
        publish(Store(host, store.port))
    else:
        store = reach_store(host, begin.store_port, timeout)
    dist.init_process_group(
        _backend(device),
        store=PrefixStore(f"generation-{begin.generation}", store),
        rank=begin.rank,
        world_size=begin.world_size,
        timeout=timeout,
    )
    return control_group(config)


def join_by_environment(config: RunConfig, device: torch.device) -> dist.ProcessGroup:
    """Join the world that torchrun describes in the environment."""
    timeout = timedelta(seconds=config.train.collective_timeout_seconds)
    dist.init_process_group(_backend(device), init_method="env://", timeout=timeout)
    return control_group(config)


def control_group(config: RunConfig) -> dist.ProcessGroup:
    """A gloo group of the whole world. Its traffic never queues behind the gradients'."""
    group = dist.new_group(
        backend="gloo", timeout=timedelta(seconds=config.train.collective_timeout_seconds)
    )
    assert isinstance(group, dist.ProcessGroup)
    return group


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
