"""`mqserve status` shows what there is, whatever it is called."""

import asyncio
from collections.abc import Iterator
from io import StringIO
from typing import Any

import pytest
import redis
from rich.console import Console

import mqserve as serve
from mqserve.broker.redis_store import open_redis
from mqserve.broker.settings import Settings
from mqserve.broker.store_keys import StoreKeys
from mqserve.controller import desired as changes
from mqserve.controller.state import Beat, Desired
from mqserve.status import show_status
from tests.instances import DEADLINE_S, Deploy, distributed_only, new_name

pytestmark = [distributed_only, pytest.mark.anyio]


async def shown(environment: dict[str, str]) -> str:
    """What `mqserve status` prints, in this process, since it takes a second to make one."""
    printed = StringIO()
    await show_status(Settings.read(environment), Console(file=printed, width=240))
    return printed.getvalue()


@pytest.fixture
def say(store_url: str, shared_namespace: str) -> Iterator[Any]:
    """Writes the beat of a member, as of now; it is gone with the test."""
    keys, fields = StoreKeys(shared_namespace), set[str]()
    with redis.Redis.from_url(store_url) as store:

        def say(kind: str, member_id: str, **facts: Any) -> None:
            seconds, microseconds = store.time()
            beat = Beat(kind, member_id, seconds * 1000 + microseconds // 1000, **facts)
            fields.add(beat.field)
            store.hset(keys.beats, beat.field, beat.to_bytes())

        yield say
        store.hdel(keys.beats, *fields)


async def test_names_with_brackets_are_shown_as_they_are(
    client: serve.Client, deploy: Deploy, environment: dict[str, str], say: Any
) -> None:
    name, route = new_name("e"), f"/{new_name('x')}[/y]"
    client.create_endpoint(name, backend=deploy(lambda request: "well"), route=route)
    try:
        say("node", "[red]node[/]", url="http://[fe80::1]:9000", state="[odd]")
        printed = await shown(environment)
    finally:
        client.delete_endpoint(name)
    assert all(text in printed for text in (route, "[red]node[/]", "http://[fe80::1]:9000", "[odd]")), printed


async def test_what_a_member_says_has_no_escape_codes_and_begins_no_line(
    client: serve.Client, environment: dict[str, str], say: Any
) -> None:
    forged = "23:59:59 [1] ERROR mqserve.FORGED: yes"
    say("node", f"odd\n{forged}", url="http://there\x1b]0;title\x07", state="\u202eup", error=f"well\r\n{forged}\x1b[31m")
    printed = await shown(environment)
    assert "mqserve.FORGED" in printed and r"\x1b]0;title\x07" in printed and r"\u202eup" in printed
    lines = printed.split("\n")
    assert all(line.isprintable() and not line.startswith("23:59:59") for line in lines), printed


async def test_a_member_of_a_kind_that_this_version_does_not_know_is_shown_last(
    deploy: Deploy, environment: dict[str, str], say: Any
) -> None:
    deploy(lambda request: "well")
    say("gardener", "of-another-version")
    members, _, _ = (await shown(environment)).partition("Backends")
    kinds = [line.split()[0] for line in members.splitlines() if line.rstrip().endswith("s ago")]
    assert kinds == ["node", "proxy", "replica", "gardener"], members


async def test_a_proxy_that_cannot_follow_is_shown_with_its_reason_until_it_can(
    client: serve.Client, environment: dict[str, str], shared_namespace: str, store_url: str
) -> None:
    words, keys = "the code of-nobody is not in the store", StoreKeys(shared_namespace)
    async with open_redis(store_url, shared_namespace) as store, asyncio.timeout(DEADLINE_S):
        instance = Desired.from_bytes(await store.get(keys.desired)).instance
        for middlewares, is_shown in (("of-nobody", True), ("", False)):
            await changes.commit(store, keys, instance, changes.set_middlewares(middlewares))
            while (words in await shown(environment)) is not is_shown:
                pass
