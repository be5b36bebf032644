"""A rank without torch that takes one snapshot, says so, and waits to be killed.

The configuration is a JSON object: `step`, and `files`, name to content in hex. The descriptors it
tells of are kept open, so a test may write to its memory through /proc.
"""

import argparse
import hashlib
import json
import os
import sys
import time

from opt_train.protocol.commands import Begin
from opt_train.protocol.facts import MemoryFile, Phase, SnapshotTaken, Warm
from opt_train.protocol.framing import from_line, to_line


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--facts-fd", type=int, required=True)
    parser.add_argument("--control-fd", type=int, required=True)
    given = parser.parse_args()
    os.write(given.facts_fd, to_line(Warm(os.getpid(), 0.01)))
    line = os.fdopen(given.control_fd, "rb", buffering=0).readline()
    if not line:
        return 0
    begin = from_line(line)
    assert isinstance(begin, Begin)
    with open(begin.config_path) as file:
        config = json.load(file)
    os.write(given.facts_fd, to_line(Phase("step", config["step"])))
    files = []
    for name, text in config["files"].items():
        content = bytes.fromhex(text)
        descriptor = os.memfd_create(name)
        os.write(descriptor, content)
        files.append(
            MemoryFile(name, len(content), hashlib.sha256(content).hexdigest(), descriptor)
        )
    os.write(given.facts_fd, to_line(SnapshotTaken(config["step"], tuple(files), 0.5)))
    time.sleep(1000)
    return 0


if __name__ == "__main__":
    sys.exit(main())
