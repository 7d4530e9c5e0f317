"""Where a collector is unless its file or the environment says otherwise. A module of its own, for who only asks it."""

import os
from collections.abc import Mapping
from pathlib import Path


def default_runtime_dir(environ: Mapping[str, str]) -> Path:
    """Where sockets, lock and ledgers lie unless the file says otherwise."""
    base = environ.get("XDG_RUNTIME_DIR", "")
    return Path(base, "collector") if base.startswith("/") else Path(f"/tmp/collector-{os.getuid()}")


def default_control(environ: Mapping[str, str]) -> str:
    """The control endpoint to which commands go: COLLECTOR_CONTROL, else the one in the default runtime directory."""
    return environ.get("COLLECTOR_CONTROL") or f"ipc://{default_runtime_dir(environ)}/control"
