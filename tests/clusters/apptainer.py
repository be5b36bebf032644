#!/usr/bin/env python3
"""A stand-in for `apptainer`: ``exec [OPTIONS] IMAGE COMMAND...`` runs the command where it is.

It takes the options that https://apptainer.org/docs/user/latest/cli/apptainer_exec.html lists and
we use, and no other; a mount must have a source that is there; variables called ``APPTAINERENV_X``
are ``X`` inside (https://apptainer.org/docs/user/latest/environment_and_metadata.html). As in an
image there are no commands of Slurm's inside: PATH has what ``APPTAINER_PATH`` says. It writes what
it was given to the file ``APPTAINER_SAID``.
"""

import argparse
import os
import shlex
import sys


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="apptainer", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    exec_parser = verbs.add_parser("exec", allow_abbrev=False)
    exec_parser.add_argument("-B", "--bind", action="append", default=[])
    exec_parser.add_argument("--nv", action="store_true")
    exec_parser.add_argument("--pwd", default="")
    exec_parser.add_argument("image")
    # Options end at the image: what follows is the command's.
    exec_parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args(arguments)
    mounts = [mount for bind in given.bind for mount in bind.split(",")]
    for mount in mounts:
        source = mount.split(":")[0]
        if not os.path.exists(source):
            sys.exit(f"FATAL: mount source {source} doesn't exist")
    if said := os.environ.get("APPTAINER_SAID"):
        words = [f"image={given.image}", *(f"bind={mount}" for mount in mounts)]
        words += [f"nv={given.nv}", f"pwd={given.pwd}"]
        with open(said, "w") as file:
            file.write(shlex.join(words))
    prefix = "APPTAINERENV_"
    inside = {k: v for k, v in os.environ.items() if not k.startswith("APPTAINER")}
    inside |= {k[len(prefix) :]: v for k, v in os.environ.items() if k.startswith(prefix)}
    inside |= {"PATH": os.environ.get("APPTAINER_PATH", "/bin"), "APPTAINER_CONTAINER": given.image}
    os.execvpe(given.command[0], given.command, inside)


if __name__ == "__main__":
    main(sys.argv[1:])
