"""The registered convertors, loaded in a process that matches or converts by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.convertors import Convertor, register_url_convertor

from ...broker.errors import BackendFailed, StoreUnavailable
from ...broker.failures import LEAVING, describe
from ...broker.store import Store
from ...broker.store_keys import StoreKeys
from ...broker.values import code
from ...broker.values.signing import Signer


class Convertors:
    """Loads each convertor once, and again when its code changes."""

    def __init__(self, store: Store, keys: StoreKeys, signer: Signer) -> None:
        self._store = store
        self._keys = keys
        self._signer = signer
        self._made: dict[str, tuple[str, Convertor[Any]]] = {}  # name -> (sha256 of its code, the convertor)

    def __repr__(self) -> str:
        return f"<Convertors {', '.join(self._made) or 'none'}>"

    async def register(self, wanted: Mapping[str, str]) -> None:
        """Loads the convertors in `wanted` (name -> sha256, as in the desired document). Raises BackendFailed for one that cannot be
        loaded, and StoreUnavailable."""
        for name, sha256 in wanted.items():
            if name not in self._made or self._made[name][0] != sha256:
                self._made[name] = (sha256, await self._make(name, sha256))
            register_url_convertor(name, self._made[name][1])

    async def _make(self, name: str, sha256: str) -> Convertor[Any]:
        try:
            convertor, _ = await code.load(self._store, self._keys, sha256, self._signer)
            made: Convertor[Any] = convertor()
        except StoreUnavailable:
            raise
        except (Exception, *LEAVING) as error:
            raise BackendFailed(f"convertor {name!r} cannot be made ({describe(error).words}): mend it and register it again") from error
        return made
