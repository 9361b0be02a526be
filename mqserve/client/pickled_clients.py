"""How clients and handles are pickled: as the address of their instance, whose client is looked up in the process that unpickles them."""

from __future__ import annotations

import copyreg
from typing import Any

from .client import Client
from .clients import clients
from .handle import Address, AsyncHandle, Handle, HandleOptions, StreamHandle
from .sender import Sender

_AnyHandle = Handle | AsyncHandle | StreamHandle


class _FarHome:
    """The home of an unpickled handle. It looks for the instance when the handle is used."""

    def __init__(self, address: Address) -> None:
        self.address = address

    @property
    def sender(self) -> Sender:
        return clients.at(self.address).sender


def _reduce_client(client: Client) -> Any:
    return _find_client, (client.address,)


def _find_client(address: Address) -> Client:
    return clients.at(address)


def _reduce_handle(handle: _AnyHandle) -> Any:
    return _make_handle, (type(handle), *handle._parts())


def _make_handle(kind: type[_AnyHandle], endpoint: str, address: Address, options: HandleOptions, missing_ok: bool) -> _AnyHandle:
    return kind(endpoint, _FarHome(address), options, missing_ok=missing_ok)


copyreg.pickle(Client, _reduce_client)
copyreg.pickle(Handle, _reduce_handle)
copyreg.pickle(AsyncHandle, _reduce_handle)
copyreg.pickle(StreamHandle, _reduce_handle)
