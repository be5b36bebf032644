"""The manifest: what it vouches for is what lies there, and without it there is no checkpoint."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from opt_train.checkpoint import manifest as manifests
from opt_train.checkpoint.commit import build_manifest, commit_manifest, retire_checkpoint
from opt_train.checkpoint.listing import list_checkpoints
from opt_train.checkpoint.manifest import MANIFEST, STATE, CheckpointError, Manifest

SHARDS = {
    "shard-00001.safetensors": bytes(range(256)) * 40,
    "shard-00002.safetensors": b"second" * 999,
}


def write(folder: Path, state: object = None) -> dict[str, tuple[int, str]]:
    """A folder as the ranks leave it; what they report."""
    folder.mkdir(parents=True)
    given = {"step": 7, "samples": 56, "layout": {"shard": 2}} if state is None else state
    contents = {**SHARDS, STATE: json.dumps(given).encode()}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {
        name: (len(content), hashlib.sha256(content).hexdigest())
        for name, content in contents.items()
    }


@pytest.fixture
def committed(tmp_path: Path) -> tuple[Path, str]:
    folder = tmp_path / "checkpoints" / "1.02" / "step-00000007"
    manifest = build_manifest(
        folder, "1.02", 7, write(folder), config_sha256="c" * 64, journal_head="j" * 64
    )
    return folder, commit_manifest(folder, manifest)


def test_a_committed_manifest_reads_back_and_verifies(committed: tuple[Path, str]) -> None:
    folder, sha256 = committed
    assert hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest() == sha256
    moved: list[tuple[int, int]] = []
    manifest = manifests.verify(folder, sha256, lambda done, total: moved.append((done, total)))
    assert (manifest.attempt, manifest.step, manifest.config_sha256) == ("1.02", 7, "c" * 64)
    assert manifest.state == {"step": 7, "samples": 56, "layout": {"shard": 2}}
    assert manifest.layout == {"shard": 2}
    assert manifest.healthy
    assert moved[-1] == (manifest.bytes, manifest.bytes)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*SHARDS, STATE, MANIFEST])


def test_the_state_says_whether_training_was_well(tmp_path: Path) -> None:
    files = write(tmp_path / "c", {"healthy": False})
    assert not build_manifest(tmp_path / "c", "1.00", 1, files).healthy


@pytest.mark.parametrize("name", [*SHARDS, STATE])
def test_a_flip_anywhere_in_a_file_is_found_and_the_file_named(
    committed: tuple[Path, str], name: str
) -> None:
    folder, sha256 = committed
    good = (folder / name).read_bytes()
    for where in {0, 1, 7, 8, len(good) // 2, len(good) - 1}:
        content = bytearray(good)
        content[where] ^= 0x40
        (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name} has a wrong checksum"):
            manifests.verify(folder, sha256)
    (folder / name).write_bytes(good)
    manifests.verify(folder, sha256)


@pytest.mark.parametrize("name", [*SHARDS, STATE])
@pytest.mark.parametrize("change", ["shorter", "longer", "empty", "missing", "folder"])
def test_a_file_of_another_size_is_found_and_named(
    committed: tuple[Path, str], name: str, change: str
) -> None:
    folder, sha256 = committed
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if change == "folder":
        path.mkdir()
    elif change != "missing":
        path.write_bytes({"shorter": content[:-1], "longer": content + b"\0", "empty": b""}[change])
    with pytest.raises(CheckpointError, match=rf"{name} (has|is missing|cannot be read)"):
        manifests.verify(folder, sha256)


def test_every_flipped_byte_of_the_manifest_is_found_by_its_hash(
    committed: tuple[Path, str],
) -> None:
    folder, sha256 = committed
    good = (folder / MANIFEST).read_bytes()
    for where in range(len(good)):
        content = bytearray(good)
        content[where] ^= 1
        (folder / MANIFEST).write_bytes(content)
        with pytest.raises(
            CheckpointError, match=r"manifest.json is not the manifest that was committed"
        ):
            manifests.verify(folder, sha256)


def test_shards_without_a_manifest_are_no_checkpoint(committed: tuple[Path, str]) -> None:
    folder, sha256 = committed
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"manifest.json is missing"):
        manifests.verify(folder, sha256)
    with pytest.raises(CheckpointError, match=r"manifest.json is missing"):
        manifests.verify(folder)


def test_a_stray_shard_is_not_trusted(committed: tuple[Path, str]) -> None:
    """The reader takes every shard it finds: one left by another save could replace tensors."""
    folder, sha256 = committed
    (folder / "shard-00003.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"shard-00003.safetensors is not in the manifest"):
        manifests.verify(folder, sha256)


def test_a_torn_manifest_is_no_checkpoint(committed: tuple[Path, str]) -> None:
    folder, _ = committed
    good = (folder / MANIFEST).read_bytes()
    for length in range(0, len(good) - 2, 13):
        (folder / MANIFEST).write_bytes(good[:length])
        with pytest.raises(CheckpointError, match=r"manifest.json is damaged"):
            manifests.read(folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version": 2}, r"has version 2; this program reads 1"),
        (
            {"files": {"../../../etc/passwd": {"bytes": 1, "sha256": ""}}},
            r"names '../../../etc/passwd'",
        ),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}, r"names '/etc/passwd'"),
        ({"files": {"a": {"bytes": 1}}}, r"is damaged"),
        ({"files": [1]}, r"is damaged"),
        ({"step": "7"}, r"is damaged: state or step"),
        ({"state": None}, r"is damaged: state or step"),
        ({"extra": 1}, r"is damaged"),
    ],
)
def test_a_manifest_of_another_form_is_refused(
    committed: tuple[Path, str], change: dict[str, object], sentence: str
) -> None:
    folder, _ = committed
    payload = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(payload | change))
    with pytest.raises(CheckpointError, match=sentence):
        manifests.read(folder)


def test_a_report_that_does_not_match_the_folder_is_not_committed(tmp_path: Path) -> None:
    """A rank that reported and whose file then went missing must not become a checkpoint."""
    folder = tmp_path / "c"
    files = write(folder)
    shard = "shard-00001.safetensors"
    with pytest.raises(CheckpointError, match=r"no shard of .* was reported"):
        build_manifest(folder, "1.00", 7, {STATE: files[STATE]})
    with pytest.raises(CheckpointError, match=r"state.json was not reported"):
        build_manifest(folder, "1.00", 7, {shard: files[shard]})
    with pytest.raises(CheckpointError, match=r"state.json has a wrong checksum"):
        build_manifest(folder, "1.00", 7, files | {STATE: (files[STATE][0], "0" * 64)})
    (folder / shard).write_bytes(b"less")
    with pytest.raises(CheckpointError, match=rf"{shard} has 4 bytes instead of 10240"):
        build_manifest(folder, "1.00", 7, files)
    (folder / shard).unlink()
    with pytest.raises(CheckpointError, match=rf"{shard} is missing"):
        build_manifest(folder, "1.00", 7, files)
    assert not (folder / MANIFEST).exists()


def test_the_same_checkpoint_has_the_same_manifest(tmp_path: Path) -> None:
    hashes = set()
    for name in "ab":
        files = write(tmp_path / name)
        shuffled = dict(sorted(files.items(), reverse=name == "a"))
        hashes.add(
            commit_manifest(tmp_path / name, build_manifest(tmp_path / name, "1.00", 7, shuffled))
        )
    assert len(hashes) == 1


def test_retiring_takes_the_manifest_first_and_can_be_repeated(committed: tuple[Path, str]) -> None:
    folder, _ = committed
    program = f"""
import os, shutil, signal
from pathlib import Path
from opt_train.checkpoint.commit import retire_checkpoint
shutil.rmtree = lambda path: os.kill(os.getpid(), signal.SIGKILL)
retire_checkpoint(Path({str(folder)!r}))
"""
    process = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (folder / MANIFEST).exists()
    assert (folder / STATE).exists()
    retire_checkpoint(folder)
    assert not folder.exists()
    retire_checkpoint(folder)


def test_committing_is_all_or_nothing_when_killed(tmp_path: Path) -> None:
    """Killed just before the rename: the shards lie there, and nobody takes them for a
    checkpoint."""
    folder = tmp_path / "c"
    files = write(folder)
    program = f"""
import json, os, signal, sys
from pathlib import Path
from opt_train.checkpoint.commit import build_manifest, commit_manifest
Path.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
folder = Path({str(folder)!r})
commit_manifest(folder, build_manifest(folder, "1.00", 7, {files!r}))
"""
    process = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(CheckpointError, match=r"manifest.json is missing"):
        manifests.read(folder)
    sha256 = commit_manifest(folder, build_manifest(folder, "1.00", 7, files))
    manifests.verify(folder, sha256)


def test_a_person_s_list_has_the_good_and_the_rest_in_order(tmp_path: Path) -> None:
    for attempt, step in (("1.10", 5), ("1.09", 30), ("1.09", 4)):
        folder = tmp_path / attempt / f"step-{step:08d}"
        commit_manifest(folder, build_manifest(folder, attempt, step, write(folder)))
    write(tmp_path / "1.10" / "step-00000009")
    (tmp_path / "1.09" / "step-00000030" / STATE).unlink()
    (tmp_path / "1.09" / "notes").mkdir()
    listed = list_checkpoints(tmp_path)
    assert [(item.attempt, item.step) for item in listed] == [
        ("1.09", 4),
        ("1.09", 30),
        ("1.10", 5),
        ("1.10", 9),
    ]
    assert [item.why == "" for item in listed] == [True, False, True, False]
    assert "state.json is missing" in listed[1].why
    assert "never committed" in listed[3].why
    assert listed[0].bytes == sum(map(len, SHARDS.values())) + len(
        b'{"step": 7, "samples": 56, "layout": {"shard": 2}}'
    )
    assert list_checkpoints(tmp_path / "nothing") == ()


def test_numbers_that_json_cannot_say_are_kept_as_words(tmp_path: Path) -> None:
    files = write(tmp_path / "c")
    manifest = build_manifest(tmp_path / "c", "1.00", 7, files)
    broken = Manifest(
        **{**asdict(manifest), "files": manifest.files, "state": {"loss": float("inf")}}
    )
    commit_manifest(tmp_path / "c", broken)
    assert float(manifests.read(tmp_path / "c").state["loss"]) == float("inf")


def test_the_supervisor_reads_manifests_without_torch() -> None:
    program = (
        "import sys, opt_train.checkpoint.manifest; assert not {'torch', 'numpy'} & "
        "sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, env={**os.environ})
