"""The command lines of containers, read by stand-ins that parse them as the programs document it:
neither program is installed where these tests run."""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from opt_train.cli import main as cli
from opt_train.clusters.config import ClusterConfig, SlurmConfig
from opt_train.clusters.containers import (
    Container,
    check_container,
    make_container,
    mounted_paths,
)
from opt_train.config.compose import compose
from opt_train.protocol.exits import BadInput

APPTAINER = Path(__file__).with_name("apptainer.py")
PATHS = (Path("/runs/night"), Path("/prepared/texts $(id)"))
SEEN = {"PYTHONPATH": "/runs/night/code/1:/home/me,too", "OPT_TRAIN_NODE": "/runs/night n1"}


def parse_as_pyxis(options: tuple[str, ...]) -> argparse.Namespace:
    """The options that the plugin adds to srun, as ``srun --help`` shows them and ``args.c`` reads
    them (https://github.com/NVIDIA/pyxis)."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--container-image", required=True)
    parser.add_argument("--container-mounts", type=pyxis_mounts, required=True)
    parser.add_argument("--container-env", type=lambda names: names.split(","))
    parser.add_argument("--no-container-mount-home", action="store_true")
    parser.add_argument("--container-writable", action="store_true")
    return parser.parse_args(options)


def pyxis_mounts(value: str) -> list[tuple[str, str, str]]:
    """SRC:DST[:FLAGS][,SRC:DST...]: each a path from the root, flags separated by ``+``."""
    mounts = []
    for mount in value.split(","):
        source, target, flags = [*mount.split(":", 2), ""][:3]
        assert source.startswith("/"), mount
        assert target.startswith("/"), mount
        mounts.append((source, target, flags))
    return mounts


def test_pyxis_gets_image_mounts_and_variables() -> None:
    config = SlurmConfig(
        container="pyxis",
        container_image="nvcr.io#nvidia/pytorch:24.05-py3",
        container_mounts="/scratch:/mnt/scratch:ro+rprivate,/data:/data",
        container_options="--no-container-mount-home",
        container_python="/opt/conda/bin/python",
    )
    container = make_container(config, PATHS, SEEN)
    parsed = parse_as_pyxis(container.srun_options)
    assert parsed.container_image == "nvcr.io#nvidia/pytorch:24.05-py3"
    assert parsed.container_mounts == [
        ("/runs/night", "/runs/night", ""),
        ("/prepared/texts $(id)", "/prepared/texts $(id)", ""),
        ("/scratch", "/mnt/scratch", "ro+rprivate"),
        ("/data", "/data", ""),
    ]
    # The image's own value would win otherwise.
    assert parsed.container_env == ["PYTHONPATH", "OPT_TRAIN_NODE"]
    assert parsed.no_container_mount_home
    assert (container.prefix, container.python) == ((), "/opt/conda/bin/python")


def test_apptainer_runs_the_command_with_image_binds_and_variables(tmp_path: Path) -> None:
    """The stand-in refuses options that `apptainer exec` does not have, and runs the command."""
    config = SlurmConfig(
        container="apptainer",
        container_image="/images/train.sif",
        container_mounts="/tmp:/scratch:ro",
        container_options="--nv --pwd '/a b'",
    )
    container = make_container(config, [tmp_path], SEEN)
    assert container.prefix[0] == "apptainer"
    code = "import os, sys; print(sys.argv[1:], os.environ['PYTHONPATH'])"
    done = subprocess.run(
        [sys.executable, APPTAINER, *container.prefix[1:], sys.executable, "-c", code, "$(id)"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/bin", "APPTAINER_SAID": str(tmp_path / "said"), **container.environment},
    )
    assert done.stdout.strip() == f"['$(id)'] {SEEN['PYTHONPATH']}"
    said = (tmp_path / "said").read_text()
    assert shlex.split(said) == [
        "image=/images/train.sif",
        f"bind={tmp_path}:{tmp_path}",
        "bind=/tmp:/scratch:ro",
        "nv=True",
        "pwd=/a b",
    ]


def test_without_a_container_nothing_is_added() -> None:
    container = make_container(SlurmConfig(), PATHS, SEEN)
    assert container == Container()
    assert not container.hides_slurm
    assert container.python == sys.executable


def test_what_a_rank_reads_and_writes_is_mounted_once() -> None:
    run = Path("/runs/night")
    config = compose(["model=tiny", "data.directory=/runs/night/data"])
    assert mounted_paths(run, config) == [run]
    config = compose(["model=tiny", "data.directory=/prepared/x", "train.initial_weights=/w"])
    assert mounted_paths(run, config) == [run, Path("/prepared/x"), Path("/w")]


@pytest.mark.parametrize("name", ["a:b", "a,b"])
def test_a_path_that_would_be_read_as_two_mounts_is_refused(name: str) -> None:
    apptainer = SlurmConfig(container="apptainer", container_image="/images/train.sif")
    with pytest.raises(BadInput, match=r"cannot be mounted into a container"):
        check_container(apptainer, [Path("/runs", name)])


def test_a_container_without_an_image_is_refused_before_anything_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["cluster=slurm-pyxis", "model=tiny", "data.corpus=x"]
    for verb in ("run", "submit"):
        assert cli.main([verb, *words]) == 2
        said = capsys.readouterr().err
        assert said.startswith("opt-train: cluster.slurm.container=pyxis needs an image;")


@pytest.mark.parametrize(
    "override",
    [
        'cluster.slurm.container_mounts="/a"',
        'cluster.slurm.container_mounts="a:/b"',
        'cluster.slurm.container_mounts="/a:/b --privileged"',
        'cluster.slurm.container_image="--writable"',
        'cluster.slurm.container_image="x y"',
        'cluster.slurm.container_python="-c"',
        'cluster.slurm.container_options="--nv \'"',
        "cluster.slurm.container=docker",
    ],
)
def test_a_value_that_would_be_taken_for_something_else_is_refused(override: str) -> None:
    with pytest.raises(BadInput, match=r"cluster\.slurm\.container"):
        compose(["cluster=slurm", "model=tiny", override])


@pytest.mark.parametrize("kind", ["pyxis", "apptainer"])
def test_the_profiles_differ_in_the_container_alone(kind: str) -> None:
    plain = compose(["cluster=slurm", "model=tiny"])
    given = compose([f"cluster=slurm-{kind}", "model=tiny", "cluster.slurm.container_image=/image"])
    assert (given.cluster.kind, given.cluster.slurm.container) == ("slurm", kind)
    assert given.supervisor == plain.supervisor
    assert isinstance(given.cluster, ClusterConfig)
