"""A user's leash: what a mode is set for, and that a misspelt one is refused with the nearest."""

import pytest

from opt_train.config.compose import compose
from opt_train.protocol.exits import BadInput
from opt_train.supervisor.config import SupervisorConfig
from opt_train.supervisor.modes import Mode, mode_of


def test_the_detail_goes_before_the_cause_and_that_before_the_mode_of_all() -> None:
    config = SupervisorConfig(
        mode="advise", modes="gpu_ecc=observe, gpu_ecc/remap_pending = act,straggler=act"
    )
    assert mode_of("gpu_ecc", "remap_pending", config) is Mode.ACT
    assert mode_of("gpu_ecc", "uncontained", config) is Mode.OBSERVE
    assert mode_of("straggler", "any words", config) is Mode.ACT
    assert mode_of("hang", "", config) is Mode.ADVISE
    assert mode_of("gpu_ecc", "", SupervisorConfig()) is Mode.ACT


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        ("gpu_ec=advise", "'gpu_ec' is no cause; did you mean gpu_ecc?"),
        ("zebra=advise", "'zebra' is no cause; docs/causes.md lists them"),
        ("straggler=obsrve", "'obsrve' is no mode of straggler; did you mean observe?"),
        ("straggler=", "'' is no mode of straggler; choose from observe, advise, act"),
        ("straggler", "'straggler' is not cause=mode; write pairs like straggler=observe,"),
        (
            "gpu_ecc/remap=act",
            "'gpu_ecc/remap' is no detail that has a response; use gpu_ecc/contained, "
            "gpu_ecc/uncontained, gpu_ecc/remap_pending or gpu_ecc/remap_failed",
        ),
        ("hang/of rank 3=act", "'hang/of rank 3' is no detail that has a response; use hang"),
        ("hang=act,hang=observe", "names hang twice; give it one mode"),
    ],
)
def test_a_misspelt_pair_is_refused_in_a_sentence(modes: str, expected: str) -> None:
    with pytest.raises(BadInput) as refused:
        compose(["data.corpus=texts", f'supervisor.modes="{modes}"'])
    assert str(refused.value).startswith("supervisor.modes")
    assert expected in str(refused.value)


def test_the_mode_of_all_is_one_of_three() -> None:
    with pytest.raises(BadInput, match=r"supervisor.mode=off is not possible; use observe or"):
        compose(["data.corpus=texts", "supervisor.mode=off"])
