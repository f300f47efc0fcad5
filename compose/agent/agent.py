"""An agent: it is given a proxy, a CA and a token, and no key.

It does its work through Envoy, asks for more than it may, and tries to get past Envoy. Nothing of the broker is used here, only
what every Python has.

Ends with 0 where all went as it must, else with 1.
"""

import json
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

PAYMENTS = "https://payments.acme.example:8443"
WIKI = "http://envoy:15002/wiki"
TIMEOUT_S = 3.0

Row = tuple[str, str, str]  # what is tried, what must come of it, what came


def call(method: str, url: str, body: object = None, headers: dict[str, str] | None = None) -> str:
    """`allowed`, or the code of the denial; of a refused tunnel, and where nobody decided, no more than the status is seen."""
    content = json.dumps(body).encode() if body else None
    sent = Request(url, content, {"content-type": "application/json", **(headers or {})}, method=method)  # noqa: S310 - written below
    try:
        with urlopen(sent, timeout=10) as answer:  # noqa: S310 - the same
            return verdict(answer.read())
    except HTTPError as denied:
        said = denied.read()
        return str(json.loads(said)["code"]) if said else f"HTTP {denied.code}"
    except (URLError, OSError, HTTPException) as failed:
        return str(getattr(failed, "reason", failed))


def verdict(answer: bytes) -> str:
    """What an answer with a good status says: of MCP, a denial is a result that a model can read."""
    document = json.loads(answer)
    result = document.get("result", {})
    return str(json.loads(result["content"][0]["text"])["code"]) if result.get("isError") else "allowed"


def tool(name: str, **arguments: str) -> str:
    """A call of an MCP tool, at the base-url door."""
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": name, "arguments": arguments}}
    accepts = {"accept": "application/json, text/event-stream", "x-broker-token": os.environ["BROKER_TOKEN"]}
    return call("POST", WIKI, message, accepts)


def work() -> Iterable[Row]:
    """What it does through Envoy."""
    refund = f"{PAYMENTS}/v1/refunds"
    yield "refund 12.00", "allowed", call("POST", refund, {"charge": "ch_1", "amount": 1200})
    yield "refund 990.00", "params_invalid", call("POST", refund, {"charge": "ch_1", "amount": 99000})
    yield "delete a charge", "operation_not_declared", call("DELETE", f"{PAYMENTS}/v1/charges/ch_1")
    yield "search pages (MCP)", "allowed", tool("search_pages", query="refunds")
    yield "delete a page (MCP)", "operation_not_declared", tool("delete_page", page="home")
    yield "a host that nobody declared", "Tunnel connection failed: 403 Forbidden", call("GET", "https://evil.example/")


def connect(host: str, port: int) -> str:
    """A refusal is an answer too: somebody is there."""
    try:
        with socket.create_connection((host, port), TIMEOUT_S):
            return "REACHED"
    except ConnectionRefusedError:
        return "REACHED (refused)"
    except OSError:
        return "no way"


def resolve(name: str) -> str:
    """Whether anybody heard the question, by which data gets out too: that there is no such name is an answer."""
    try:
        return f"REACHED ({socket.gethostbyname(name)})"
    except socket.gaierror as failed:
        return "no way" if failed.errno == socket.EAI_AGAIN else f"REACHED ({failed.strerror})"


def ask_dns(server: str) -> str:
    """A name server, asked past the system's own."""
    question = struct.pack("!6H", 1, 0x0100, 1, 0, 0, 0) + b"\x04evil\x07example\x00" + struct.pack("!2H", 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.settimeout(TIMEOUT_S)
        try:
            asked.sendto(question, (server, 53))
            asked.recv(512)
        except ConnectionRefusedError:
            return "REACHED (refused)"
        except OSError:
            return "no way"
    return "REACHED"


def gateway() -> str:
    """Where the host would be: the first address of this network, whatever the routes say."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((socket.gethostbyname("envoy"), 9))
        return ".".join([*probe.getsockname()[0].split(".")[:3], "1"])


def past_envoy() -> Iterable[Row]:
    """What it tries without Envoy, all at once."""
    tries: list[tuple[str, Callable[[], str]]] = [
        ("the tool itself", lambda: connect("payments.acme.example", 8443)),
        ("Redis", lambda: connect("redis", 6379)),
        ("a processor's admin port", lambda: connect("processor-1", 15003)),
        ("the host", lambda: connect(gateway(), 22)),
        ("the internet", lambda: connect("1.1.1.1", 443)),
        ("the cloud's metadata", lambda: connect("169.254.169.254", 80)),
        ("a name, by the system", lambda: resolve("evil.example")),
        ("a name server", lambda: ask_dns("1.1.1.1")),
    ]
    with ThreadPoolExecutor(len(tries)) as pool:
        came = [pool.submit(attempt) for _, attempt in tries]
    return [(what, "no way", each.result()) for (what, _), each in zip(tries, came, strict=True)]


def equip() -> None:
    """What an agent is given: a proxy, a CA, and a token."""
    folder = Path(os.environ["AGENT_FOLDER"])
    os.environ["BROKER_TOKEN"] = token = (folder / "token").read_text()
    os.environ["HTTPS_PROXY"] = f"http://refund-bot:{token}@envoy:15001"
    os.environ["SSL_CERT_FILE"] = str(folder / "ca.pem")


def main() -> int:
    """Try everything and print what came of it."""
    equip()
    wrong = 0
    for title, rows in (("through Envoy", work()), ("past Envoy", past_envoy())):
        print(f"{title}\n")
        for what, must, came in rows:
            wrong += came != must
            print(f"  {what:<32} {came}" + ("" if came == must else f"   <- must be: {must}"))
        print()
    print("all as it must be" if not wrong else f"{wrong} not as it must be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
