"""`opt-train plan` must answer without files, without torch, and with an exit code that a script
can trust."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command import Said

Say = Callable[..., Said]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_recipe_is_planned_without_its_users_files(say: Say, empty_folder: Path) -> None:
    said = say("plan", "experiment=opt-175b")
    assert (said.code, said.err) == (0, "")
    assert "174,604,468,224 parameters" in said.out
    assert "replicate 1 x shard 124 x tensor 8" in said.out
    assert re.search(r"none +selective +full\*", said.out)
    assert re.search(r"one node fewer +10.4%: .*; warning: more than 10%", said.out)
    assert list(empty_folder.iterdir()) == []


def test_lines_fit_a_wide_terminal(say: Say) -> None:
    assert max(len(line) for line in say("plan", "experiment=opt-175b").out.splitlines()) <= 160


def test_the_files_a_user_names_are_kept(say: Say) -> None:
    said = say(
        "plan",
        "experiment=opt-175b",
        "data.corpus=mine",
        "tokenizer.vocab_file=v",
        "tokenizer.merges_file=m",
    )
    assert said.code == 0
    assert "data.corpus" in say("plan", "experiment=opt-175b", "--cfg", "job").err


def test_planning_never_loads_torch() -> None:
    planning = "from opt_train.cli.main import main; main(['plan', 'experiment=opt-125m'])"
    code = f"import sys; {planning}; assert not {{'torch', 'numpy'}} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_layout_that_idles_is_planned_and_refused(say: Say) -> None:
    said = say("plan", "experiment=opt-175b", "cluster.nodes=123")
    assert said.code == 1
    assert said.err.count("\n") == 1
    assert "10.4% of the sequences computed are padding" in said.err
    assert "checkpoint\n  a save" in said.out


def test_idling_can_be_allowed(say: Say) -> None:
    said = say("plan", "experiment=opt-175b", "cluster.nodes=123", "--allow-idle")
    assert (said.code, said.err) == (0, "")


@pytest.mark.parametrize(
    "words",
    [
        ("experiment=opt-175b", "parallel.activation_checkpointing=none"),
        ("experiment=opt-125m", "train.micro_batch=32", "--memory-gb", "6"),
        ("experiment=opt-6.7b", "parallel.replicate=128", "--memory-gb", "90"),
        ("experiment=opt-66b", "cluster.nodes=1", "train.micro_batch=8"),
        ("experiment=opt-175b", "train.micro_batch=1", "parallel.accumulate=whole"),
        (
            "experiment=opt-175b",
            "cluster.nodes=2",
            "parallel.activation_checkpointing=none",
            "--memory-gb",
            "40",
        ),
    ],
    ids=[
        "recompute",
        "smaller micro-batches",
        "fewer copies",
        "more nodes",
        "gradients in shards",
        "all at once",
    ],
)
def test_every_mend_of_what_does_not_fit_makes_it_fit(say: Say, words: tuple[str, ...]) -> None:
    said = say("plan", *words)
    assert said.code == 1
    mends = re.findall(r"((?:[a-z_]+\.[a-z_]+=\S+ )+)\(", said.err)
    assert mends
    for mend in mends:
        mended = json.loads(say("plan", "--json", "--allow-idle", *words, *mend.split()).out)
        assert mended["fits"], mend
        assert mended["refusals"] == []


def test_what_nothing_mends_is_not_given_a_mend_that_does_not(say: Say) -> None:
    said = say(
        "plan",
        "experiment=opt-175b",
        "parallel.tensor=1",
        "train.micro_batch=1",
        "--memory-gb",
        "2",
    )
    assert said.code == 1
    assert "no number of nodes mends that with this parallel.tensor; use a larger one" in said.err


def test_a_program_gets_numbers(say: Say) -> None:
    said = say("plan", "experiment=opt-175b", "--json", "--tokens", "300e9")
    plan = json.loads(said.out)
    assert plan["world_size"] == 992
    assert plan["idle_share"] == 0.0
    assert plan["idle_share_without_a_node"] == pytest.approx(1 - 992 / 1107)
    assert [memory["mode"] for memory in plan["memory"]] == ["none", "selective", "full"]
    assert (
        plan["throughput"]["tokens"]
        >= 300e9
        > plan["throughput"]["tokens"] - plan["throughput"]["tokens_per_step"]
    )
    assert plan["checkpoint"]["bytes"] == 10 * 174_604_468_224
    assert plan["fits"] is True


def test_a_refusal_is_in_the_json_and_in_the_exit_code(say: Say) -> None:
    said = say("plan", "experiment=opt-175b", "cluster.nodes=123", "--json")
    assert said.code == 1
    assert json.loads(said.out)["refusals"]


def test_every_recipe_is_planned_by_one_command(say: Say) -> None:
    said = say("plan", "--multirun", "experiment=glob(opt-*)", "--json")
    assert said.code == 0
    assert len(json.loads(said.out)) == 9


def test_one_refused_of_many_is_exit_1(say: Say) -> None:
    assert say("plan", "-m", "experiment=opt-175b", "cluster.nodes=123,124").code == 1


@pytest.mark.parametrize(
    ("words", "mend"),
    [
        (("--mfu", "2"), "0.353"),
        (("--mfu", "0"), "0.353"),
        (("--mfu", "nan"), "0.353"),
        (("--gpu", "V100"), "A100, H100 or H200"),
        (("--memory-gb", "0"), "80"),
        (("--tokens", "0"), "300e9"),
        (("--tokens", "inf"), "300e9"),
        (("model.layer=3",), "model.layers"),
        (("parallel.tensor=7", "train.micro_batch=1"), "parallel.tensor"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_mend(
    say: Say, words: tuple[str, ...], mend: str
) -> None:
    said = say("plan", "experiment=opt-175b", *words)
    assert (said.code, said.out) == (2, "")
    assert said.err.count("\n") == 1
    assert mend in said.err


def test_another_gpu_changes_time_and_memory(say: Say) -> None:
    def planned(*words: str) -> dict[str, Any]:
        plan: dict[str, Any] = json.loads(say("plan", "experiment=opt-13b", "--json", *words).out)
        return plan

    slow, fast = planned(), planned("--gpu", "H200")
    assert fast["throughput"]["days"] == pytest.approx(slow["throughput"]["days"] * 312 / 989)
    assert fast["gpu"]["memory_gb"] == 141
    assert planned("--gpu", "H200", "--memory-gb", "100")["gpu"]["memory_gb"] == 100


def test_no_time_is_invented_for_fp32(say: Say) -> None:
    said = say("plan", "experiment=demo")
    assert "no peak is known in fp32" in said.out
    assert json.loads(say("plan", "experiment=demo", "--json").out)["throughput"]["days"] is None


def test_an_engine_that_is_not_modelled_is_named(say: Say) -> None:
    said = say("plan", "experiment=opt-125m", "parallel.engine=deepspeed", "parallel.compile=false")
    assert "deepspeed is not modelled" in said.out


def test_a_rehearsal_that_fails_is_said_and_not_shown_as_agreement(
    say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    said = say("plan", "experiment=demo", "--rehearse")
    assert said.code == 2
    assert "the rehearsal failed" in said.err
    assert "differs" not in said.out


TINY = ("experiment=demo", "model.layers=3")


def test_a_rehearsal_stands_beside_the_arithmetic(say: Say) -> None:
    said = say("plan", *TINY, "--rehearse")
    assert said.code == 0
    assert re.search(r"arithmetic +rehearsed +difference", said.out)
    assert "nothing differs by more than 5%" in said.out
    assert "rehearsing opt-demo" in said.err


@pytest.mark.slow
def test_a_program_gets_the_rehearsal_too(say: Say) -> None:
    plan = json.loads(say("plan", *TINY, "--rehearse", "--json").out)
    assert set(plan["rehearsals"]) == {"none", "selective", "full"}
    assert all(abs(row["difference"]) <= 0.05 for row in plan["comparison"])
    assert plan["rehearsals"]["none"]["held_at_peak"]
