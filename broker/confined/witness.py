"""The witness: listens on this machine, at its own addresses and on its loopback, and counts what comes.

Law: it must hear before it is believed. What it counted is what got out, whatever anybody inside says.
"""

import contextlib
import socket
import threading
from collections.abc import Iterator

from broker.confined.probes import is_public
from broker.errors import BrokerError

_ANY = {socket.AF_INET: ("127.0.0.1", "192.0.2.1"), socket.AF_INET6: ("::1", "2001:db8::1")}  # loopback; RFC 5737, RFC 3849
_PATIENCE_S = 2.0


class Witness:
    """Listens at one port, TCP and UDP. `addresses` are those of this machine; `heard` is how often somebody came."""

    def __init__(self) -> None:
        self.heard, self._open = 0, contextlib.ExitStack()
        self._came = threading.Condition()
        self.addresses = tuple(_addresses())
        self.port = 0
        for family, (loopback, _) in _ANY.items():
            for address in (loopback, *(each for each in self.addresses if (":" in each) == (family == socket.AF_INET6))):
                with contextlib.suppress(OSError):  # a machine without IPv6
                    self._listen(family, address)

    def _listen(self, family: int, address: str) -> None:
        stream = self._open.enter_context(socket.socket(family, socket.SOCK_STREAM))
        stream.bind((address, self.port))
        self.port = stream.getsockname()[1]
        datagrams = self._open.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        datagrams.bind((address, self.port))
        stream.listen()
        for work in (self._accept, self._answer):
            threading.Thread(target=work, args=(stream if work == self._accept else datagrams,), daemon=True).start()

    def _count(self) -> None:
        with self._came:
            self.heard += 1
            self._came.notify_all()

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                listening.accept()[0].close()
                self._count()

    def _answer(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                said, who = listening.recvfrom(64)
                self._count()
                listening.sendto(said, who)

    def checked(self) -> "Witness":
        """Itself, once it has heard this process. Raises `BrokerError` where it does not."""
        socket.create_connection(("127.0.0.1", self.port), _PATIENCE_S).close()
        with self._came:
            if not self._came.wait_for(lambda: self.heard, _PATIENCE_S):
                raise BrokerError("the witness does not hear what is sent to it", "see what a firewall does to the loopback")
            self.heard = 0
        return self

    def close(self) -> None:
        """Stop listening."""
        self._open.close()


def _addresses() -> Iterator[str]:
    """The machine's own address of each family, by which it would go out; nothing is sent."""
    for family, (_, outside) in _ANY.items():
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((outside, 9))
            if is_public(own := probe.getsockname()[0]):
                yield own
