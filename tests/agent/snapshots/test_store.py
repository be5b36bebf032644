"""What an agent holds: it outlives its rank, is never trusted unread, and leaves nothing half
behind."""

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from opt_train.agent.snapshots import store as stores
from opt_train.agent.snapshots.placement import SnapshotMissing
from opt_train.checkpoint.manifest import FileEntry
from tests.agent.snapshots.stores import (
    MEMORY,
    NODE,
    child,
    content,
    entry,
    files_below,
    memory_descriptors,
    names,
    play,
    put,
    store_in,
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_memory_of_a_rank_outlives_its_death(tmp_path: Path) -> None:
    data = content(1)

    async def scene() -> None:
        async with store_in(tmp_path) as store:
            with child(data) as rank:
                store.adopt(MEMORY, "shard", rank.pid, rank.fd, len(data), entry(data).sha256)
                rank.kill()
                assert await store.is_good(MEMORY, "shard", entry(data))
                assert names(store) == {MEMORY: ("shard",)}
        assert not files_below(tmp_path)

    play(scene())


def test_nothing_is_taken_from_a_rank_that_is_gone(tmp_path: Path) -> None:
    data = content(1, 100)

    async def scene() -> None:
        async with store_in(tmp_path) as store:
            with child(data) as rank:
                rank.process.kill()
                os.waitid(
                    os.P_PID, rank.pid, os.WEXITED | os.WNOWAIT
                )  # a zombie, as an agent has it for a moment
                with pytest.raises(OSError, match="No such file"):
                    store.adopt(MEMORY, "shard", rank.pid, rank.fd, len(data), entry(data).sha256)
                rank.kill()
                with pytest.raises(OSError, match="No such file"):
                    store.adopt(MEMORY, "shard", rank.pid, rank.fd, len(data), entry(data).sha256)
            assert not store.files()

    play(scene())


def test_memory_that_its_rank_has_written_over_is_not_held_any_more(tmp_path: Path) -> None:
    data = content(1)

    async def scene() -> None:
        before = memory_descriptors(os.getpid())
        async with store_in(tmp_path) as store:
            with child(data) as rank:
                store.adopt(MEMORY, "shard", rank.pid, rank.fd, len(data), entry(data).sha256)
                assert await store.is_good(MEMORY, "shard", entry(data))
                rank.overwrite(b"\x00")
                assert not await store.is_good(MEMORY, "shard", entry(data))
            assert not store.files()
            await store.drop(MEMORY)  # what was given to the helper before is done
            assert memory_descriptors(os.getpid()) == before

    play(scene())


def test_memory_taken_again_for_a_later_step_is_not_the_earlier_one(
    tmp_path: Path,
) -> None:
    data, later = content(1, 1000), "memory/1.00/step-00000010"

    async def scene() -> None:
        async with store_in(tmp_path) as store:
            with child(data) as rank:
                for path in (MEMORY, later):
                    store.adopt(path, "shard", rank.pid, rank.fd, len(data), entry(data).sha256)
            assert names(store) == {later: ("shard",)}

    play(scene())


@pytest.mark.parametrize("size", [0, 999, 1001])
def test_memory_of_another_size_than_claimed_is_not_taken(tmp_path: Path, size: int) -> None:
    async def scene() -> None:
        async with store_in(tmp_path) as store:
            with (
                child(content(1, 1000)) as rank,
                pytest.raises(SnapshotMissing, match="1000 bytes"),
            ):
                store.adopt(MEMORY, "shard", rank.pid, rank.fd, size, "")
            assert not store.files()

    play(scene())


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "/etc/passwd", "a.partial", "manifest.json", ".x", "a\n"]
)
def test_no_file_is_held_under_a_name_that_leads_elsewhere(tmp_path: Path, name: str) -> None:
    async def scene() -> None:
        async with store_in(tmp_path) as store:
            with pytest.raises(SnapshotMissing, match="no name of a checkpoint's file"):
                store.partial_file(NODE, name, entry(b""))

    play(scene())


@pytest.mark.parametrize(
    "path",
    ["", "node", "shared/1.00/step-00000005", "node/../step-00000005", f"/{NODE}", f"{NODE}/"],
)
def test_no_checkpoint_is_held_under_a_path_that_leads_elsewhere(tmp_path: Path, path: str) -> None:
    async def scene() -> None:
        async with store_in(tmp_path) as store:
            with pytest.raises(SnapshotMissing, match="no checkpoint that agents hold"):
                store.partial_file(path, "shard", entry(b""))
            with pytest.raises(SnapshotMissing, match="no checkpoint that agents hold"):
                store.drop(path)

    play(scene())


@pytest.mark.parametrize("path", [MEMORY, NODE])
def test_a_partial_file_with_other_bytes_than_the_manifests_leaves_nothing(
    tmp_path: Path, path: str
) -> None:
    data = content(1)

    async def scene() -> None:
        before = memory_descriptors(os.getpid())
        async with store_in(tmp_path) as store:
            for wrong in (data[:-1], data + b"x", content(2)):
                with pytest.raises(SnapshotMissing, match="other bytes than the manifest names"):
                    await put(store, path, "shard", wrong, entry(data))
            assert not store.files()
            await store.drop(path)
            assert not files_below(tmp_path)
            assert memory_descriptors(os.getpid()) == before

    play(scene())


def test_a_copy_in_memory_cannot_be_written_over(tmp_path: Path) -> None:
    data = content(1)

    async def scene() -> None:
        async with store_in(tmp_path) as store:
            await put(store, MEMORY, "shard", data)
            link = Path(await store.link(MEMORY, ["shard"], b"{}")) / "shard"
            with link.open("r+b", buffering=0) as file, pytest.raises(PermissionError):
                file.write(b"x")
            assert await store.is_good(MEMORY, "shard", entry(data))

    play(scene())


def test_a_new_agent_finds_what_lies_on_disk_and_removes_only_what_is_half(tmp_path: Path) -> None:
    data = content(1)

    async def scene() -> None:
        async with store_in(tmp_path) as store:
            await put(store, NODE, "shard", data)
            await put(store, MEMORY, "shard", data)
            folder = Path(await store.link(NODE, ["shard"], b"{}"))
        assert files_below(store.folder) == {f"{NODE}/shard"}
        stays = {
            "note.txt",
            f"{NODE}/sub/deep.partial",
            "node/other",
            "node/1.00/step-x/shard",
            f"{NODE}/link.partial",
        }
        for name in stays | {f"{NODE}/shard-2.partial"}:
            (store.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (store.folder / name).write_text("foreign")
        (store.folder / NODE / "link.partial").unlink()
        (store.folder / NODE / "link.partial").symlink_to(store.folder / "note.txt")
        folder.mkdir(parents=True)
        (folder / "shard").symlink_to(store.folder / "note.txt")
        async with store_in(tmp_path) as again:
            assert names(again) == {NODE: ("shard",)}
            assert await again.is_good(NODE, "shard", entry(data))
            assert files_below(again.folder) == stays | {f"{NODE}/shard"}
        async with store_in(tmp_path, node="node-2") as other:
            assert not other.files(), "files of another node"

    play(scene())


def test_files_lie_where_nobody_else_may_look(tmp_path: Path) -> None:
    async def scene() -> None:
        async with store_in(tmp_path) as store:
            await put(store, NODE, "shard", b"data")
            folder = store.folder / NODE
            while folder != tmp_path:
                assert folder.stat().st_mode & 0o777 == 0o700
                folder = folder.parent
            assert (store.folder / NODE / "shard").stat().st_mode & 0o077 == 0

    play(scene())


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    async def scene() -> None:
        async with store_in(tmp_path) as store:
            (tmp_path / store.folder.relative_to(tmp_path).parts[0]).mkdir(mode=0o755)
            with pytest.raises(PermissionError, match="not a folder of this user alone"):
                await put(store, NODE, "shard", b"data")
            assert not store.files()

    play(scene())


def test_a_damaged_file_on_disk_is_not_held_and_makes_room(tmp_path: Path) -> None:
    data = content(1)

    async def scene() -> None:
        async with store_in(tmp_path) as store:
            await put(store, NODE, "shard", data)
            file = store.folder / NODE / "shard"
            with file.open("r+b") as opened:
                opened.seek(5_000_000)
                opened.write(bytes([data[5_000_000] ^ 1]))
            assert not await store.is_good(NODE, "shard", entry(data))
            assert not store.files()
            await put(store, NODE, "shard", data)
            assert await store.is_good(NODE, "shard", entry(data))

    play(scene())


def test_a_full_disk_leaves_nothing_half(small_disk: Path) -> None:
    data = content(1)

    async def scene() -> None:
        async with store_in(small_disk) as store:
            await put(store, NODE, "shard-1", data)
            with pytest.raises(OSError, match="No space left") as raised:
                await put(store, NODE, "shard-2", data)
            assert raised.value.errno == errno.ENOSPC
            assert names(store) == {NODE: ("shard-1",)}
            await store.drop(
                "node/1.00/step-00000001"
            )  # what was given to the helper before is done
            assert files_below(store.folder) == {f"{NODE}/shard-1"}
            await store.drop(NODE)
            await put(store, NODE, "shard-2", data)

    play(scene())


def test_a_copy_that_would_take_the_nodes_last_memory_is_not_begun(tmp_path: Path) -> None:
    async def scene() -> None:
        before = memory_descriptors(os.getpid())
        async with store_in(tmp_path) as store:
            with pytest.raises(OSError, match="Cannot allocate memory"):
                await put(store, MEMORY, "shard", b"", FileEntry(1 << 50, ""))
            assert memory_descriptors(os.getpid()) == before

    play(scene())


def test_dropped_memory_and_disk_are_free(tmp_path: Path) -> None:
    async def scene() -> None:
        async with store_in(tmp_path) as store:
            before = memory_descriptors(os.getpid())
            for path in (MEMORY, NODE):
                await put(store, path, "shard-1", content(1))
                await put(store, path, "shard-2", content(2))
                await store.link(path, ["shard-1"], b"{}")
            assert memory_descriptors(os.getpid()) == before + 2
            await store.drop(MEMORY)
            assert names(store) == {NODE: ("shard-1", "shard-2")}
            assert memory_descriptors(os.getpid()) == before
            await store.drop(NODE)
            assert not store.files()
            assert not list(tmp_path.iterdir())

    play(scene())


@pytest.mark.parametrize("path", [MEMORY, NODE])
def test_a_drop_while_the_file_is_read_harms_nothing(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "PIECE_BYTES", 1 << 12)  # many: the drop comes in the middle
    data = content(1, 1_000_000)

    async def scene() -> None:
        async with store_in(tmp_path) as store:
            await put(store, path, "shard", data)
            reading = asyncio.create_task(store.is_good(path, "shard", entry(data)))
            await asyncio.sleep(0.001)
            assert not reading.done()
            await store.drop(path)
            assert not await reading
            assert not store.files()
            await put(store, path, "shard", data)
            cancelled = asyncio.create_task(store.is_good(path, "shard", entry(data)))
            await asyncio.sleep(0.001)
            cancelled.cancel()
            await asyncio.wait([cancelled])
            assert await store.is_good(path, "shard", entry(data)), (
                "a reader that was cancelled cost the file"
            )

    play(scene())


def test_linked_files_are_read_by_another_process_and_gone_after_the_end(tmp_path: Path) -> None:
    data, late = content(1), content(2, 1000)
    read = "import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())"

    def hash_of(file: Path) -> str:
        return subprocess.check_output([sys.executable, "-c", read, file], text=True).strip()

    async def scene() -> None:
        async with store_in(tmp_path) as store:
            for path in (MEMORY, NODE):
                await put(store, path, "shard-1", data)
                folder = Path(await store.link(path, ["shard-1"], b'{"first": 1}'))
                await put(store, path, "shard-2", late)
                assert Path(await store.link(path, ["shard-2"], b'{"second": 1}')) == folder
                assert files_below(folder) == {"shard-1", "shard-2", "manifest.json"}
                assert (folder / "manifest.json").read_bytes() == b'{"second": 1}'
                assert hash_of(folder / "shard-1") == entry(data).sha256
                assert hash_of(folder / "shard-2") == entry(late).sha256
                assert (folder / "shard-1").stat().st_size == len(data)
            with pytest.raises(SnapshotMissing, match="not held any more"):
                await store.link(MEMORY, ["shard-3"], b"{}")
            # A descriptor's number is used again: a link must never lead to what came after.
            store.forget(MEMORY, ["shard-1"])
            await store.drop("memory/1.00/step-00000001")
            assert files_below(store.folder / "restore" / MEMORY) == {"shard-2", "manifest.json"}
        assert files_below(tmp_path) == {
            f"{store.folder.relative_to(tmp_path)}/{NODE}/shard-{n}" for n in (1, 2)
        }

    play(scene())
