"""What is done about an alarm: one row a sign, a rung for each time that it comes again.

Measured in plain PyTorch on tiny models (a late learning rate x 30, broken moments, flipped bits,
broken data): an event does not recur, so the same data is trained again first; lowering the rate in
place cures nothing, as the weights are damaged, and only as much as was measured is taken; a bad
range is passed whole or not at all. Where only the loss scale is ill nothing is damaged: what its
overflows have left out never was, so it is set anew in place and no step is trained twice.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from opt_train.run.instability import ProbeVerdict
from opt_train.stability.detectors import Alarm

LR_FACTOR_MIN, LR_FACTOR_MAX = 0.02, 0.5
LR_FACTOR_BLIND = 0.3
"""Where the size of what is too large says nothing of the rate."""
RESTART_FACTOR_MIN, RESTART_FACTOR_MAX = 0.02, 0.5
SKIPPED_BEYOND = 8
"""Batches left out behind the alarm, the first time; twice as many each time after."""
RESCALES_MAX = 6
"""The loss scale is set anew so many times within one instability: overflows that have a cause of
their own may outlast the first."""
SCALE, FLOOR = 2.0**8, 2.0**-5
"""Where no step tells what works."""
FLOOR_BELOW = 2.0**13
"""The floor is no nearer to the scale that has worked."""
SKIPPED_BLINDLY = 64
"""The same where the data looks better than it is, and so does what is behind the alarm."""
FURTHER_BACK_STEPS = 40
"""With each relapse behind the first, where the state may be what is sick."""


class Rung(StrEnum):
    """What is done."""

    REPLAY = "replay"
    """Go back, probe the data with the weights there, and train the same data again; bad data is
    passed as soon as it is found."""
    SKIP = "skip"
    """Go back, and leave out the data up to the alarm and some more."""
    LOWER_LR = "lower_lr"
    """Go back, and lower the learning rate by as much as the updates were too large."""
    RESCALE = "rescale"
    """Stay, and set the loss scale to what has worked before, and its floor far below; 6 times at
    most."""
    RESCALE_BACK = "rescale_back"
    """Go back, and set the loss scale to what has worked, and its floor far below."""
    SHRINK_EMBEDDING = "shrink_embedding"
    """Go back, and multiply the embedding's gradient by as much as it was too large."""
    RESTART = "restart"
    """Begin again at step 0, with the learning rate lowered by as much as the updates were too
    large."""
    GIVE_BACK = "give_back"
    """Raise a learning rate that was lowered, by up to 2 and never above its schedule."""
    TAKE_AGAIN = "take_again"
    """Go back to before it was raised, and lower it again, for good."""
    HAND_OVER = "hand_over"
    """Go back, save and stop: a person must decide."""


LADDER: Mapping[str, tuple[Rung, ...]] = {
    "non_finite": (Rung.REPLAY, Rung.SKIP, Rung.LOWER_LR, Rung.HAND_OVER),
    "outliers": (Rung.REPLAY, Rung.SKIP, Rung.HAND_OVER),
    "rise": (Rung.REPLAY, Rung.SKIP, Rung.SKIP, Rung.HAND_OVER),
    "update_jump": (Rung.REPLAY, Rung.LOWER_LR, Rung.LOWER_LR, Rung.HAND_OVER),
    "frozen": (Rung.REPLAY, Rung.HAND_OVER),
    # Replayed for the probe's sake, which finds where it ends, if the loss shows it at all.
    "broken_data": (Rung.REPLAY, Rung.SKIP, Rung.SKIP, Rung.HAND_OVER),
    "loss_scale_collapse": (Rung.RESCALE, Rung.REPLAY, Rung.LOWER_LR, Rung.HAND_OVER),
    "loss_scale_floor": (Rung.RESCALE, Rung.REPLAY, Rung.LOWER_LR, Rung.HAND_OVER),
    "loss_scale_skips": (Rung.RESCALE, Rung.REPLAY, Rung.LOWER_LR, Rung.HAND_OVER),
    "underflow": (Rung.RESCALE, Rung.HAND_OVER),
    # Unlike what overflows, what vanishes is trained on: Adam makes steps of full size of the rest.
    "partial_underflow": (Rung.RESCALE_BACK, Rung.HAND_OVER),
    "forward_overflow": (Rung.REPLAY, Rung.LOWER_LR, Rung.HAND_OVER),
    "embedding_gradient": (
        Rung.REPLAY,
        Rung.SHRINK_EMBEDDING,
        Rung.SHRINK_EMBEDDING,
        Rung.HAND_OVER,
    ),
    "ceiling_at_start": (Rung.RESTART, Rung.RESTART, Rung.HAND_OVER),
    "ceiling": (Rung.REPLAY, Rung.LOWER_LR, Rung.LOWER_LR, Rung.HAND_OVER),
    "activation_jump": (Rung.REPLAY, Rung.LOWER_LR, Rung.LOWER_LR, Rung.HAND_OVER),
    "logit_jump": (Rung.REPLAY, Rung.LOWER_LR, Rung.LOWER_LR, Rung.HAND_OVER),
    "falls_too_well": (Rung.SKIP, Rung.SKIP, Rung.HAND_OVER),
    "repeated_data": (Rung.REPLAY, Rung.HAND_OVER),
    "initialisation": (Rung.HAND_OVER,),
    "weight_decay": (Rung.HAND_OVER,),
    "plateau": (Rung.HAND_OVER,),
    "held_out_gap": (Rung.HAND_OVER,),
}
"""Alarm -> rungs, the first for its first time."""
SKIPPED_BEYOND_OF: Mapping[str, tuple[int, int]] = {
    "falls_too_well": (SKIPPED_BLINDLY, 4),
    "broken_data": (SKIPPED_BLINDLY // 4, 4),
}
"""Alarm -> batches left out behind it the first time, and how many times as many each time after,
where they are others."""
UNMEASURED = frozenset({"ceiling", "activation_jump", "logit_jump"})
"""Alarms whose ratio is not that of the updates."""


IN_PLACE = frozenset({Rung.RESCALE})
"""They go nowhere back, so they do not count among the tries; each is the first of its row."""

NEEDS_NO_SCALE = "bf16 needs no loss scale: precision.compute=bf16, where the hardware has it"
ADVICE: Mapping[str, str] = {
    "loss_scale_collapse": NEEDS_NO_SCALE,
    "loss_scale_floor": NEEDS_NO_SCALE,
    "loss_scale_skips": NEEDS_NO_SCALE,
    "underflow": NEEDS_NO_SCALE,
    "partial_underflow": NEEDS_NO_SCALE,
    "forward_overflow": "bf16 has the range of fp32: precision.compute=bf16, where the hardware "
    "has it",
}
"""Alarm -> what a person may do that no rung does."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A rung and its measure."""

    rung: Rung
    lr_factor: float = 1.0
    beyond_batches: int = 0
    """Left out behind the alarm's place in the data, and all before it that has not been trained on
    in the state that is gone back to."""
    loss_scale: float = 0.0
    loss_scale_floor: float = 0.0
    embedding_factor: float = 1.0

    @property
    def is_in_place(self) -> bool:
        """Nothing is gone back to."""
        return self.rung in IN_PLACE


def answer(alarm: Alarm, acts: int, acts_max: int, verdict: str = "", rescales: int = 0) -> Answer:
    """What is done about `alarm` when `acts` things have been done about the same instability, and
    `rescales` in place, and a probe has said `verdict` last."""
    rungs = LADDER[alarm.name]
    if Rung.RESCALE in rungs:
        if rescales < RESCALES_MAX:
            return _rescaled(alarm, Rung.RESCALE)
        rungs = tuple(rung for rung in rungs if rung is not Rung.RESCALE)
    # Bad data that was passed, or a state that was sick already, says nothing of a rung: there may
    # be more of the one, and an older one than the other, and it is looked again.
    if verdict in (ProbeVerdict.BAD_DATA, ProbeVerdict.BAD_STATE) and acts < acts_max:
        return Answer(Rung.REPLAY)
    rung = Rung.HAND_OVER if acts >= acts_max else rungs[min(acts, len(rungs) - 1)]
    match rung:
        case Rung.LOWER_LR:
            if alarm.name in UNMEASURED:
                return Answer(rung, lr_factor=LR_FACTOR_BLIND)
            # As much as was measured: factors of 0.9 or 0.67 cured nothing, and in place none did.
            factor = min(LR_FACTOR_MAX, max(LR_FACTOR_MIN, 1 / max(alarm.ratio, 1.0)))
            return Answer(rung, lr_factor=factor)
        case Rung.RESCALE_BACK:
            return _rescaled(alarm, rung)
        case Rung.SHRINK_EMBEDDING:
            return Answer(rung, embedding_factor=1 / max(alarm.ratio, 1.0))
        case Rung.RESTART:
            factor = 1 / max(alarm.ratio, 1.0)
            return Answer(rung, lr_factor=min(RESTART_FACTOR_MAX, max(RESTART_FACTOR_MIN, factor)))
        case Rung.SKIP if alarm.name in SKIPPED_BEYOND_OF:
            first, times = SKIPPED_BEYOND_OF[alarm.name]
            return Answer(rung, beyond_batches=first * times**acts)
        case Rung.SKIP:
            # Twice as far each time: to leave out a part of a bad range is as good as nothing.
            return Answer(rung, beyond_batches=SKIPPED_BEYOND * 2 ** max(0, acts - 1))
        case _:
            return Answer(rung)


def _rescaled(alarm: Alarm, rung: Rung) -> Answer:
    # What has worked in this run, since what fits depends on its batch and its precision; it finds
    # its place below by itself.
    scale = alarm.scale or SCALE
    return Answer(rung, loss_scale=scale, loss_scale_floor=min(FLOOR, scale / FLOOR_BELOW))
