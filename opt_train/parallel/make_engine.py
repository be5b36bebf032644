"""The engine that a configuration asks for."""

from opt_train.parallel.engine import Engine, EngineSpec
from opt_train.parallel.fsdp import Fsdp2, build


def make_engine(spec: EngineSpec) -> Engine:
    """The engine that `parallel.engine` names, with initial weights. Needs a process group.

    Raises:
        BadInput: what is asked for is not there.
    """
    # The optional engines are imported here alone: they cost seconds, and change torch as they
    # load.
    match spec.parallel.engine:
        case "fairscale":
            from opt_train.parallel.fairscale_engine import Fairscale

            return Fairscale(spec)
        case "deepspeed":
            from opt_train.parallel.deepspeed_engine import DeepSpeed

            return DeepSpeed(spec)
        case _:
            return Fsdp2(build(spec), spec)
