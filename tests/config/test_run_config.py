"""Agents and ranks read the resolved configuration: it must be the same one, and cost them no
import."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from opt_train.config.compose import compose
from opt_train.config.run_config import RunConfig, from_json, sha256_of, to_json
from opt_train.protocol.exits import BadInput


def test_a_configuration_survives_its_file(tmp_path) -> None:
    config = compose(["experiment=demo", "optim.lr=1", 'data.corpus="a, b"'])
    assert isinstance(config.optim.lr, float), (
        "an int in a float's place would change the hash after a round trip"
    )
    (tmp_path / "config.json").write_text(to_json(config))
    again = from_json(tmp_path / "config.json")
    assert again == config
    assert sha256_of(again) == sha256_of(config)


HEAVY = ("torch", "numpy", "hydra", "omegaconf", "yaml", "datasets", "tokenizers")


def test_reading_it_imports_neither_torch_nor_hydra(tmp_path: Path) -> None:
    """An agent starts in the time of Python itself, on every node of an allocation."""
    path = tmp_path / "config.json"
    path.write_text(to_json(replace(RunConfig(), seed=7)))
    program = (
        "import sys; from pathlib import Path; from opt_train.config.run_config import from_json; "
        f"print(from_json(Path({str(path)!r})).seed, sorted({{*{HEAVY}}} & {{*sys.modules}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "7 []\n"


def test_what_an_older_version_wrote_is_read(tmp_path: Path) -> None:
    """A key that came later has its default, and a law that came later does not lock a run out."""
    path = tmp_path / "config.json"
    values = json.loads(to_json(RunConfig()))
    del values["sinks"], values["checkpoint"]["keep_hours"]
    values["checkpoint"]["keep"] = 0
    path.write_text(json.dumps(values))
    read = from_json(path)
    assert (read.sinks, read.checkpoint.keep_hours, read.checkpoint.keep) == (
        RunConfig().sinks,
        RunConfig().checkpoint.keep_hours,
        0,
    )


def test_what_a_newer_version_wrote_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"train": {"momentum_of_tomorrow": 1}}))
    with pytest.raises(BadInput, match=r"train\.momentum_of_tomorrow is no configuration key"):
        from_json(path)
