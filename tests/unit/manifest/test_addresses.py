import pytest

from broker.manifest.addresses import AddressError, parse_endpoint, parse_spiffe
from broker.policy.snapshot import Endpoint


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("https://api.github.com", Endpoint("https", "api.github.com", 443)),
        ("https://api.github.com/", Endpoint("https", "api.github.com", 443)),
        ("https://wiki.example:8443/mcp", Endpoint("https", "wiki.example", 8443, "/mcp")),
        ("http://127.0.0.1:8080/a/b", Endpoint("http", "127.0.0.1", 8080, "/a/b")),
        ("http://localhost", Endpoint("http", "localhost", 80)),
        ("https://[2001:db8::7]:8443", Endpoint("https", "2001:db8::7", 8443)),
        ("https://xn--bcher-kva.example", Endpoint("https", "xn--bcher-kva.example", 443)),
    ],
)
def test_an_endpoint_in_its_one_spelling_is_read(text, endpoint):
    assert parse_endpoint(text) == endpoint


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("ftp://a.example", "no http or https", id="another scheme"),
        pytest.param("HTTPS://a.example", "no http or https", id="a scheme in upper case"),
        pytest.param("a.example", "no http or https", id="no scheme"),
        pytest.param("https://", "no DNS name", id="no host"),
        pytest.param("https://u:p@a.example", "user information", id="user information"),
        pytest.param("https://a.example?x=1", "a query", id="a query"),
        pytest.param("https://a.example/#x", "a fragment", id="a fragment"),
        pytest.param("https://*.a.example", "a wildcard", id="a wildcard"),
        pytest.param("https://a.example.", "ends with a dot", id="a trailing dot"),
        pytest.param("https://A.example", "upper case", id="upper case"),
        pytest.param("https://bücher.example", "not ASCII", id="a U-label"),
        pytest.param("https://ab--c.example", "no DNS name", id="a reserved label"),
        pytest.param("https://a..example", "no DNS name", id="an empty label"),
        pytest.param("https://-a.example", "no DNS name", id="a hyphen first"),
        pytest.param("https://a_b.example", "no DNS name", id="an underscore"),
        pytest.param(f"https://{'a' * 64}.example", "no DNS name", id="a label too long"),
        pytest.param(f"https://{'a.' * 127}example", "no DNS name", id="a host too long"),
        pytest.param("https://127.1", "no IP address", id="a short IPv4 address"),
        pytest.param("https://0x7f.0.0.0x1", "no IP address", id="a hexadecimal IPv4 address"),
        pytest.param("https://2130706433", "no IP address", id="an IPv4 address as one number"),
        pytest.param("https://127.0.0.01", "no IP address", id="an octal IPv4 address"),
        pytest.param("https://[2001:DB8::7]", "canonical form", id="IPv6 in upper case"),
        pytest.param("https://[::ffff:127.0.0.1]", "canonical form", id="a mapped IPv4 address"),
        pytest.param("https://[fe80::1%25eth0]", "no IP address|canonical form", id="a zone"),
        pytest.param("https://a.example:0", "the port", id="port 0"),
        pytest.param("https://a.example:65536", "the port", id="a port too high"),
        pytest.param("https://a.example:", "the port", id="an empty port"),
        pytest.param("https://a.example:0443", "the port", id="a port with a zero first"),
        pytest.param("https://a.example/b/", "ends with a slash", id="a slash at the end"),
        pytest.param("https://a.example/b//c", "empty segment", id="an empty segment"),
        pytest.param("https://a.example/b/../c", "dot segment", id="a dot segment"),
        pytest.param("https://a.example/%62", "percent-encoded", id="a needless percent-encoding"),
        pytest.param("https://a.example\n", "no DNS name", id="a line break at the end"),
    ],
)
def test_any_other_endpoint_is_refused_with_its_reason(text, reason):
    with pytest.raises(AddressError, match=f"(?:{reason}).*; "):
        parse_endpoint(text)


@pytest.mark.parametrize("text", ["spiffe://acme.example/agents/refund-bot", "spiffe://a/b"])
def test_a_spiffe_id_of_a_workload_passes(text):
    parse_spiffe(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "acme",
        "https://acme/x",
        "spiffe://acme",
        "spiffe://acme/",
        "spiffe://Acme/x",
        "spiffe://acme/x/",
        "spiffe://acme//x",
        "spiffe://acme/../x",
        "spiffe://acme/x/.",
        "spiffe://acme/%41",
        "spiffe://acme:1/x",
        "spiffe://acme/x?y",
        "spiffe://acme/x\n",
        f"spiffe://acme/{'x' * 2048}",
    ],
)
def test_any_other_spiffe_id_is_refused(text):
    with pytest.raises(AddressError, match="no SPIFFE ID"):
        parse_spiffe(text)
