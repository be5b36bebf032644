"""``python -m opt_train.burn_in.storage --folder DIR --bytes N --test NAME --file NAME``: write,
fsync, rename and read back a file."""

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path

from opt_train.burn_in.results import BurnInResult, BurnInTest, to_line
from opt_train.diagnosis.causes import Cause, StorageDetail

BLOCK_BYTES = 1 << 22


def main(arguments: list[str]) -> int:
    """Print the result."""
    parser = argparse.ArgumentParser(prog="python -m opt_train.burn_in.storage")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--file", required=True, help="name of the file that is written")
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--test", type=BurnInTest, required=True)
    given = parser.parse_args(arguments)
    print(to_line([storage(given.test, given.folder / given.file, given.bytes)]))
    return 0


def storage(test: BurnInTest, path: Path, size: int) -> BurnInResult:
    """Write `size` bytes to `path`, make them durable, rename the file, read it back."""
    part = str(path.parent)
    renamed = path.with_name(f"{path.name}.renamed")
    try:
        try:
            written = _write(path, size)
            os.rename(path, renamed)
            read, same = _read(renamed, size)
        finally:
            # Of one that was killed here the next finds the file, under the same name.
            for leftover in (path, renamed):
                with contextlib.suppress(OSError):
                    leftover.unlink(missing_ok=True)
    except OSError as error:
        trouble = f"{part}: {error.strerror or error}"
        return BurnInResult(test, part, trouble=trouble, cause=Cause.STORAGE, detail=_detail(test))
    trouble = "" if same else f"{part}: what was read is not what was written"
    return BurnInResult(
        test,
        part,
        written,
        "B/s",
        remark=f"{size:,} bytes written and fsynced; read back at {read / 1e6:,.0f} MB/s",
        trouble=trouble,
        cause=Cause.STORAGE if trouble else "",
        detail=_detail(test) if trouble else "",
    )


def _detail(test: BurnInTest) -> str:
    return StorageDetail.NODE_DISK if test is BurnInTest.DISK else ""


def _block(number: int) -> bytes:
    # Another content each time, or a disk that compresses would win.
    return number.to_bytes(8, "little") * (BLOCK_BYTES // 8)


def _write(path: Path, size: int) -> float:
    """Bytes a second until they were durable."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        began = time.perf_counter()
        for number, length in enumerate(_lengths(size)):
            left = memoryview(_block(number))[:length]
            while left:
                left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
        return size / (time.perf_counter() - began)
    finally:
        os.close(descriptor)


def _read(path: Path, size: int) -> tuple[float, bool]:
    """Bytes a second, and whether they are those that `_write` wrote."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # From the disk and not from memory, where the kernel lets itself be asked.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        same = os.fstat(descriptor).st_size == size
        for number, length in enumerate(_lengths(size)):
            same &= _read_whole(descriptor, length) == _block(number)[:length]
        return size / (time.perf_counter() - began), same
    finally:
        os.close(descriptor)


def _read_whole(descriptor: int, length: int) -> bytes:
    """`length` bytes, or fewer at the end of the file."""
    pieces = []
    while length and (piece := os.read(descriptor, length)):
        pieces.append(piece)
        length -= len(piece)
    return b"".join(pieces)


def _lengths(size: int) -> list[int]:
    return [min(BLOCK_BYTES, size - at) for at in range(0, size, BLOCK_BYTES)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
