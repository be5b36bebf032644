"""What came of a seed, and the command that runs it again."""

from dataclasses import dataclass

from opt_train.simulation.histories import run_history


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a seed: the stage in which its run rests, or what broke."""

    seed: int
    end: str
    broken: str = ""


def judge(seed: int) -> Verdict:
    """Run `seed` to its end."""
    try:
        return Verdict(seed, run_history(seed).replayed.stage)
    except AssertionError as error:
        return Verdict(seed, "", str(error) or "an assertion without words")


def command_for(seed: int) -> str:
    """The command that runs `seed` again, alone."""
    return f"python -m opt_train.simulation --first {seed} --seeds 1"
