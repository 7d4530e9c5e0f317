"""Words for people that several programs use: in logs and errors, and on the terminal."""

from collections.abc import Mapping
from typing import Any


def say_count(number: int, thing: str) -> str:
    """How many there are, in words: 1 channel, 2,000 channels."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def say_error(error: Mapping[str, Any]) -> str:
    """Message and data of an error as the exchange sends it: unauthorized (reason: invalid_token)."""
    data = error.get("data")
    if isinstance(data, Mapping):
        data = ", ".join(f"{key}: {value}" for key, value in data.items())
    return f"{error.get('message', '')}{'' if data in (None, '') else f' ({data})'}"


def printable(text: str) -> str:
    """The text without characters that could steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)
