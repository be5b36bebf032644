"""The run's secret: what agents and supervisor prove to each other. It never travels and never
enters a log."""

import os
import secrets
from pathlib import Path

SECRET_BYTES = 32
_MAX_FILE_BYTES = 256


class SecretUnusable(Exception):
    """The secret's file is missing, is not 64 hexadecimal digits, or others may read it. One
    sentence."""


def ensure_secret(path: Path) -> bytes:
    """The secret at `path`; made first, mode 0600, if there is none.

    Raises:
        SecretUnusable: what lies there is no secret.
    """
    if not path.exists():
        partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_bytes(SECRET_BYTES).hex() + "\n")
                file.flush()
                # An empty secret after a power cut would lock every agent out of its own run.
                os.fsync(file.fileno())
            # A link, unlike a rename, replaces nothing: of two that make a secret at once, one wins
            # and both read it.
            os.link(partial, path)
        except FileExistsError:
            pass
        finally:
            partial.unlink(missing_ok=True)
    return read_secret(path)


def read_secret(path: Path) -> bytes:
    """The 32 bytes whose hexadecimal digits lie at `path`.

    Raises:
        SecretUnusable: it is missing, is not 64 hexadecimal digits, or is open to others.
    """
    try:
        # A planted link is not followed, and a planted pipe does not hold us up.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            text = file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise SecretUnusable(f"{path} cannot be read: {error.strerror}") from None
    if mode & 0o077:
        raise SecretUnusable(f"{path} is open to others (mode {mode:04o}); run chmod 600 on it")
    try:
        secret = bytes.fromhex(text.decode("ascii"))
    except (UnicodeDecodeError, ValueError):
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise SecretUnusable(
            f"{path} is not 64 hexadecimal digits; remove it while nothing of this run lives"
        )
    return secret
