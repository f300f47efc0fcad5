"""A name server that says what a test has it say, and remembers what it was asked: for names that change their address."""

import socket
import struct
import threading
from contextlib import suppress
from ipaddress import ip_address

_TYPES = {1: 4, 28: 6}  # A, AAAA: the version of the address


class NameServer:
    """Answers from `addresses`, each name's own; `asked` are the names of all queries. TTL 1 s."""

    def __init__(self, listening: socket.socket) -> None:
        self.addresses: dict[str, tuple[str, ...]] = {}
        self.asked: list[str] = []
        self._socket = listening
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            query, who = self._socket.recvfrom(512)
            if not query:
                return
            with suppress(OSError):  # who asked is gone
                self._socket.sendto(self._answer(query), who)

    def _answer(self, query: bytes) -> bytes:
        labels, at = [], 12
        while length := query[at]:
            labels.append(query[at + 1 : at + 1 + length].decode().lower())
            at += 1 + length
        name, (kind,) = ".".join(labels), struct.unpack("!H", query[at + 1 : at + 3])
        self.asked.append(name)
        wanted = [each for each in map(ip_address, self.addresses.get(name, ())) if each.version == _TYPES.get(kind)]
        code = 0 if name in self.addresses else 3
        records = b"".join(struct.pack("!HHHIH", 0xC00C, kind, 1, 1, len(each.packed)) + each.packed for each in wanted)
        return query[:2] + struct.pack("!HHHHH", 0x8180 | code, 1, len(wanted), 0, 0) + query[12 : at + 5] + records

    def close(self) -> None:
        """Ends the thread first: one that waits at a closed socket may go on at whatever gets its number next."""
        with suppress(OSError):  # it isn't connected; who waits is woken all the same
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()
