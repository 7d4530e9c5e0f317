"""The parts of the documents that are taken from the code, each between two comments that name it.

`python -m tests.generated` writes them anew; tests/test_docs.py says where they are out of date.
"""

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module

import click

from collector.cli import COMMANDS
from collector.config.keys import KEYS, REQUIRED
from collector.config.patterns import CONDITIONS
from collector.lifecycle import Exit
from collector.messages import CODES
from collector.supervisor.process import describe_exit
from tests.support import REPOSITORY, collector

DOCUMENTS = sorted([REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *REPOSITORY.glob("docs/*.md")])

_BLOCK = re.compile(r"(?<=<!-- generated: )([a-z]+)( -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)


def write_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head = list(head)
    cells = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in cells)


def print_command(*arguments: str) -> str:
    """What a command prints to a pipe of 80 columns."""
    columns = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(collector(*arguments), env=columns, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.rstrip().replace("python -m collector", "collector")


def write_help() -> str:
    """Every command with its help."""
    titles = ["collector", *(f"collector {name}" for name in COMMANDS)]
    texts = [print_command(*title.split()[1:], "--help") for title in titles]
    return "\n".join(f"## {title}\n\n```\n{text}\n```\n" for title, text in zip(titles, texts, strict=True))


def write_commands() -> str:
    """Every command with the first sentence of its help."""
    rows = []
    for name, (module, _) in COMMANDS.items():
        command: click.Command = getattr(import_module(f"collector.cli.{module}"), name)
        words = " ".join((command.help or "").split("\n\n")[0].split())
        wanted = [each for each in command.params if isinstance(each, click.Argument)]
        usage = ["collector", name, *(each.make_metavar(click.Context(command)) for each in wanted)]
        rows.append((f"`{' '.join(usage)}`", re.split(r"(?<=\.) ", words)[0]))
    return write_table(("command", "what it does"), rows)


def write_keys() -> str:
    """Every key of the configuration."""
    rows = (
        (f"`{table}.{name}`", key.type, f"`{describe_default(table, name)}`", key.meaning)
        for table, keys in KEYS.items() for name, key in keys.items()
    )  # fmt: skip
    return write_table(("key", "type", "default", "meaning"), rows)


DEFAULTS = {
    ("collector", "runtime_dir"): "$XDG_RUNTIME_DIR/collector, else /tmp/collector-<uid>",
    ("collector", "control"): "ipc://<runtime_dir>/control",
    ("connection", "publish"): "ipc://<runtime_dir>/<name>.pub",
    ("connection", "credentials"): "none",
}
"""What a default comes to that is no value of its own."""


def describe_default(table: str, name: str) -> str:
    """The default of a key, as TOML has it or in words."""
    default = KEYS[table][name].default
    if default is REQUIRED:
        return "required"
    return DEFAULTS.get((table, name)) or json.dumps(default)


def write_conditions() -> str:
    """Every condition that a pattern may have."""
    rows = ((f"`{key}`", " ".join(signs), f"`{example}`", words) for key, (signs, example, words) in CONDITIONS.items())
    return write_table(("condition", "signs", "example", "meaning"), rows)


def write_codes() -> str:
    """Every error code of the control channel."""
    return write_table(("code", "what it means to you"), ((f"`{code}`", words) for code, words in CODES.items()))


def write_exits() -> str:
    """Every exit code of a worker process."""
    return write_table(("code", "name", "meaning"), ((str(int(e)), f"`{e.name}`", describe_exit(e)) for e in Exit))


def write_faults() -> str:
    """Every fault of the practice exchange."""
    return f"```\n{print_command('exchange', '--list-faults')}\n```\n"


BLOCKS: Mapping[str, Callable[[], str]] = {
    "help": write_help,
    "commands": write_commands,
    "keys": write_keys,
    "conditions": write_conditions,
    "codes": write_codes,
    "exits": write_exits,
    "faults": write_faults,
}
"""Each block and what writes it."""


def regenerate(text: str) -> str:
    """A document with its blocks written anew."""
    return _BLOCK.sub(lambda found: f"{found[1]}{found[2]}\n{BLOCKS[found[1]]()}\n", text)


def main() -> None:
    """Write all documents anew."""
    for path in DOCUMENTS:
        text = path.read_text()
        fresh = regenerate(text)
        if fresh != text:
            path.write_text(fresh)
            print(f"wrote {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
