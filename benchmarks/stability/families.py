"""The families of each half. Whether a setting is sick, the benchmark itself measures: it must end
more than 2 % worse than its twin when it is left alone.

What is tied to a *batch* is met again wherever that batch is read; an *event* happens once,
whatever is trained again afterwards; what is tied to the *configuration* stays until something is
put right.
"""

from collections.abc import Mapping, Sequence

from benchmarks.stability.settings import HELD_OUT, TUNING, Family

# What names a sickness rightly: alarms, causes of incidents, a probe's verdict. That the loss rises
# or that steps are outliers is a sign of many things, and names nothing; names that no detector has
# do no harm.
RATE = ("update_jump", "activation_jump", "logit_jump", "ceiling", "ceiling_at_start")
FROZEN = ("frozen",)
DATA = ("bad data", "broken_data", "repeated_data", "falls_too_well", "held_out_gap")
STATE = ("update_jump", "non_finite", "loss_nan", "activation_jump", "logit_jump", "ceiling")
SCALE = (
    *("loss_scale_floor", "loss_scale_collapse", "loss_scale_skips", "underflow"),
    "partial_underflow",
    *("forward_overflow", "non_finite"),
)
EMBEDDING = ("embedding_gradient",)
NOISE = ("outliers",)
"""Of gradients that are too large and nothing else."""
NOT_TO_CURE = ("initialisation", "weight_decay")

NO_CLIP = ("optim.clip=1e9", "optim.beta2=0.999")
LATE, RANGE = 0.45, 0.3


def _data(name: str, how: str, kind: str, **more: object) -> Family:
    sickness = {"what": "batches", "how": how, **more}
    return Family(name=name, kind=kind, sickness=sickness, onset=0.4, length=RANGE, names=DATA)


def _event(name: str, kind: str, sickness: Mapping[str, object], **more: object) -> Family:
    values = {"onset": 0.5, "names": STATE, **more}
    return Family(name=name, kind=kind, sickness=sickness, **values)  # type: ignore[arg-type]


FAMILIES: Mapping[str, Sequence[Family]] = {
    TUNING: (
        Family(
            name="lr x10 from the start",
            kind="LR at the start",
            wrong=("optim.lr=0.06",),
            names=RATE,
        ),
        Family(
            name="lr x30 late",
            kind="LR late",
            sickness={"what": "rate", "times": 30.0},
            onset=LATE,
            names=RATE,
        ),
        Family(
            name="lr x0.01 late",
            kind="stall",
            sickness={"what": "rate", "times": 0.01},
            onset=LATE,
            curable=False,
            names=FROZEN,
        ),
        Family(
            name="initial weights x50",
            kind="initial weights",
            wrong=("model.init_std=1.0",),
            curable=False,
            names=NOT_TO_CURE,
        ),
        Family(
            name="weight decay 100",
            kind="weight decay",
            wrong=("optim.weight_decay=100",),
            curable=False,
            names=NOT_TO_CURE,
        ),
        _data("garbage tokens", "garbage", "tokens"),
        _data("one token", "one_token", "tokens"),
        _data("one document", "one_document", "tokens"),
        _data("labels shuffled", "labels_shuffled", "labels"),
        _data("labels equal inputs", "labels_are_inputs", "labels"),
        Family(
            name="circle of 8 batches",
            kind="cursor",
            sickness={"what": "circle", "batches": 8},
            onset=0.4,
            curable=False,
            names=DATA,
        ),
        _event("second moments zeroed", "moments", {"what": "moments", "second": 0.0}),
        _event("second moments x1e6", "moments", {"what": "moments", "second": 1e6}, names=FROZEN),
        _event("weight, bit 30", "bit flip", {"what": "flip", "of": "weight"}),
        _event(
            "queries and keys x40",
            "attention logits",
            {"what": "multiply", "matches": ["q_proj.weight", "k_proj.weight"], "times": 40.0},
        ),
        _event(
            "embedding gradient x1e5",
            "embedding gradient",
            {"what": "gradient_times", "matches": ["embed_"], "times": 1e5},
            onset=0.4,
            names=EMBEDDING,
        ),
        _event(
            "gradient noise",
            "gradient noise",
            {"what": "gradient_noise", "std": 0.1},
            onset=0.4,
            curable=False,
            names=NOISE,
        ),
        _event(
            "one gradient x1e4, no clipping",
            "gradient spike",
            {"what": "gradient_times", "matches": [""], "times": 1e4, "steps": 1},
            shared=NO_CLIP,
            names=(*NOISE, *FROZEN),
        ),
        _event(
            "fp16, activations x3e4",
            "fp16 activations",
            {"what": "rescale", "layer": 1, "times": 3e4},
            precision="fp16",
            names=(*SCALE, *STATE),
        ),
        _event(
            "fp16, 40 overflows, no floor",
            "fp16 loss scale",
            {"what": "overflows", "steps": 40},
            precision="fp16",
            # OPT's own policy finds back within 100 steps, as its window shrinks with its scale.
            shared=(
                "precision.loss_scale=megatron",
                "precision.loss_scale_initial=1024",
                "precision.loss_scale_window_steps=200",
                "precision.loss_scale_floor=5.9604644775390625e-08",
            ),
            onset=0.4,
            names=SCALE,
        ),
        Family(
            name="fp16, scale fixed at 2^-24",
            kind="fp16 underflow",
            precision="fp16",
            wrong=(
                "precision.loss_scale=fixed",
                "precision.loss_scale_initial=5.9604644775390625e-08",
            ),
            names=(*SCALE, *FROZEN),
        ),
    ),
    HELD_OUT: (
        Family(
            name="lr x30 from the start",
            kind="LR at the start",
            wrong=("optim.lr=0.12",),
            names=RATE,
        ),
        Family(
            name="lr x50 late",
            kind="LR late",
            sickness={"what": "rate", "times": 50.0},
            onset=0.4,
            names=RATE,
        ),
        Family(
            name="lr x0.001 late",
            kind="stall",
            sickness={"what": "rate", "times": 0.001},
            onset=0.4,
            curable=False,
            names=FROZEN,
        ),
        Family(
            name="initial weights x100",
            kind="initial weights",
            wrong=("model.init_std=2.0",),
            curable=False,
            names=NOT_TO_CURE,
        ),
        Family(
            name="weight decay 30",
            kind="weight decay",
            wrong=("optim.weight_decay=30",),
            curable=False,
            names=NOT_TO_CURE,
        ),
        _data("tokens shuffled", "tokens_shuffled", "tokens"),
        _data("another tokenizer", "other_ids", "tokens"),
        _data("garbage in half of the rows", "half_garbage", "tokens"),
        _data("labels two ahead", "labels_two_ahead", "labels"),
        _data("labels of the row beside", "labels_rolled", "labels"),
        Family(
            name="one batch for ever",
            kind="cursor",
            sickness={"what": "circle", "batches": 1},
            onset=0.4,
            curable=False,
            names=DATA,
        ),
        _event("first moments x100", "moments", {"what": "moments", "first_times": 100.0}),
        _event("moment, bit 30", "bit flip", {"what": "flip", "of": "exp_avg"}),
        _event(
            "token embeddings x8",
            "weights",
            {"what": "multiply", "matches": ["embed_tokens"], "times": 8.0},
            names=STATE,
        ),
        _event(
            "gains of LayerNorms x30",
            "weights",
            {"what": "multiply", "matches": ["layer_norm.weight"], "times": 30.0},
            names=STATE,
        ),
        _event(
            "gradient's sign turned for 30 steps",
            "gradient",
            {"what": "gradient_times", "matches": [""], "times": -1.0, "steps": 30},
            names=(*NOISE, *STATE),
        ),
        _event(
            "embedding gradient x1e4",
            "embedding gradient",
            {"what": "gradient_times", "matches": ["embed_"], "times": 1e4},
            onset=0.25,
            names=EMBEDDING,
        ),
        _event(
            "two gradients x1e5, no clipping",
            "gradient spike",
            {"what": "gradient_times", "matches": [""], "times": 1e5, "steps": 2},
            shared=NO_CLIP,
            names=(*NOISE, *FROZEN),
        ),
        _event(
            "fp16, residuals overflow",
            "fp16 activations",
            {"what": "multiply", "matches": ["layers.1.fc2.weight"], "times": 4e5},
            precision="fp16",
            names=(*SCALE, *STATE),
        ),
        Family(
            name="fp16, floor at 2^22",
            kind="fp16 loss scale",
            precision="fp16",
            wrong=(
                "precision.loss_scale_floor=4194304",
                "precision.loss_scale_initial=16777216",
            ),
            names=SCALE,
        ),
    ),
}

QUICK = ("lr x30 late", "garbage tokens", "second moments zeroed", "weight, bit 30")
"""The four of the short form, of the tuning half."""
