"""Where and how a process runs, and what it has used: read from outside, for all of its threads."""

import ctypes
import os
import time
from pathlib import Path
from typing import NamedTuple


class Place(NamedTuple):
    """CPUs: one for the measured program, one for all others; None leaves them to the system."""

    measured: int | None
    others: int | None


class Usage(NamedTuple):
    """What a process has used so far: CPU (user and system, ns) and context switches of all its threads."""

    cpu: int
    switches: int


def read_usage(pid: int) -> Usage:
    """Read it. The clock's number is made as clock_getcpuclockid(3) does."""
    switches = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        switches += sum(int(line.split()[1]) for line in status.read_text().splitlines() if "ctxt_switches" in line)
    return Usage(time.clock_gettime_ns(~pid << 3 | 2), switches)


def read_uss(pid: int) -> float:
    """Megabytes that only this process holds."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) / 1024


def read_peak_rss(pid: int) -> float:
    """Megabytes that it held resident at most."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def read_busy(cpu: int | None) -> int:
    """Nanoseconds that a CPU (None: all of them) has been busy or was taken by the hypervisor."""
    label = "cpu" if cpu is None else f"cpu{cpu}"
    line = next(line for line in Path("/proc/stat").read_text().splitlines() if line.split()[0] == label)
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, line.split()[1:9])
    return (user + nice + system + irq + softirq + steal) * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))


def pin(cpu: int | None, pid: int = 0) -> None:
    """Keep all threads of a process on one CPU; None leaves it where it is."""
    if cpu is not None:
        for thread in os.listdir(f"/proc/{pid or 'self'}/task"):
            os.sched_setaffinity(int(thread), {cpu})


def set_timer_slack(ns: int) -> None:
    """Let this thread's sleeps end on time (Linux adds 50 us otherwise)."""
    ctypes.CDLL(None).prctl(29, ns, 0, 0, 0)
