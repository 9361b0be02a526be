"""Leases: one instance per namespace, one leading controller per instance. A lease that does not beat any more has lapsed.

Whoever leads may be frozen between any two steps and wake up after another took over. So every write of a leader to the
store is made under its claim, in one step with a look at the lease (`Leader.claim`); and before what cannot be made so, a
leader looks at its own clock (`Leader.hold`), which says earlier than anybody else's that its time is over.
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
from ..broker.store_keys import ENDED_TTL_S, LEADER_TTL_S, StoreKeys
from ..broker.values.code import files_of
from .state.documents import Count, Desired, HttpOptions, decode_document

logger = logging.getLogger(__name__)

FILES_AT_ONCE = 500
LAPSED_AFTER_S = 10.0  # longer than a change of leaders takes
LEADS_FOR_S = LEADER_TTL_S - 1.5  # by the leader's own clock; others wait for LEADER_TTL_S
RENEWED_EVERY_S = 1.0
WATCHED_FOR_S = LEADS_FOR_S + 2 * RENEWED_EVERY_S  # a lease that looks alive must beat within this: its leader may hang on the broker
JOIN_WATCH_S = 3.5  # an empty namespace may be one whose leader is about to write its documents back


class NotLeading(MQServeError):
    """Another controller leads, or may by now: what was to be done is not ours to do."""


class InstanceLease(msgspec.Struct, frozen=True):
    """Who runs the instance. `at` is store ms, renewed by the leading controller, which names itself."""

    id: str
    owner: str
    detached: bool
    at: Count
    leader: str = ""


class InstanceClaim(NamedTuple):
    """The instance that a starter has, and its document as it was found where it was there before."""

    id: str
    found: Desired | None = None


class Standing(Enum):
    """What is left of an instance, as the store says."""

    RUNS = "runs"
    DRAINS = "drains"
    ENDED = "ended"  # cleared, or another one is there in its place
    LOST = "lost"  # the store knows nothing of it: it lost its data, which a controller that lives writes back


class Leadership(msgspec.Struct, frozen=True):
    """Who leads, under which epoch; a later leader has a higher one."""

    controller: str
    epoch: Count
    at: Count


async def claim_instance(
    store: Store, keys: StoreKeys, head_node: str, http: HttpOptions | None, *, detached: bool, incomplete: bool = False
) -> InstanceClaim:
    """The namespace is ours after this. `incomplete`: what is declared is to be deployed yet.

    A lapsed instance is cleared (its queues stay, with the requests in them). A lapsed detached one is taken over by a detached start, with
    all that is deployed: `head_node` and `http` are the new ones then, unless `http` is None, of a starter that has no opinion of either.
    Raises InstanceError for a live one.
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
    await _write(store, keys, raw, lease)  # first: of two starters who see one lapsed lease, one clears and the other is refused
    await _forget_documents(store, keys, (keys.instance, msgspec.json.encode(lease)))
    desired = Desired(instance=lease.id, head_node=head_node, http=http or HttpOptions(location="NoServer"), incomplete=incomplete)
    if not await store.replace(keys.desired, None, desired.to_bytes()):
        raise _started_meanwhile()
    return InstanceClaim(lease.id)


async def check_free(store: Store, keys: StoreKeys) -> InstanceLease | None:
    """The lapsed lease that stands there, if one does. Raises InstanceError for a live one."""
    raw = await store.get(keys.instance)
    old = decode_lease(raw) if raw is not None else None
    if old is not None and await _is_alive(store, keys, old):
        raise InstanceError(
            f"an instance runs under this namespace already (started by {old.owner}): join it with serve.connect(), end it with "
            "`mqserve shutdown`, or choose another namespace (MQSERVE_NAMESPACE)"
        )
    return old


def _is_left(instance: str, raw: bytes | None) -> bool:
    """Whether a document of the instance is there to be taken over, and not about to go."""
    desired = Desired.from_bytes(raw)
    return raw is not None and desired.instance == instance and not desired.closing


async def _take_over(store: Store, keys: StoreKeys, instance: str, head_node: str, http: HttpOptions | None) -> Desired:
    """The old head node is gone, and with it the only one that HeadOnly lets run a proxy. Returns the document as it was."""
    while True:
        raw = await store.get(keys.desired)
        if not _is_left(instance, raw):
            raise InstanceError("the instance was shut down while it was taken over: start again")
        old = Desired.from_bytes(raw)
        if http is None:
            return old
        new_http = msgspec.structs.replace(http, middlewares=http.middlewares or old.http.middlewares)
        new = msgspec.structs.replace(old, head_node=head_node, http=new_http, version=old.version + 1)
        if await store.replace(keys.desired, raw, new.to_bytes()):
            return old


async def give_back(store: Store, keys: StoreKeys, claim: InstanceClaim, head_node: str) -> None:
    """After a start that failed: whoever starts next finds the instance as it was, unless somebody else has it by then."""
    raw = await store.get(keys.desired)
    if claim.found is None or not _is_left(claim.id, raw) or (current := Desired.from_bytes(raw)).head_node != head_node:
        return
    old = msgspec.structs.replace(current, head_node=claim.found.head_node, http=claim.found.http, version=current.version + 1)
    await store.replace(keys.desired, raw, old.to_bytes())


async def read_instance(store: Store, keys: StoreKeys) -> InstanceLease:
    """The running instance. Raises InstanceError when there is none."""
    raw = await store.get(keys.instance)
    if raw is None or await store.get(keys.desired) is None:
        raise no_instance()
    return decode_lease(raw)


def no_instance() -> InstanceError:
    return InstanceError("no instance runs under this namespace: start one with `mqserve start`, `mqserve run` or serve.start()")


async def has_leader(store: Store, keys: StoreKeys, instance: str) -> bool:
    """Whether a controller leads this instance: watched for a while, unless it is long gone."""
    raw = await store.get(keys.instance)
    lease = decode_lease(raw) if raw is not None else None
    return lease is not None and lease.id == instance and await _is_alive(store, keys, lease)


async def renew_instance(store: Store, keys: StoreKeys, instance: str, leader: str, guard: Guard) -> bool:
    """Writes it anew where it is broken or was deleted. False where it was refused; another instance's is none of ours to renew, nor is
    that of one which has ended."""
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
    """All documents of this instance, and of no later one; results of its requests stay until they expire.

    False where the guard refused it. Whoever dies halfway leaves what the next one clears.
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
    """Whether it was cleared on purpose, or for another one: a store that lost its data knows nothing of that."""
    raw, ended = await store.get_documents([keys.instance, keys.ended])
    return ended == instance.encode() or _is_of_another(raw, instance)


def _is_of_another(raw_lease: bytes | None, instance: str) -> bool:
    """One that does not parse says nothing of that: its controller writes it anew."""
    try:
        return raw_lease is not None and decode_lease(raw_lease).id != instance
    except BadEnvelope:
        return False


async def read_standing(store: Store, keys: StoreKeys, instance: str) -> Standing:
    """A document that is left is to be cleared yet, whatever the other keys say. Raises StoreUnavailable."""
    raw_desired, raw_lease, ended = await store.get_documents([keys.desired, keys.instance, keys.ended])
    if raw_desired is not None:
        try:
            desired = Desired.from_bytes(raw_desired)
        except BadEnvelope:  # its followers go on with the last good one
            return Standing.RUNS
        if desired.instance != instance:
            return Standing.ENDED
        return Standing.DRAINS if desired.closing else Standing.RUNS
    if ended == instance.encode() or _is_of_another(raw_lease, instance):
        return Standing.ENDED
    return Standing.LOST


async def _forget_documents(store: Store, keys: StoreKeys, guard: Guard) -> None:
    try:
        desired = Desired.from_bytes(await store.get(keys.desired))
    except BadEnvelope:
        desired = Desired()  # the code it named stays behind: nobody can tell which that was
    for sha256 in desired.codes:  # the files first, since the records lead to them; many of them, so some at a time
        raw = await store.get_large(keys.code(sha256))
        files = list(await files_of(store, keys, raw)) if raw is not None else []
        for at in range(0, len(files), FILES_AT_ONCE):
            await store.delete(*map(keys.code, files[at : at + FILES_AT_ONCE]), guard=guard)
    await store.delete(keys.desired, keys.observed, keys.beats, keys.leader, *map(keys.code, desired.codes), guard=guard)
    await store.announce()


class Leader:
    """One controller's claim to lead."""

    def __init__(self, store: Store, keys: StoreKeys, controller: str, kept_by: str = "") -> None:
        self._store = store
        self._keys = keys
        life = secrets.token_hex(3)  # a container that is restarted has the id of its last life
        self.name = f"{controller}#{kept_by}.{life}" if kept_by else f"{controller}#{life}"  # see `release_of`
        self._mine: bytes | None = None
        self._renewed_at = -math.inf  # monotonic, from before the write
        self._above = 0
        self.epoch = 0

    def __repr__(self) -> str:
        return f"<Leader {self.name}, epoch {self.epoch}, {'leading' if self._mine else 'waiting'}>"

    @property
    def claim(self) -> Guard:
        """What makes a write refuse itself once another leads. Raises NotLeading."""
        if self._mine is None:
            raise NotLeading("another controller leads")
        return self._keys.leader, self._mine

    @property
    def leads_for_s(self) -> float:
        """How long from now, by our own clock; it runs on while we are frozen."""
        return self._renewed_at + LEADS_FOR_S - time.monotonic() if self._mine is not None else 0.0

    def still_leads(self) -> bool:
        return self.leads_for_s > 0

    async def lead(self) -> bool:
        """Takes or renews the lead; False while another one has it."""
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
        """Leads on, for long enough to do what comes next. Raises NotLeading, also where nobody took over while we were frozen: what
        comes next was decided before that."""
        epoch = self.epoch
        if self.still_leads() and self.leads_for_s < LEADS_FOR_S - RENEWED_EVERY_S:
            await self.lead()
        if not self.still_leads() or self.epoch != epoch:
            raise NotLeading("another controller took over")

    def outrank(self, epoch: int) -> None:
        """The next claim is above this epoch, which somebody else had."""
        if epoch > self.epoch:
            self._above = max(self._above, epoch)

    async def release(self, *, for_good: bool = False) -> None:
        """At a graceful end: whoever waits leads at once, above our epoch. `for_good`: with the instance, nothing is left to lead."""
        mine, self._mine = self._mine, None
        if mine is not None:
            lapsed = None if for_good else msgspec.json.encode(Leadership(self.name, self.epoch, 0))
            await self._store.replace(self._keys.leader, mine, lapsed)


async def release_of(store: Store, keys: StoreKeys, kept_by: str) -> None:
    """The lead of a controller that has ended, if it stands there, for the next one to lead at once. To be called by the
    keeper of this token's controllers while none of them lives: a lead with the token is nobody's then.

    What is compared is the claim as it was read: a leader that came meanwhile keeps its own. Raises StoreUnavailable.
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
    """Raises BadEnvelope."""
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
        raise _started_meanwhile()


def _started_meanwhile() -> InstanceError:
    return InstanceError("another process started an instance under this namespace at the same moment: join it with serve.connect()")


def _owner() -> str:
    return f"{socket.gethostname()}, process {os.getpid()}"
