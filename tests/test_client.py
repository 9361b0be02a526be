"""Which instance a client belongs to, as the documents of the store say it."""

import pytest

from mqserve.broker.errors import InstanceError
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.settings import Settings
from mqserve.broker.store_keys import StoreKeys
from mqserve.client.membership import Membership
from mqserve.connections import Connections
from mqserve.controller import lease
from mqserve.controller.state.documents import Desired

pytestmark = pytest.mark.anyio

KEYS = StoreKeys("tests")
MINE, ANOTHERS = Desired(instance="mine", version=1), Desired(instance="another", version=1)


def membership(store: EmbeddedStore, *, owns: bool) -> Membership:
    return Membership(Connections(Settings.read({}), EmbeddedQueue(), store, KEYS, "test"), "mine", owns=owns)


async def test_a_client_that_slept_until_another_instance_was_there_knows_that_its_own_has_ended() -> None:
    mine = membership(EmbeddedStore(), owns=True)
    assert await mine.saw(MINE) and not mine.has_ended
    assert not await mine.saw(ANOTHERS) and mine.has_ended


async def test_a_client_that_joined_goes_on_with_the_next_instance() -> None:
    mine = membership(EmbeddedStore(), owns=False)
    assert await mine.saw(ANOTHERS)
    assert (mine.instance, mine.has_ended) == ("another", False)


async def test_a_store_that_came_back_empty_is_no_end_and_its_documents_are_waited_for() -> None:
    store = EmbeddedStore()
    for owns in (True, False):
        mine = membership(store, owns=owns)
        assert not await mine.saw(None) and not mine.has_ended
    with pytest.raises(InstanceError, match=r"has lost the documents .* no controller has written them back .* see `mqserve status`"):
        await mine.read()
    assert not mine.has_ended


@pytest.mark.parametrize("owns", [True, False])
async def test_an_instance_that_was_shut_down_is_said_at_once_and_noted(owns: bool) -> None:
    store = EmbeddedStore()
    await lease.forget(store, KEYS, "mine")
    mine = membership(store, owns=owns)
    with pytest.raises(InstanceError, match=r"has been shut down, and none runs .* start one .* serve\.connect\(\) joins it"):
        await mine.read()
    assert mine.has_ended
    with pytest.raises(InstanceError, match="no instance runs under this namespace"):
        await mine.find_again()
    await store.set(KEYS.desired, ANOTHERS.to_bytes())
    if owns:
        with pytest.raises(InstanceError, match=r"another one has its namespace: serve\.connect\(\) joins that"):
            await mine.commit(lambda desired: desired)
    else:
        assert (await mine.commit(lambda desired: desired)).instance == mine.instance == "another"
    assert mine.has_ended is owns
