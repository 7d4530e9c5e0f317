"""The log of every process: one line a record on stderr, with the time (UTC), the level and who says it."""

import logging
import sys
import time


class _Line(logging.Formatter):
    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def formatMessage(self, record: logging.LogRecord) -> str:
        # What the exchange or a client wrote may stand in a record; it must not look like a record of its own.
        record.message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in record.message)
        return super().formatMessage(record)


def start_log(name: str, level: str) -> None:
    """Send this process's log to stderr under `name`, from `level` (debug, info, warning, error) upwards."""
    writer = logging.StreamHandler(sys.stderr)
    writer.setFormatter(_Line(f"%(asctime)s %(levelname)-7s {name}: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[writer], force=True)
