"""`broker token NAME`: an agent's or a person's token, printed alone; or all of an agent's tokens taken back."""

from pathlib import Path

import click
import orjson

from broker import clock
from broker.admin.client import ask
from broker.cli import options
from broker.errors import UsageError
from broker.identity import MAX_OPERATOR_S, MAX_TOKEN_S, Person, TokenAuthority
from broker.keys import ed25519
from broker.state import State


@click.command()
@click.argument("name")
@options.state
@click.option("--ttl", type=click.IntRange(1, MAX_OPERATOR_S), help="Its life, in seconds: an hour at most, a person's twelve.")
@click.option("--revoke", is_flag=True, help="Take back every token of this agent that was issued until now.")
@click.option("--operator", is_flag=True, help="For the person NAME, who acts on agents and approvals over the admin API.")
@click.option("--group", "groups", multiple=True, metavar="GROUP", help="With --operator: a group that this person is in.")
@options.as_json
def token(
    *, name: str, state: Path, ttl: int | None, revoke: bool, operator: bool, groups: tuple[str, ...], as_json: bool
) -> None:
    """Print a token by which the broker knows the agent NAME."""
    folder = options.broker_state(state)
    authority = TokenAuthority(ed25519(folder.keys / "tokens.key"))
    if groups and not operator:
        raise UsageError("only people are in groups", "write --operator too")
    if operator and revoke:
        raise UsageError("an operator's tokens can't be taken back", "they end by themselves; give short ones with --ttl")
    if operator:
        made = authority.mint_operator(Person(name, groups), clock.now(), ttl := ttl or MAX_OPERATOR_S)
        document = {"operator": name, "groups": groups, "token": made, "expires_in": ttl}
        click.echo(orjson.dumps(document) if as_json else made)
        return
    if (ttl or 0) > MAX_TOKEN_S:
        raise UsageError(f"an agent's token lives {MAX_TOKEN_S} s at most", f"write --ttl {MAX_TOKEN_S}, or less")
    _refuse_unknown(folder, name)
    if revoke:
        options.act(folder, f"/agents/{name}/tokens/revoke", {}, lambda held, me: held.revoke_tokens(name, me))
        click.echo(orjson.dumps({"agent": name, "revoked": "tokens"}) if as_json else f"the tokens of {name} no longer count")
        return
    made = authority.mint(name, clock.now(), ttl := ttl or MAX_TOKEN_S)
    click.echo(orjson.dumps({"agent": name, "token": made, "expires_in": ttl}) if as_json else made)


def _refuse_unknown(folder: State, name: str) -> None:
    """A running broker knows who takes tokens; without one, a token is judged when it is used."""
    answer = ask(folder.control_socket, "GET", f"/agents/{name}")
    if answer is None:
        click.echo(f"no broker runs on {folder.root}: whether a manifest names {name!r} was not checked", err=True)
        return
    if "token" not in answer:
        raise UsageError(f"no manifest names an agent {name!r}", "see `broker agents list`")
    if not answer["token"]:
        raise UsageError(f"the manifest of {name!r} takes no tokens", "write `token: true` under its identity")
