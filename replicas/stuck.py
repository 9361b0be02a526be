"""Ends a replica that will run no more requests: a call of it never returns, or code outside any call blocks its thread."""

from __future__ import annotations

import time

from ..broker.errors import BackendFailed
from .register import Register
from .stages import Job, KeptJob, Stage
from .user_hooks import RECONFIGURE_BUDGET_S
from .worker import Worker

STUCK_AFTER_S = 10.0


def check_calls(backend: str, register: Register, request_timeout_s: float) -> None:
    """Raises BackendFailed if a call goes on STUCK_AFTER_S after `request_timeout_s`, that of a job after `job_timeout_s`, and nobody waits
    for it: nothing else ends it."""
    # not by the request's own deadline: a client with a short one must not end replicas
    now = time.monotonic()
    for job in register.at(Stage.RUNNING):
        allowed_s = max([_allowed_s(member, request_timeout_s) for member in job.batch or (job,)])
        stuck_since = now - allowed_s - STUCK_AFTER_S
        if job.started < stuck_since and all(_is_long_unwanted(member, stuck_since) for member in job.batch or (job,)):
            setting = "job_timeout_s" if isinstance(job, KeptJob) else "request_timeout_s"
            raise BackendFailed(
                f"a call of backend {backend!r} goes on {STUCK_AFTER_S:g} s after {setting} ({allowed_s:g} s), and ends its replica: "
                "ask serve.cancelled() in it, or allow more"
            )


def _allowed_s(job: Job, request_timeout_s: float) -> float:
    return job.timeout_s if isinstance(job, KeptJob) else request_timeout_s


def _is_long_unwanted(job: Job, since: float) -> bool:
    """Whether nobody waits for the job. One that streams counts from when it was given up, since it may run for long."""
    return job.unwanted and (job.flow is None or not job.flow.is_shown or job.flow.stopped_at < since)


def check_silence(backend: str, register: Register, worker: Worker) -> None:
    """Raises BackendFailed if user code blocks the worker's thread while no request or hook runs, since no request could start. Must be
    called once a second."""
    in_hook = 0 <= time.monotonic() - worker.hook_since < RECONFIGURE_BUDGET_S
    worker.thread.ask_for_life(may_be_busy=in_hook or bool(register.at(Stage.RUNNING)))
    if (silent_s := worker.thread.missed) > STUCK_AFTER_S:
        raise BackendFailed(
            f"code of backend {backend!r} has blocked its replica for {silent_s} s, outside any request, so that none starts: in async "
            "code await what takes long, or run it by asyncio.to_thread"
        )
