"""Who gives a command, as the journal names them."""

import getpass
import os
import socket


def user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user number without a name, as in many containers
        return f"user {os.getuid()}"


def user_and_host() -> str:
    return f"{user()} on {socket.gethostname()}"
