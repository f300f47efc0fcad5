"""An authorization server: Authlib's endpoints and grants behind a loopback port, and a token exchange built on Authlib's base.

Authlib has no RFC 8693, so `_Exchange` is written here from its sections 2.1 and 2.2. All else that judges is Authlib's.
"""
# ruff: noqa: ARG002 - Authlib says what its hooks are given

import json
import os
import secrets
import ssl
import threading
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl

import jwt
from authlib.oauth2.rfc6749 import (
    AuthorizationServer,
    BaseGrant,
    ClientCredentialsGrant,
    ClientMixin,
    InvalidRequestError,
    OAuth2Request,
    TokenEndpointMixin,
)
from authlib.oauth2.rfc6749.errors import InvalidGrantError, OAuth2Error
from authlib.oauth2.rfc6749.requests import BasicOAuth2Payload
from authlib.oauth2.rfc6750 import BearerTokenGenerator
from authlib.oauth2.rfc7009 import RevocationEndpoint
from authlib.oauth2.rfc7523 import JWTBearerClientAssertion, JWTBearerGrant
from joserfc import jwk

os.environ.setdefault("AUTHLIB_INSECURE_TRANSPORT", "1")  # on loopback
_TYPES = "urn:ietf:params:oauth:token-type:"


class Client(ClientMixin):
    """A registered client: its secret or public key (a JWK), and what it may ask for."""

    def __init__(self, client_id: str, scopes: str, *, secret: str = "", key: Mapping[str, Any] | None = None) -> None:
        self.client_id, self.scopes, self.secret, self.key = client_id, set(scopes.split()), secret, key
        self.grants = {"client_credentials", JWTBearerGrant.GRANT_TYPE, _Exchange.GRANT_TYPE}
        self.methods = {"client_secret_basic", "client_secret_post", "client_assertion_jwt"}

    def get_client_id(self):
        return self.client_id

    def get_allowed_scope(self, scope):
        return " ".join(word for word in (scope or "").split() if word in self.scopes)

    def check_client_secret(self, client_secret):
        return bool(self.secret) and secrets.compare_digest(self.secret.encode(), client_secret.encode())

    def check_endpoint_auth_method(self, method, endpoint):
        return method in self.methods

    def check_grant_type(self, grant_type):
        return grant_type in self.grants


class _Request(OAuth2Request):
    def __init__(self, uri, headers, form):
        super().__init__("POST", uri, headers=headers)
        self.payload = BasicOAuth2Payload(form)
        self._form = form

    @property
    def form(self):
        return self._form


@dataclass
class Issued:
    """A token that the server gave, and for what."""

    token: str
    client_id: str
    scope: str
    revoked: bool = False

    def check_client(self, client):
        return client.client_id == self.client_id


class _InvalidTarget(OAuth2Error):
    error = "invalid_target"


class _ClientAssertion(JWTBearerClientAssertion):
    def __init__(self, world):
        super().__init__()
        self.world = world

    def get_audiences(self):
        return [self.world.url + "/token"]

    def validate_jti(self, claims, jti):
        return not (jti in self.world.jtis or self.world.jtis.add(jti))

    def resolve_client_public_key(self, client):
        return jwk.import_key(client.key)


class _Bearer(JWTBearerGrant):
    def resolve_issuer_client(self, issuer):
        return self.server.world.clients.get(issuer)

    def resolve_client_public_key(self, client):
        return jwk.import_key(client.key)

    def get_audiences(self):
        return [self.server.world.url + "/token"]

    def authenticate_user(self, subject):
        return subject

    def has_granted_permission(self, client, user):
        return True


class _Exchange(BaseGrant, TokenEndpointMixin):
    GRANT_TYPE = "urn:ietf:params:oauth:grant-type:token-exchange"
    TOKEN_ENDPOINT_AUTH_METHODS = ["client_secret_basic", "client_secret_post", "client_assertion_jwt"]  # noqa: RUF012 - Authlib's word

    def validate_token_request(self):
        form, world = self.request.form, self.server.world
        anonymous = "client_id" not in form and "Authorization" not in self.request.headers
        self.request.client = world.anonymous if anonymous else self.authenticate_token_endpoint_client()
        if form.get("requested_token_type") != f"{_TYPES}access_token" or form.get("subject_token_type") != f"{_TYPES}jwt":
            raise InvalidRequestError("these token types are not exchanged")
        try:
            claims = jwt.decode(form.get("subject_token", ""), world.trusted, ["EdDSA", "ES256"], audience=world.audience)
        except jwt.PyJWTError as error:
            raise InvalidGrantError(str(error)) from error
        if form.get("audience", world.audience) != world.audience or form.get("resource", world.resource) != world.resource:
            raise _InvalidTarget
        self.request.user = claims["sub"]
        self.validate_requested_scope()

    def create_token_response(self):
        token = self.generate_token(user=self.request.user, scope=self.request.payload.scope, include_refresh_token=False)
        self.save_token(token)
        return 200, {**token, "issued_token_type": f"{_TYPES}access_token"}, self.TOKEN_RESPONSE_HEADER


class _Revocation(RevocationEndpoint):
    CLIENT_AUTH_METHODS = ["client_secret_basic", "client_secret_post", "client_assertion_jwt"]  # noqa: RUF012 - Authlib's word

    def query_token(self, token_string, token_type_hint):
        return next((issued for issued in self.server.world.issued if issued.token == token_string), None)

    def revoke_token(self, token, request):
        token.revoked = True


class _Server(AuthorizationServer):
    def __init__(self, world):
        super().__init__()
        self.world = world
        self.register_token_generator(
            "default", BearerTokenGenerator(lambda **_: "at-" + secrets.token_hex(16), expires_generator=lambda *_: world.life)
        )
        for grant in (ClientCredentialsGrant, _Bearer, _Exchange):
            self.register_grant(
                type(grant.__name__, (grant,), {"TOKEN_ENDPOINT_AUTH_METHODS": _Exchange.TOKEN_ENDPOINT_AUTH_METHODS})
            )
        self.register_endpoint(_Revocation(self))
        self.register_client_auth_method("client_assertion_jwt", _ClientAssertion(world))

    def query_client(self, client_id):
        return self.world.clients.get(client_id)

    def save_token(self, token, request):
        self.world.issued.append(Issued(token["access_token"], request.client.client_id, token.get("scope", "")))

    def create_oauth2_request(self, request):
        return request

    def handle_response(self, status, body, headers):
        return status, dict(headers), body if isinstance(body, str) else json.dumps(body)

    def send_signal(self, name, *args, **kwargs):
        pass


@dataclass
class World:
    """What the server knows, gave and heard. `instead` is (status, headers, body) for the next requests; `gate` holds them up."""

    url: str = ""
    clients: dict[str, Client] = field(default_factory=dict)
    anonymous: Client = field(default_factory=lambda: Client("anonymous", "read write"))
    trusted: Any = None
    audience: str = "//sts.example/pool"
    resource: str = "https://crm.example/"
    life: int = 3600
    issued: list[Issued] = field(default_factory=list)
    jtis: set[str] = field(default_factory=set)
    heard: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    instead: tuple[int, dict[str, str], bytes] | None = None
    gate: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serving(certificate=None):
    """The server; `certificate` (files of chain and key) makes it speak TLS."""
    world = World()
    world.gate.set()
    authlib = _Server(world)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            form = dict(parse_qsl(self.rfile.read(int(self.headers["content-length"])).decode(), keep_blank_values=True))
            world.heard.append((self.path, form))
            world.gate.wait(20)
            request = _Request(world.url + self.path, self.headers, form)
            if world.instead:
                status, headers, body = world.instead
            elif self.path == "/token":
                status, headers, body = authlib.create_token_response(request)
            else:
                status, headers, body = authlib.create_endpoint_response("revocation", request)
            content = body if isinstance(body, bytes) else body.encode()
            self.send_response(status)
            for name, value in {"content-length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            pass  # a client that hangs up is a test's business

    server = Quiet(("127.0.0.1", 0), Handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    world.url = f"{'https' if certificate else 'http'}://localhost:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield world
    finally:
        world.gate.set()
        server.shutdown()
        server.server_close()
