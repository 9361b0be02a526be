"""Webhooks: who may be called, at which addresses, how they are signed, and what becomes of those that are not received."""

import asyncio
import ipaddress
import logging
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from email.utils import formatdate

import msgspec
import pytest
import trustme
from msgspec.structs import replace
from standardwebhooks import Webhook as Library
from yarl import URL

from mqserve.broker.callbacks import CallbackRules, CallbackSettings, NotAllowed
from mqserve.broker.errors import BadEnvelope, BadValue, BrokerUnavailable
from mqserve.broker.jobs import EndNote, JobEnd, JobState, Sequel
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.memory.webhooks import EmbeddedWebhookDelivery, EmbeddedWebhooks
from mqserve.broker.queue import Queue
from mqserve.broker.settings import Settings
from mqserve.broker.store import Store, recorded
from mqserve.broker.store_keys import StoreKeys
from mqserve.broker.values.webhook_signing import WebhookSigner, derived_secret, written
from mqserve.broker.webhooks import GIVEN_UP_AFTER_MS, VERSION, WAITS_S, Webhook, WebhookDelivery, next_wait_s
from mqserve.controller.end_webhooks import EndWebhooks
from mqserve.controller.outbox import Outbox
from mqserve.controller.receivers import NotReceived, Receivers, is_global, resolve
from mqserve.controller.webhooks import WebhookSending
from tests.broker.traffic import until
from tests.ports import free_port
from tests.receivers import receiving

pytestmark = pytest.mark.anyio

SECRETS = [b"a secret of a receiver, 32 bytes.", b"another one, which is 32 bytes.."]
RULES = CallbackRules(("hooks.example:*", "*.inner.example"), http=True)
LOCAL = [ipaddress.ip_network("127.0.0.1/32")]
BODY = '{"type":"job.succeeded"}'


# Who may be called.


@pytest.mark.parametrize(
    "url", ["https://hooks.example/x?y=1", "http://hooks.example:8080", "https://HOOKS.example./x", "https://a.b.inner.example"]
)
def test_a_url_of_a_host_that_is_set_is_taken(url: str) -> None:
    assert RULES.check(url).raw_path


def test_path_and_query_are_sent_as_they_are_written() -> None:
    assert RULES.check("https://hooks.example/a%2Fb?x=%20&y=%7E").raw_path_qs == "/a%2Fb?x=%20&y=%7E"


@pytest.mark.parametrize(
    ("host", "url", "is_taken"),
    [
        ("hooks.example", "https://hooks.example:443/", True),
        ("hooks.example", "http://hooks.example:80/", True),
        ("hooks.example", "https://hooks.example:8443/", False),
        ("hooks.example", "https://hooks.example:80/", False),
        ("hooks.example", "https://hooks.example:0/", False),
        ("hooks.example:8443", "https://hooks.example:8443/", True),
        ("hooks.example:8443", "https://hooks.example/", False),
        ("hooks.example:*", "https://hooks.example:22/", True),
        ("*.hooks.example:8443", "https://a.hooks.example:8443/", True),
        ("::1", "https://[::1]/", True),
        ("[::1]:8443", "https://[::1]:8443/", True),
        ("[::1]:8443", "https://[::1%25lo]:8443/", False),
        ("127.0.0.1", "https://2130706433/", False),
        ("127.0.0.1", "https://0x7f.1/", False),
        ("127.0.0.1", "https://[::ffff:127.0.0.1]/", False),
    ],
)
def test_a_host_is_called_at_the_port_of_its_scheme_unless_the_setting_names_another(host: str, url: str, is_taken: bool) -> None:
    rules = CallbackSettings.read({"MQSERVE_CALLBACK_HOSTS": host, "MQSERVE_CALLBACK_HTTP": "1"}, "").rules
    if is_taken:
        assert rules.check(url).port
    else:
        with pytest.raises(NotAllowed):
            rules.check(url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://other.example/", "none of the hosts"),
        ("https://inner.example/", "none of the hosts"),
        ("https://evilinner.example/", "none of the hosts"),
        ("https://.inner.example/", "none of the hosts|does not parse"),
        ("https://hooks.example@other.example/", "no user"),
        ("https://other.example\\@hooks.example/", "ASCII"),
        ("https://hooks.example/ x", "ASCII"),
        ("https://hooks.example/\nx", "ASCII"),
        ("https://user:word@hooks.example/", "no user"),
        ("https://hooks.example/#part", "no fragment"),
        ("ftp://hooks.example/", "https://"),
        ("//hooks.example/", "https://"),
        ("https://hooks.example:99999/", "does not parse"),
        ("https://hooks.example/" + "x" * 2000, "2000"),
    ],
)
def test_another_url_is_refused_with_the_reason(url: str, why: str) -> None:
    with pytest.raises(BadValue, match=why):
        RULES.check(url)


def test_without_hosts_nobody_is_called_and_without_leave_nobody_by_http() -> None:
    with pytest.raises(BadValue, match="MQSERVE_CALLBACK_HOSTS"):
        CallbackRules().check("https://hooks.example/")
    with pytest.raises(BadValue, match="MQSERVE_CALLBACK_HTTP"):
        CallbackRules(("hooks.example",)).check("http://hooks.example/")


def test_the_settings_go_to_the_controllers_and_not_to_their_children() -> None:
    env = {
        "MQSERVE_SECRET_KEY": "k" * 32,
        "MQSERVE_CALLBACK_HOSTS": "Hooks.example:*, *.inner.example",
        "MQSERVE_CALLBACK_HTTP": "1",
        "MQSERVE_CALLBACK_NETWORKS": "10.0.0.0/8",
        "MQSERVE_WEBHOOK_SECRET": ", ".join(map(written, SECRETS)),
    }
    settings = Settings.read(env)
    assert settings.callbacks.rules == RULES and settings.webhook_secrets == tuple(SECRETS)
    assert Settings.read(settings.to_env()) == settings
    assert settings.for_proxy().callbacks == settings.for_replica().callbacks == CallbackSettings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MQSERVE_CALLBACK_HOSTS", "*"),
        ("MQSERVE_CALLBACK_HOSTS", "https://hooks.example"),
        ("MQSERVE_CALLBACK_HOSTS", "hooks.example:https"),
        ("MQSERVE_CALLBACK_HOSTS", "hooks.example:0"),
        ("MQSERVE_CALLBACK_NETWORKS", "10.0.0.1/8"),
        ("MQSERVE_WEBHOOK_SECRET", "whsec_short"),
        ("MQSERVE_WEBHOOK_SECRET", "no secret that is written right"),
        ("MQSERVE_WEBHOOK_SECRET", f"{written(SECRETS[0])},whsec_short"),
    ],
)
def test_settings_that_are_wrong_are_refused(name: str, value: str) -> None:
    with pytest.raises(BadValue, match=name):
        Settings.read({"MQSERVE_SECRET_KEY": "k" * 32, name: value})


def test_hosts_without_anything_to_sign_with_are_refused() -> None:
    urls = {"MQSERVE_BROKER_URL": "amqp://localhost", "MQSERVE_STORE_URL": "redis://localhost"}
    with pytest.raises(BadValue, match="nothing to sign webhooks with"):
        Settings.read({**urls, "MQSERVE_CALLBACK_HOSTS": "hooks.example"})


# At which addresses.


@pytest.mark.parametrize("text", ["93.184.216.34", "2606:4700::1111", "::ffff:93.184.216.34", "64:ff9b::5db8:d822", "2002:5db8:d822::1"])
def test_a_global_address_may_be_asked(text: str) -> None:
    assert is_global(ipaddress.ip_address(text))


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.1.1", "255.255.255.255",
        "240.0.0.1", "::1", "::", "fe80::1", "fc00::1", "fec0::1", "ff0e::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254",
        "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::1", "2002:a9fe:a9fe::", "2001:0:5db8:d822::1", "2001:db8::1",
        "168.63.129.16", "192.0.0.192", "::ffff:168.63.129.16",
        "::127.0.0.1", "fd00:ec2::254",
    ],
)  # fmt: skip
def test_no_other_address_may_be_asked(text: str) -> None:
    assert not is_global(ipaddress.ip_address(text))


class Names:
    """A resolver that gives one answer after the other, and the last one for ever."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.asked = 0
        self._answers = answers

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked += 1
        return self._answers[min(self.asked, len(self._answers)) - 1]


async def post(receiver_port: int, names: Names, host: str = "hooks.example") -> int:
    return (await Receivers(LOCAL, names).post(URL(f"http://{host}:{receiver_port}/x?y=1"), {}, b"body")).status


async def test_a_name_that_changes_its_address_after_the_check_is_not_asked_again() -> None:
    with receiving() as receiver, receiving(address="127.0.0.2", port=receiver.port) as forbidden:
        names = Names(["127.0.0.1"], ["127.0.0.2"])
        assert await post(receiver.port, names) == 200
        assert names.asked == 1
        with pytest.raises(NotReceived, match="no global address"):
            await post(receiver.port, names)
        assert (len(receiver.received), len(forbidden.received)) == (1, 0)
        assert (receiver.received[0].path, receiver.received[0].headers["host"]) == ("/x?y=1", f"hooks.example:{receiver.port}")


async def test_of_several_addresses_only_those_that_may_be_asked_are() -> None:
    with receiving() as receiver, receiving(address="127.0.0.2", port=receiver.port) as forbidden:
        assert await post(receiver.port, Names(["127.0.0.2", "fe80::1%lo", "127.0.0.1"])) == 200
        assert (len(receiver.received), len(forbidden.received)) == (1, 0)


async def test_a_redirect_is_an_answer_and_not_followed() -> None:
    with receiving(lambda number: (302, {"Location": "http://169.254.169.254/latest/meta-data"})) as receiver:
        assert await post(receiver.port, Names(["127.0.0.1"])) == 302
        assert len(receiver.received) == 1


async def test_no_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver, receiving() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert await post(receiver.port, Names(["127.0.0.1"])) == 200
        assert not proxy.received


async def test_a_receiver_that_is_down_or_has_no_address_is_told_as_that() -> None:
    with pytest.raises(NotReceived, match=r"refused|Connect"):
        await post(free_port(), Names(["127.0.0.1"]))
    with pytest.raises(NotReceived, match="no address"):
        await post(80, Names([]))


async def test_a_slow_receiver_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mqserve.controller.receivers.ATTEMPT_S", 0.2)
    async with speaking(b"") as port:
        with pytest.raises(NotReceived, match=r"within 0\.2 s"):
            await post(port, Names(["127.0.0.1"]))


@pytest.mark.parametrize(
    "said", [b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000, b"HTTP/1.1 100 Continue\r\n\r\n" * 4000]
)
async def test_what_is_no_answer_is_read_only_in_part(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mqserve.controller.receivers.ATTEMPT_S", 0.5)
    async with speaking(said) as port:
        with pytest.raises(NotReceived):
            await post(port, Names(["127.0.0.1"]))


@pytest.mark.parametrize("more", [b"", b"x" * 1_000_000])
async def test_an_answer_counts_whatever_follows_its_head(more: bytes) -> None:
    async with speaking(b"HTTP/1.1 204 No Content\r\n\r\n" if not more else b"HTTP/1.1 200 OK\r\n\r\n" + more) as port:
        assert await post(port, Names(["127.0.0.1"])) == (200 if more else 204)


@asynccontextmanager
async def speaking(said: bytes) -> AsyncIterator[int]:
    """A server that says the same to everybody, and then nothing more."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(said)
            await reader.read()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_https_goes_to_the_checked_address_under_the_name_of_the_host() -> None:
    authority = trustme.CA()
    asked: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("hooks.example").configure_cert(context)
    context.sni_callback = lambda sock, name, its: asked.append(name)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"body")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    async with server:
        port = server.sockets[0].getsockname()[1]
        receivers = Receivers(LOCAL, Names(["127.0.0.1"]), trusting)
        assert (await receivers.post(URL(f"https://hooks.example:{port}/"), {}, b"body")).status == 200
        with pytest.raises(NotReceived, match="certificate"):
            await receivers.post(URL(f"https://other.example:{port}/"), {}, b"body")
    assert asked == ["hooks.example", "other.example"]


# How they are signed.


@pytest.mark.parametrize("secret", SECRETS)
def test_the_library_of_the_receiver_takes_the_signature_of_each_secret(secret: bytes) -> None:
    signer = WebhookSigner(SECRETS, "ns")
    headers = signer.headers(signer.id_of("job", "job.failed"), BODY.encode(), int(time.time()))
    assert Library(written(secret)).verify(BODY, headers) == {"type": "job.succeeded"}


def test_a_webhook_has_the_same_id_in_each_try_and_another_one_than_others() -> None:
    signer = WebhookSigner(SECRETS, "ns")
    assert signer.id_of("a", "job.failed") == signer.id_of("a", "job.failed")
    signers = (signer, WebhookSigner(SECRETS, "another"))
    assert len({one.id_of(job, event) for one in signers for job in ("a", "b") for event in ("job.failed", "job.succeeded")}) == 8
    assert WebhookSigner(SECRETS[1:], "ns").id_of("a", "job.failed") == signer.id_of("a", "job.failed"), "once the secret has changed"


def test_while_the_key_is_changed_webhooks_have_the_signatures_of_both() -> None:
    earlier, later = "e" * 32, "l" * 32
    settings = Settings.read({"MQSERVE_SECRET_KEY": later, "MQSERVE_SECRET_KEY_PREVIOUS": earlier})
    headers = WebhookSigner(settings.webhook_secrets, settings.namespace).headers("msg_1", BODY.encode(), int(time.time()))
    for key in (earlier, later):
        assert Library(written(derived_secret(key.encode(), settings.namespace))).verify(BODY, headers)


# What becomes of them.


def webhook_to(port: int, since_ms: int = 0) -> Webhook:
    return Webhook(VERSION, "msg_1", f"http://hooks.example:{port}/x", BODY, since_ms)


def test_the_pauses_grow_up_to_two_hours_and_end_after_a_day() -> None:
    pauses: list[int] = []
    now_ms = tries = 0
    while (pause_s := next_wait_s(Webhook(VERSION, "", "", "", 0, tries), now_ms)) is not None:
        pauses.append(pause_s)
        tries, now_ms = tries + 1, now_ms + pause_s * 1000
    assert pauses[:4] == [2, 4, 8, 16] and max(pauses) == WAITS_S[-1] == 8192
    assert GIVEN_UP_AFTER_MS <= now_ms < GIVEN_UP_AFTER_MS + 8192_000


@pytest.mark.parametrize(("asked_s", "waits_s"), [(0, 8), (7, 8), (9, 16), (3600, 4096), (10**8, 8192)])
def test_a_receiver_that_says_when_it_wants_to_be_asked_again_is_not_asked_before(asked_s: float, waits_s: int) -> None:
    assert next_wait_s(Webhook(VERSION, "", "", "", 0, tries=2), 0, asked_s) == waits_s


class Hasty(EmbeddedWebhooks):
    """Notes how long webhooks are to wait, and lets none wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[int] = []
        self.given_up: list[Webhook] = []

    async def wait(self, webhook: Webhook, wait_s: int) -> None:
        self.waits.append(wait_s)
        await self.send(webhook)

    async def set_aside(self, webhook: Webhook) -> None:
        self.given_up.append(webhook)


@asynccontextmanager
async def sending(webhooks: EmbeddedWebhooks, *addresses: str) -> AsyncIterator[None]:
    store = EmbeddedStore("ns")
    sender = WebhookSending(webhooks, store, WebhookSigner(SECRETS, "ns"), RULES, Receivers(LOCAL, Names(addresses or ["127.0.0.1"])))
    sender.go_on()
    try:
        yield
    finally:
        await sender.stop()


async def test_a_receiver_that_answers_500_ten_times_gets_it_in_the_end_once_with_one_id_and_a_good_signature() -> None:
    webhooks = Hasty()
    with receiving(lambda number: (500 if number <= 10 else 200, {})) as receiver:
        async with sending(webhooks):
            await webhooks.send(webhook_to(receiver.port, EmbeddedStore("ns").now_ms()))
            await until(lambda: len(receiver.received) == 11)
        assert webhooks.waits == list(WAITS_S[:10]) and not webhooks.waiting
        for received in receiver.received:
            assert Library(written(SECRETS[0])).verify(received.body, received.headers) == {"type": "job.succeeded"}
        assert {received.headers["webhook-id"] for received in receiver.received} == {"msg_1"}


async def test_the_log_warns_once_in_a_while_of_a_receiver_that_takes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    webhooks = Hasty()
    with receiving(lambda number: (500 if number <= 3 else 200, {})) as receiver, caplog.at_level(logging.INFO):
        async with sending(webhooks):
            await webhooks.send(webhook_to(receiver.port, EmbeddedStore("ns").now_ms()))
            await until(lambda: len(receiver.received) == 4)
    said = [(record.levelname, record.getMessage()) for record in caplog.records if "is sent again" in record.getMessage()]
    assert [level for level, _ in said] == ["WARNING", "INFO", "INFO"]
    assert said[0][1] == "webhook msg_1 to hooks.example is sent again in 2 s: the receiver answered with status 500"


async def test_a_webhook_to_a_network_that_is_not_allowed_is_said_with_the_setting(caplog: pytest.LogCaptureFixture) -> None:
    webhooks = Hasty()
    async with sending(webhooks, "10.0.0.1"):
        await webhooks.send(webhook_to(80, EmbeddedStore("ns").now_ms()))
        await until(lambda: webhooks.waits)
    assert any(record.levelname == "WARNING" and "MQSERVE_CALLBACK_NETWORKS" in record.getMessage() for record in caplog.records)


async def test_a_receiver_that_is_down_gets_it_once_it_is_up() -> None:
    webhooks, port = Hasty(), free_port()
    async with sending(webhooks):
        await webhooks.send(webhook_to(port, EmbeddedStore("ns").now_ms()))
        await until(lambda: len(webhooks.waits) >= 3)
        with receiving(port=port) as receiver:
            await until(lambda: len(receiver.received) == 1)


async def test_one_that_nobody_took_for_a_day_is_a_dead_letter_with_the_reason() -> None:
    webhooks = Hasty()
    with receiving(lambda number: (503, {})) as receiver:
        async with sending(webhooks):
            await webhooks.send(webhook_to(receiver.port, EmbeddedStore("ns").now_ms() - GIVEN_UP_AFTER_MS))
            await until(lambda: webhooks.given_up)
    assert (webhooks.given_up[0].tries, "503" in webhooks.given_up[0].error) == (1, True)


async def test_one_to_a_host_that_may_not_be_called_any_more_waits_for_other_settings() -> None:
    webhooks = Hasty()
    webhook = Webhook(VERSION, "msg_1", "http://other.example/x", BODY, EmbeddedStore("ns").now_ms())
    async with sending(webhooks):
        await webhooks.send(webhook)
        await until(lambda: len(webhooks.waits) >= 3)
        await webhooks.send(msgspec.structs.replace(webhook, since_ms=0))
        await until(lambda: webhooks.given_up)
    assert "MQSERVE_CALLBACK_HOSTS" in webhooks.given_up[0].error


async def test_one_whose_url_makes_no_sense_is_a_dead_letter_at_once() -> None:
    webhooks = Hasty()
    async with sending(webhooks):
        await webhooks.send(Webhook(VERSION, "msg_1", "no url", BODY, EmbeddedStore("ns").now_ms()))
        await until(lambda: webhooks.given_up)
    assert not webhooks.waits


@pytest.mark.parametrize("number", ["tries", "since_ms"])
def test_a_message_whose_numbers_are_none_is_no_webhook(number: str) -> None:
    with pytest.raises(BadEnvelope):
        Webhook.from_bytes(replace(webhook_to(1), **{number: -99}).to_bytes())


async def test_one_that_its_connection_has_lost_is_left_to_the_broker_which_has_it_still(monkeypatch: pytest.MonkeyPatch) -> None:
    class Away(EmbeddedWebhooks):
        asked = 0

        async def wait(self, webhook: Webhook, wait_s: int) -> None:
            Away.asked += 1
            raise BrokerUnavailable("away")

    monkeypatch.setattr("mqserve.controller.webhooks.TRY_AGAIN_S", 0.01)
    webhooks = Away()
    async with sending(webhooks, "127.0.0.2"):
        await webhooks.send(webhook_to(1, EmbeddedStore("ns").now_ms()))
        await until(lambda: Away.asked >= 3)
        monkeypatch.setattr(EmbeddedWebhookDelivery, "is_lost", True)
        await until(lambda: not webhooks.waiting and not webhooks._unsettled)
    assert not webhooks.waiting


async def test_a_receiver_that_is_gone_for_good_is_not_asked_again() -> None:
    webhooks = Hasty()
    with receiving(lambda number: (410, {})) as receiver:
        async with sending(webhooks):
            await webhooks.send(webhook_to(receiver.port, EmbeddedStore("ns").now_ms()))
            await until(lambda: webhooks.given_up)
        assert len(receiver.received) == 1 and not webhooks.waits


@pytest.mark.parametrize("as_date", [False, True])
async def test_a_receiver_that_is_busy_is_asked_again_when_it_says(as_date: bool) -> None:
    webhooks, said = Hasty(), formatdate(time.time() + 30, usegmt=True) if as_date else "30"
    with receiving(lambda number: (429, {"Retry-After": said}) if number == 1 else (204, {})) as receiver:
        async with sending(webhooks):
            await webhooks.send(webhook_to(receiver.port, EmbeddedStore("ns").now_ms()))
            await until(lambda: len(receiver.received) == 2)
    assert webhooks.waits == [32]


async def test_a_receiver_that_is_slow_has_a_share_of_the_room_and_others_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mqserve.controller.receivers.SLOW_S", 0.05)
    monkeypatch.setattr("mqserve.controller.receivers.ATTEMPT_S", 0.2)
    monkeypatch.setattr("mqserve.controller.receivers.SHARE", 2)
    async with speaking(b"") as silent:
        receivers = Receivers(LOCAL, Names(["127.0.0.1"]))

        async def ask(port: int) -> str:
            try:
                return str((await receivers.post(URL(f"http://hooks.example:{port}/"), {}, b"body")).status)
            except NotReceived as error:
                return str(error)

        assert all("no answer" in said for said in await asyncio.gather(*(ask(silent) for _ in range(5))))
        with receiving() as receiver:
            again = [asyncio.create_task(ask(silent)) for _ in range(5)]
            said = await asyncio.gather(*(ask(receiver.port) for _ in range(5)))
            assert said == ["200"] * 5
            assert sorted("is slow" in one for one in await asyncio.gather(*again)) == [False, False, True, True, True]


async def test_a_receiver_that_has_become_quick_again_has_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mqserve.controller.receivers.SHARE", 1)
    with receiving() as receiver:
        receivers, url = Receivers(LOCAL, Names(["127.0.0.1"])), URL(f"http://hooks.example:{receiver.port}/")
        monkeypatch.setattr("mqserve.controller.receivers.SLOW_S", 0)
        await receivers.post(url, {}, b"body")
        monkeypatch.setattr("mqserve.controller.receivers.SLOW_S", 10)
        await receivers.post(url, {}, b"body")
        answers = await asyncio.gather(*(receivers.post(url, {}, b"body") for _ in range(5)))
        assert [answer.status for answer in answers] == [200] * 5


async def test_names_are_looked_up_beside_the_loop_and_what_is_none_has_no_address() -> None:
    assert "127.0.0.1" in await resolve("localhost", 80)
    for name in ("x" * 64 + ".example", "name.invalid", "2130706433.invalid"):
        with pytest.raises((OSError, UnicodeError)):
            await resolve(name, 80)


@pytest.mark.parametrize("host", ["2130706433", "0177.0.0.1", "0x7f.1", "0", "localhost"])
async def test_other_ways_to_write_an_address_lead_nowhere_either(host: str) -> None:
    with pytest.raises(NotReceived):
        await Receivers().post(URL(f"http://{host}:80/"), {}, b"body")


async def test_nothing_goes_to_a_forbidden_address() -> None:
    webhooks = Hasty()
    with receiving(address="127.0.0.2") as forbidden:
        async with sending(webhooks, "127.0.0.2"):
            await webhooks.send(webhook_to(forbidden.port, EmbeddedStore("ns").now_ms()))
            await until(lambda: len(webhooks.waits) >= 3)
        assert not forbidden.received


# Their queue and the outbox, in both forms.


async def test_a_webhook_waits_in_its_queue_and_one_that_is_put_off_comes_back_after_its_time(queue: Queue) -> None:
    taken: list[Webhook] = []

    def take(delivery: WebhookDelivery) -> None:
        taken.append(delivery.webhook())
        delivery.ack()

    webhooks, one = queue.webhooks, webhook_to(1)
    await webhooks.declare()
    await webhooks.send(one)
    consumption = await webhooks.consume(10, take)
    await until(lambda: taken == [one])
    began = time.monotonic()
    await webhooks.wait(one, WAITS_S[0])
    await until(lambda: taken == [one, one])
    assert time.monotonic() - began > WAITS_S[0] - 0.1
    await webhooks.set_aside(one)
    await consumption.cancel()
    await webhooks.delete_if_empty()


def end_of(store: Store, job_id: str, callback: str) -> JobEnd:
    return JobEnd(job_id, b"result", b"note", JobState.SUCCEEDED, 200, "b", store.now_ms(), 60_000, endpoint="e", callback=callback)


async def test_the_first_end_of_a_job_with_a_callback_is_in_the_outbox_until_it_is_removed(store: Store) -> None:
    await recorded(store.jobs.end_then, end_of(store, "one", ""))
    for _ in range(2):
        await recorded(store.jobs.end_then, end_of(store, "two", "https://hooks.example/2"))
    await recorded(store.jobs.end_then, end_of(store, "three", "https://hooks.example/3"))
    found = await store.jobs.ends(10)
    assert [EndNote.from_bytes(entry.note).id for entry in found] == ["two", "three"]
    await store.jobs.drop_ends(found[0].place)
    assert await store.jobs.ends(10) == found[1:]
    await store.jobs.drop_ends(found[1].place)
    assert not await store.jobs.ends(10)


def outbox_of(store: Store, webhooks: EmbeddedWebhooks, signer: WebhookSigner) -> Outbox:
    send = EndWebhooks(webhooks, signer, RULES, store.now_ms).send
    return Outbox(store, StoreKeys("tests"), {Sequel.WEBHOOK: send})


async def test_what_is_in_the_outbox_is_sent_once_more_after_a_death_under_the_same_id(store: Store) -> None:
    queue, signer = EmbeddedQueue(), WebhookSigner(SECRETS, "ns")
    await recorded(store.jobs.end_then, end_of(store, "one", "https://hooks.example/1"))
    await recorded(store.jobs.end_then, end_of(store, "two", "https://elsewhere.example/"))
    await recorded(store.jobs.end_then, end_of(store, "three", "no url"))

    class Dying(EmbeddedWebhooks):
        async def send(self, webhook: Webhook) -> None:
            await super().send(webhook)
            raise RuntimeError("killed")

    dying = Dying()
    await outbox_of(store, dying, signer).send_all()
    assert await store.jobs.ends(10)
    await outbox_of(store, queue.webhooks, signer).send_all()
    assert (
        [webhook.id for webhook in dying.waiting]
        == [webhook.id for webhook in queue.webhooks.waiting]
        == [signer.id_of(job, "job.succeeded") for job in ("one", "two")]
    )
    assert not await store.jobs.ends(10)
