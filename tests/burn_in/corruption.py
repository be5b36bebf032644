"""A node whose device computes a wrong bit now and then, as the test programs meet it.

The interpreter of the device's program imports `sitecustomize` first, as every interpreter does;
the one that is written here flips the lowest bit of one number of the second product. Nothing of
the product knows of it.
"""

import os
from pathlib import Path

_SITECUSTOMIZE = """\
import os
import sys

if "opt_train.burn_in.device" in sys.orig_argv and os.environ["OPT_TRAIN_NODE"].endswith({mark!r}):
    import torch

    multiply, calls = torch.mm, []

    def mm(a, b, out):
        multiply(a, b, out=out)
        calls.append(out)
        if len(calls) == 2:
            out.view(torch.int32)[7, 5] ^= 1
        return out

    torch.mm = mm
"""


def corrupt(folder: Path, node: str) -> dict[str, str]:
    """The environment in which the device of `node` is wrong once; `folder` takes what does it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE.format(mark=f"#{node}"))
    before = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *([before] if before else [])])}
