"""AWS through a real Envoy: what arrives is signed for exactly what was judged, by a session that the agent never sees."""

import re
import shutil
from types import SimpleNamespace

import pytest
import stack
from fakes.sts import aws

LOOPBACK = {"addresses": ["127.0.0.0/8"]}
OBJECT = {"match": {"method": "GET", "path": "/exports/{+key}"}, "effect": "read"}
BUCKET = "<CreateBucketConfiguration><LocationConstraint>eu-central-1</LocationConstraint></CreateBucketConfiguration>"
POLICY = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}

pytestmark = pytest.mark.envoy


@pytest.fixture(scope="module")
def signing():
    """A fake AWS (STS and S3) that checks each signature anew, and a broker that assumes a role there."""
    folder = stack.short_folder()
    with aws() as cloud:
        _know_sessions(cloud)
        (folder / "manifests").mkdir()
        credential = {
            "issuer": "aws-sts",
            "role": "arn:aws:iam::123456789012:role/agents/reports",
            "access_key": {"env": "BROKER_KEY_ID"},
            "secret": {"env": "BROKER_KEY"},
            "sts": cloud.url,
            "scopes": {"policy": POLICY},
            "as": {"sigv4": {"service": "s3", "region": "eu-central-1"}},
        }
        operations = {
            "get": {**OBJECT, "params": {"query": {"properties": {"part": {"type": "string"}}}}},
            "put": {"match": {"method": "PUT", "path": "/exports/{+key}"}, "effect": "write"},
            "make": {"match": {"method": "PUT", "path": "/exports"}, "effect": "write"},
        }
        stack.write_manifests(
            folder / "manifests",
            stack.tool("s3", cloud.url, operations, upstream=LOOPBACK, credential=credential),
            stack.agent("reporter", {"s3": {"operations": {name: {} for name in operations}}}),
        )
        own = {"BROKER_KEY_ID": "AKIAEXAMPLE", "BROKER_KEY": "wJalr/long-lived", "AWS_EC2_METADATA_DISABLED": "true"}
        broker = stack.Broker(folder / "manifests", folder / "state", own)
        with broker.direct("reporter") as client:
            made = client.put("/s3/exports", content=BUCKET, headers={"content-type": "application/xml"})
        assert made.status_code == 200, made.text
        yield SimpleNamespace(broker=broker, cloud=cloud, state=folder / "state")
        broker.stop()
    shutil.rmtree(folder)


def _know_sessions(cloud):
    """As AWS does, let each session that STS gives sign."""
    plain = cloud._plain

    def noting(start_response, status, content, more=()):
        found = [re.search(rf"<{name}>([^<]+)".encode(), content) for name in ("AccessKeyId", "SecretAccessKey", "SessionToken")]
        if all(found):
            key, secret, token = (each[1].decode() for each in found)
            cloud.keys[key] = (secret, token)
        return plain(start_response, status, content, more)

    cloud._plain = noting


def test_objects_are_written_and_read_by_names_that_spell_badly(signing):
    with signing.broker.direct("reporter") as client:
        for key in ("a.csv", "deep/er/b.csv", "with%20space+plus.csv", "%C3%BCml%C3%A4ut.csv"):
            stored = client.put(f"/s3/exports/{key}", content=f"of {key}".encode(), headers={"content-type": "text/csv"})
            assert stored.status_code == 200, stored.text
            read = client.get(f"/s3/exports/{key}")
            assert (read.status_code, read.text) == (200, f"of {key}")


def test_an_agents_own_signature_and_wishes_are_not_what_is_signed(signing):
    own = {"authorization": "AWS4-HMAC-SHA256 Credential=mine", "x-amz-acl": "public-read", "x-amz-date": "20000101T000000Z"}
    with signing.broker.direct("reporter") as client:
        assert client.put("/s3/exports/acl.csv", content=b"x", headers=own).status_code == 200
        answer = client.get("/s3/exports/acl.csv?part=1", headers=own)
        assert answer.status_code in (200, 206, 416)


def test_the_record_names_the_session_and_no_file_holds_its_keys(signing):
    with signing.broker.direct("reporter") as client:
        assert client.get("/s3/exports/none.csv").status_code == 404
    lease = signing.broker.decisions(verdict="allow")[-1]["credential"]
    assert (lease["issuer"], lease["lease_id"][:8]) == ("aws-sts", "aws-sts-")
    secrets = [text for secret, token in signing.cloud.keys.values() for text in (secret, token) if text]
    for path in (*signing.state.rglob("*"), signing.broker.log_path):
        if path.is_file():
            content = path.read_bytes()
            assert not [text for text in secrets if text.encode() in content], path
