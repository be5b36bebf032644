"""Ranks for tests of how ranks are started: `ODD_RANK` in the environment says what they do. They
end with 7 where all went well."""

import os
import sys
import threading
import time

WHAT = os.environ["ODD_RANK"]
if WHAT == "cannot be imported":
    raise ImportError("libcudart.so.13: cannot open shared object file")
if WHAT == "imports a thread":
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()


def import_everything() -> None:
    if WHAT == "computes":
        import torch

        torch.set_num_threads(1)


def main() -> int:
    if WHAT == "threads":
        threading.Thread(target=time.sleep, args=(60,)).start()
    if WHAT in ("threads", "waits"):
        time.sleep(60)
    if WHAT == "computes":
        import torch

        torch.set_num_threads(2)
        left, right = torch.rand(2, 512, 512, dtype=torch.float64)
        row = sum(left[3, k] * right[k] for k in range(512))
        assert torch.allclose((left @ right)[3], row)
        assert len(os.listdir("/proc/self/task")) > 1, "computed by one thread"
    print("parent", os.getppid(), "threads", threading.active_count(), flush=True)
    return 7


if __name__ == "__main__":
    sys.exit(main())
