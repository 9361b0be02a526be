"""Leases: one instance per namespace, one leading controller per instance. A lease that does not beat any more has lapsed."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket

import msgspec

from ..broker.errors import BadEnvelope, InstanceError
from ..broker.store import Store
from ..broker.store_keys import LEADER_TTL_S, StoreKeys
from .state import Count, Desired, HttpOptions, decode_document

logger = logging.getLogger(__name__)

LAPSED_AFTER_S = 8.0
WATCHED_FOR_S = 3.5  # a lease that looks alive must beat within this, or its owner was killed a moment ago


class InstanceLease(msgspec.Struct, frozen=True):
    """Who runs the instance. `at` is store ms, renewed by the leading controller."""

    id: str
    owner: str
    detached: bool
    at: Count


class Leadership(msgspec.Struct, frozen=True):
    """Who leads, under which epoch; a later leader has a higher one."""

    controller: str
    epoch: Count
    at: Count


async def claim_instance(store: Store, keys: StoreKeys, head_node: str, http: HttpOptions, *, detached: bool) -> InstanceLease:
    """The namespace is ours after this, with an empty desired document.

    A lapsed instance is cleared (its queues stay, with the requests in them), a lapsed detached one is taken over as it is.
    Raises InstanceError for a live one.
    """
    raw = await store.get(keys.instance)
    if raw is not None:
        old = _decode_lease(raw)
        if await _is_alive(store, keys, old):
            raise InstanceError(
                f"an instance runs under this namespace already (started by {old.owner}): join it with serve.connect(), end it with "
                "`mqserve shutdown`, or choose another namespace (MQSERVE_NAMESPACE)"
            )
        raw = await store.get(keys.instance)
        if old.detached and detached:
            lease = msgspec.structs.replace(old, owner=_owner(), at=store.now_ms())
            await _write(store, keys, raw, lease)
            return lease
    lease = InstanceLease(secrets.token_hex(8), _owner(), detached, store.now_ms())
    await _write(store, keys, raw, lease)  # first: of two starters who see one lapsed lease, one clears and the other is refused
    if raw is not None:
        await _forget_documents(store, keys)
    await store.replace(keys.desired, None, Desired(instance=lease.id, head_node=head_node, http=http).to_bytes())
    return lease


async def read_instance(store: Store, keys: StoreKeys) -> InstanceLease:
    """The running instance. Raises InstanceError when there is none."""
    raw = await store.get(keys.instance)
    if raw is None or await store.get(keys.desired) is None:
        raise InstanceError("no instance runs under this namespace: start one with `mqserve start`, `mqserve run` or serve.start()")
    return _decode_lease(raw)


async def renew_instance(store: Store, keys: StoreKeys, instance: str) -> None:
    raw = await store.get(keys.instance)
    if raw is None:
        return
    try:
        lease = _decode_lease(raw)
    except BadEnvelope as error:
        logger.warning("%s; writing it anew", error)
        lease = InstanceLease(instance, "restored by its controller", True, 0)
    if lease.id == instance:
        await store.set(keys.instance, msgspec.json.encode(msgspec.structs.replace(lease, at=store.now_ms())))


async def forget(store: Store, keys: StoreKeys, instance: str) -> None:
    """All documents of this instance, and of no later one; results of its requests stay until they expire."""
    raw = await store.get(keys.instance)
    if raw is not None and _decode_lease(raw).id != instance:
        return
    if raw is None or await store.replace(keys.instance, raw, None):
        await _forget_documents(store, keys)


async def _forget_documents(store: Store, keys: StoreKeys) -> None:
    try:
        desired = Desired.from_bytes(await store.get(keys.desired))
    except BadEnvelope:
        desired = Desired()  # the code it named stays behind; nobody can tell which that was
    hashes = {*desired.convertors.values(), *(backend.code for backend in desired.backends.values()), desired.http.middlewares} - {""}
    await store.delete(keys.desired, keys.observed, keys.beats, keys.leader, *(keys.code(sha256) for sha256 in hashes))
    await store.announce()


class Leader:
    """One controller's claim to lead."""

    def __init__(self, store: Store, keys: StoreKeys, controller: str) -> None:
        self._store = store
        self._keys = keys
        self._controller = controller
        self._mine: bytes | None = None
        self.epoch = 0

    def __repr__(self) -> str:
        return f"<Leader {self._controller}, epoch {self.epoch}, {'leading' if self._mine else 'waiting'}>"

    async def lead(self) -> bool:
        """Takes or renews the lead; False while another one has it."""
        now_ms = self._store.now_ms()
        raw = await self._store.get(self._keys.leader)
        current = _decode_leadership(raw) if raw else None
        if raw is not None and raw == self._mine and current is not None:
            new = msgspec.structs.replace(current, at=now_ms)
        elif current is None or now_ms - current.at > LEADER_TTL_S * 1000:
            new = Leadership(self._controller, max(self.epoch, current.epoch if current else 0) + 1, now_ms)
        else:
            self._mine = None
            return False
        encoded = msgspec.json.encode(new)
        # Not `replace`: renewing wakes nobody, and this beats every second. Only a change of hands must compare.
        if raw is not None and raw == self._mine:
            await self._store.set(self._keys.leader, encoded)
        elif not await self._store.replace(self._keys.leader, raw, encoded):
            return False
        self._mine, self.epoch = encoded, new.epoch
        return True


async def _is_alive(store: Store, keys: StoreKeys, lease: InstanceLease) -> bool:
    if store.now_ms() - lease.at > LAPSED_AFTER_S * 1000:
        return False
    until = asyncio.get_running_loop().time() + WATCHED_FOR_S
    while asyncio.get_running_loop().time() < until:
        await asyncio.sleep(0.1)
        raw = await store.get(keys.instance)
        if raw is None:
            return False
        now = _decode_lease(raw)
        if now.at != lease.at or now.id != lease.id:
            return True
    return False


def _decode_lease(raw: bytes) -> InstanceLease:
    return decode_document(raw, InstanceLease, "instance's lease")


def _decode_leadership(raw: bytes) -> Leadership | None:
    """None, so that the next controller takes the lead, for what does not parse."""
    try:
        return decode_document(raw, Leadership, "lead of the controllers")
    except BadEnvelope as error:
        logger.warning("%s; taking it", error)
        return None


async def _write(store: Store, keys: StoreKeys, old: bytes | None, lease: InstanceLease) -> None:
    if not await store.replace(keys.instance, old, msgspec.json.encode(lease)):
        raise InstanceError("another process started an instance under this namespace at the same moment: join it with serve.connect()")


def _owner() -> str:
    return f"{socket.gethostname()}, process {os.getpid()}"
