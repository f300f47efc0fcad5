"""What must be refused, tried byte by byte at every door: nothing reaches an upstream, and each refusal is in the record once."""

import itertools
import json
from contextlib import ExitStack

import httpx
import pytest
import stack
import wire
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ResponseReceived
from wire import BASE_URL, DOORS, JSON, PROXY, TLS, TUNNEL, Answer, Watch

GOOD = b'{"title": "x"}'
AT_EVERY_DOOR = pytest.mark.parametrize("door", DOORS)
WEBSOCKET = (("connection", "Upgrade"), ("upgrade", "websocket"), ("sec-websocket-version", "13"), ("sec-websocket-key", "eA=="))
H2C = (("connection", "Upgrade, HTTP2-Settings"), ("upgrade", "h2c"), ("http2-settings", "AAMAAABkAARAAAAAAAIAAAAA"))


def connect(world, target, name="writer", extra=b""):
    with stack.tunnel(world.broker, target, name, extra=extra) as (_, answer):
        return Answer.read(answer)


@AT_EVERY_DOOR
def test_the_way_of_these_attacks_is_open_to_an_honest_call(world, door):
    watch = Watch(world)
    answer = wire.send(world, door, "POST", "/items", JSON, GOOD)
    assert answer.status == 200
    assert [(seen.path, seen.body) for upstream in world.upstreams for seen in upstream.seen] == [("/items", GOOD)]
    assert [record["verdict"] for record in watch.decisions] == ["allow"]


@AT_EVERY_DOOR
def test_an_honest_call_leaves_no_refusal_behind_when_its_connection_ends(world, door):
    watch = Watch(world)
    for _ in range(3):
        wire.send(world, door, "GET", "/items")
    # A refusal comes by way of the same log, after whatever the calls before it left there.
    wire.send(world, door, "GET", "/items", (("transfer-encoding", "gzip"),))
    stack.until(lambda: [record for record in watch.decisions if record["verdict"] == "deny"])
    assert [record["verdict"] for record in watch.decisions] == ["allow"] * 3 + ["deny"]


# Whose call it is.


def test_tunnels_of_two_agents_keep_their_own_identities(world):
    watch = Watch(world)
    with ExitStack() as open_tunnels:
        for name in ("writer", "reader"):
            for _ in range(8):
                inside = open_tunnels.enter_context(wire.opened(world, TLS, name))
                request = wire.head(world, TLS, "GET", f"/items/{name}")
                assert Answer.read(stack.exchange_bytes(inside, request)).status == 200
    assert {(record["agent"]["name"], record["path"]) for record in watch.decisions} == {
        ("writer", "/items/writer"),
        ("reader", "/items/reader"),
    }


# Hosts.


@pytest.mark.parametrize(
    "spelling",
    [
        pytest.param("evil.example:443", id="undeclared"),
        pytest.param("LOCALHOST:{secure}", id="upper case"),
        pytest.param("localhost.:{secure}", id="trailing dot"),
        pytest.param("localhost:1", id="other port"),
        pytest.param("localhost:443", id="the scheme's default port"),
        pytest.param("localhost:0{secure}", id="port with a leading zero"),
        pytest.param("2130706433:{other}", id="address as one number"),
        pytest.param("0x7f.1:{other}", id="address in hexadecimal"),
        pytest.param("127.1:{other}", id="address cut short"),
        pytest.param("0177.0.0.1:{other}", id="address in octal"),
        pytest.param("[::ffff:127.0.0.1]:{other}", id="address mapped to IPv6"),
        pytest.param("[::1]:{other}", id="the other loopback"),
        pytest.param("xn--lcalhost-rcb:{secure}", id="punycode look-alike"),
        pytest.param("sub.localhost:{secure}", id="below a declared host"),
    ],
)
def test_a_connect_to_another_spelling_is_host_not_declared(world, spelling):
    watch = Watch(world)
    target = spelling.format(secure=world.secure.port, other=world.other.port)
    record = watch.refused("host_not_declared", connect(world, target), 403)
    assert (record["host"], record["method"]) == (target, "CONNECT")


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("u:p@localhost:{secure}", id="user information"),
        pytest.param("localhost", id="no port"),
        pytest.param("l\u00f6calhost:{secure}", id="not ASCII"),
        pytest.param("https://localhost:{secure}/", id="a URL"),
    ],
)
def test_a_connect_that_is_no_authority_is_closed_and_recorded(world, target):
    watch = Watch(world)
    head = wire.head(world, PROXY, "CONNECT", "/", target=target.format(secure=world.secure.port))
    with wire.opened(world, PROXY) as connection:
        answer = Answer.read(stack.exchange_bytes(connection, head))
    assert answer.status in (0, 400, 403)
    watch.refused("host_not_declared" if answer.status == 403 else "protocol_violation")


def test_a_connect_to_a_tool_that_the_agent_does_not_hold_is_refused(world):
    watch = Watch(world)
    watch.refused("tool_not_declared", connect(world, f"localhost:{world.secure.port}", "nobody"), 403)


@pytest.mark.parametrize("door", [PROXY, TUNNEL, TLS])
@pytest.mark.parametrize(
    "spelling",
    [
        pytest.param("evil.example", id="undeclared"),
        pytest.param("{host}.:{port}", id="trailing dot"),
        pytest.param("{upper}:{port}", id="upper case or another name"),
        pytest.param("{host}", id="no port"),
        pytest.param("{host}:1", id="other port"),
        pytest.param("{host}:0{port}", id="port with a leading zero"),
        pytest.param("2130706433:{port}", id="address as one number"),
        pytest.param("0x7f.1:{port}", id="address in hexadecimal"),
        pytest.param("127.1:{port}", id="address cut short"),
        pytest.param("[::ffff:127.0.0.1]:{port}", id="address mapped to IPv6"),
        pytest.param("[{host}]:{port}", id="brackets that are not IPv6's"),
        pytest.param("xn--lcalhost-rcb:{port}", id="punycode look-alike"),
    ],
)
def test_an_authority_in_another_spelling_is_another_host(world, door, spelling):
    watch = Watch(world)
    host, _, port = wire.place(world, door).partition(":")
    upper = "LOCALHOST"
    answer = wire.send(world, door, "GET", "/items", host=spelling.format(host=host, port=port, upper=upper))
    watch.refused("host_not_declared" if door == PROXY else "authority_mismatch", answer, 403)


@pytest.mark.parametrize("door", [TUNNEL, TLS])
def test_user_information_in_a_host_header_is_another_host(world, door):
    watch = Watch(world)
    answer = wire.send(world, door, "GET", "/items", host=f"u:p@{wire.place(world, door)}")
    watch.refused("authority_mismatch", answer, 403)


def test_what_stands_beside_the_authority_of_an_absolute_form_is_dropped(world):
    # RFC 9112 section 3.2.2: a proxy ignores Host there. Envoy reads neither that nor user information; nor does the upstream.
    place = wire.place(world, PROXY)
    answer = wire.send(world, PROXY, "GET", "/items", host="evil.example", target=f"http://u:p@{place}/items")
    assert answer.status == 200
    [seen] = world.plain.seen
    assert [value for name, value in seen.headers if name.lower() == "host"] == [place]
    assert "u:p" not in str(seen)


@pytest.mark.parametrize(
    ("target", "code", "status"),
    [
        pytest.param("https://localhost:{secure}/items", "authority_mismatch", 403, id="https in the clear"),
        pytest.param("https://127.0.0.1:{other}/v1/items", "authority_mismatch", 403, id="https to an address in the clear"),
        pytest.param("http://localhost:{secure}/items", "host_not_declared", 403, id="http to an https tool"),
        pytest.param("ftp://127.0.0.1:{plain}/items", "protocol_violation", 0, id="another scheme"),
    ],
)
def test_an_absolute_form_with_another_scheme_is_refused(world, target, code, status):
    watch = Watch(world)
    ports = {"secure": world.secure.port, "other": world.other.port, "plain": world.plain.port}
    watch.refused(code, wire.send(world, PROXY, "GET", "/items", target=target.format(**ports)), status)


@pytest.mark.parametrize("door", [TUNNEL, TLS, BASE_URL])
def test_two_hosts_are_refused(world, door):
    watch = Watch(world)
    answer = wire.send(world, door, "GET", "/items", (("host", "evil.example"),))
    watch.refused("protocol_violation", answer, 400)


# CONNECT, SNI and authority.


@pytest.mark.parametrize(
    "sni",
    [
        pytest.param("evil.example", id="undeclared"),
        pytest.param(None, id="none"),
        pytest.param("localhost.", id="trailing dot"),
        pytest.param("sub.localhost", id="below a declared host"),
        pytest.param("xn--lcalhost-rcb", id="punycode look-alike"),
        pytest.param("127.0.0.1", id="an address, which clients do not send"),
    ],
)
def test_tls_to_an_undeclared_name_gets_no_certificate_at_all(world, sni):
    watch = Watch(world)
    with stack.tunnel(world.broker, f"localhost:{world.secure.port}", "writer") as (connection, _):
        assert wire.certificate(connection, sni) is None
    record = watch.refused("host_not_declared")
    assert record["agent"]["name"] == "writer"


PLACES = ("named", "far", "address")


@pytest.mark.parametrize(
    ("opened", "sni", "authority"),
    [
        pytest.param(*combination, id=" ".join(combination))
        for combination in itertools.product(PLACES, PLACES, PLACES)
        if len(set(combination)) > 1
    ],
)
def test_connect_sni_and_authority_name_one_declared_place(world, opened, sni, authority):
    watch = Watch(world)
    places = {"named": f"localhost:{world.secure.port}", "far": "far.test:8443", "address": f"127.0.0.1:{world.other.port}"}
    names = {"named": "localhost", "far": "far.test", "address": None}  # RFC 6066: no SNI for addresses
    base = "/v1" if authority == "address" else ""
    with stack.tunnel(world.broker, places[opened], "writer") as (connection, _):
        if opened != "address" and sni == "address":
            assert wire.certificate(connection, None) is None
            watch.refused("host_not_declared")
            return
        with stack.tls(connection, world.broker, names[sni]) as inside:
            request = f"GET {base}/items HTTP/1.1\r\nhost: {places[authority]}\r\n\r\n"
            answer = Answer.read(stack.exchange_bytes(inside, request.encode()))
    watch.refused("authority_mismatch", answer, 403)


def test_plain_http_in_a_tunnel_to_an_https_tool_is_refused(world):
    watch = Watch(world)
    place = wire.place(world, TLS)
    with stack.tunnel(world.broker, place, "writer") as (connection, _):
        answer = Answer.read(stack.exchange_bytes(connection, f"GET /items HTTP/1.1\r\nhost: {place}\r\n\r\n".encode()))
    watch.refused("host_not_declared", answer, 403)


def test_plain_http_in_a_tunnel_cannot_say_that_it_is_https(world):
    watch = Watch(world)
    place = wire.place(world, TLS)
    with stack.tunnel(world.broker, place, "writer") as (connection, _):
        request = f"GET https://{place}/items HTTP/1.1\r\nhost: {place}\r\n\r\n"
        answer = Answer.read(stack.exchange_bytes(connection, request.encode()))
    watch.refused("authority_mismatch", answer, 403)


def test_envoy_knows_no_way_to_a_host_that_the_catalog_does_not_name(world):
    for target in ("evil.example:443", "evil.example:80"):
        connect(world, target)
    wire.send(world, PROXY, "GET", "/items", host="evil.example")
    dump, certificates = (envoy_says(world, path) for path in ("/config_dump?include_eds", "/certs"))
    assert "far.test" in dump
    assert "evil.example" not in dump + certificates
    kinds = {cluster["cluster"].get("type", "STATIC") for cluster in clusters(json.loads(dump))}
    assert kinds <= {"STATIC", "STRICT_DNS"}  # which resolve their own addresses, and nothing that a request brings


def envoy_says(world, path):
    transport = httpx.HTTPTransport(uds=str(world.broker.state / "run" / "envoy-admin.sock"))
    with httpx.Client(transport=transport, base_url="http://envoy") as admin:
        return admin.get(path).text


def clusters(dump):
    [found] = [config for config in dump["configs"] if config["@type"].endswith("ClustersConfigDump")]
    return [*found["dynamic_active_clusters"], *found["static_clusters"]]


# Other protocols than one HTTP/1.1 or HTTP/2 request after another.


@AT_EVERY_DOOR
@pytest.mark.parametrize("body", [pytest.param(None, id="without body"), pytest.param(GOOD, id="with body")])
def test_a_websocket_is_refused(world, door, body):
    watch = Watch(world)
    answer = wire.send(world, door, "GET" if body is None else "POST", "/items", (*WEBSOCKET, *JSON), body)
    watch.refused("protocol_violation", answer, 403)


@AT_EVERY_DOOR
@pytest.mark.parametrize("body", [pytest.param(None, id="without body"), pytest.param(GOOD, id="with body")])
def test_an_offer_of_h2c_is_not_taken_up_nor_passed_on(world, door, body):
    # RFC 9110 section 7.8: a server may ignore Upgrade. Envoy takes it off before any filter sees it; the call stays HTTP/1.1.
    answer = wire.send(world, door, "GET" if body is None else "POST", "/items", (*H2C, *JSON), body)
    assert (answer.status, answer.raw[:8]) == (200, b"HTTP/1.1")
    [seen] = [seen for upstream in world.upstreams for seen in upstream.seen]
    assert [seen.header(name) for name in ("upgrade", "http2-settings", "connection")] == [None] * 3


@AT_EVERY_DOOR
def test_what_follows_an_offer_of_h2c_is_read_as_http_1_1(world, door):
    with wire.opened(world, door) as connection:
        answer = stack.exchange_bytes(connection, wire.head(world, door, "GET", "/items", H2C))
        assert answer.startswith(b"HTTP/1.1 200")
        watch = Watch(world)
        assert b"200" not in stack.exchange_bytes(connection, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
        watch.refused("protocol_violation")


@pytest.mark.parametrize("door", [TUNNEL, TLS, BASE_URL])
def test_a_nested_connect_is_refused(world, door):
    watch = Watch(world)
    place = wire.place(world, TLS)
    answer = wire.send(world, door, "CONNECT", "/", host=place, target=place)
    watch.refused("protocol_violation", answer, 403)


def test_bytes_after_connect_and_before_its_answer_are_refused(world):
    watch = Watch(world)
    smuggled = wire.head(world, TUNNEL, "GET", "/items")
    answer = connect(world, wire.place(world, TUNNEL), extra=smuggled)
    assert answer.status == 400
    assert watch.refused("protocol_violation")["agent"]["name"] == "writer"


@AT_EVERY_DOOR
@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/0.9", "HTTP/1.2", "HTTP/2.0"])
def test_another_version_of_http_is_refused(world, door, version):
    watch = Watch(world)
    answer = wire.send(world, door, "GET", "/items", version=version)
    assert answer.status in (0, 400, 426)
    watch.refused("protocol_violation", answer)


@AT_EVERY_DOOR
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x00\x01\x02garbage\r\n\r\n", id="garbage"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00", id="HTTP/2 with prior knowledge"),
        pytest.param(b"\x04\x01\x01\xbb\x7f\x00\x00\x01agent\x00", id="SOCKS"),
        pytest.param(b"GET\r\n\r\n", id="a request line cut short"),
    ],
)
def test_what_is_no_http_1_1_is_closed_and_recorded(world, door, data):
    watch = Watch(world)
    with wire.opened(world, door) as connection:
        answer = stack.exchange_bytes(connection, data)
    assert b"200" not in answer[:12]
    watch.refused("protocol_violation")


@AT_EVERY_DOOR
@pytest.mark.parametrize(
    "headers",
    [
        pytest.param((("transfer-encoding", "chunked"), ("content-length", "5")), id="transfer-encoding and content-length"),
        pytest.param((("content-length", "5"), ("transfer-encoding", "chunked")), id="content-length and transfer-encoding"),
        pytest.param((("content-length", "14"), ("content-length", "14")), id="content-length twice"),
        pytest.param((("content-length", "14"), ("content-length", "3")), id="two content-lengths"),
        pytest.param((("content-length", "14, 14"),), id="content-length as a list"),
        pytest.param((("content-length", "-1"),), id="negative content-length"),
        pytest.param((("content-length", "+14"),), id="signed content-length"),
        pytest.param((("content-length", "0xe"),), id="hexadecimal content-length"),
        pytest.param((("transfer-encoding", "gzip, chunked"),), id="compressed in transfer"),
        pytest.param((("transfer-encoding", "xchunked"),), id="a look-alike of chunked"),
        pytest.param((("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")), id="chunked twice"),
        pytest.param((("bad name", "x"),), id="a space in a header name"),
        pytest.param((("x", b"a\x00b"),), id="NUL in a header value"),
        pytest.param((("x", "a" * 70_000),), id="headers over the limit"),
        pytest.param(tuple((f"x-{number}", "1") for number in range(150)), id="too many headers"),
    ],
)
def test_framing_that_two_readers_could_read_differently_is_refused(world, door, headers):
    watch = Watch(world)
    answer = wire.send(world, door, "POST", "/items", (*JSON, *headers), GOOD)
    assert answer.status in (0, 400, 431)
    watch.refused("protocol_violation")


@AT_EVERY_DOOR
def test_trailers_of_http_1_1_are_dropped(world, door):
    trailers = b"authorization: Bearer mine\r\nx-broker-decision: allow\r\n"
    answer = wire.send(world, door, "POST", "/items", JSON, GOOD, chunked=True, trailers=trailers)
    assert answer.status == 200
    [seen] = [seen for upstream in world.upstreams for seen in upstream.seen]
    assert (seen.body, "mine" in str(seen)) == (GOOD, False)


@pytest.mark.parametrize("body", [pytest.param(GOOD, id="after a body"), pytest.param(None, id="without a body")])
def test_trailers_of_http_2_are_refused(world, body):
    watch = Watch(world)
    place = wire.place(world, TLS)
    connection = H2Connection(H2Configuration(header_encoding="utf-8"))
    connection.initiate_connection()
    pseudo = [(":method", "POST"), (":scheme", "https"), (":authority", place), (":path", "/items")]
    connection.send_headers(1, [*pseudo, *JSON])
    if body:
        connection.send_data(1, body)
    connection.send_headers(1, [("authorization", "Bearer mine")], end_stream=True)
    with wire.opened(world, TLS, alpn="h2") as inside:
        inside.sendall(connection.data_to_send())
        answers = []
        while not answers:
            answers = [event for event in connection.receive_data(inside.recv(65_536)) if isinstance(event, ResponseReceived)]
    record = watch.refused("protocol_violation")
    headers = dict(answers[0].headers)
    assert (headers[":status"], headers["x-broker-decision-id"]) == ("400", record["decision_id"])


@AT_EVERY_DOOR
@pytest.mark.parametrize("method", ["TRACE", "get", "PROPFIND", "DELETE"])
def test_a_method_that_no_operation_has_is_refused(world, door, method):
    watch = Watch(world)
    answer = wire.send(world, door, method, "/items")
    assert answer.status in (0, 400, 403)
    watch.refused("operation_not_declared" if answer.status == 403 else "protocol_violation", answer)


# Paths.


@AT_EVERY_DOOR
@pytest.mark.parametrize(
    "path",
    [
        "//items", "/items//a1", "/items/../items", "/items/./a1", "/items/..", "/items/%2e%2e/items", "/items/.%2E/items",
        "/items/%2e/a1", "/items%2fa1", "/items%2Fa1", "/items%5ca1", "/items\\a1", "/items;p/a1", "/items/a1;p", "/items/a1%3bp",
        "/items/a1%00", "/items/a1%0d%0aX:1", "/items/%252f", "/items/%25%32%66", "/items/a%25", "/items/%c3", "/items/%c0%af",
        "/items/%", "/items/%zz", "/items/a%7f", "/items?x=%00", "/items?x=a;y=b", "/items?x=%zz",
    ],
)  # fmt: skip
def test_a_path_with_a_second_reading_is_refused(world, door, path):
    watch = Watch(world)
    watch.refused("protocol_violation", wire.send(world, door, "GET", path), 400)


@AT_EVERY_DOOR
@pytest.mark.parametrize("path", ["/items/a1#x", "/items#/x", "/items?x=1#f"])
def test_a_fragment_is_refused(world, door, path):
    watch = Watch(world)
    watch.refused("protocol_violation", wire.send(world, door, "GET", path), 400)


@AT_EVERY_DOOR
@pytest.mark.parametrize("path", ["/items/a b", "/items/\xe9", "/items/a\tb", "/items/\x7f"])
def test_a_path_with_raw_bytes_that_no_path_has_is_closed_and_recorded(world, door, path):
    watch = Watch(world)
    answer = wire.send(world, door, "GET", path)
    assert answer.status in (0, 400)
    watch.refused("protocol_violation")


@AT_EVERY_DOOR
@pytest.mark.parametrize("path", ["/Items", "/items/", "/items/a1/", "/items/a1/b", "/", "/v1/items"])
def test_a_path_of_no_operation_is_refused(world, door, path):
    watch = Watch(world)
    watch.refused("operation_not_declared", wire.send(world, door, "GET", path), 403)


@pytest.mark.parametrize(
    "path", ["/plainer/items", "/PLAIN/items", "/", "/%70lain/items", "//plain/items", "/secure/../plain/items"]
)
def test_the_base_url_door_knows_tools_by_their_exact_names(world, path):
    watch = Watch(world)
    answer = wire.send(world, BASE_URL, "GET", "/", target=path)
    watch.refused("protocol_violation" if answer.status == 400 else "tool_not_declared", answer)


# Bodies.

MALFORMED = [
    pytest.param('{"title": "x"}'.encode("utf-16"), id="UTF-16"),
    pytest.param('{"title": "x"}'.encode("utf-16-le"), id="UTF-16 without a mark"),
    pytest.param('{"title": "x"}'.encode("utf-32"), id="UTF-32"),
    pytest.param(b"\xef\xbb\xbf" + GOOD, id="byte order mark"),
    pytest.param(b'{"title": "x", "title": "y"}', id="duplicate key"),
    pytest.param(b'{"title": "x", "\\u0074itle": "y"}', id="duplicate key, once escaped"),
    pytest.param(b'{"title": NaN}', id="NaN"),
    pytest.param(b'{"title": -Infinity}', id="Infinity"),
    pytest.param(b'{"title": 1e999}', id="1e999"),
    pytest.param(b'{"title": 18446744073709551616}', id="an integer over 64 bits"),
    pytest.param(b"[" * 100_000 + b"]" * 100_000, id="100,000 levels"),
    pytest.param(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, id="100,000 levels of objects"),
    pytest.param(b'{"title": "\\ud800"}', id="half a surrogate pair"),
    pytest.param(b'{"title": "\xed\xa0\x80"}', id="a surrogate in UTF-8"),
    pytest.param(b'{"title": "x"} {}', id="two texts"),
    pytest.param(b"{'title': 'x'}", id="single quotes"),
    pytest.param(b'{"title": "x",}', id="trailing comma"),
    pytest.param(b'{"title": "x"\x00}', id="NUL"),
    pytest.param(b"\x1f\x8b\x08\x00", id="gzip that does not say so"),
]


@AT_EVERY_DOOR
@pytest.mark.parametrize("body", MALFORMED)
def test_json_that_readers_disagree_on_is_refused(world, door, body):
    watch = Watch(world)
    watch.refused("body_malformed", wire.send(world, door, "POST", "/items", JSON, body), 400)


@AT_EVERY_DOOR
@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip", "br", "zstd", "deflate", "compress", "identity, gzip", "unknown"])
def test_a_compressed_body_is_refused(world, door, encoding):
    watch = Watch(world)
    answer = wire.send(world, door, "POST", "/items", (*JSON, ("content-encoding", encoding)), b"\x1f\x8b\x08\x00\x00\x00")
    watch.refused("encoding_not_allowed", answer, 415)


@pytest.mark.parametrize(
    "media",
    ["application/json; charset=utf-16", 'application/json;charset="latin1"', "text/plain", "application/x-json", "json", ""],
)  # fmt: skip
def test_a_body_of_another_type_or_charset_is_refused(world, media):
    watch = Watch(world)
    watch.refused("encoding_not_allowed", wire.send(world, TLS, "POST", "/items", (("content-type", media),), GOOD), 415)


@AT_EVERY_DOOR
def test_an_unknown_field_is_refused_where_the_schema_forbids_it(world, door):
    watch = Watch(world)
    record = watch.refused("params_invalid", wire.send(world, door, "POST", "/items", JSON, b'{"title": "x", "Title": "y"}'), 403)
    assert record["violations"]


@AT_EVERY_DOOR
@pytest.mark.parametrize("chunked", [pytest.param(False, id="content-length"), pytest.param(True, id="chunked")])
@pytest.mark.parametrize(
    ("call", "size"),
    [
        pytest.param("PUT /items/a1", 1_001, id="a byte over the operation's cap"),
        pytest.param("PUT /items/a1", 200_000, id="over Envoy's connection buffer"),
        pytest.param("PUT /items/a1", 1_500_000, id="over the cap of all the tool's operations"),
        pytest.param("POST /items", 1_048_577, id="a byte over the default cap"),
        pytest.param("POST /items", 3_000_000, id="far over the default cap"),
    ],
)
def test_a_body_over_the_cap_is_refused(world, door, chunked, call, size):
    watch = Watch(world)
    answer = wire.send(world, door, *call.split(), JSON, b"x" * size, chunked=chunked)
    watch.refused("body_too_large", answer, 413)


@AT_EVERY_DOOR
def test_a_body_of_exactly_the_cap_passes(world, door):
    assert wire.send(world, door, "PUT", "/items/a1", (), b"x" * 1_000, chunked=True).status == 200


@AT_EVERY_DOOR
def test_expect_continue_does_not_let_the_body_ahead_of_the_decision(world, door):
    watch = Watch(world)
    answer = wire.send(world, door, "POST", "/items", (*JSON, ("expect", "100-continue")), b'{"title": 1}')
    watch.refused("params_invalid", answer, 403)


# JSON-RPC envelopes.

CALL = '{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"search_pages","arguments":{"query":"x"}}}'


def rpc(world, body, headers=()):
    return wire.send(world, BASE_URL, "POST", "/", (*JSON, ("accept", "application/json"), *headers), body, target="/wiki")


def test_the_way_of_these_envelopes_is_open_to_an_honest_one(world):
    assert rpc(world, CALL.encode()).status == 200
    assert [(seen.path, seen.body) for seen in world.wiki.seen] == [("/mcp", CALL.encode())]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        pytest.param(CALL.replace('"id":1', '"id":1,"id":2'), "body_malformed", id="duplicate key"),
        pytest.param(CALL.replace('"method"', '"Method":"ping","method"'), "protocol_violation", id="case-folded key"),
        pytest.param(CALL.replace('"jsonrpc"', '"JSONRPC"'), "protocol_violation", id="case-folded version"),
        pytest.param(CALL.replace('"name"', '"Name":"delete_page","name"'), "protocol_violation", id="case-folded tool name"),
        pytest.param(CALL.replace('"name"', '"name":"delete_page","name"'), "body_malformed", id="two tool names"),
        pytest.param(f"[{CALL}]", "protocol_violation", id="batch of one"),
        pytest.param(f"[{CALL},{CALL}]", "protocol_violation", id="batch"),
        pytest.param("[]", "protocol_violation", id="empty batch"),
        pytest.param(CALL + CALL, "body_malformed", id="two messages"),
        pytest.param(CALL.replace("2.0", "1.0"), "protocol_violation", id="another version"),
        pytest.param(CALL.replace('"id":1', '"id":NaN'), "body_malformed", id="NaN as id"),
        pytest.param(CALL.replace('"id":1', '"id":1e999'), "body_malformed", id="1e999 as id"),
        pytest.param(CALL.replace('"id":1,', ""), "protocol_violation", id="no id"),
        pytest.param(CALL.replace('"x"', '"\\udfff"'), "body_malformed", id="half a surrogate pair"),
        pytest.param(CALL.replace('{"query":"x"}', "[" * 100_000 + "]" * 100_000), "body_malformed", id="100,000 levels"),
        pytest.param(CALL.replace('"x"', '"x","more":1'), "params_invalid", id="unknown argument"),
        pytest.param(CALL.replace('"x"', '"x","Query":"y"'), "params_invalid", id="case-folded argument"),
        pytest.param(CALL.replace("search_pages", "delete_page"), "operation_not_declared", id="a tool that is not granted"),
        pytest.param(CALL.replace("search_pages", "Search_Pages"), "operation_not_declared", id="a tool in another case"),
        pytest.param(CALL.replace("tools/call", "Tools/Call"), "operation_not_declared", id="a method in another case"),
        pytest.param(CALL.replace("tools/call", "resources/read"), "operation_not_declared", id="a method that is not allowed"),
    ],
)
def test_an_envelope_with_a_second_reading_is_refused(world, body, code):
    watch = Watch(world)
    answer = rpc(world, body.encode())
    watch.refused(code, answer)
    shown = json.loads(answer.body)
    assert "error" in shown or shown["result"]["isError"] is True


@pytest.mark.parametrize("encoded", [CALL.encode("utf-16"), b"\xef\xbb\xbf" + CALL.encode()], ids=["UTF-16", "byte order mark"])
def test_an_envelope_in_another_encoding_is_refused(world, encoded):
    watch = Watch(world)
    watch.refused("body_malformed", rpc(world, encoded), 400)


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "deflate"])
def test_a_compressed_envelope_is_refused(world, encoding):
    watch = Watch(world)
    watch.refused("encoding_not_allowed", rpc(world, CALL.encode(), (("content-encoding", encoding),)), 415)


# What an agent says of itself.

CLAIMS = (
    "authorization", "x-api-key", "api-key", "x-goog-api-key", "cookie", "x-auth-token", "x-agent-id", "x-broker-decision",
    "x-broker-agent", "x-broker-token-2", "x-broker-decision-id", "x-forwarded-client-cert", "x-forwarded-for",
    "x-forwarded-host", "x-forwarded-proto", "x-forwarded-uri", "forwarded", "via", "x-real-ip", "true-client-ip",
    "x-envoy-original-path", "x-envoy-original-host", "x-envoy-upstream-rq-timeout-ms", "x-envoy-retry-on", "x-envoy-internal",
    "x-http-method-override", "x-http-method", "x-method-override", "x-original-url", "x-rewrite-url", "x_broker_decision",
    "X_Agent_Id", "x_forwarded_for", "X_Api_Key", "X-BROKER_decision", "X_HTTP_METHOD_OVERRIDE",
)  # fmt: skip


@AT_EVERY_DOOR
def test_what_an_agent_says_of_itself_never_goes_upstream(world, door):
    answer = wire.send(world, door, "GET", "/items", tuple((name, "said-by-the-agent") for name in CLAIMS))
    assert answer.status == 200
    [seen] = [seen for upstream in world.upstreams for seen in upstream.seen]
    assert [pair for pair in seen.headers if "said-by-the-agent" in pair[1]] == []
    assert seen.method == "GET"
    assert seen.header("authorization") == f"Bearer {world.secret}"


@AT_EVERY_DOOR
def test_no_header_of_the_agents_opens_the_gate_or_makes_it_someone_else(world, door):
    watch = Watch(world)
    claims = tuple((name, "allow" if "decision" in name else "spiffe://acme.example/agents/mutual") for name in CLAIMS)
    record = watch.refused("operation_not_declared", wire.send(world, door, "DELETE", "/items/a1", claims, name="writer"), 403)
    assert record["agent"]["name"] == "writer"


@AT_EVERY_DOOR
@pytest.mark.parametrize("name", ["access_token", "Access_Token", "access%5Ftoken", "api_key", "%61pi_key", "client_secret"])
def test_a_credential_in_the_query_never_goes_upstream(world, door, name):
    assert wire.send(world, door, "GET", f"/items?page=2&{name}=mine&q=1").status == 200
    [seen] = [seen for upstream in world.upstreams for seen in upstream.seen]
    assert seen.path == "/items?page=2&q=1"


@AT_EVERY_DOOR
def test_the_token_that_opened_the_door_never_goes_upstream(world, door):
    assert wire.send(world, door, "GET", "/items").status == 200
    assert world.broker.token("writer") not in str([seen for upstream in world.upstreams for seen in upstream.seen])


# Upstreams.


@pytest.mark.parametrize(
    ("name", "connections"),
    [
        pytest.param("inward", 0, id="a name that resolves to loopback, where no address is listed"),
        pytest.param("foreign", 1, id="a certificate of another authority"),
        pytest.param("misnamed", 1, id="a certificate for another name"),
    ],
)
@pytest.mark.parametrize("door", [TLS, BASE_URL])
def test_an_upstream_that_is_not_what_the_catalog_says_gets_no_request(world, door, name, connections):
    upstream = getattr(world, name)
    before = upstream.connections
    with world.broker.client("writer") if door == TLS else world.broker.direct("writer") as client:
        answer = client.get(f"https://localhost:{upstream.port}/items" if door == TLS else f"/{name}/items")
    assert (answer.status_code, answer.json()["code"]) == (403, "upstream_untrusted")
    assert upstream.seen == []
    assert (upstream.connections - before > 0) == bool(connections)
    outcome = world.broker.outcome(answer.headers["x-broker-decision-id"])
    assert outcome["code"] == "upstream_untrusted"
    assert world.secret not in answer.text + str(answer.headers)
