"""Who can reach the rendezvous of a generation."""

import json
import subprocess
import sys

SCRIPT = """
import json
import torch
import torch.distributed as dist
from opt_train.config.run_config import RunConfig
from opt_train.protocol.commands import Begin
from opt_train.train.rendezvous import join

told = []
begin = Begin(1, "1.00", "node-1", 0, 0, 1, 0, "", 0, "", "", "", None, None, 0)
join(begin, RunConfig(), torch.device("cpu"), told.append)
listening = []
for table in ("/proc/net/tcp", "/proc/net/tcp6"):
    for line in open(table).readlines()[1:]:
        address, _, state = line.split()[1:4]
        if state == "0A" and address.endswith(f":{told[0].port:04X}"):
            listening.append(address.partition(":")[0])
dist.destroy_process_group()
print(json.dumps([told[0].host, listening]))
"""


def test_the_store_of_a_local_run_is_not_open_to_the_network() -> None:
    """torch's own store listens on every interface, and takes keys from whoever connects."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    host, listening = json.loads(done.stdout.splitlines()[-1])
    assert host == "127.0.0.1"
    assert listening == ["0100007F"], "127.0.0.1 alone"
