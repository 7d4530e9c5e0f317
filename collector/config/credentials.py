"""API keys: taken out of the environment once, at the start, so that no child process inherits them.

Those that lie in files are read again for each life of a worker, so that a key can be changed while others run.
"""

import os
import re
import stat
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field

_VARIABLE = re.compile(r"(?P<prefix>.+)_CLIENT_(?P<part>ID|SECRET)(?P<file>_FILE)?\Z", re.DOTALL)
_MAX_FILE = 4096


@dataclass(frozen=True, slots=True)
class Credentials:
    """One API key of the exchange. `fault` says why it cannot be used, "" if it can."""

    client_id: str
    client_secret: str = field(repr=False)
    fault: str = ""
    prefix: str = field(default="", compare=False)
    parts: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def read_again(self) -> "Credentials":
        """The key as its files hold it now; the same where it came from the environment itself."""
        return _build(self.prefix, self.parts)


def take_secrets(environ: MutableMapping[str, str]) -> dict[str, Credentials]:
    """Remove every PREFIX_CLIENT_ID and PREFIX_CLIENT_SECRET (or ..._FILE) from the environment; return them by prefix.

    A pair that is not whole or whose file cannot be read is returned with its fault: only who names it has to care.
    """
    taken: dict[str, dict[str, str]] = {}
    for name in list(environ):
        match = _VARIABLE.match(name)
        if match:
            parts = taken.setdefault(match["prefix"], {})
            parts[match["part"] + (match["file"] or "")] = environ.pop(name)
    return {prefix: _build(prefix, parts) for prefix, parts in taken.items()}


def _build(prefix: str, parts: Mapping[str, str]) -> Credentials:
    try:
        return Credentials(_find_part(prefix, "ID", parts), _find_part(prefix, "SECRET", parts), "", prefix, parts)
    except ValueError as error:
        return Credentials("", "", str(error), prefix, parts)


def _find_part(prefix: str, part: str, parts: Mapping[str, str]) -> str:
    variable = f"{prefix}_CLIENT_{part}"
    value, path = parts.get(part, ""), parts.get(f"{part}_FILE", "")
    if value and path:
        raise ValueError(f"both {variable} and {variable}_FILE are set; set one of them")
    if not value and not path:
        raise ValueError(f"{variable} is not in the environment; set it, or {variable}_FILE to a file that holds it")
    text = _read_file(f"{variable}_FILE", path) if path else value.strip()
    if not text or not text.isprintable():
        raise ValueError(
            f"{variable}{'_FILE' if path else ''} does not hold one line of text; set it to the bare value"
        )
    return text


def _read_file(variable: str, path: str) -> str:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe could hold up the start for ever
            raise ValueError(f"{variable} does not name a regular file; give it the path of one")
        with open(path, "rb") as file:
            text = file.read(_MAX_FILE + 1)
        return text.decode().strip() if len(text) <= _MAX_FILE else ""
    except UnicodeDecodeError:
        return ""
    except OSError as error:
        raise ValueError(
            f"{variable} names a file that cannot be read ({error.strerror}); correct the path, or who may read it"
        ) from None
