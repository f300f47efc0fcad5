"""`github-app`: an installation token of a GitHub App, with the operation's permissions and for the pinned repositories only.

Laws: the App's key signs statements of ten minutes and never leaves; GitHub's clock counts, for those and for the token's end. A
token that may do more than was asked for is not used.
https://docs.github.com/rest/apps/apps#create-an-installation-access-token-for-an-app
"""

from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import quote

import jwt
import orjson
from pydantic import Field

from broker.credentials.base import CredentialUnavailable, Lease, Occasion, Secret, leased, referenced
from broker.credentials.http import Answer, Roots, ask
from broker.credentials.settings import Issued, bare, chosen, lifetime, parsed
from broker.manifest.words import Model, Reference, Url, Word

# The most that GitHub takes is ten minutes; it asks to begin a minute back, for clocks that differ.
_JWT_S, _BACK_S = 540, 60
_CREATED, _UNAUTHORIZED = 201, 401
_LEVELS = ("read", "write", "admin")


class Permissions(Model):
    """What a token may do."""

    permissions: dict[Word, Literal["read", "write", "admin"]] = Field(
        min_length=1, description="The App's permissions by GitHub's names, such as {issues: write}."
    )


class GithubAppSettings(Issued):
    """A GitHub App, and where it is installed."""

    secret: Reference = Field({"env": "GITHUB_APP_PRIVATE_KEY"}, description="The App's private key (PEM).")
    app: Word | Reference = Field(  # type: ignore[assignment]  # of a union's dict, a literal key is text to mypy
        {"env": "GITHUB_APP_ID"}, description="The App's client ID, or its ID in quotes; or where it is found."
    )
    installation: int | None = Field(None, gt=0, description="The installation's ID; found by the owner if absent.")
    owner: Word | None = Field(
        None, description="The organisation or user that installed the App; if absent, the only `owner` that the manifest allows."
    )
    api: Url = Field("https://api.github.com", description="The API's URL; https://HOST/api/v3 for GitHub Enterprise Server.")
    ca: Roots | None = None
    scopes: Permissions | Annotated[dict[Word, Permissions], Field(min_length=1)] = Field(  # type: ignore[assignment]  # its own
        description="The permissions, of which operations that read get only read; or, by an operation's name or an effect, "
        "exactly its permissions."
    )


class GithubAppSource:
    """Asks GitHub for tokens, and deletes them."""

    name: ClassVar[str] = "github-app"
    Settings: ClassVar[type[Model]] = GithubAppSettings

    def narrowed(self, occasion: Occasion) -> tuple[str, ...]:
        """`issues:write` for each permission, `owner=acme` and `repo=web` for each pin."""
        pins = (f"{word}={value}" for word in ("owner", "repo") for value in occasion.pins.get(word, ()))
        return (*sorted(f"{name}:{level}" for name, level in _permissions(occasion).items()), *pins)

    async def fetch(self, occasion: Occasion, now: float) -> Lease:
        """A token; GitHub gives each an hour."""
        settings = parsed(GithubAppSettings, occasion.spec.settings)
        answer = await _token(settings, occasion, now)
        if answer.status == _UNAUTHORIZED and answer.date and abs(answer.date - now) > _BACK_S:
            # Our clock differs from GitHub's, which refuses a JWT of another time.
            answer = await _token(settings, occasion, answer.date)
        if answer.status != _CREATED:
            raise _refused(answer, occasion)
        token, life = _checked(answer, occasion)
        handle = Secret(orjson.dumps([settings.api, settings.ca, token]).decode())
        return leased(occasion.spec, token, scopes=self.narrowed(occasion), expires=now + life, handle=handle)

    async def revoke(self, handle: Secret) -> None:
        """Delete the token. One that GitHub no longer knows has ended."""
        api, ca, token = orjson.loads(handle.reveal())
        answer = await _ask("DELETE", f"{api}/installation/token", token, ca)
        if not (answer.ok or answer.status == _UNAUTHORIZED):
            raise CredentialUnavailable(f"GitHub did not delete a token (status {answer.status})", "see GitHub's status page")


async def _token(settings: GithubAppSettings, occasion: Occasion, at: float) -> Answer:
    statement, installation = _statement(settings, occasion.tool.name, at), settings.installation
    if installation is None:
        owner = quote(settings.owner or _pinned_owner(occasion), safe="")
        # What GitHub describes for users it answers for organisations too.
        answer = await _ask("GET", f"{settings.api}/users/{owner}/installation", statement, settings.ca)
        installation = answer.document.get("id")
        if not answer.ok or type(installation) is not int:
            return answer
    wanted: dict[str, Any] = {"permissions": _permissions(occasion)}
    if repositories := occasion.pins.get("repo"):
        wanted["repositories"] = list(repositories)
    url = f"{settings.api}/app/installations/{installation}/access_tokens"
    return await _ask("POST", url, statement, settings.ca, wanted)


async def _ask(method: str, url: str, token: str, ca: Roots | None, body: object = None) -> Answer:
    headers = {"authorization": f"Bearer {token}", "accept": "application/vnd.github+json", "x-github-api-version": "2022-11-28"}
    return await ask(method, url, headers=headers, body=body, ca=ca)


def _permissions(occasion: Occasion) -> dict[str, str]:
    scopes = occasion.spec.settings["scopes"]
    wanted = chosen(scopes, occasion, "permissions")
    only_reads = wanted is scopes and (occasion.operation is None or occasion.operation.effect == "read")
    return {name: "read" if only_reads else level for name, level in wanted["permissions"].items()}


def _pinned_owner(occasion: Occasion) -> str:
    owners = occasion.pins.get("owner", ())
    if len(owners) != 1:
        what = f"where the GitHub App of {occasion.tool.name!r} is installed is not said"
        raise CredentialUnavailable(what, "write its installation or owner, or pin one owner in the manifest")
    return owners[0]


def _statement(settings: GithubAppSettings, tool: str, at: float) -> str:
    app = settings.app if isinstance(settings.app, str) else referenced(settings.app, tool)
    claims = {"iss": app, "iat": int(at) - _BACK_S, "exp": int(at) + _JWT_S}
    try:
        return jwt.encode(claims, referenced(settings.secret, tool), algorithm="RS256")
    except (ValueError, TypeError, jwt.PyJWTError):
        what = f"the private key of the GitHub App of {tool!r} is no RSA key in PEM"
        raise CredentialUnavailable(what, "put the file there that GitHub made, unchanged") from None


def _checked(answer: Answer, occasion: Occasion) -> tuple[str, float]:
    """The token and the seconds that it has left, if it is no wider than asked for."""
    told = answer.document
    try:
        permissions = {str(name): _LEVELS.index(level) for name, level in told["permissions"].items()}
        names = {repository["full_name"].lower().rpartition("/")[2] for repository in told.get("repositories", ())}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _unusable("is no installation token") from None
    # Every token may read what is public of a repository.
    asked = {"metadata": 0} | {name: _LEVELS.index(level) for name, level in _permissions(occasion).items()}
    if any(level > asked.get(name, -1) for name, level in permissions.items()):
        raise _unusable("is a token with more permissions than were asked for, and it is not used")
    pinned = {name.lower() for name in occasion.pins.get("repo", ())}
    if pinned and (told.get("repository_selection") != "selected" or not set() < names <= pinned):
        raise _unusable("is a token for more repositories than were asked for, and it is not used")
    issuer = GithubAppSource.name
    return bare(told.get("token"), issuer), lifetime(answer.left(told.get("expires_at")), None, issuer)


def _unusable(why: str) -> CredentialUnavailable:
    return CredentialUnavailable(f"GitHub's answer {why}", "see that `api` is GitHub's")


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
