"""The rehearsal in the forkserver: a whole life of a worker, of which nothing is left but what Python keeps."""

import gc
import logging
import os
import ssl
import threading

import pytest

from collector.lifecycle import Exit
from workers.deribit.connection.socket import read_certificates
from workers.rehearsal import rehearse


def test_a_worker_lives_to_its_end_and_leaves_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    gc.collect()  # what other tests left behind is not closed while this one counts
    root = logging.getLogger()
    before, handlers = (threading.active_count(), len(os.listdir("/proc/self/fd"))), list(root.handlers)
    try:
        assert rehearse() is Exit.GAVE_UP
        assert root.handlers == []
    finally:
        root.handlers = handlers  # the test program's own
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
    assert capfd.readouterr() == ("", "")


def test_what_is_read_before_workers_are_forked_is_what_they_trust() -> None:
    assert read_certificates() == len(ssl.create_default_context().get_ca_certs())
