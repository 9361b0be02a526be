"""Settings come from arguments, then the environment or the files it names, then defaults, and are refused early."""

from pathlib import Path

import pytest

from mqserve.broker.errors import BadValue
from mqserve.broker.settings import Settings

URLS = {"MQSERVE_BROKER_URL": "amqp://user:hunter2@broker", "MQSERVE_STORE_URL": "redis://:hunter2@store"}
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
