"""``python -m opt_train.burn_in.device --slot N ...``: test the device of one slot, and memory.

The same product of the same matrices is computed again and again, and each result is compared with
the first, bit by bit: a device that answers differently corrupts silently. One that is wrong in the
same way each time shows in the fingerprint, which other devices of its kind have too. Memory is
filled with patterns, all of it before any of it is read back, so that addresses that fall together
show as well.
"""

import argparse
import hashlib
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from opt_train.burn_in.results import BurnInResult, BurnInTest, to_line
from opt_train.diagnosis.causes import Cause
from opt_train.host.gpu_files import count_gpu_files

SEED = 175
GPU_SIZE, CPU_SIZE = 8192, 512
FEWEST_REPEATS = 3
PATTERNS = (0, -1, 0x5555555555555555, -0x5555555555555556)
"""64-bit words: none, all, and every other bit set. Behind them each word holds its own number."""
BLOCK_WORDS = 1 << 23


def main(arguments: list[str]) -> int:
    """Print the results of one slot."""
    parser = argparse.ArgumentParser(prog="python -m opt_train.burn_in.device")
    parser.add_argument("--device", required=True, choices=("auto", "cpu", "cuda"))
    parser.add_argument("--slot", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--matmul-size", type=int, required=True)
    parser.add_argument("--matmul-seconds", type=float, required=True)
    parser.add_argument("--gpu-memory-share", type=float, required=True)
    parser.add_argument("--host-memory-bytes", type=int, required=True)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    device = device_of_slot(given.device, given.slot)
    if device is None:
        has = torch.cuda.device_count()
        print(to_line([_absent(given.slot, has)]))
        return 0
    part = f"slot {given.slot} ({_name(device)})"
    results: list[BurnInResult] = []
    if given.matmul_seconds:
        results.append(matmul(device, part, given.matmul_size, given.matmul_seconds))
    if given.gpu_memory_share and device.type == "cuda":
        # Of what is free: a warm rank, or somebody else's program, may have the rest.
        free, _ = torch.cuda.mem_get_info(device)
        size = int(free * given.gpu_memory_share)
        results.append(memory(BurnInTest.GPU_MEMORY, device, part, size))
    if given.host_memory_bytes:
        cpu = torch.device("cpu")
        results.append(
            memory(BurnInTest.HOST_MEMORY, cpu, f"slot {given.slot}", given.host_memory_bytes)
        )
    print(to_line(results))
    return 0


def device_of_slot(wanted: str, slot: int) -> torch.device | None:
    """The device that the slot's rank would use; None: it has no GPU that works."""
    # A rank would go on with the CPU where the driver is broken; a test must not.
    none_at_all = not torch.cuda.is_available() and count_gpu_files() == 0
    if wanted == "cpu" or (wanted == "auto" and none_at_all):
        return torch.device("cpu")
    if slot >= torch.cuda.device_count():
        return None
    torch.cuda.set_device(slot)
    return torch.device("cuda", slot)


def _absent(slot: int, has: int) -> BurnInResult:
    return BurnInResult(
        BurnInTest.MATMUL,
        f"slot {slot}",
        trouble=f"slot {slot} has no GPU: torch sees {has}, and /dev shows {count_gpu_files()}",
        cause=Cause.GPU_LOST,
    )


def _kind(device: torch.device, size: int) -> str:
    """What two devices must have in common to compute the same bits."""
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{_name(device)}, torch {torch.__version__}, {size}{threads}"


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    models = [line for line in _cpuinfo().splitlines() if line.startswith("model name")]
    return models[0].partition(":")[2].strip() if models else platform.machine()


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def matmul(device: torch.device, part: str, size: int, seconds: float) -> BurnInResult:
    """Compute one product for `seconds`; every result must be the first one, to the bit."""
    on_gpu = device.type == "cuda"
    size = size or (GPU_SIZE if on_gpu else CPU_SIZE)
    # Drawn on the CPU: the same numbers on every device.
    draw = torch.Generator().manual_seed(SEED)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    a, b = (torch.randn(size, size, generator=draw).to(device, dtype) for _ in range(2))
    first = a @ b
    working, repeats, different = 0.0, 0, 0
    result = torch.empty_like(first)
    deadline = time.monotonic() + seconds
    # Not for a number of repeats: a device that is right when cold may be wrong when it is hot.
    while repeats < FEWEST_REPEATS or time.monotonic() < deadline:
        began = time.perf_counter()
        torch.mm(a, b, out=result)
        _synchronize(device)
        working += time.perf_counter() - began
        repeats += 1
        different += not torch.equal(_bits(result), _bits(first))
        result.zero_()  # what is not computed anew must not pass for it
    trouble = f"{different} of {repeats} products differ from the first" if different else ""
    return BurnInResult(
        BurnInTest.MATMUL,
        part,
        2.0 * size**3 * repeats / working,
        "FLOP/s",
        fingerprint=f"{_kind(device, size)}: {_sha256(first)}",
        remark=f"{repeats} products of {size} x {size} in {str(dtype).removeprefix('torch.')}",
        trouble=trouble,
        cause=Cause.SILENT_CORRUPTION if trouble else "",
    )


def memory(test: BurnInTest, device: torch.device, part: str, size: int) -> BurnInResult:
    """Fill `size` bytes with each pattern and read them back."""
    # Somebody else may have taken some of it meanwhile: another slot that shares the device.
    blocks = next(filter(None, (_blocks(size // share, device) for share in (1, 2, 4, 8))), None)
    if blocks is None:
        return BurnInResult(test, part, trouble=f"an eighth of {size:,} bytes cannot be had")
    began = time.perf_counter()
    wrong = 0
    for pattern in (*PATTERNS, None):
        for number, block in enumerate(blocks):
            _fill(block, pattern, number)
        for number, block in enumerate(blocks):
            wrong += _wrong_words(block, pattern, number)
    _synchronize(device)
    seconds = time.perf_counter() - began
    moved = 2 * (len(PATTERNS) + 1) * sum(block.nbytes for block in blocks)
    return BurnInResult(
        test,
        part,
        moved / seconds,
        "B/s",
        remark=f"{sum(block.nbytes for block in blocks):,} bytes, {len(PATTERNS) + 1} patterns",
        trouble=f"{wrong} words do not read back as they were written" if wrong else "",
        cause=Cause.SILENT_CORRUPTION if wrong else "",
    )


def _blocks(size: int, device: torch.device) -> list[torch.Tensor] | None:
    """Memory in pieces; None: there is not so much."""
    try:
        return [torch.empty(n, dtype=torch.int64, device=device) for n in _block_sizes(size)]
    except RuntimeError:  # torch's out-of-memory errors are of this kind
        return None


def _block_sizes(size: int) -> Iterator[int]:
    words = max(1, size // 8)
    yield from (min(BLOCK_WORDS, words - at) for at in range(0, words, BLOCK_WORDS))


def _fill(block: torch.Tensor, pattern: int | None, number: int) -> None:
    if pattern is None:
        torch.arange(number * BLOCK_WORDS, number * BLOCK_WORDS + len(block), out=block)
    else:
        block.fill_(pattern)


def _wrong_words(block: torch.Tensor, pattern: int | None, number: int) -> int:
    if pattern is None:
        first = number * BLOCK_WORDS
        expected = torch.arange(first, first + len(block), device=block.device)
        return int((block != expected).sum())
    return int((block != pattern).sum())


def _bits(values: torch.Tensor) -> torch.Tensor:
    # As numbers NaN would differ from itself, and 0 be the same as -0.
    return values.view(torch.int16 if values.element_size() == 2 else torch.int32)


def _sha256(values: torch.Tensor) -> str:
    return hashlib.sha256(_bits(values).cpu().numpy().tobytes()).hexdigest()[:16]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
