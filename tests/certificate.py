"""A certificate of our own for this machine: what a server over TLS needs, and whom its clients have to trust."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HAS_OPENSSL = shutil.which("openssl") is not None


def make_certificate(folder: Path) -> str:
    """The path of one file with certificate and key; SSL_CERT_FILE may name it too. Needs openssl."""
    key, certificate, both = (folder / name for name in ("key.pem", "certificate.pem", "both.pem"))
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", f"{key}", "-out", f"{certificate}"]
    subprocess.run([*make, *names], check=True, capture_output=True)
    both.write_text(key.read_text() + certificate.read_text())
    return str(both)


@contextmanager
def trusted(certificate: str) -> Iterator[None]:
    """Have this process, and those that it starts, trust a certificate and no other."""
    before = os.environ.get("SSL_CERT_FILE")
    os.environ["SSL_CERT_FILE"] = certificate
    try:
        yield
    finally:
        if before is None:
            del os.environ["SSL_CERT_FILE"]
        else:
            os.environ["SSL_CERT_FILE"] = before
