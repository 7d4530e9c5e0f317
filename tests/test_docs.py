"""The documents say what is true: their tables are the code's, their examples run, what they name exists."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from inspect import getdoc
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from collector import OrderBook, Subscriber, __version__
from collector.client.rules.everywhere import CHANNEL_STATES, CONNECTION_STATES
from collector.config import load_config
from collector.config.keys import KEYS
from collector.messages import CODES, OPS
from collector.schema import ENVELOPE, KINDS, SCHEMA
from tests.generated import BLOCKS, DOCUMENTS, describe_default, regenerate
from tests.pipeline import ask, find_port, short_directory
from tests.support import REPOSITORY, Program, collector, running, wait_until
from workers.deribit.publishing.ledger import RECORD, STEP, Ledger

README = REPOSITORY / "README.md"
DOCS = REPOSITORY / "docs"
TEXTS = {str(path.relative_to(REPOSITORY)): path.read_text() for path in DOCUMENTS}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def find_code(language: str) -> list[Any]:
    """Every block of code in that language, named by its document."""
    return [
        pytest.param(found[2], id=f"{name}:{text[: found.start()].count(chr(10)) + 1}")
        for name, text in TEXTS.items()
        for found in FENCE.finditer(text)
        if found[1] == language
    ]


def find_examples(*classes: type) -> list[Any]:
    """The example of each class: the indented lines of its docstring, which imports nothing."""
    texts = {each.__name__: (getdoc(each) or "").splitlines() for each in classes}
    examples = {name: [line[4:] for line in lines if line.startswith("    ")] for name, lines in texts.items()}
    imports = ["import collections", "from collector import *"]
    return [pytest.param("\n".join([*imports, *lines]), id=name) for name, lines in examples.items()]


def read_table(document: Path, *head: str) -> list[list[str]]:
    """The rows of every table of a document that has such a head, each cell without its backticks."""
    rows: list[list[str]] = []
    inside = False
    for line in document.read_text().splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")] if line.startswith("|") else []
        inside = cells == list(head) if not inside else bool(cells)
        if inside and cells != list(head) and set(cells[0]) != {"-"}:
            rows.append(cells)
    assert rows, f"{document.name} has no table with the head {head}"
    return rows


# What stands in the documents is what the code says.


@pytest.mark.parametrize("name", TEXTS)
def test_parts_taken_from_the_code_are_up_to_date(name: str) -> None:
    assert TEXTS[name] == regenerate(TEXTS[name]), f"{name}: write it anew with: python -m tests.generated"


def test_every_generated_part_is_used() -> None:
    named = {name for text in TEXTS.values() for name in re.findall(r"<!-- generated: ([a-z]+) -->", text)}
    assert named == set(BLOCKS)


def test_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 350


def test_readme_tells_every_type_and_key() -> None:
    rows = read_table(README, "type", "from the channels", "further keys (`?`: may be absent)")
    told = {kind: keys.split(", ") if keys != "what Deribit sends" else [] for kind, _, keys in rows}
    assert told == {kind: list(keys) for kind, keys in SCHEMA.items()}
    envelope = [row[0] for row in read_table(README, "key", "meaning")]
    assert envelope == list(ENVELOPE)


def test_wire_page_tells_every_key_and_its_value() -> None:
    told: dict[str, dict[str, str]] = {}
    for kind, key, value, _ in read_table(DOCS / "wire.md", "type", "key", "value", "meaning"):
        if kind:
            keys = told.setdefault(kind, {})
        else:
            keys[key] = value
    assert told == {kind: dict(keys) for kind, keys in SCHEMA.items()}
    envelope = read_table(DOCS / "wire.md", "key", "value", "meaning")
    assert {key: value for key, value, _ in envelope} == dict(ENVELOPE)


def test_wire_page_tells_every_value_reason_and_state() -> None:
    page = DOCS / "wire.md"
    assert [row[0] for row in read_table(page, "value", "what it is")] == list(KINDS)
    reasons = [row[0] for row in read_table(page, "reason of a gap", "what happened")]
    assert sorted(reasons) == ["disconnect", "overflow", "restart", "sequence"]
    assert all(map(KINDS["gap reason"], reasons))
    states = [row[0] for row in read_table(page, "state", "meaning")]
    assert sorted(states) == sorted([*CHANNEL_STATES, *CONNECTION_STATES])


@pytest.mark.parametrize("page", [README, DOCS / "control.md"], ids=lambda page: page.name)
def test_control_tables_tell_every_op(page: Path) -> None:
    assert [row[0] for row in read_table(page, "op", "arguments", "result")] == list(OPS)


def test_comparison_names_only_what_there_is() -> None:
    page = DOCS / "coming-from-websockexnova.md"
    for _, ours, _ in read_table(page, "zen_websocket, default", "here, default", "remark"):
        if " = " in ours:
            name, default = ours.split(" = ")
            assert default.removesuffix(" s").strip("`") == describe_default("connection", name)
        elif re.fullmatch(r"[a-z_]+", ours):
            assert ours in {*KEYS["connection"], "always", "none"}
    errors = read_table(page, "zen_websocket", "control code here", "in workers.deribit")
    codes = {match[1] for row in errors if (match := re.match(r"(\w+)(?:`|$)", row[1]))}
    assert codes
    assert codes <= set(CODES)


def test_log_lines_are_those_of_the_code() -> None:
    paths = [path for folder in ("collector", "workers") for path in (REPOSITORY / folder).rglob("*.py")]
    code = re.sub(r'"\s+f?"', "", "\n".join(path.read_text() for path in paths))  # a string in two parts is one
    for line, *_ in read_table(DOCS / "operating.md", "line", "level", "meaning", "what to do"):
        told = re.sub(r"\bN (?:channels|messages)\b|\b[A-Z]{2,}\b", "\n", line)  # what is another each time
        missing = [phrase for phrase in re.findall(r"[a-z_][a-z_' ]*[a-z]", told) if phrase not in code]
        assert not missing, f"{line}: no log line has {missing}"


def test_every_error_in_the_log_is_told() -> None:
    rows = read_table(DOCS / "operating.md", "line", "level", "meaning", "what to do")
    told = " ".join(line for line, level, *_ in rows if "error" in level or "critical" in level)
    for path in (path for folder in ("collector", "workers") for path in (REPOSITORY / folder).rglob("*.py")):
        for text in re.findall(
            r'(?:log\.(?:error|critical|exception)\(|_fail\(Exit\.\w+,)\s*f?"([^"]*)"', path.read_text()
        ):
            phrases = re.findall(r"[a-z][a-z' ]*[a-z]", re.sub(r"%[.\d]*[a-z]|{.*?}", "\n", text))
            assert not phrases or any(phrase in told for phrase in phrases), f"{path.name}: {text}"


@pytest.mark.parametrize("name", TEXTS)
def test_each_part_taken_from_the_code_has_one_end(name: str) -> None:
    assert TEXTS[name].count("<!-- end -->") == TEXTS[name].count("<!-- generated: ")


def test_size_of_a_ledger_is_as_told(tmp_path: Path) -> None:
    told = re.search(
        r"`ls -l` shows (\d+) MB,.*? takes (\d+) KiB at first, and\nthen (\d+) bytes", TEXTS["docs/operating.md"], re.S
    )
    assert told is not None
    Ledger(tmp_path / "a.ledger", fresh=True).close()
    length = (tmp_path / "a.ledger").stat().st_size
    assert [int(number) for number in told.groups()] == [length // 1_000_000, STEP * RECORD // 1024, RECORD]


def test_make_targets_are_told() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    told = {row[0].removeprefix("make ") for row in read_table(README, "target", "what it does")}
    assert told <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert told >= set(re.findall(r"^([a-z-]+):.*##", makefile, re.MULTILINE))


def test_changelog_tells_of_this_version() -> None:
    newest = re.search(r"^## (\S+)", TEXTS["CHANGELOG.md"], re.MULTILINE)
    assert newest is not None
    assert newest[1] == __version__


# What is named exists.


def find_anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", TEXTS[name])):
        path, _, anchor = target.partition("#")
        found = (REPOSITORY / name).parent / path if path else REPOSITORY / name
        assert found.exists(), target
        if anchor:
            assert anchor in find_anchors(found.read_text()), target


@pytest.mark.parametrize("name", TEXTS)
def test_paths_exist(name: str) -> None:
    for path in re.findall(r"`((?:configs|collector|workers|tests|docs)/[\w/.-]+)`", TEXTS[name]):
        assert (REPOSITORY / path).exists(), path


# What is shown works.


@pytest.mark.parametrize("code", find_code("toml"))
def test_configurations_are_taken(code: str, tmp_path: Path) -> None:
    assert tomllib.loads(code)
    file = tmp_path / "shown.toml"
    file.write_text(code)
    assert load_config(file, {}).connections


def test_refusal_is_as_shown(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('[[connection]]\nname = "futures"\nurl = "practice"\ntimeout = 5000\n')
    shown = re.search(r"\$ collector plan mine.toml\n(.*)\n", TEXTS["docs/configuration.md"])
    assert shown is not None
    done = subprocess.run(
        collector("plan", "mine.toml"), cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30
    )
    assert (done.returncode, done.stderr.strip()) == (2, shown[1])


@pytest.mark.parametrize("code", find_code("javascript"))
def test_javascript_is_well_formed(code: str, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node on this machine")
    file = tmp_path / "shown.mjs"
    file.write_text(code)
    subprocess.run([node, "--check", str(file)], check=True, timeout=30)


def test_libraries_of_other_languages_are_those_that_are_tested() -> None:
    rows = read_table(
        DOCS / "subscribing.md",
        "language", "program", "ZeroMQ", "MessagePack", "tested on", "endpoints",
    )  # fmt: skip
    manifests = {"go": "go.mod", "rust": "Cargo.lock", "java": "pom.xml", "node": "package.json"}
    told = {row[1].split("/")[2]: row[2:4] for row in rows}
    assert set(told) == set(manifests)
    for folder, libraries in told.items():
        text = (REPOSITORY / "tests" / "interop" / folder / manifests[folder]).read_text().lower()
        for library in libraries:
            name, version = library.lower().split()[:2]
            assert re.search(rf"{name}\W+(artifactid\W+)?(version\W+)?v?{re.escape(version)}\W", text), library


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[str, dict[str, Any]]]:
    """The demo as a process, with ports of its own: its control endpoint, and its states by connection."""
    text = (REPOSITORY / "configs" / "demo.toml").read_text()
    with short_directory() as directory:
        for port in ("5601", "5602"):
            text = text.replace(f":{port}", f":{find_port()}")
        file = directory / "demo.toml"
        file.write_text(f'{text}\n[collector]\nruntime_dir = "{directory}/run"\n')
        control = f"ipc://{directory}/run/control"
        with running(*collector("run", str(file))) as program:
            program.wait_line("control on")

            def find_live() -> dict[str, Any] | None:
                states: dict[str, Any] = ask(control, "get_state")
                live = all(state["state"] == "live" for state in states.values())
                return states if live and len(states) == 2 else None

            yield control, wait_until(find_live, "two live connections")
            program.process.terminate()
            assert program.wait_exit() == 0


def test_state_map_is_as_told(demo: tuple[str, dict[str, Any]]) -> None:
    told = [row[0] for row in read_table(DOCS / "control.md", "key", "meaning")]
    assert set(told) == set(demo[1]["futures"])


BOOK = "deribit.book.BTC-PERPETUAL."


def record(control: str, path: Path) -> int:
    """Keep some messages as the documents do it; return a time amid those of the book."""
    shown = re.search(r"^collector tail --for 1h (.*) > messages\.jsonl", TEXTS["docs/subscribing.md"], re.MULTILINE)
    assert shown is not None
    command = collector("tail", "--control", control, "--count", "300", *shown[1].split())
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60)
    path.write_text(done.stdout)
    times: list[int] = [row["receive_ts"] for row in map(json.loads, done.stdout.splitlines()) if BOOK in row["topic"]]
    return times[-2]


@pytest.mark.parametrize("code", [*find_code("python"), *find_examples(Subscriber, OrderBook)])
def test_python_examples_run(code: str, demo: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    control, states = demo
    compile(code, "shown", "exec")
    code = code.replace("tcp://127.0.0.1:5601", states["futures"]["publish"])
    code = code.replace("wss://www.deribit.com/ws/api/v2", states["futures"]["url"])
    if "messages.jsonl" in code:
        code = re.sub(r"at=\d[\d_]*", f"at={record(control, tmp_path / 'messages.jsonl')}", code)
    file = tmp_path / "shown.py"
    file.write_text(code)
    with running(sys.executable, str(file), env={"COLLECTOR_CONTROL": control}, cwd=tmp_path) as program:
        if "while True" in code or " in subscriber:" in code:
            wait_until(lambda: len(program.out) >= 3 or program.process.poll() is not None, "three lines")
        else:
            assert program.wait_exit() == 0, program.text()
        assert program.out[:1] not in ([], ["None"]), program.text()
        assert "Traceback" not in program.text(), program.text()


def test_check_of_a_kept_file_sees_what_is_not_in_it(demo: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "messages.jsonl"
    record(demo[0], file)
    (code,) = (shown.values[0] for shown in find_code("python") if "Verifier" in shown.values[0])

    def check() -> list[str]:
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
            check=True, timeout=30,
        ).stdout.splitlines()  # fmt: skip

    assert check() == ["300 messages, 0 findings"]
    lines = file.read_text().splitlines(keepends=True)
    dropped = [number for number, line in enumerate(lines) if BOOK in line][-2]
    file.write_text("".join(lines[:dropped] + lines[dropped + 1 :]))
    findings = check()
    assert findings[0].startswith(f"BROKEN sequence {BOOK}100ms message "), findings
    assert findings[-1] == "299 messages, 1 findings"


def test_reader_in_bare_python_tells_what_was_lost_and_nothing_else() -> None:
    (code,) = (shown.values[0] for shown in find_code("python") if "seen = {}" in shown.values[0])
    topics = {kind: f"deribit.{kind}.A.raw" for kind in ("trade", "heartbeat")}
    stream: list[tuple[str, str, int, int, dict[str, Any]]] = [
        ("trade", "status", 1, 7, {"join": True, "state": "live"}),  # it comes late: nothing was lost
        ("heartbeat", "heartbeat", 1, 90, {}),
        ("trade", "status", 2, 1, {"state": "recovering"}),  # and had no data yet
        ("heartbeat", "heartbeat", 2, 1, {}),
        ("trade", "trade", 2, 2, {}),
        ("trade", "gap", 3, 1, {"reason": "restart"}),
        ("trade", "trade", 3, 2, {}),
        ("trade", "repair", 3, 3, {"missing": []}),
        ("trade", "status", 2, 9, {"state": "closed"}),  # late words of another one
        ("trade", "trade", 3, 6, {}),
        ("trade", "repair", 3, 7, {"missing": [[4, 5]]}),
        ("trade", "status", 4, 3, {"join": True, "state": "live"}),
        ("trade", "trade", 4, 4, {}),
    ]
    with zmq.Context() as context, context.socket(zmq.XPUB) as publisher:
        publisher.linger = 0
        code = code.replace(
            "tcp://127.0.0.1:5601", f"tcp://127.0.0.1:{publisher.bind_to_random_port('tcp://127.0.0.1')}"
        )
        with running(sys.executable, "-u", "-c", code.replace('"deribit.trade."', '"deribit."')) as program:
            assert publisher.poll(20_000)
            for topic, kind, epoch, seq, more in stream:
                payload = {"type": kind, "epoch": epoch, "seq": seq, "price": 1.0, "amount": 2.0, **more}
                publisher.send_multipart([topics[topic].encode(), msgpack.packb(payload)])
            wait_until(lambda: f"{topics['trade']} 4 1.0 2.0" in program.out, "the last trade")
            told = [line.replace(topics["trade"], "T") for line in program.out]
    assert told == [
        "trade on it only while live: T live",
        "trade on it only while live: T recovering",
        "T 2 1.0 2.0",
        "GAP T restart",
        "T 2 1.0 2.0",
        "LOST on the way to this program: T 4 to 5",
        "T 6 1.0 2.0",
        "these trades stay missing: T [[4, 5]]",
        "LOST on the way to this program: T 1 to 3",
        "trade on it only while live: T live",
        "NEW EPOCH, no gap: anything may be missing before T 4",
        "T 4 1.0 2.0",
    ]


def run_until_end(arguments: tuple[str, ...], **variables: str) -> int:
    """Run the collector until it ends by itself; return its exit code."""
    program = Program(*collector(*arguments), env=variables)
    try:
        return program.wait_exit()
    finally:
        program.end()


def test_exit_codes_are_as_told(demo: tuple[str, dict[str, Any]]) -> None:
    told = [row[0] for row in read_table(README, "code", "when")]
    assert told == ["0", "1", "2", "3", "129", "130", "143"]
    control, states = demo
    runtime_dir = control.removeprefix("ipc://").removesuffix("/control")
    table = f'[[connection]]\nname = "a"\nurl = "{states["futures"]["url"]}"\n'
    with short_directory() as directory:
        file = directory / "a.toml"
        file.write_text(f'[collector]\nruntime_dir = "{runtime_dir}"\n{table}')
        assert run_until_end(("run", str(file))) == 1  # the demo runs there already
        file.write_text(f'[collector]\nruntime_dir = "{directory}/run"\n{table}credentials = "KEY"\n')
        assert run_until_end(("run", str(file))) == 2  # there is no key
        assert run_until_end(("run", str(file)), KEY_CLIENT_ID="a", KEY_CLIENT_SECRET="b") == 3
    assert run_until_end(("state", "--control", control)) == 0
    assert run_until_end(("close", "nobody", "--control", control)) == 1
    assert run_until_end(("state", "--nonsense")) == 2


# What is shipped.


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel and the source distribution."""
    directory = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(directory)]
    subprocess.run(command, cwd=REPOSITORY, env=dict(os.environ), check=True, capture_output=True, timeout=60)
    return directory


def test_wheel_holds_the_two_packages_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    information = f"deribit_collector-{__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"collector", "workers", information}
    assert f"{information}/licenses/LICENSE" in names
    assert all(name.endswith((".py", ".typed")) for name in names if not name.startswith(information))


def test_source_distribution_holds_license_and_documents(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    assert names >= {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "configs/demo.toml", "docs/wire.md"}
    assert not [name for name in names if name.startswith((".venv", "build/", ".git/"))]
