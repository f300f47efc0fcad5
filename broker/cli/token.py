"""`broker token NAME`: an agent token, printed alone; or all of an agent's tokens taken back."""

from pathlib import Path

import click
import orjson

from broker import clock
from broker.admin.client import ask
from broker.audit.log import AuditLog
from broker.audit.record import revocation_record
from broker.cli import options
from broker.errors import UsageError
from broker.identity import MAX_TOKEN_S, TokenAuthority
from broker.keys import ed25519
from broker.state import State


@click.command()
@click.argument("name")
@options.state
@click.option("--ttl", type=click.IntRange(1, MAX_TOKEN_S), default=MAX_TOKEN_S, show_default=True, help="Its life, in seconds.")
@click.option("--revoke", is_flag=True, help="Take back every token of this agent that was issued until now.")
@options.as_json
def token(*, name: str, state: Path, ttl: int, revoke: bool, as_json: bool) -> None:
    """Print a token with which the agent NAME proves itself to the broker."""
    folder = options.broker_state(state)
    _refuse_unknown(folder, name)
    if revoke:
        _revoke(folder, name)
        click.echo(orjson.dumps({"agent": name, "revoked": "tokens"}) if as_json else f"the tokens of {name} no longer count")
        return
    made = TokenAuthority(ed25519(folder.keys / "tokens.key")).mint(name, clock.now(), ttl)
    click.echo(orjson.dumps({"agent": name, "token": made, "expires_in": ttl}) if as_json else made)


def _refuse_unknown(folder: State, name: str) -> None:
    """A running broker knows who takes tokens; without one, a token is judged when it is used."""
    answer = ask(folder.control_socket, "GET", f"/agents/{name}")
    if answer is None:
        click.echo(f"no broker runs on {folder.root}: whether a manifest names {name!r} was not checked", err=True)
        return
    if "token" not in answer:
        raise UsageError(f"no manifest names an agent {name!r}", "see `broker check` for the agents' files")
    if not answer["token"]:
        raise UsageError(f"the manifest of {name!r} takes no tokens", "write `token: true` under its identity")


def _revoke(folder: State, name: str) -> None:
    if ask(folder.control_socket, "POST", f"/agents/{name}/tokens/revoke") is not None:
        return
    # No broker runs, so the log is free: the revocation is in force when the next one starts.
    now = clock.now()
    with AuditLog(folder.audit, ed25519(folder.keys / "audit.key"), now, clock.mono_ns()) as log:
        record = revocation_record(now, clock.mono_ns(), {"name": name}, "tokens revoked by an operator")
        log.append({**record, "revoked": {"tokens_until": now}})
        log.sync(now)
