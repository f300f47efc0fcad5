"""`github-app`: an installation token of a GitHub App, with the operation's permissions and for the pinned repositories only.

Laws: the App's key signs statements of ten minutes and never leaves; GitHub's clock counts, for those and for the token's end. A
token that may do more than was asked for is not used.
https://docs.github.com/rest/apps/apps#create-an-installation-access-token-for-an-app
"""

import secrets
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import quote

import httpx
import jwt
import orjson
from pydantic import Field

from broker.credentials.ask import Answer, Url, ask
from broker.credentials.base import CredentialUnavailable, Lease, Occasion, Secret, leased, referenced
from broker.credentials.settings import Issued, chosen, parsed, problems
from broker.manifest.models import Model, Word
from broker.manifest.models import Secret as Reference

# The most that GitHub takes is ten minutes; it asks to begin a minute back, for clocks that differ.
_JWT_S, _BACK_S = 540, 60
_LEVELS = ("read", "write", "admin")


class Permissions(Model):
    """What a token may do."""

    permissions: dict[Word, Literal["read", "write", "admin"]] = Field(
        min_length=1, description="The App's permissions by GitHub's names, such as {issues: write}."
    )


class Settings(Issued):
    """A GitHub App, and where it is installed."""

    secret: Reference = Field(description="The App's private key (PEM).")
    app: Word = Field(description="The App's client ID, or its ID in quotes.")
    installation: int | None = Field(None, gt=0, description="The installation's ID; found by the owner if absent.")
    owner: Word | None = Field(
        None, description="The organisation or user that installed the App; if absent, the only `owner` that the manifest allows."
    )
    api: Url = Field("https://api.github.com", description="The API's URL; https://HOST/api/v3 for GitHub Enterprise Server.")
    scopes: Permissions | Annotated[dict[Word, Permissions], Field(min_length=1)] = Field(  # type: ignore[assignment]  # its own
        description="The permissions, of which operations that read get only read; or, by an operation's name or an effect, exactly "
        "its permissions."
    )


class GithubAppSource:
    """Asks GitHub for tokens, and deletes them."""

    name: ClassVar[str] = "github-app"
    Settings = Settings

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    @staticmethod
    def check(settings: Mapping[str, object]) -> list[str]:
        """As `Settings` says."""
        return problems(Settings, settings, GithubAppSource.name)

    def narrowed(self, occasion: Occasion) -> tuple[str, ...]:
        """`issues:write` for each permission, `owner=acme` and `repo=web` for each pin."""
        pins = (f"{word}={value}" for word in ("owner", "repo") for value in occasion.pins.get(word, ()))
        return (*sorted(f"{name}:{level}" for name, level in _permissions(occasion).items()), *pins)

    async def fetch(self, occasion: Occasion, now: float) -> Lease:
        """A token; GitHub gives each an hour."""
        answer = await self._token(occasion, now)
        if answer.status == httpx.codes.UNAUTHORIZED and answer.date and abs(answer.date - now) > _BACK_S:
            # Our clock differs from GitHub's, which refuses a JWT of another time.
            answer = await self._token(occasion, answer.date)
        if answer.status != httpx.codes.CREATED:
            raise _refused(answer, occasion)
        token, life = _checked(answer, occasion)
        handle = Secret(orjson.dumps([self._api(occasion), token]).decode())
        lease_id = f"{self.name}-{secrets.token_hex(8)}"
        return leased(occasion.spec, lease_id, token, scopes=self.narrowed(occasion), expires=now + life, handle=handle)

    async def revoke(self, handle: Secret) -> None:
        """Delete the token. One that GitHub no longer knows has ended."""
        api, token = orjson.loads(handle.reveal())
        answer = await self._ask("DELETE", f"{api}/installation/token", token)
        if answer.status not in (httpx.codes.NO_CONTENT, httpx.codes.UNAUTHORIZED):
            raise CredentialUnavailable(f"GitHub did not delete a token (status {answer.status})", "see GitHub's status page")

    async def _token(self, occasion: Occasion, at: float) -> Answer:
        settings = parsed(Settings, occasion.spec.settings)
        statement, installation = _statement(settings, occasion.tool.name, at), settings.installation
        if installation is None:
            owner = quote(settings.owner or _pinned_owner(occasion), safe="")
            # What GitHub describes for users it answers for organisations too.
            answer = await self._ask("GET", f"{settings.api}/users/{owner}/installation", statement)
            if answer.status != httpx.codes.OK:
                return answer
            installation = answer.fields().get("id")
            if type(installation) is not int:
                raise answer.unusable("names no installation")
        wanted: dict[str, Any] = {"permissions": _permissions(occasion)}
        if repositories := occasion.pins.get("repo"):
            wanted["repositories"] = list(repositories)
        url = f"{settings.api}/app/installations/{installation}/access_tokens"
        return await self._ask("POST", url, statement, orjson.dumps(wanted))

    async def _ask(self, method: str, url: str, token: str, content: bytes | None = None) -> Answer:
        headers = {
            "authorization": f"Bearer {token}",
            "accept": "application/vnd.github+json",
            "x-github-api-version": "2022-11-28",
        }
        return await ask(self._client, "GitHub", method, url, headers=headers, content=content)

    @staticmethod
    def _api(occasion: Occasion) -> str:
        return parsed(Settings, occasion.spec.settings).api


def _permissions(occasion: Occasion) -> dict[str, str]:
    scopes = occasion.spec.settings["scopes"]
    if "permissions" not in scopes:
        return dict(chosen(scopes, occasion)["permissions"])
    reads = occasion.operation is None or occasion.operation.effect == "read"
    return {name: "read" if reads else level for name, level in scopes["permissions"].items()}


def _pinned_owner(occasion: Occasion) -> str:
    owners = occasion.pins.get("owner", ())
    if len(owners) != 1:
        what = f"where the GitHub App of {occasion.tool.name!r} is installed is not said"
        raise CredentialUnavailable(what, "write its installation or owner, or pin one owner in the manifest")
    return owners[0]


def _statement(settings: Settings, tool: str, at: float) -> str:
    claims = {"iss": settings.app, "iat": int(at) - _BACK_S, "exp": int(at) + _JWT_S}
    try:
        return jwt.encode(claims, referenced(settings.secret, tool), algorithm="RS256")
    except (ValueError, TypeError, jwt.PyJWTError):
        what = f"the private key of the GitHub App of {tool!r} is no RSA key in PEM"
        raise CredentialUnavailable(what, "put the file there that GitHub made, unchanged") from None


def _checked(answer: Answer, occasion: Occasion) -> tuple[str, float]:
    """The token and the seconds that it has left, if it is no wider than asked for."""
    told = answer.fields()
    try:
        token, permissions = str(told["token"]), {str(name): _LEVELS.index(level) for name, level in told["permissions"].items()}
        ends = datetime.fromisoformat(told["expires_at"])
        names = {str(repository["full_name"]).lower() for repository in told.get("repositories", ())}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise answer.unusable("is no installation token") from None
    # Every token may read what is public of a repository.
    asked = {"metadata": 0} | {name: _LEVELS.index(level) for name, level in _permissions(occasion).items()}
    if any(level > asked.get(name, -1) for name, level in permissions.items()):
        raise answer.unusable("is a token with more permissions than were asked for, and it is not used")
    pinned = {name.lower() for name in occasion.pins.get("repo", ())}
    if pinned and (told.get("repository_selection") != "selected" or not {name.rpartition("/")[2] for name in names} <= pinned):
        raise answer.unusable("is a token for more repositories than were asked for, and it is not used")
    if answer.date is None or ends.tzinfo is None:
        raise answer.unusable("does not say what time it is")
    if (life := ends.timestamp() - answer.date) <= 0:
        raise answer.unusable("is a token that has ended already")
    return token, life


_REMEDIES = {
    401: "see that `app` is the App's ID and `secret` its private key, and that neither was deleted there",
    403: "see whether the installation is suspended, or an IP allow list keeps the broker out",
    404: "see that the App is installed there, and correct `installation` or `owner`",
    422: "give the App these permissions and have the change accepted where it is installed; add the pinned repositories there",
}


def _refused(answer: Answer, occasion: Occasion) -> CredentialUnavailable:
    asked = ", ".join(sorted(f"{name}: {level}" for name, level in _permissions(occasion).items()))
    what = f"GitHub refuses a token for {occasion.tool.name!r} with {asked} (status {answer.status})"
    return CredentialUnavailable(what, _REMEDIES.get(answer.status, "see GitHub's documentation of installation tokens"))
