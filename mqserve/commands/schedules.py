"""`mqserve schedules`: lists schedules, shows, pauses, resumes, deletes and runs them. Only running one needs the broker."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from typing import Any, NamedTuple

import msgspec
from rich.console import Console

from ..broker.errors import BadEnvelope
from ..broker.jobs import priority_name
from ..broker.process.printable import printable
from ..broker.redis.store import open_redis
from ..broker.settings import Settings
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from ..broker.times import rfc3339
from ..broker.values.codecs import decode_plain
from ..broker.values.signing import Signer
from ..controller import changes, lease
from ..controller.cron import next_times
from ..controller.schedule_changes import delete_schedule, find_schedule, pause_schedule, resume_schedule
from ..controller.scheduled_jobs import opened_call
from ..controller.state.documents import Desired, Observed, Schedule
from ..controller.state.firings import Firing, read_firings
from ..controller.state.reading import read_desired, read_observed
from .call import joined
from .printing import print_about, print_json, print_sentence
from .status import ScheduleFacts
from .status_table import make_console, print_table, schedules_table

_SHOWN_TIMES = 5


class _Stored(NamedTuple):
    """What the store knows of schedules."""

    desired: Desired
    observed: Observed
    firings: dict[str, Firing]
    now_ms: int

    def facts(self, schedule: Schedule) -> ScheduleFacts:
        return ScheduleFacts.of(schedule, self.firings.get(schedule.name), self.observed, self.now_ms)


async def list_schedules(settings: Settings, *, as_json: bool, console: Console | None = None) -> int:
    """Prints all schedules as a table, or as JSON, one per line."""
    console = console or make_console()
    async with _opened(settings) as (store, keys):
        stored = await _read(store, keys)
    facts = [stored.facts(schedule) for schedule in stored.desired.schedules.values()]
    if as_json:
        return print_json(console, map(msgspec.to_builtins, facts))
    if not facts:
        return print_sentence(console, "There are no schedules.")
    print_table(console, schedules_table(console, facts))
    return 0


async def show_schedules(settings: Settings, names: Sequence[str], *, as_json: bool, console: Console | None = None) -> int:
    """Prints all that is known of each schedule. Raises BadValue for an unknown name."""
    console = console or make_console()
    async with _opened(settings) as (store, keys):
        stored = await _read(store, keys)
    for schedule in [find_schedule(stored.desired, name) for name in names]:
        times = [rfc3339(ms) for ms in islice(next_times(schedule, stored.now_ms), _SHOWN_TIMES)]
        facts = {**msgspec.to_builtins(stored.facts(schedule)), "next_times": times}
        facts |= _facts_of_call(schedule, settings.signer)
        if as_json:
            print_json(console, [facts])
        else:
            print_about(console, facts | {"data": json.dumps(facts.get("data"))})
    return 0


async def pause_schedules(settings: Settings, names: Sequence[str]) -> int:
    """Raises BadValue for an unknown name, and then changes nothing, as the next two do."""
    return await _change(settings, names, lambda name, _: pause_schedule(name), "paused")


async def resume_schedules(settings: Settings, names: Sequence[str]) -> int:
    return await _change(settings, names, lambda name, store: resume_schedule(name, store.now_ms), "resumed")


async def delete_schedules(settings: Settings, names: Sequence[str]) -> int:
    return await _change(settings, names, lambda name, _: delete_schedule(name), "deleted")


def run_schedule(settings: Settings, name: str) -> int:
    """Sends a job of the schedule now, and prints its id."""
    with joined(settings) as client:
        job = client.run_schedule(name)
    return print_sentence(None, f"{printable(name)} runs as job {job.id}")


async def _change(settings: Settings, names: Sequence[str], change_of: Callable[[str, Store], changes.Change], done: str) -> int:
    async with _opened(settings) as (store, keys):

        def change(desired: Desired) -> Desired:
            for name in names:
                find_schedule(desired, name)
                desired = change_of(name, store)(desired)
            return desired

        await changes.commit(store, keys, (await lease.read_instance(store, keys)).id, change, any_instance=True)
    return print_sentence(None, f"{len(names)} {done}.")


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[tuple[Store, StoreKeys]]:
    async with open_redis(settings.store_url, settings.namespace) as store:
        yield store, StoreKeys(settings.namespace)


async def _read(store: Store, keys: StoreKeys) -> _Stored:
    """Raises InstanceError if there is no instance."""
    raw_desired, raw_observed, raw_firings = await store.get_documents([keys.desired, keys.observed, keys.firings])
    if raw_desired is None:
        raise lease.no_instance()
    return _Stored(read_desired(raw_desired), read_observed(raw_observed), read_firings(raw_firings), store.now_ms())


def _facts_of_call(schedule: Schedule, signer: Signer) -> dict[str, Any]:
    """Returns what its jobs are like. A pickle is not opened, since anybody who has the key may have made it."""
    try:
        call = opened_call(schedule, signer)
    except BadEnvelope as error:
        return {"call": str(error)}
    facts: dict[str, Any] = {
        "priority": priority_name(call.priority),
        "tag": call.tag,
        "result_ttl_s": call.result_ttl_s or None,
        "expires_s": call.expires_ms / 1000 or None,
        "callback_url": call.callback,
        "method_name": call.head.call,
        "shard_key": call.shard_key,
    }
    try:
        data = msgspec.to_builtins(decode_plain(call.body, call.content_type)[0])
    except BadEnvelope:
        data = "(pickled)"
    return facts | {"data": data}
