"""Who takes part in an instance, as its documents in the store say."""

from typing import Any

import msgspec
import redis

from mqserve.broker.store_keys import StoreKeys
from mqserve.controller.lease import Leadership
from mqserve.controller.state.beats import SILENT_AFTER_S, Beat, read_beats
from mqserve.controller.state.documents import Desired, Observed
from mqserve.controller.state.reading import read_desired, read_observed


class Members:
    """Read anew at each call."""

    def __init__(self, store_url: str, namespace: str) -> None:
        self._store: Any = redis.Redis.from_url(store_url)  # its types cannot tell bytes from str
        self._keys = StoreKeys(namespace)

    def beats(self, kind: str, backend: str = "", state: str = "ready") -> list[Beat]:
        """Those that live and are in that state."""
        seconds, microseconds = self._store.time()
        since = seconds * 1000 + microseconds // 1000 - SILENT_AFTER_S * 1000
        found = self.last_beats()
        beats = [beat for beat in found if (beat.kind, beat.state) == (kind, state) and beat.at > since]
        return [beat for beat in beats if backend in ("", getattr(beat, "backend", ""))]

    def last_beats(self) -> list[Beat]:
        """Of everybody that is not forgotten, however long ago they were."""
        fields = {field.decode(): raw for field, raw in self._store.hgetall(self._keys.beats).items()}
        return list(read_beats(fields).values())

    def age(self, pid: int, by_s: float) -> None:
        """As if this process, which does not beat any more, had beaten its last so much longer ago."""
        (beat,) = [beat for beat in self.last_beats() if beat.pid == pid]
        self._store.hset(self._keys.beats, beat.field, msgspec.structs.replace(beat, at=beat.at - int(by_s * 1000)).to_bytes())

    def pids(self, kind: str, backend: str = "") -> set[int]:
        return {beat.pid for beat in self.beats(kind, backend)}

    def observed(self) -> Observed:
        return read_observed(self._store.get(self._keys.observed))

    def compared(self) -> Desired:
        """What is wanted, once a leader has compared it with what is seen; until then nothing."""
        raw = self._store.get(self._keys.desired)
        desired = read_desired(raw) if raw else Desired()
        return desired if self.observed().seen == (desired.epoch, desired.version) else Desired()

    def leader(self) -> tuple[int, int]:
        """(process id, epoch) of the controller that leads; zeros when none does."""
        raw = self._store.get(self._keys.leader)
        held = msgspec.json.decode(raw, type=Leadership) if raw else Leadership("-0#", 0, 0)
        seconds, _ = self._store.time()
        if held.at < (seconds - 8) * 1000:
            return 0, 0
        return _pid_of(held), held.epoch

    def has_let_go(self, pid: int) -> bool:
        """Whether this controller gave the lead up, or another has it: a lead that lapsed says until when it was held."""
        raw = self._store.get(self._keys.leader)
        held = msgspec.json.decode(raw, type=Leadership) if raw else None
        return held is None or held.at == 0 or _pid_of(held) != pid

    def close(self) -> None:
        self._store.close()


def _pid_of(held: Leadership) -> int:
    return int(held.controller.partition("#")[0].rpartition("-")[2])
