"""A future by id whose store cannot be asked; in a module of its own, since it starts an instance of its own."""

import uuid

import pytest

import mqserve as serve
from tests.faults.wire import Wire
from tests.instances import started, wait_until


def test_a_store_that_cannot_be_asked_is_said(broker_url: str, store_wire: Wire) -> None:
    with started(broker_url=broker_url, store_url=store_wire.url) as client:
        ref = client.future(uuid.uuid4().hex)
        store_wire.refuse()
        store_wire.reset()
        for ask in (ref.done, ref.result, ref.cancel, lambda: serve.wait([ref], timeout=0)):
            with pytest.raises(serve.StoreUnavailable):
                ask()
        store_wire.mend()
        assert wait_until(lambda: _asked_again(ref)) == "False"


def _asked_again(ref: serve.Future) -> str:
    try:
        return str(ref.done())
    except serve.StoreUnavailable:
        return ""
