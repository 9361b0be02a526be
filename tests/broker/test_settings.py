"""Settings come from arguments, then the environment or the files it names, then defaults, and are refused early."""

from pathlib import Path

import pytest

from mqserve.broker.errors import BadValue
from mqserve.broker.settings import Settings, masked

URLS = {"MQSERVE_BROKER_URL": "amqp://user:hunter2@broker", "MQSERVE_STORE_URL": "redis://:hunter2@store"}
KINDS = {"BROKER": "amqp", "STORE": "redis"}
KEY, OTHER_KEY = "k" * 32, "o" * 32


def test_nothing_set_means_embedded_with_a_key_of_its_own() -> None:
    settings = Settings.read({})
    assert settings.embedded
    assert settings.namespace == "mqserve"
    assert settings.signer
    assert settings.secret_keys != Settings.read({}).secret_keys


def test_two_urls_mean_distributed_and_without_a_key_nothing_is_signed() -> None:
    settings = Settings.read(URLS)
    assert not settings.embedded
    assert not settings.signer


def test_an_argument_goes_before_the_environment() -> None:
    settings = Settings.read(
        {**URLS, "MQSERVE_NAMESPACE": "theirs"}, namespace="ours", broker_url="amqps://other", store_url="rediss://other"
    )
    assert (settings.namespace, settings.broker_url, settings.store_url) == ("ours", "amqps://other", "rediss://other")


def test_empty_urls_as_arguments_ask_for_the_embedded_form() -> None:
    assert Settings.read(URLS, broker_url="", store_url="").embedded


@pytest.mark.parametrize(("there", "missing"), [tuple(URLS), tuple(reversed(URLS))])
def test_one_url_without_the_other_is_refused_and_the_missing_one_named(there: str, missing: str) -> None:
    with pytest.raises(BadValue, match=f"{there} is set and {missing} is not"):
        Settings.read({there: URLS[there]})


@pytest.mark.parametrize(("name", "url"), [("MQSERVE_BROKER_URL", "http://:hunter2@x"), ("MQSERVE_STORE_URL", "hunter2@x")])
def test_a_url_of_another_scheme_is_refused_without_showing_it(name: str, url: str) -> None:
    with pytest.raises(BadValue, match=name) as refusal:
        Settings.read({**URLS, name: url})
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize("namespace", ["Upper", "dot.ted", "a" * 41, "new\nline", "trailing\n"])
def test_a_namespace_that_could_not_name_queues_is_refused(namespace: str) -> None:
    with pytest.raises(BadValue, match="namespace"):
        Settings.read({"MQSERVE_NAMESPACE": namespace})


def test_a_short_key_is_refused_at_once() -> None:
    with pytest.raises(BadValue, match="MQSERVE_SECRET_KEY has 5 bytes"):
        Settings.read({"MQSERVE_SECRET_KEY": "short"})


def test_the_previous_key_opens_and_the_present_one_seals() -> None:
    settings = Settings.read({**URLS, "MQSERVE_SECRET_KEY": KEY, "MQSERVE_SECRET_KEY_PREVIOUS": OTHER_KEY})
    assert settings.secret_keys == (KEY.encode(), OTHER_KEY.encode())


def test_secrets_may_come_from_files(tmp_path: Path) -> None:
    for name, content in {"broker": URLS["MQSERVE_BROKER_URL"], "store": URLS["MQSERVE_STORE_URL"], "key": KEY}.items():
        (tmp_path / name).write_text(f"{content}\n")
    files = {"MQSERVE_BROKER_URL_FILE": "broker", "MQSERVE_STORE_URL_FILE": "store", "MQSERVE_SECRET_KEY_FILE": "key"}
    settings = Settings.read({variable: str(tmp_path / name) for variable, name in files.items()})
    assert (settings.broker_url, settings.store_url) == tuple(URLS.values())
    assert settings.secret_keys == (KEY.encode(),)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"], ids=["missing", "not text"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadValue, match=f"MQSERVE_SECRET_KEY_FILE names '{path}'"):
        Settings.read({"MQSERVE_SECRET_KEY_FILE": str(path)})


def test_a_child_reads_the_same_settings_from_its_environment() -> None:
    keys = {"MQSERVE_SECRET_KEY": KEY, "MQSERVE_SECRET_KEY_PREVIOUS": OTHER_KEY, "MQSERVE_ADMIN_TOKEN": "a-token-of-the-tests"}
    settings = Settings.read({**URLS, **keys}, namespace="ours")
    assert Settings.read(settings.to_env()) == settings


@pytest.mark.parametrize("token", ["x" * 15, "sixteen and spaces", "ünicode" * 3, "a\nbreak" * 3])
def test_an_admin_token_that_can_be_guessed_or_not_be_sent_is_refused(token: str) -> None:
    with pytest.raises(BadValue, match="MQSERVE_ADMIN_TOKEN needs at least 16"):
        Settings.read({"MQSERVE_ADMIN_TOKEN": token})


def test_no_secret_shows_in_the_state() -> None:
    shown = repr(Settings.read({**URLS, "MQSERVE_SECRET_KEY": KEY, "MQSERVE_ADMIN_TOKEN": OTHER_KEY}))
    assert OTHER_KEY not in shown
    assert "hunter2" not in shown
    assert KEY not in shown


# What a node's children are told.

ROLES = {f"MQSERVE_{role}_{kind}_URL": f"{scheme}://{role.lower()}:pw@h" for role in ("REPLICA", "PROXY") for kind, scheme in KINDS.items()}


def test_a_child_is_told_its_own_credentials_and_nobody_elses() -> None:
    settings = Settings.read({**URLS, **ROLES, "MQSERVE_SECRET_KEY": KEY})
    for child, role in ((settings.for_replica(), "replica"), (settings.for_proxy(), "proxy")):
        told = child.to_env()
        assert (told["MQSERVE_BROKER_URL"], told["MQSERVE_STORE_URL"]) == (f"amqp://{role}:pw@h", f"redis://{role}:pw@h")
        assert not [name for name in told if name in ROLES]
        assert "hunter2" not in str(told)


def test_without_credentials_of_its_own_a_child_is_told_the_nodes() -> None:
    child = Settings.read({**URLS, "MQSERVE_REPLICA_STORE_URL": ROLES["MQSERVE_REPLICA_STORE_URL"]}).for_replica()
    assert (child.broker_url, child.store_url) == (URLS["MQSERVE_BROKER_URL"], ROLES["MQSERVE_REPLICA_STORE_URL"])


def test_a_node_process_is_told_what_its_children_are_to_get() -> None:
    settings = Settings.read({**URLS, **ROLES, "MQSERVE_TRUSTED_USERS": "one, two,"})
    assert settings.trusted_users == ("one", "two")
    assert Settings.read(settings.to_env()) == settings


@pytest.mark.parametrize("name", ROLES)
def test_a_childs_url_may_come_from_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "url").write_text(ROLES[name] + "\n")
    assert Settings.read({**URLS, f"{name}_FILE": str(tmp_path / "url")}) == Settings.read({**URLS, name: ROLES[name]})


# TLS, and URLs that are wrong.


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("MQSERVE_BROKER_URL", "amqps://u:hunter2@h/?no_verify_ssl=1"),
        ("MQSERVE_BROKER_URL", "amqps://u:hunter2@h/?no_verify_ssl=yes"),
        ("MQSERVE_STORE_URL", "rediss://u:hunter2@h/0?ssl_cert_reqs=none"),
        ("MQSERVE_STORE_URL", "rediss://u:hunter2@h/0?ssl_cert_reqs=optional"),
        ("MQSERVE_STORE_URL", "rediss://u:hunter2@h/0?ssl_check_hostname=False"),
        ("MQSERVE_PROXY_STORE_URL", "rediss://u:hunter2@h/0?ssl_cert_reqs=none"),
    ],
)
def test_a_url_that_turns_verification_off_is_refused_unless_one_insists(name: str, url: str) -> None:
    with pytest.raises(BadValue, match=f"{name} says .*MQSERVE_CA_FILE.*MQSERVE_INSECURE=1") as refusal:
        Settings.read({**URLS, name: url})
    assert "hunter2" not in str(refusal.value)
    assert url in Settings.read({**URLS, name: url, "MQSERVE_INSECURE": "1"}).to_env().values()


def test_the_authority_goes_into_the_urls_of_tls_that_name_none(tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.write_text("")
    urls = {"MQSERVE_BROKER_URL": "amqps://h/v?heartbeat=5", "MQSERVE_STORE_URL": "rediss://h/0", "MQSERVE_CA_FILE": str(authority)}
    settings = Settings.read(urls)
    assert settings.broker_url == f"amqps://h/v?heartbeat=5&cafile={authority}"
    assert settings.store_url == f"rediss://h/0?ssl_ca_certs={authority}"
    assert Settings.read(settings.to_env()) == settings
    plain = Settings.read({**URLS, "MQSERVE_CA_FILE": str(authority)})
    assert (plain.broker_url, plain.store_url) == tuple(URLS.values())
    own = Settings.read({**urls, "MQSERVE_STORE_URL": "rediss://h/0?ssl_ca_certs=/own.pem"})
    assert own.store_url == "rediss://h/0?ssl_ca_certs=/own.pem"


def test_an_authority_that_cannot_be_read_is_named() -> None:
    with pytest.raises(BadValue, match=r"MQSERVE_CA_FILE names '/nowhere\.pem'"):
        Settings.read({**URLS, "MQSERVE_CA_FILE": "/nowhere.pem"})


@pytest.mark.parametrize("name", URLS)
def test_a_password_that_breaks_its_url_is_not_shown(name: str) -> None:
    broken = URLS[name].replace("hunter2", "hunter2/and#more")
    with pytest.raises(BadValue, match=f"{name} does not parse.*%2F") as refusal:
        Settings.read({**URLS, name: broken})
    assert "hunter2" not in str(refusal.value)
    assert refusal.value.__cause__ is None


def test_a_url_is_shown_without_its_secrets() -> None:
    assert masked("rediss://u:hunter2@h/0?password=hunter2") == "rediss://u:***@h/0"
