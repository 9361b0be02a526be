"""Starting over an instance that is there: what fails of it ends alone."""

from typing import Any

import msgspec
import pytest

from mqserve.broker.errors import InstanceError
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.settings import Settings
from mqserve.connections import Connections
from mqserve.controller.lease import read_instance
from mqserve.controller.state.documents import HttpOptions
from mqserve.controller.state.reading import read_desired
from mqserve.instance.starting import StartOptions, running_instance
from tests.controller.test_lease import DEPLOYED, KEYS, leave_behind
from tests.ports import free_port

pytestmark = pytest.mark.anyio


async def test_a_start_that_fails_leaves_the_instance_it_took_over_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Its controller finds no server where its settings say."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    store, nowhere = EmbeddedStore(), free_port()
    settings = Settings.read(broker_url=f"amqp://127.0.0.1:{nowhere}", store_url=f"redis://127.0.0.1:{nowhere}")
    instance = await leave_behind(store, **DEPLOYED)
    before = read_desired(await store.get(KEYS.desired))
    connections = Connections(settings, EmbeddedQueue(), store, KEYS, "test")
    with pytest.raises(InstanceError, match=f"ended at once: see {tmp_path}"):
        async with running_instance(connections, StartOptions(HttpOptions(port=free_port()), detached=True)):
            pass
    desired = read_desired(await store.get(KEYS.desired))
    assert (await read_instance(store, KEYS)).id == desired.instance == instance
    assert msgspec.structs.replace(desired, version=before.version) == before and not desired.closing
