"""The files of ipc sockets, which outlive whoever listened there and was killed; what to do where none can be made."""

import errno
import os
import socket
import stat

_CURES: dict[int | None, str] = {
    errno.EADDRINUSE: "stop what listens there",
    errno.EEXIST: "remove what is no socket",
    errno.EACCES: "open the place to this user",
    errno.ENOSPC: "make room",
}


def advise(number: int | None) -> str:
    """What to do where an endpoint cannot be bound, to stand behind the system's own words; "" if that is not known."""
    return f"; write another endpoint, or {_CURES[number]}" if number in _CURES else ""


def remove_socket(endpoint: str) -> None:
    """Remove what a killed process left of an ipc endpoint; the file of one that is served stays."""
    scheme, _, path = endpoint.partition("://")
    if scheme != "ipc":
        return
    try:
        if is_socket(path) and _is_left(path):
            os.unlink(path)
    except OSError:
        return  # it is gone, or not ours to remove


def is_socket(path: str) -> bool:
    """Whether a socket's file lies at a path. Raises OSError if nothing does."""
    return stat.S_ISSOCK(os.lstat(path).st_mode)


def _is_left(path: str) -> bool:
    """Whether nobody listens at a socket's file; only a refusal says so for sure. Raises OSError if it cannot be asked.

    A server that is too busy to be asked (EAGAIN), or of another kind (EPROTOTYPE), is there.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
    return False
