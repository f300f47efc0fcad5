"""What a confined command finds in its environment."""

import pytest

from broker.confined.environment import CA, PLACEHOLDER, environment


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "AWS_PROFILE",
        "GITHUB_TOKEN", "GH_TOKEN", "STRIPE_KEY", "SLACK_WEBHOOK", "NPM_TOKEN", "CLIENT_SECRET", "DB_PASSWORD", "PGPASSWORD",
        "TOKEN", "password", "GOOGLE_APPLICATION_CREDENTIALS", "SSH_PRIVATE_KEY", "SIGNING_KEY_PASSPHRASE", "API_TOKEN_FILE",
        "BROKER_REDIS_URL", "GITLAB_PAT", "PD_KEY", "OPENAI_KEY", "SIGNING_KEY", "RAILS_MASTER_KEY", "AZURE_STORAGE_KEY",
        "DB_PASS", "SMTP_PASS", "SSHPASS", "AZURE_STORAGE_CONNECTION_STRING", "DOCKER_AUTH_CONFIG", "npm_config__auth",
        "CI_JOB_JWT", "JWT", "DB_DSN", "DISCORD_WEBHOOK_URL", "TLS_KEY_FILE",
    ],
)  # fmt: skip
def test_a_variable_that_is_named_like_a_credential_is_left_out_and_told(name):
    made = environment({name: "x", "EDITOR": "vi"})
    assert made.cleared == [name]
    assert name not in made.variables
    assert made.variables["EDITOR"] == "vi"


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "ANTHROPIC_API_KEY", "api_key", "X_APIKEY"])
def test_an_api_key_is_told_and_replaced_since_clients_do_not_start_without_one(name):
    made = environment({name: "sk-1"})
    assert (made.cleared, made.variables[name]) == ([name], PLACEHOLDER)
    assert environment({name: "sk-1"}, keep=[name]).variables[name] == "sk-1"


@pytest.mark.parametrize(
    "value",
    [
        "postgres://u:p@db/x", "see redis://:pw@h:6379/0", "https://bot:tok@git.example/x.git", "postgres://h/db?user=u&password=p",
        "host=h user=u password=p", "AccountName=a;AccountKey=z", "Server=h;Pwd=p", "https://h/blob?sv=1&sig=x", "https://h/?access_token=x",
        "AUTHORIZATION: basic abc", "ghp_0123456789abcdefghij", "sk-0123456789", "eyJhbGciOiJIUzI1NiJ9.e30.x",
        "-----BEGIN PRIVATE KEY-----",
    ],
)  # fmt: skip
def test_a_value_that_holds_a_password_is_left_out_whatever_its_name(value):
    assert environment({"WHERE": value}).cleared == ["WHERE"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PATH", "/usr/bin:/bin"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("AWS_REGION", "eu-west-1"),
        ("KEYBOARD", "de"),
        ("MAX_TOKENS", "100"),
        ("HOMEPAGE", "https://example.com/a@b"),
        ("SPATIAL", "1"),
        ("PATH", "/opt/sk-something-old/bin"),
        ("XAUTHORITY", "/root/.Xauthority"),
        ("GIT_AUTHOR_NAME", "me"),
        ("AUTHOR", "me"),
        ("LESSKEY", "/etc/less"),
        ("MONKEY", "1"),
        ("BYPASS", "1"),
        ("COMPASS_X", "1"),
        ("SSH_PUBLIC_KEY", "ssh-ed25519 AAAA"),
        ("GPG_KEY", "A035C8C19219BA821ECEA86B64E628F8D684696D"),
        ("KUBECONFIG", "/root/.kube/config"),
        ("GIT_SSH_COMMAND", "ssh -o PasswordAuthentication=no"),
        ("PS1", "$(token=1)"),
    ],
)
def test_what_is_no_credential_stays(name, value):
    made = environment({name: value})
    assert (made.variables[name], made.cleared) == (value, [])


def test_a_variable_is_kept_by_its_name_alone():
    made = environment({"GH_TOKEN": "a", "NPM_TOKEN": "b"}, keep=["GH_TOKEN"])
    assert (made.variables["GH_TOKEN"], made.cleared) == ("a", ["NPM_TOKEN"])


def test_every_runtime_is_led_to_the_door_and_to_our_ca_whatever_the_caller_says():
    theirs = {
        "https_proxy": "http://evil:1",
        "NO_PROXY": "*",
        "SSL_CERT_FILE": "/x",
        "SSL_CERT_DIR": "/x",
        "NODE_EXTRA_CA_CERTS": "/x",
    }
    found = environment(theirs).variables
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        assert found[name] == "http://127.0.0.1:1001"
    assert (found["NO_PROXY"], found["no_proxy"], found["NODE_USE_ENV_PROXY"]) == ("", "", "1")
    for name in (
        "SSL_CERT_FILE",
        "REQUESTS_CA_BUNDLE",
        "NODE_EXTRA_CA_CERTS",
        "CURL_CA_BUNDLE",
        "GIT_SSL_CAINFO",
        "AWS_CA_BUNDLE",
    ):
        assert found[name] == CA
    assert "SSL_CERT_DIR" not in found


@pytest.mark.parametrize("name", ["DBUS_SESSION_BUS_ADDRESS", "DOCKER_HOST", "SSH_AUTH_SOCK", "XDG_RUNTIME_DIR"])
def test_what_leads_to_a_socket_of_the_hosts_is_gone_without_a_word(name):
    made = environment({name: "unix:///x"})
    assert name not in made.variables
    assert made.cleared == []
