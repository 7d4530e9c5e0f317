"""The files of ipc sockets, which outlive whoever listened there and was killed."""

import os
import stat


def remove_socket(endpoint: str) -> None:
    """Remove what a killed process left of an ipc endpoint. Only for one who knows that nobody listens there."""
    scheme, _, path = endpoint.partition("://")
    if scheme != "ipc":
        return
    try:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
    except OSError:
        return  # it is gone, or not ours to remove
