"""`python -m tests.faults [--cases N] [--seed S] [--programs M]`: run cases, print progress and one line at the end."""

import argparse
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import count

from tests.certificate import HAS_OPENSSL
from tests.faults.programs import SCENARIOS, SLOW, run_round
from tests.faults.pure import run_case


def main() -> int:
    """Run what is asked for; 1 if a case failed."""
    options = read_options()
    if options.only is not None:
        found = run_case(options.only, verbose=True)
        print("".join(f"{text}\n" for text in found), end="")
        return report(1, {f"--only {options.only}": found} if found else {})
    began, done, failed = time.monotonic(), 0, {}
    total = options.cases + options.programs
    for name, complaints in run_all(options.seed, options.cases, options.programs):
        done += 1
        if complaints:
            failed[name] = complaints
            print(f"{name} failed:", *(text[-1000:] for text in complaints[:5]), sep="\n    ", flush=True)
        if done % max(1, total // 20) == 0:
            print(f"{done} of {total} cases, {len(failed)} failed, {time.monotonic() - began:.0f} s", flush=True)
    return report(done, failed)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="seeded cases of frames, connections and lives")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--only", type=int, help="run this case alone; print what was received, and what is wrong")
    parser.add_argument("--programs", type=int, default=48, help="cases with the real programs, a round at a time")
    return parser.parse_args()


def run_all(seed: int, cases: int, programs: int) -> Iterator[tuple[str, list[str]]]:
    """Run all cases; give the name of each and what is wrong."""
    with ProcessPoolExecutor(2) as pool:
        seeds = range(seed, seed + cases)
        found = pool.map(run_case, seeds, chunksize=8)
        for each, complaints in zip(seeds, found, strict=True):
            yield f"--only {each}", complaints
    done = 0
    for number in count():
        if done >= programs:
            return
        tls = HAS_OPENSSL and number % 2 == 1
        ended = run_round(seed + done, SCENARIOS + SLOW, tls)
        for name, complaints in list(ended.items())[: programs - done]:
            done += 1
            yield f"program {name}{' over TLS' if tls else ''}", complaints


def report(done: int, failed: dict[str, list[str]]) -> int:
    """Print the last line; return the exit code."""
    print(f"{done} cases, {len(failed)} failed" + "".join(f"\n  {name}" for name in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
