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
import secrets
import signal
from asyncio.subprocess import PIPE
from typing import Annotated, Any, ClassVar

import orjson
from pydantic import AfterValidator, Field

from broker.credentials.base import CredentialUnavailable, Lease, Occasion, Secret, leased
from broker.credentials.settings import Issued, bare, bounded, document, granted, lifetime, parsed, scopes_of
from broker.manifest.models import Model, Seconds, Word, refusal
from broker.redaction import redacted

log = logging.getLogger(__name__)

_SHOWN = 2000


def _whole(command: tuple[str, ...]) -> tuple[str, ...]:
    if not "".join(command[:1]).startswith("/"):
        raise refusal("it begins with no file; write the whole path, such as /usr/local/bin/issue")
    return command


class ExecSettings(Issued):
    """A command that makes a credential."""

    command: Annotated[tuple[Annotated[str, Field(pattern=r"^[^\x00]{1,4096}$")], ...], AfterValidator(_whole)] = Field(
        description="The command and its arguments; its file by the whole path. No shell reads it."
    )
    timeout: Seconds = Field(5, description="How long it may take, 5s unless given.")
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
            said = err.decode(errors="replace").replace(
                credential if isinstance(credential, str) and credential else "\0", "[redacted]"
            )
            log.warning("%s says: %s", what, ascii(redacted(said[:_SHOWN])))
        if status:
            raise CredentialUnavailable(f"{what} ended with {status}", "see what it said in the broker's log")
        token = bare(credential, self.name)
        scopes = granted(answer.get("scopes"), tuple(told["scopes"]), self.name)
        expires = now + lifetime(answer.get("expires_in"), settings.ttl, self.name)
        return leased(occasion.spec, f"exec-{secrets.token_hex(8)}", token, scopes=scopes, expires=expires)

    async def revoke(self, handle: Secret) -> None:
        """Nothing: there is no contract for it, and no lease of it has a handle."""


async def _run(settings: ExecSettings, told: bytes, what: str) -> tuple[int, bytes, bytes]:
    """Exit status, stdout and stderr."""
    environment = {name: os.environ[name] for name in ("PATH", *settings.environment) if name in os.environ}
    try:
        process = await asyncio.create_subprocess_exec(
            *settings.command, env=environment, cwd="/", start_new_session=True, stdin=PIPE, stdout=PIPE, stderr=PIPE
        )
    except OSError as error:
        raise CredentialUnavailable(
            f"{what} can't be started ({error.strerror})", "name a file that the broker may execute"
        ) from None
    try:
        async with asyncio.timeout(settings.timeout):
            return await _talked(process, told)
    except TimeoutError:
        raise CredentialUnavailable(f"{what} took longer than {settings.timeout} s", "see what it waits for") from None
    except ValueError:  # of `bounded`, or of the stream for one long line
        raise CredentialUnavailable(f"{what} writes too much", "let it write one JSON object") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _talked(process: asyncio.subprocess.Process, told: bytes) -> tuple[int, bytes, bytes]:
    assert process.stdin and process.stdout and process.stderr  # noqa: PT018, S101 - they are pipes
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it need not read
        process.stdin.write(told)
        process.stdin.close()
    out, err = await asyncio.gather(bounded(process.stdout), bounded(process.stderr))
    return await process.wait(), out, err
