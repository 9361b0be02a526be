"""Leases: one instance per namespace, one leading controller per instance. A lease that is not renewed lapses.

A leader may be frozen between any two steps and wake up after another one took over. So each write of a leader to the store is fenced by
its claim: the same step checks the lease (`Leader.claim`). Before an operation that cannot be fenced, the leader checks its own clock
(`Leader.hold`), by which its lease ends before any other controller may take over.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import socket
import time
from enum import Enum
from typing import NamedTuple

import msgspec

from ..broker.errors import BadEnvelope, InstanceError, MQServeError
from ..broker.store import Guard, Store
from ..broker.store_keys import ENDED_TTL_S, FIRINGS_TTL_S, LEADER_TTL_S, StoreKeys
from ..broker.values.code import files_of
from .desired_writes import write_next
from .state.documents import Count, Desired, HttpOptions
from .state.reading import decode_document, read_desired

logger = logging.getLogger(__name__)

FILES_AT_ONCE = 500
LAPSED_AFTER_S = 10.0  # longer than a change of leaders takes
LEADS_FOR_S = LEADER_TTL_S - 1.5  # by the leader's own clock; other controllers wait for LEADER_TTL_S
RENEWED_EVERY_S = 1.0
WATCHED_FOR_S = LEADS_FOR_S + 2 * RENEWED_EVERY_S  # a live lease must be renewed within this time: its leader may hang on the broker
JOIN_WATCH_S = 3.5  # an empty namespace may belong to an instance whose leader is about to write its documents back


class NotLeading(MQServeError):
    """Another controller leads, or may lead by now, so the operation was not done."""


class InstanceLease(msgspec.Struct, frozen=True):
    """Who runs the instance. `at` is store ms; the leading controller renews it and names itself."""

    id: str
    owner: str
    detached: bool
    at: Count
    leader: str = ""


class InstanceClaim(NamedTuple):
    """The instance that a starter claimed, and its desired document if it took over an existing one."""

    id: str
    found: Desired | None = None


class Standing(Enum):
    """What the store says is left of an instance."""

    RUNS = "runs"
    DRAINS = "drains"
    ENDED = "ended"  # cleared, or another instance has its place
    LOST = "lost"  # the store lost its data; a living controller will write it back


class Leadership(msgspec.Struct, frozen=True):
    """Who leads, under which epoch. A later leader has a higher epoch."""

    controller: str
    epoch: Count
    at: Count


async def claim_instance(
    store: Store, keys: StoreKeys, head_node: str, http: HttpOptions | None, *, detached: bool, incomplete: bool = False
) -> InstanceClaim:
    """Claims the namespace. `incomplete` marks that what is declared has yet to be deployed.

    A lapsed instance is cleared (its queues stay, with the requests in them). A detached start takes over a lapsed detached instance with
    all that is deployed, and sets `head_node` and `http` anew; with None for `http` both stay as they are. Raises InstanceError if the
    instance is alive.
    """
    old = await check_free(store, keys)
    raw = None
    if old is not None:
        raw = await store.get(keys.instance)
        if raw is not None and decode_lease(raw) != old:
            raise _started_meanwhile()
        if old.detached and detached and _is_left(old.id, await store.get(keys.desired)):
            await _write(store, keys, raw, msgspec.structs.replace(old, owner=_owner(), at=store.now_ms()))
            return InstanceClaim(old.id, await _take_over(store, keys, old.id, head_node, http))
    lease = InstanceLease(secrets.token_hex(8), _owner(), detached, store.now_ms())
    await _write(store, keys, raw, lease)  # the lease first: of two starters that see one lapsed lease, one clears and the other is refused
    await _forget_documents(store, keys, (keys.instance, msgspec.json.encode(lease)))
    desired = Desired(instance=lease.id, head_node=head_node, http=http or HttpOptions(location="NoServer"), incomplete=incomplete)
    if not await store.replace(keys.desired, None, desired.to_bytes()):
        raise _started_meanwhile()
    return InstanceClaim(lease.id)


async def check_free(store: Store, keys: StoreKeys) -> InstanceLease | None:
    """Returns the lapsed lease, or None if there is no lease. Raises InstanceError for a live one."""
    raw = await store.get(keys.instance)
    old = decode_lease(raw) if raw is not None else None
    if old is not None and await _is_alive(store, keys, old):
        raise InstanceError(
            f"an instance runs under this namespace already (started by {old.owner}): join it with serve.connect(), end it with "
            "`mqserve shutdown`, or choose another namespace (MQSERVE_NAMESPACE)"
        )
    return old


def _is_left(instance: str, raw: bytes | None) -> bool:
    """Whether the instance's document is there to be taken over, and not closing."""
    desired = read_desired(raw)
    return raw is not None and desired.instance == instance and not desired.closing


async def _take_over(store: Store, keys: StoreKeys, instance: str, head_node: str, http: HttpOptions | None) -> Desired:
    """Replaces the head node, which is gone: with HeadOnly it is the only one that runs a proxy. Returns the document as it was."""
    while True:
        raw = await store.get(keys.desired)
        if not _is_left(instance, raw):
            raise InstanceError("the instance was shut down while it was taken over: start again")
        old = read_desired(raw)
        if http is None:
            return old
        new_http = msgspec.structs.replace(http, middlewares=http.middlewares or old.http.middlewares)
        if await write_next(store, keys, raw, msgspec.structs.replace(old, head_node=head_node, http=new_http)) is not None:
            return old


async def give_back(store: Store, keys: StoreKeys, claim: InstanceClaim, head_node: str) -> None:
    """Undoes a claim after a failed start: the next starter finds the instance as it was, unless somebody else has claimed it by then."""
    raw = await store.get(keys.desired)
    if claim.found is None or not _is_left(claim.id, raw) or (current := read_desired(raw)).head_node != head_node:
        return
    await write_next(store, keys, raw, msgspec.structs.replace(current, head_node=claim.found.head_node, http=claim.found.http))


async def read_instance(store: Store, keys: StoreKeys) -> InstanceLease:
    """Returns the lease of the running instance. Raises InstanceError if there is none."""
    raw = await store.get(keys.instance)
    if raw is None or await store.get(keys.desired) is None:
        raise no_instance()
    return decode_lease(raw)


def no_instance() -> InstanceError:
    return InstanceError("no instance runs under this namespace: start one with `mqserve start`, `mqserve run` or serve.start()")


async def has_leader(store: Store, keys: StoreKeys, instance: str) -> bool:
    """Whether a controller leads this instance. Watches the lease for a while, unless it lapsed long ago."""
    raw = await store.get(keys.instance)
    lease = decode_lease(raw) if raw is not None else None
    return lease is not None and lease.id == instance and await _is_alive(store, keys, lease)


async def renew_instance(store: Store, keys: StoreKeys, instance: str, leader: str, guard: Guard) -> bool:
    """Renews the lease, and rewrites a broken or deleted one. Returns False if the guard refused it. The lease of another instance, or of
    one that has ended, is left alone."""
    raw, ended = await store.get_documents([keys.instance, keys.ended])
    if raw is None and ended == instance.encode():
        return True
    restored = InstanceLease(instance, "restored by its controller", True, 0)
    try:
        lease = restored if raw is None else decode_lease(raw)
    except BadEnvelope as error:
        logger.warning("%s; writing it anew", error)
        lease = restored
    if lease.id != instance:
        return True
    renewed = msgspec.json.encode(msgspec.structs.replace(lease, at=store.now_ms(), leader=leader))
    return await store.replace(keys.instance, raw, renewed, guard=guard, quiet=True)


async def forget(store: Store, keys: StoreKeys, instance: str, guard: Guard | None = None) -> bool:
    """Deletes all documents of this instance, but not those of a later one; results of its requests stay until they expire, and so do the
    firings of schedules where its queues stay.

    Returns False if the guard refused it. If this process dies in the middle, the next call deletes the rest.
    """
    while True:
        raw = await store.get(keys.instance)
        if raw is not None and decode_lease(raw).id != instance:
            return True
        await store.set(keys.ended, instance.encode(), ttl_ms=ENDED_TTL_S * 1000)
        if raw is None or await store.replace(keys.instance, raw, None, guard=guard):
            break
        if guard is not None:
            return False
    await _forget_documents(store, keys, (keys.instance, None))
    return True


async def has_ended(store: Store, keys: StoreKeys, instance: str) -> bool:
    """Whether the instance was cleared on purpose, or for another one. A store that lost its data has no record of that."""
    raw, ended = await store.get_documents([keys.instance, keys.ended])
    return ended == instance.encode() or _is_of_another(raw, instance)


def _is_of_another(raw_lease: bytes | None, instance: str) -> bool:
    """Whether the lease names another instance. A lease that does not parse does not count: its controller rewrites it."""
    try:
        return raw_lease is not None and decode_lease(raw_lease).id != instance
    except BadEnvelope:
        return False


async def read_standing(store: Store, keys: StoreKeys, instance: str) -> Standing:
    """Returns what is left of the instance. A remaining document means that it is still to be cleared, whatever the other keys say.
    Raises StoreUnavailable."""
    raw_desired, raw_lease, ended = await store.get_documents([keys.desired, keys.instance, keys.ended])
    if raw_desired is not None:
        try:
            desired = read_desired(raw_desired)
        except BadEnvelope:  # followers of a broken document go on with the last good one
            return Standing.RUNS
        if desired.instance != instance:
            return Standing.ENDED
        return Standing.DRAINS if desired.closing else Standing.RUNS
    if ended == instance.encode() or _is_of_another(raw_lease, instance):
        return Standing.ENDED
    return Standing.LOST


async def _forget_documents(store: Store, keys: StoreKeys, guard: Guard) -> None:
    try:
        desired = read_desired(await store.get(keys.desired))
    except BadEnvelope:
        desired = Desired()  # the code it named stays behind: a broken document does not say which that was
    for sha256 in desired.codes:  # the files first, since the records lead to them; many of them, so some at a time
        raw = await store.get_large(keys.code(sha256))
        files = list(await files_of(store, keys, raw) or ()) if raw is not None else []
        for at in range(0, len(files), FILES_AT_ONCE):
            await store.delete(*map(keys.code, files[at : at + FILES_AT_ONCE]), guard=guard)
    # The firings of schedules stay where messages do: the next instance of the namespace makes up for what was missed in between.
    firings = {keys.firings} if desired.closing and not desired.keeps_queues else set()
    gone = [keys.desired, keys.observed, keys.beats, keys.leader, *firings, *map(keys.code, desired.codes)]
    if await store.delete(*gone, guard=guard) and not firings:
        await store.expire([keys.firings], FIRINGS_TTL_S * 1000)  # the leader's next write takes the TTL away
    await store.announce()


class Leader:
    """One controller's claim to the lead, which fences its writes."""

    def __init__(self, store: Store, keys: StoreKeys, controller: str, kept_by: str = "") -> None:
        self._store = store
        self._keys = keys
        life = secrets.token_hex(3)  # a restarted container has the id of its last life, so the name needs a random part
        self.name = f"{controller}#{kept_by}.{life}" if kept_by else f"{controller}#{life}"  # see `release_of`
        self._mine: bytes | None = None
        self._renewed_at = -math.inf  # monotonic, taken before the write
        self._above = 0
        self.epoch = 0

    def __repr__(self) -> str:
        return f"<Leader {self.name}, epoch {self.epoch}, {'leading' if self._mine else 'waiting'}>"

    @property
    def claim(self) -> Guard:
        """The guard that makes a write fail once another controller leads (a fencing token). Raises NotLeading."""
        if self._mine is None:
            raise NotLeading("another controller leads")
        return self._keys.leader, self._mine

    @property
    def leads_for_s(self) -> float:
        """How long we still lead, by our own clock, which goes on while we are frozen."""
        return self._renewed_at + LEADS_FOR_S - time.monotonic() if self._mine is not None else 0.0

    def still_leads(self) -> bool:
        return self.leads_for_s > 0

    async def lead(self) -> bool:
        """Takes or renews the lead; returns False if another controller has it."""
        began, now_ms = time.monotonic(), self._store.now_ms()
        raw = await self._store.get(self._keys.leader)
        current = _decode_leadership(raw) if raw else None
        is_mine = current is not None and current.controller == self.name
        if current is not None and is_mine and current.epoch > self._above:
            new = msgspec.structs.replace(current, at=now_ms)
        elif current is None or is_mine or now_ms - current.at > LEADER_TTL_S * 1000:
            new = Leadership(self.name, max(self.epoch, self._above, current.epoch if current else 0) + 1, now_ms)
        else:
            self._mine = None
            return False
        encoded = msgspec.json.encode(new)
        if not await self._store.replace(self._keys.leader, raw, encoded, quiet=True):
            self._mine = None
            return False
        self._mine, self._renewed_at, self.epoch = encoded, began, new.epoch
        return True

    async def hold(self) -> None:
        """Renews the lead so that it lasts for the next operation. Raises NotLeading if another controller took over, and also if the lead
        lapsed by our own clock while we were frozen: the operation was decided before that."""
        epoch = self.epoch
        if self.still_leads() and self.leads_for_s < LEADS_FOR_S - RENEWED_EVERY_S:
            await self.lead()
        if not self.still_leads() or self.epoch != epoch:
            raise NotLeading("another controller took over")

    def outrank(self, epoch: int) -> None:
        """Makes the next claim exceed this epoch, which another leader had."""
        if epoch > self.epoch:
            self._above = max(self._above, epoch)

    async def release(self, *, for_good: bool = False) -> None:
        """Gives the lead up at a graceful end: a standby leads at once, under a higher epoch. With `for_good` the lease is deleted, since
        the instance has ended."""
        mine, self._mine = self._mine, None
        if mine is not None:
            lapsed = None if for_good else msgspec.json.encode(Leadership(self.name, self.epoch, 0))
            await self._store.replace(self._keys.leader, mine, lapsed)


async def release_of(store: Store, keys: StoreKeys, kept_by: str) -> None:
    """Releases the lead of a dead controller, so that the next one leads at once. Only the keeper of this token's controllers may call
    it, while none of them lives: then nobody holds a lead with the token.

    It compares and sets the claim as it was read, so a leader that came meanwhile keeps its own. Raises StoreUnavailable.
    """
    raw = await store.get(keys.leader)
    held = _decode_leadership(raw) if raw else None
    if held is not None and held.controller.partition("#")[2].startswith(f"{kept_by}."):
        await store.replace(keys.leader, raw, msgspec.json.encode(msgspec.structs.replace(held, at=0)))


async def _is_alive(store: Store, keys: StoreKeys, lease: InstanceLease) -> bool:
    if store.now_ms() - lease.at > LAPSED_AFTER_S * 1000:
        return False
    until = asyncio.get_running_loop().time() + WATCHED_FOR_S
    while asyncio.get_running_loop().time() < until:
        await asyncio.sleep(0.1)
        raw = await store.get(keys.instance)
        if raw is None:
            return False
        now = decode_lease(raw)
        if now.at != lease.at or now.id != lease.id:
            return True
    return False


def decode_lease(raw: bytes) -> InstanceLease:
    """Raises BadEnvelope for bytes that are no lease."""
    return decode_document(raw, InstanceLease, "instance's lease")


def _decode_leadership(raw: bytes) -> Leadership | None:
    """Returns None for a lead that does not parse, so that the next controller takes it."""
    try:
        return decode_document(raw, Leadership, "lead of the controllers")
    except BadEnvelope as error:
        logger.warning("%s; taking the lead", error)
        return None


async def _write(store: Store, keys: StoreKeys, old: bytes | None, lease: InstanceLease) -> None:
    if not await store.replace(keys.instance, old, msgspec.json.encode(lease)):
        raise _started_meanwhile()


def _started_meanwhile() -> InstanceError:
    return InstanceError("another process started an instance under this namespace at the same moment: join it with serve.connect()")


def _owner() -> str:
    return f"{socket.gethostname()}, process {os.getpid()}"
