"""`exec`: a command makes the credential: one JSON object on its stdin, one on its stdout.

    stdin   {"agent": "bot", "spiffe": "…", "tool": "crm", "operation": "tickets.get", "scopes": [], "ttl": 3600, "pins": {}}
    stdout  {"credential": "…", "expires_in": 600, "scopes": []}

Laws: no shell, an environment of what is named, answers of bounded size. When its time is over, or it has ended, its whole
process group is killed. What it writes on stderr goes to the log without its credential; nothing else that it writes is shown.
"""

import asyncio
import contextlib
import logging
import os
import signal
from typing import Annotated, Any, ClassVar

import orjson
from pydantic import AfterValidator, Field

from broker.credentials.base import CredentialUnavailable, Lease, Occasion, Secret, leased
from broker.credentials.settings import MAX_ANSWER, Issued, bare, document, granted, lifetime, parsed, scopes_of
from broker.manifest.words import Model, Seconds, Word, refusal
from broker.redaction import redacted

log = logging.getLogger(__name__)

_TIMEOUT_S, _SHOWN = 5, 2000


def _whole(command: tuple[str, ...]) -> tuple[str, ...]:
    if not "".join(command[:1]).startswith("/"):
        raise refusal("it begins with no file; write the whole path, such as /usr/local/bin/issue")
    return command


class ExecSettings(Issued):
    """A command that makes a credential."""

    command: Annotated[tuple[Annotated[str, Field(pattern=r"^[^\x00]{1,4096}$")], ...], AfterValidator(_whole)] = Field(
        description="The command and its arguments; its file by the whole path. No shell reads it."
    )
    timeout: Seconds | None = Field(None, description="How long it may take, 5s unless given.")
    environment: tuple[Word, ...] = Field((), description="Names of the broker's variables that it gets, beside PATH.")


class ExecSource:
    """Runs the command once for each lease."""

    name: ClassVar[str] = "exec"
    Settings: ClassVar[type[Model]] = ExecSettings

    def narrowed(self, occasion: Occasion) -> tuple[str, ...]:
        """All that the command is told and may narrow by."""
        return (orjson.dumps(self._told(occasion), option=orjson.OPT_SORT_KEYS).decode(),)

    def _told(self, occasion: Occasion) -> dict[str, Any]:
        operation, settings = occasion.operation, occasion.spec.settings
        return {
            "agent": occasion.agent.name,
            "spiffe": occasion.agent.spiffe,
            "tool": occasion.tool.name,
            "operation": operation.name if operation else None,
            "scopes": scopes_of(settings.get("scopes"), occasion),
            "ttl": min(settings.get("ttl") or occasion.max_ttl, occasion.max_ttl),
            "pins": dict(occasion.pins),
        }

    async def fetch(self, occasion: Occasion, now: float) -> Lease:
        """What the command answers."""
        settings, told = parsed(ExecSettings, occasion.spec.settings), self._told(occasion)
        what = f"the command of {occasion.tool.name!r}"
        status, out, err = await _run(settings, orjson.dumps(told), what)
        answer = document(out)
        credential = answer.get("credential")
        if err:
            hidden = credential if isinstance(credential, str) and credential else "\0"
            said = err.decode(errors="replace").replace(hidden, "[redacted]")
            log.warning("%s says: %s", what, ascii(redacted(said[:_SHOWN])))
        if status:
            raise CredentialUnavailable(f"{what} ended with {status}", "see what it said in the broker's log")
        token = bare(credential, self.name)
        scopes = granted(answer.get("scopes"), tuple(told["scopes"]), self.name)
        expires = now + lifetime(answer.get("expires_in"), settings.ttl, self.name)
        return leased(occasion.spec, token, scopes=scopes, expires=expires)

    async def revoke(self, handle: Secret) -> None:
        """Nothing: there is no contract for it, and no lease of it has a handle."""


async def _run(settings: ExecSettings, told: bytes, what: str) -> tuple[int | None, bytes, bytes]:
    """Exit status, stdout and stderr."""
    environment = {name: os.environ[name] for name in ("PATH", *settings.environment) if name in os.environ}
    start = asyncio.get_running_loop().subprocess_exec
    try:
        process, talk = await start(_Talk, *settings.command, env=environment, cwd="/", start_new_session=True)
    except OSError as error:
        raise CredentialUnavailable(
            f"{what} can't be started ({error.strerror})", "name a file that the broker may execute"
        ) from None
    try:
        process.get_pipe_transport(0).write(told)  # type: ignore[union-attr]  # the pipe of stdin
        process.get_pipe_transport(0).close()  # type: ignore[union-attr]
        async with asyncio.timeout(settings.timeout or _TIMEOUT_S):
            await talk.ended
        return process.get_returncode(), talk.said[1], talk.said[2]
    except TimeoutError:
        raise CredentialUnavailable(
            f"{what} took longer than {settings.timeout or _TIMEOUT_S} s", "see what it waits for"
        ) from None
    except ValueError:
        raise CredentialUnavailable(f"{what} writes too much", "let it write one JSON object") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.get_pid(), signal.SIGKILL)
        await talk.exited.wait()
        process.close()


class _Talk(asyncio.SubprocessProtocol):
    """What a command says. It has ended when it exited and nobody holds its pipes."""

    def __init__(self) -> None:
        self.said = {1: b"", 2: b""}
        self.exited = asyncio.Event()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.said[fd] += data
        if len(self.said[fd]) > MAX_ANSWER and not self.ended.done():
            self.ended.set_exception(ValueError("too long"))

    def process_exited(self) -> None:
        self.exited.set()

    def connection_lost(self, _: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)
