"""Schedules, as Python sees them: `serve.schedule` makes one, `serve.list_schedules` shows them."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ..broker.calls.scheduled_calls import MAX_BYTES, VERSION, ScheduledCall, encode_data
from ..broker.errors import BadSignature, BadType, BadValue, TooLarge
from ..broker.jobs import PRIORITIES
from ..broker.queue_names import check_name
from ..broker.times import utc
from ..broker.values.signing import Signer
from ..controller.cron import next_time
from ..controller.schedule_changes import check_schedule
from ..controller.state.documents import CatchUp, Schedule
from ..controller.state.firings import Firing
from .handle import AsyncHandle, Handle


@dataclass(frozen=True, slots=True)
class ScheduleStatus:
    """What is known of a schedule at one moment."""

    name: str
    endpoint: str
    cron: str
    timezone: str
    catch_up: CatchUp
    paused: bool
    next_at: datetime | None
    """When it fires next; None while it is paused."""
    last_at: datetime | None
    """The time of its last firing, for which a job was sent."""
    last_job: str
    """The id of that job, for `serve.job`; empty if there was none yet."""

    @classmethod
    def of(cls, schedule: Schedule, last: Firing | None, now_ms: int) -> ScheduleStatus:
        return cls(
            schedule.name,
            schedule.endpoint,
            schedule.cron,
            schedule.timezone,
            schedule.catch_up,
            schedule.paused,
            _time(next_time(schedule, now_ms)),
            _time(last.at if last is not None and last.job else None),
            last.job if last is not None else "",
        )


def make_schedule(
    name: str, handle: Handle | AsyncHandle, data: Any, *, cron: str, timezone: str, catch_up: CatchUp, signer: Signer, key_problem: str
) -> Schedule:
    """Returns the schedule for the document. Raises BadType, BadValue, NotEncodable, TooLarge, and BadSignature without the key that the
    instance demands."""
    check_name(name, "a schedule")
    check_schedule(cron, timezone, catch_up)
    if key_problem:
        raise BadSignature(key_problem)
    order = handle._order(data, {})
    options, endpoint = order.options, order.meta.endpoint
    if options.delay_s or options.eta is not None:
        raise BadValue(f"schedule {name!r} says by itself when its jobs begin: give its handle no delay_s or eta")
    if options.idempotency_key:
        raise BadValue(f"each job of schedule {name!r} has an id of its own: give its handle no idempotency_key")
    content_type, body = encode_data(data, signer, endpoint, name)
    call = ScheduledCall(
        VERSION,
        content_type,
        body,
        order.meta,
        order.shard_key,
        PRIORITIES[options.priority],
        options.tag or name,
        math.ceil(options.result_ttl_s or 0),
        math.ceil((options.expires_s or 0) * 1000),
        options.callback_url,
    )
    sealed = call.sealed(signer, endpoint, name)
    if len(sealed) > MAX_BYTES:
        raise TooLarge(f"the data of schedule {name!r} takes {len(sealed)} bytes and the limit is {MAX_BYTES}: give a reference to it")
    return Schedule(name, endpoint, cron, timezone, sealed, secrets.token_hex(16), catch_up)


def check_handle(handle: object) -> Handle | AsyncHandle:
    """Raises BadType for what is neither a handle nor a name."""
    if not isinstance(handle, Handle | AsyncHandle):
        raise BadType(f"a schedule takes the name of an endpoint, or a handle with options, not {handle!r}")
    return handle


def _time(ms: int | None) -> datetime | None:
    return None if ms is None else utc(ms)
