"""Network namespaces for tests. Where none can be made, tests that need one skip, and say why."""

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

_CLONE_NEWNET = 0x40000000
_numbers = count()


def ip(*words: str) -> None:
    """ip(8)."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def namespace(*programs: str) -> Iterator[str]:
    """The name of a new one, its loopback device up; `programs` are those that the test needs beside ip(8)."""
    if missing := [name for name in ("ip", *programs) if not shutil.which(name)]:
        pytest.skip(f"{', '.join(missing)} is not installed (apt-get install nftables iproute2 util-linux)")
    if os.geteuid():
        pytest.skip("only root can make network namespaces")
    name = f"broker-{os.getpid()}-{next(_numbers)}"
    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made here: {error.stderr.strip()}")
    try:
        ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        ip("netns", "delete", name)


def within(name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives in a network namespace: a socket stays in the one that it was made in (network_namespaces(7))."""
    found: list[Any] = []

    def run() -> None:
        with Path(f"/run/netns/{name}").open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        try:
            found.append(make())
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], OSError):
        raise found[0]
    return found[0]
