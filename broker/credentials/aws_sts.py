"""`aws-sts`: a session of an AWS role that is narrowed to the operation's policy, by which requests are signed.

Laws: a session carries the agent's name (source identity) and tags of agent, tool, team and run, which a policy may refer to and
CloudTrail shows. Its secret key never travels: each request is signed. AWS's clock counts. A session can't be taken back, so none
is asked for that is longer than it may be used; AWS gives none under 15 minutes.
https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html
"""

import asyncio
import hashlib
import re
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self
from urllib.parse import urlencode
from xml.etree import ElementTree as ET

import orjson
from pydantic import Field, JsonValue, model_validator

from broker.credentials.base import CredentialUnavailable, Lease, Occasion, Outgoing, Secret, referenced
from broker.credentials.http import Answer, ask
from broker.credentials.settings import Issued, Lifetime, bare, chosen, lifetime, parsed
from broker.manifest.words import Model, Reference, Url, Word, refusal

if TYPE_CHECKING:
    from broker.credentials.sigv4 import Signer

_SHORTEST_S = 900
# AWS takes a signature for five minutes; a clock that is off by less needs no second try.
_SKEW_S = 60
_FORM = ("content-type", "application/x-www-form-urlencoded; charset=utf-8")


class SessionPolicy(Model):
    """What a session may do, of what its role may."""

    policy: dict[str, JsonValue] = Field(min_length=1, description="An IAM policy; it may refer to ${aws:PrincipalTag/agent}.")


class AwsStsSettings(Issued):
    """A role, and who the broker is to assume it."""

    role: Annotated[str, Field(pattern=r"^arn:aws[a-z-]*:iam::[0-9]{12}:role/[\w+=,.@/-]+$")] = Field(
        description="The role's ARN."
    )
    external_id: Word | None = Field(None, description="The external ID that the role's trust policy wants.")
    access_key: Reference | None = Field(None, description="An access key ID; with secret. AWS's own chain of sources if absent.")
    secret: Reference | None = Field(None, description="The secret access key.")
    sts: Url | None = Field(None, description="The URL of STS; that of the region if absent.")
    ttl: Annotated[Lifetime, Field(ge=_SHORTEST_S)] | None = Field(None, description="How long a session lives, such as 15m.")
    scopes: SessionPolicy | Annotated[dict[Word, SessionPolicy], Field(min_length=1)] = Field(  # type: ignore[assignment]  # its own
        description="The session's policy; or, by an operation's name or an effect, one for each."
    )

    @model_validator(mode="after")
    def _whole_key(self) -> Self:
        if (self.access_key is None) != (self.secret is None):
            raise refusal("a key has two parts; write access_key and secret, or neither")
        return self


class AwsStsSource:
    """Assumes roles."""

    name: ClassVar[str] = "aws-sts"
    Settings: ClassVar[type[Model]] = AwsStsSettings

    def __init__(self) -> None:
        # botocore waits in threads: one of our own, so that nobody else waits with it.
        self._thread = ThreadPoolExecutor(1, "aws-credentials")
        self._session: Any = None

    def narrowed(self, occasion: Occasion) -> tuple[str, ...]:
        """The digest of the policy, and the run that the session is tagged with."""
        digest = hashlib.sha256(_policy(occasion)).hexdigest()[:16]
        return (f"policy:{digest}", *([f"run:{occasion.run_id}"] if occasion.run_id else []))

    async def fetch(self, occasion: Occasion, now: float) -> Lease:
        """A session, and the signer with its keys."""
        settings, tool = parsed(AwsStsSettings, occasion.spec.settings), occasion.tool.name
        if occasion.spec.sigv4 is None:
            raise CredentialUnavailable(f"nothing says what the keys of {tool!r} sign", "write as: {sigv4: {service, region}}")
        wanted, (service, region) = _wanted(settings, occasion), occasion.spec.sigv4
        thread = None if settings.access_key else self._thread
        signer = await asyncio.get_running_loop().run_in_executor(thread, self._base, settings, tool, region)
        answer = await _ask(settings, signer, wanted, now)
        if not answer.ok and answer.date and abs(answer.date - now) > _SKEW_S:
            answer = await _ask(settings, signer, wanted, answer.date)
        told = _read(answer)
        if not answer.ok:
            raise _refused(answer.status, told.get("Code"), occasion)
        life = _checked(answer, told, settings, wanted)
        key, token = Secret(bare(told.get("SecretAccessKey"), self.name)), Secret(bare(told.get("SessionToken"), self.name))
        # What is signed later is signed by AWS's clock, as this answer tells it.
        access_key, ahead = bare(told.get("AccessKeyId"), self.name), (answer.date or now) - now
        sign = replace(signer, access_key=access_key, secret_key=key, token=token, service=service, ahead=ahead)
        lease_id, scopes = f"{self.name}-{secrets.token_hex(8)}", self.narrowed(occasion)
        return Lease(lease_id, self.name, "authorization", token, scopes, now + life, (key, token), sign)

    async def revoke(self, handle: Secret) -> None:
        """Never asked: no lease has a handle."""

    def _base(self, settings: AwsStsSettings, tool: str, region: str) -> "Signer":
        """The signer with the broker's own keys. In a thread: who uses AWS first waits a quarter of a second for botocore."""
        from broker.credentials.sigv4 import Signer  # noqa: PLC0415 - nobody else waits for it when the broker starts

        key: tuple[str, str, str | None]
        if settings.access_key:
            key = (referenced(settings.access_key, tool), referenced(settings.secret, tool), None)
        else:
            key = self._chain()
        return Signer(key[0], Secret(key[1]), Secret(key[2]) if key[2] else None, "sts", region)

    def _chain(self) -> tuple[str, str, str | None]:
        """What AWS's chain finds: environment, files, web identity, container, instance. It refreshes by itself."""
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 - as above
        from botocore.session import Session  # noqa: PLC0415 - as above

        try:
            self._session = self._session or Session()
            if found := self._session.get_credentials():
                keys = found.get_frozen_credentials()
                return keys.access_key, keys.secret_key, keys.token
        except (BotoCoreError, ClientError) as error:
            what = f"AWS's chain of credentials failed ({type(error).__name__})"
            raise CredentialUnavailable(what, "see the broker's AWS configuration") from None
        what = "AWS's chain has no credentials for the broker"
        raise CredentialUnavailable(what, "give the broker a role, or write access_key and secret")


def _policy(occasion: Occasion) -> bytes:
    return orjson.dumps(chosen(occasion.spec.settings["scopes"], occasion, "policy")["policy"])


def _wanted(settings: AwsStsSettings, occasion: Occasion) -> dict[str, str]:
    """The parameters of AssumeRole."""
    agent, tool = occasion.agent, occasion.tool.name
    duration = min(settings.ttl or 3600, occasion.max_ttl)
    if duration < _SHORTEST_S:
        what = f"AWS gives no session under 15 minutes, and the platform lets a credential live for {duration} s"
        raise CredentialUnavailable(what, "raise the platform's credentials.max_ttl, or use another issuer")
    # A session's name has two letters at least, an agent's may have one.
    wanted = {"Version": "2011-06-15", "RoleArn": settings.role, "RoleSessionName": f"{agent.name}@{tool}"[:64]}
    wanted |= {
        "Action": "AssumeRole",
        "SourceIdentity": agent.name,
        "DurationSeconds": str(duration),
        "Policy": _policy(occasion).decode(),
    }
    tags = {"agent": agent.name, "tool": tool, "team": re.sub(r"[^\w .:/=+@-]", "_", agent.owner), "run": occasion.run_id}
    for number, (key, value) in enumerate(tags.items(), 1):
        wanted |= {f"Tags.member.{number}.Key": key, f"Tags.member.{number}.Value": value}
    return wanted | ({"ExternalId": settings.external_id} if settings.external_id else {})


async def _ask(settings: AwsStsSettings, signer: "Signer", wanted: dict[str, str], at: float) -> Answer:
    domain = "amazonaws.com.cn" if signer.region.startswith("cn-") else "amazonaws.com"
    url = f"{(settings.sts or f'https://sts.{signer.region}.{domain}').rstrip('/')}/"
    content = urlencode(wanted).encode()
    headers = {name: value.reveal() for name, value in signer(Outgoing("POST", url, (_FORM,), content), at)}
    return await ask("POST", url, headers=dict([_FORM]) | headers, content=content)


def _read(answer: Answer) -> dict[str, str]:
    """The texts in the answer by their elements' names, which are different ones."""
    try:
        root = ET.fromstring(answer.content)  # noqa: S314 - AWS's own, bounded; expat bounds what entities grow to
    except ET.ParseError:
        raise _unusable("is no XML") from None
    return {element.tag.rpartition("}")[2]: (element.text or "").strip() for element in root.iter()}


def _checked(answer: Answer, told: dict[str, str], settings: AwsStsSettings, wanted: dict[str, str]) -> float:
    """The seconds that the session has left, if it is the one that was asked for."""
    account, role = settings.role.split(":")[4], settings.role.rpartition("/")[2]
    arn = told.get("Arn", "").split(":")
    if arn[4:] != [account, f"assumed-role/{role}/{wanted['RoleSessionName']}"]:
        raise _unusable("is a session of another role or name, and it is not used")
    if told.get("SourceIdentity", wanted["SourceIdentity"]) != wanted["SourceIdentity"]:
        raise _unusable("is a session of another source identity, and it is not used")
    life = lifetime(answer.left(told.get("Expiration")), None, AwsStsSource.name)
    if life > int(wanted["DurationSeconds"]) + _SKEW_S:
        raise _unusable("is a session that is longer than was asked for, and it is not used")
    return life


def _unusable(why: str) -> CredentialUnavailable:
    return CredentialUnavailable(f"the answer of STS {why}", "see that `sts`, if written, is AWS's")


_KEYS = "see that the broker's AWS keys are valid, and its clock right"
_REMEDIES = {
    "AccessDenied": "allow the broker sts:AssumeRole, sts:SetSourceIdentity and sts:TagSession, in the role's trust policy too",
    "ExpiredTokenException": _KEYS,
    "InvalidClientTokenId": _KEYS,
    "SignatureDoesNotMatch": _KEYS,
    "MalformedPolicyDocument": "correct scopes.policy",
    "PackedPolicyTooLarge": "shorten scopes.policy",
    "RegionDisabledException": "activate STS in this region in the role's account",
    "ValidationError": "see that ttl is not longer than the role's sessions, and scopes.policy has at most 2048 characters",
}


def _refused(status: int, code: str | None, occasion: Occasion) -> CredentialUnavailable:
    known = f" {code}" if code in _REMEDIES else ""
    what = f"STS refuses a session for {occasion.tool.name!r} (status {status}{known})"
    return CredentialUnavailable(what, _REMEDIES.get(code or "", "see AWS's documentation of AssumeRole"))
