"""A controller's copy of its instance's documents, from which it restores a store that lost them."""

from __future__ import annotations

import logging

import msgspec

from ..broker.errors import BadEnvelope
from ..broker.process.rate_limited_log import RateLimitedLog
from ..broker.store import WRONG_TYPE, Guard, Store
from ..broker.store_keys import StoreKeys
from ..broker.values.code import files_of
from . import lease
from .state.documents import Desired, Observed
from .state.reading import read_desired, read_observed

logger = logging.getLogger(__name__)


class KnownDocuments:
    """The last good desired and observed state of one instance, and the code that they name.

    A standby controller reads them like the leader: after a loss it may be the one that has to write them back.
    """

    def __init__(self, store: Store, keys: StoreKeys, instance: str) -> None:
        self._store = store
        self._keys = keys
        self._instance = instance
        self._codes: dict[str, bytes] = {}
        self._files: dict[str, frozenset[str]] = {}  # code -> the hashes of its files; nodes have the files themselves
        self._broken, self._broken_observed = RateLimitedLog(logger), RateLimitedLog(logger)
        self._desired_is_behind = self._observed_is_behind = False  # whether the store's copy is older than ours
        self.desired: Desired | None = None
        self.observed: Observed | None = None
        self.raw_desired: bytes | None = None  # as last read from the store
        self.raw_observed: bytes | None = None
        self.observed_is_broken = False
        self.is_anothers = False  # the desired document in the store is another instance's: ours was cleared while we slept

    @property
    def store_is_behind(self) -> bool:
        """Whether the store has less than we know, because it failed and came back empty or with an older copy."""
        return self._desired_is_behind or self._observed_is_behind

    async def read(self) -> None:
        self.raw_desired, self.raw_observed = await self._store.get_documents([self._keys.desired, self._keys.observed])
        self._read_desired()
        if self.is_anothers:
            return
        self._read_observed()
        if self.desired is not None:
            await self._read_codes(self.desired)

    def _read_desired(self) -> None:
        """Keeps our copy if the store has none, a broken one or an older one."""
        known = self.desired
        self._desired_is_behind = known is not None and self.raw_desired is None
        if self.raw_desired is None:
            return
        try:
            found = read_desired(self.raw_desired)
        except BadEnvelope as error:
            last = "the last good one goes on, and is written back when the key is deleted" if known else "there is no last good one"
            self._broken.say(f"{error}; {last}")
            return
        self._broken.over()
        self.is_anothers = found.instance != self._instance
        self._desired_is_behind = known is not None and _order(found) < _order(known)
        if not self.is_anothers and not self._desired_is_behind:
            self.desired = found

    def _read_observed(self) -> None:
        """Keeps our copy like `_read_desired` does, except that the leader overwrites a broken one."""
        known = self.observed
        self.observed_is_broken = False
        self._observed_is_behind = known is not None and self.raw_observed is None
        if self.raw_observed is None:
            return
        try:
            found = read_observed(self.raw_observed)
        except BadEnvelope as error:
            self._broken_observed.say(f"{error}; the leader writes it anew")
            self.observed_is_broken = True
            return
        self._observed_is_behind = known is not None and _order(found) < _order(known)
        if not self._observed_is_behind:
            self.observed = found

    async def _read_codes(self, desired: Desired) -> None:
        named = desired.codes
        self._codes = {sha256: code for sha256, code in self._codes.items() if sha256 in named}
        self._files = {sha256: files for sha256, files in self._files.items() if sha256 in named}
        for sha256 in named - set(self._codes):
            code = await self._store.get_large(self._keys.code(sha256))
            if code is not None and code != WRONG_TYPE:
                self._codes[sha256] = code
        for sha256 in set(self._codes) - set(self._files):
            if (files := await files_of(self._store, self._keys, self._codes[sha256])) is not None:
                self._files[sha256] = files

    def hashes_of(self, desired: Desired) -> frozenset[str]:
        """Returns the hashes of a document's code and of the files of that code."""
        named = desired.codes
        return named.union(*(self._files.get(sha256, frozenset()) for sha256 in named))

    async def write_back(self, claim: Guard) -> None:
        """Writes our copy of the lost documents, code included, back to the store: the desired state under a higher epoch. Does nothing
        without a copy."""
        known = self.desired
        if known is None:
            return
        logger.warning("the store lost data: writing the lost documents back")
        for sha256, code in self._codes.items():
            await self._store.set(self._keys.code(sha256), code, only_new=True)  # unfenced, since a hash can have only one value
        owner = lease.InstanceLease(known.instance, "restored by its controller", True, self._store.now_ms())
        await self._store.replace(self._keys.instance, None, msgspec.json.encode(owner), guard=claim, quiet=True)
        if self.observed is not None and self._observed_is_behind:
            newer = msgspec.structs.replace(self.observed, version=self.observed.version + 1)
            await self._store.replace(self._keys.observed, self.raw_observed, newer.to_bytes(), guard=claim)
        if self._desired_is_behind:
            restored = msgspec.structs.replace(known, epoch=known.epoch + 1)
            await self._store.replace(self._keys.desired, self.raw_desired, restored.to_bytes(), guard=claim)

    async def replace_observed(self, new: Observed, claim: Guard) -> None:
        """Writes the observed state. Raises NotLeading if the compare-and-set fails: another controller leads, or wrote meanwhile."""
        if not await self._store.replace(self._keys.observed, self.raw_observed, new.to_bytes(), guard=claim):
            raise lease.NotLeading(f"the observed state of epoch {new.epoch} was refused: another controller leads, or wrote it meanwhile")
        self.observed = new


def _order(document: Desired | Observed) -> tuple[int, int]:
    return document.epoch, document.version
