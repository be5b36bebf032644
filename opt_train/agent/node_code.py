"""The lineage's code on a node's own disk: `cluster.code=node`.

Eight ranks a node that import some three hundred files each, on two thousand nodes at once, are a
burden for a shared file system at each restart. So the agent copies them once to where the node's
snapshots lie too, and its ranks run from there. The folder is named by the code's hash, so that
runs and restarts share it, and the hash is checked each time: what is not the code is made anew.
"""

import logging
import os
import shutil
from pathlib import Path, PurePosixPath

import opt_train
from opt_train.agent.snapshots.placement import NodeFolder, directory_of
from opt_train.protocol.exits import BadInput
from opt_train.run.code.frozen_code import (
    copy_sources,
    packages_in,
    read_record,
    sha256_of_sources,
)

log = logging.getLogger(__name__)


def code_of_agent() -> Path:
    """The folder of packages that this process runs from."""
    return Path(opt_train.__path__[0]).parent


def copy_to_node(source: Path, node_directory: str) -> Path:
    """The folder on the node's disk that holds the lineage's copy `source`; `source` itself where
    it is none, or where the disk does not take it."""
    try:
        record = read_record(source)
        if record is None:
            log.warning("%s is no lineage's copy: ranks run from it as it is", source)
            return source
        below = PurePosixPath(f"opt_train-{os.getuid()}", "code")
        folder = NodeFolder(directory_of(node_directory), below)
        target = folder.path / record.sha256[:32]
        folder.make(folder.path)
        if target.is_dir() and sha256_of_sources(target) == record.sha256:
            return target
        # Two agents of one machine may do this at once: each renames its own.
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        copy_sources(packages_in(source), partial)
        if sha256_of_sources(partial) != record.sha256:
            shutil.rmtree(partial, ignore_errors=True)
            log.error("%s is not the code that was copied there: ranks run from it", source)
            return source
        _put(partial, target)
    except (OSError, BadInput) as error:
        log.warning("the code was not copied to this node (%s): ranks run from %s", error, source)
        return source
    return target


def _put(partial: Path, target: Path) -> None:
    # A folder is renamed over an empty one alone.
    try:
        partial.rename(target)
    except OSError:  # one that is not the code, or a neighbour's that has just come
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
