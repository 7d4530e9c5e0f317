"""`collector verify`: read for a while, check every rule of the wire, say what was found."""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import click

from collector.cli import Command
from collector.cli.options import (
    Ending,
    control_option,
    endpoint_option,
    exit_on_error,
    exit_unread,
    for_option,
    json_option,
)
from collector.client.subscriber import Subscriber
from collector.client.verify import RULES, Finding, Verifier
from collector.words import printable, say_count

EXAMPLES = 5
"""Findings that are shown of each rule."""

ALWAYS = ("deribit.heartbeat.", "deribit.status.")


@click.command(cls=Command)
@click.argument("prefixes", metavar="[PREFIX]...", nargs=-1)
@for_option("60s")
@endpoint_option
@control_option
@json_option
def verify(
    prefixes: tuple[str, ...], duration: float, endpoints: tuple[str, ...], control: str | None, as_json: bool
) -> None:
    """Check every message of the topics that begin with a PREFIX (all, if none is given) against the wire's rules.

    They ask whether losses are announced, not whether there are none.
    Ends with 1 if a rule is broken, or if nothing came for one of the PREFIXes. A rule for which no message came is not
    checked, and said to be so: that alone is no fault.
    """
    ending = Ending()
    wanted = (*prefixes, *ALWAYS) if prefixes else ("",)
    with exit_on_error(), Subscriber(endpoints or None, wanted, control, on_loss="report") as subscriber:
        verdict = Verdict(prefixes or ("",))
        verdict.read(subscriber, duration, ending.has_come)
        code = 0 if verdict.is_good else 1
        with exit_unread(code):
            if as_json:
                click.echo(json.dumps(verdict.to_map()))
            else:
                verdict.print()
        sys.exit(code)


class Verdict:
    """What a verifier found, with the first findings of each rule."""

    def __init__(self, prefixes: tuple[str, ...]) -> None:
        self.verifier = Verifier()
        self.prefixes = prefixes
        self.examples: dict[str, list[Finding]] = {}
        self.seconds = 0.0
        self._asked = 0

    def read(self, subscriber: Subscriber, duration: float, is_ended: Callable[[], bool]) -> None:
        """Check what comes for so long, or until Ctrl-C or SIGTERM, of which `is_ended` too may be the only sign."""
        start = time.monotonic()
        began = self._asked = time.monotonic_ns()
        there = subscriber.found.keys() - subscriber.lifeless
        with suppress(KeyboardInterrupt):  # the verdict so far is still worth having
            self._check_until(start + duration, subscriber, is_ended)
        for name in subscriber.found.keys() & there:
            self.verifier.expect(name, began)
        # Not by now: if this was stopped over its end (Ctrl-Z), what came meanwhile waits unread.
        self._keep(self.verifier.finish(self._asked))
        self.seconds = time.monotonic() - start

    def _check_until(self, end: float, subscriber: Subscriber, is_ended: Callable[[], bool]) -> None:
        """Apart from the `with` of its caller: Python 3.13 heeds a signal between two rounds of a loop outside it."""
        while (rest := end - time.monotonic()) > 0 and not is_ended():
            self._asked = time.monotonic_ns()
            frames = subscriber.receive_frames(min(rest, 1.0))
            if frames is not None:
                now, steady = time.time_ns(), time.monotonic_ns()
                self._keep(self.verifier.check(*frames, now_ns=now, steady_ns=steady))

    def _keep(self, findings: list[Finding]) -> None:
        for finding in findings:
            examples = self.examples.setdefault(finding.rule, [])
            if len(examples) < EXAMPLES:
                examples.append(finding)

    @property
    def is_good(self) -> bool:
        """Whether all was right, and something came for each prefix."""
        return not self.silent and not self.verifier.wrong

    @property
    def silent(self) -> list[str]:
        """The prefixes for which nothing came."""
        topics = [str(topic) for topic in self.verifier.topics]
        return [prefix for prefix in self.prefixes if not any(topic.startswith(prefix) for topic in topics)]

    @property
    def unchecked(self) -> list[str]:
        """The rules that nothing put to the test."""
        checked = self.verifier.count_checks()
        return [rule for rule in RULES if not checked[rule] and not self.verifier.wrong[rule]]

    def to_map(self) -> dict[str, object]:
        """The verdict for programs."""
        checked = self.verifier.count_checks()
        return {
            "ok": self.is_good,
            "seconds": round(self.seconds, 3),
            "messages": self.verifier.messages,
            "topics": len(self.verifier.topics),
            "rules": {rule: {"checked": checked[rule], "broken": self.verifier.wrong[rule]} for rule in RULES},
            "unchecked": self.unchecked,
            "healing": self.verifier.count_missing()[0],
            "missing": self.verifier.count_missing()[1],
            "silent": self.silent,
            "findings": [finding._asdict() for findings in self.examples.values() for finding in findings],
        }

    def print(self) -> None:
        """The verdict for a person."""
        checked, wrong = self.verifier.count_checks(), self.verifier.wrong
        for rule, meaning in RULES.items():
            mark, color = ("ok", "green") if checked[rule] else ("not checked", "yellow")
            if wrong[rule]:
                mark, color = f"{wrong[rule]:,} broken", "red"
            click.echo(f"{rule:9}  {checked[rule]:11,} checked  {click.style(mark.rjust(14), fg=color)}  {meaning}")
            for finding in self.examples.get(rule, []):
                click.echo(f"    {printable(f'{finding.topic}: {finding.text}')}")
        types = Counter(topic.type for topic in self.verifier.topics)
        topics = ", ".join(f"{count} {name}" for name, count in sorted(types.items()))
        click.echo(
            f"{say_count(self.verifier.messages, 'message')} in {self.seconds:.1f} s"
            f" on {say_count(len(self.verifier.topics), 'topic')}" + (f" ({topics})" if topics else "")
        )
        healing, missing = self.verifier.count_missing()
        if healing or missing:
            told = f"{say_count(missing, 'trade')} missing for good, {say_count(healing, 'gap')} without repair so far"
            click.echo(f"Announced, so no fault: {told}.")
        if self.is_good and self.unchecked:
            click.secho(f"Every rule that could be checked holds. Nothing came for: {', '.join(self.unchecked)}.")
        elif self.is_good:
            click.secho("Every rule holds.", fg="green")
        for prefix in self.silent:
            where = f" on topics that begin with {prefix!r}" if prefix else ""
            advice = "is the prefix right?" if prefix else "does a collector publish at these endpoints?"
            click.echo(f"collector: nothing came{where}; {advice}", err=True)
        if wrong:
            times = say_count(sum(wrong.values()), "time")
            click.echo(f"collector: {say_count(len(wrong), 'rule')} broken, {times}", err=True)
