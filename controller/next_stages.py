"""The next stage of a pipeline: sent when the one before it has succeeded. Any other end of a stage ends its pipeline.

Each message carries the result of the stage before by value. The results are not opened here: each keeps the seal of its own job.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec

from ..broker.calls.job_sending import JobSender, JobTerms
from ..broker.calls.sending import MAX_BODY_BYTES
from ..broker.envelope import RequestHead, Stage
from ..broker.errors import UNPARSABLE, BadEnvelope, BadSignature, TooLarge
from ..broker.jobs import JOB_RESULT_TTL_S, MAX_RESULT_TTL_S, EndNote, JobEnd, JobState
from ..broker.pipelines import Plan, stage_id
from ..broker.result_bodies import with_body
from ..broker.result_files import MAX_IN_STORE, RECORDED_WITHIN_MS, BodyGone
from ..broker.results import ErrorInfo, Result, entry_of
from ..broker.store import Store, recorded
from ..broker.store_keys import StoreKeys
from ..broker.values.carried import CARRIED, CarriedResult, carry_one
from ..broker.values.codecs import sealed_anew
from ..broker.values.signing import SealScope, Signer
from .latest_document import LatestDocument
from .state.documents import Desired
from .state.traffic import choose

logger = logging.getLogger(__name__)

_INLINE_BYTES = 256 * 1024  # a larger body of a pipeline's result gets a key of its own, as those of jobs do
_EXCEPTION = "exception"  # the content type of a sealed exception


class NextStages:
    """The stages of one instance, as the document says that `follow` got last."""

    def __init__(self, jobs: JobSender, store: Store, keys: StoreKeys, signer: Signer) -> None:
        self._jobs = jobs
        self._store = store
        self._keys = keys
        self._signer = signer
        self._document = LatestDocument(store, keys)
        self._refusal = ""
        self._large = asyncio.Lock()  # one large result at a time: each may have 64 MiB

    def __repr__(self) -> str:
        return f"<NextStages of {sum(bool(endpoint.stages) for endpoint in self._document.followed.endpoints.values())} pipelines>"

    def follow(self, desired: Desired, refusal: str) -> None:
        """`refusal` says why the store is to take no jobs."""
        self._document.follow(desired)
        self._refusal = refusal

    async def send(self, end: EndNote) -> None:
        """Returns once the next stage is on its way, or the pipeline has its end. May be called again for the same end. Raises the errors
        of broker and store, and BadEnvelope for what is no stage of ours."""
        assert end.stage is not None
        plan, index = Plan.opened(end.stage.plan, self._signer), end.stage.index
        if not 0 <= index < len(plan.stages) or end.id != stage_id(plan.id, index):
            raise BadEnvelope(f"it says that it was stage {index} of a pipeline, and its id is none of that")
        record = await self._store.jobs.read(plan.id)
        if record is not None and (record.state.is_final or record.has_result):
            return  # it was cancelled, or this was done before
        raw = await self._store.get(self._keys.future(end.id))
        if raw is None:
            return await self._end(plan, _failed("mqserve.ResultGone", f"the result of stage {plan.stages[index]!r} is not kept any more"))
        try:
            result = Result.from_bytes(raw)
        except BadEnvelope as error:  # of the result, and not of the entry: that was ours
            message = f"the result of stage {plan.stages[index]!r} cannot be read: {error}"
            return await self._end(plan, _failed("mqserve.BadEnvelope", message))
        if result.file is not None and result.file.size > MAX_BODY_BYTES:
            message = (
                f"the result of stage {plan.stages[index]!r} has {result.file.size} bytes, and one of a pipeline {MAX_BODY_BYTES} at most"
            )
            return await self._end(plan, _failed("mqserve.TooLarge", message))
        if result.ref:
            async with self._large:
                return await self._go_on(plan, index, end.state, await self._whole(plan, index, end.id, result))
        await self._go_on(plan, index, end.state, result)

    async def _whole(self, plan: Plan, index: int, job_id: str, result: Result) -> Result:
        try:
            return await with_body(self._store, self._keys, job_id, result)
        except BodyGone as error:
            return _failed("mqserve.ResultGone", f"the result of stage {plan.stages[index]!r} cannot be passed on: {error}")

    async def _go_on(self, plan: Plan, index: int, state: JobState, result: Result) -> None:
        if result.frames:
            message = f"stage {plan.stages[index]!r} answered with a stream, which no other stage takes: let it return a list"
            return await self._end(plan, _failed("mqserve.BadType", message))
        if state is not JobState.SUCCEEDED or result.error is not None or result.status >= 300 or index + 1 == len(plan.stages):
            return await self._end(plan, self._taken_over(plan, index, state, result), state)
        try:
            await self._send(plan, index + 1, result)
        except TooLarge as error:
            await self._end(plan, _failed("mqserve.TooLarge", f"the result of stage {plan.stages[index]!r} cannot go on: {error}"))

    async def _send(self, plan: Plan, index: int, result: Result) -> None:
        """Raises what `JobSender.submit` does."""
        name = plan.stages[index]
        desired = await self._document.with_endpoint(name)
        endpoint = desired.endpoints.get(name)
        if endpoint is None or endpoint.stages:
            message = f"there is no endpoint {name!r} any more, which is stage {index + 1} of {len(plan.stages)}"
            return await self._end(plan, _failed("mqserve.UnknownEndpoint", message, 503))
        job_id = stage_id(plan.id, index)
        backend, _ = choose(endpoint, plan.shard_key or job_id)  # by the id, so that a second sending goes the same way
        before = stage_id(plan.id, index - 1)
        body = carry_one(CarriedResult(result.content_type, result.body, result.backend, before))
        terms = JobTerms(
            result_ttl_s=plan.result_ttl_s,
            priority=plan.priority,
            tag=plan.tag,
            once=desired.backends[backend].config.delivery == "at_most_once",
            stage=Stage(plan.sealed(self._signer), index),
            carried=True,
        )
        head = RequestHead(endpoint=name)
        await self._jobs.submit(job_id, backend, body, CARRIED, head, origin=plan.origin, terms=terms, refusal=self._refusal)

    def _taken_over(self, plan: Plan, index: int, state: JobState, result: Result) -> Result:
        """Returns the result of a stage as that of the pipeline, so that a pickle in it opens under the id of that. A failure names its
        stage to web clients."""
        old, new = (SealScope("result", result.backend, job) for job in (stage_id(plan.id, index), plan.id))
        try:
            body = sealed_anew(result.body, result.content_type, self._signer, old, new)
        except BadSignature as refused:
            return _failed("mqserve.BadSignature", f"the result of stage {plan.stages[index]!r} cannot be passed on: {refused}")
        info = result.error
        if info is not None and info.sealed:
            info = msgspec.structs.replace(info, sealed=self._exception_of(info.sealed, old, new))
        if info is not None and state is JobState.FAILED:  # whoever else ends it otherwise writes bytes that must be the same
            info = msgspec.structs.replace(info, members=_with_stage(info.members, plan.stages[index]))
        return msgspec.structs.replace(result, body=body, error=info)

    def _exception_of(self, sealed: bytes, old: SealScope, new: SealScope) -> bytes:
        was, becomes = (SealScope("result", scope.backend, scope.id, _EXCEPTION) for scope in (old, new))
        try:
            return self._signer.seal(self._signer.open(sealed, was), becomes)
        except BadSignature:
            return b""  # type and message say enough

    async def _end(self, plan: Plan, result: Result, state: JobState = JobState.FAILED) -> None:
        """Records the end of the pipeline, unless it has one."""
        ttl_ms = self._ttl_s(plan, result) * 1000
        now_ms = self._store.now_ms()
        key = self._keys.result_body(plan.id)
        if len(result.body) > MAX_IN_STORE and self._store.files:
            file = await self._store.files.put(plan.id, result.body, now_ms + RECORDED_WITHIN_MS + ttl_ms)
            result = msgspec.structs.replace(result, body=b"", ref=key, file=file)
        elif len(result.body) > _INLINE_BYTES:
            await self._store.set(key, result.body, ttl_ms=ttl_ms)
            result = msgspec.structs.replace(result, body=b"", ref=key)
        raw = result.to_bytes()
        end = JobEnd(
            plan.id, raw, entry_of(plan.id, raw), JobState.FAILED if result.error is not None and state is JobState.SUCCEEDED else state,
            result.status, "", now_ms, ttl_ms, endpoint=plan.name, callback=plan.callback, member=plan.member,
        )  # fmt: skip
        await recorded(self._store.jobs.end_then, end)

    def _ttl_s(self, plan: Plan, result: Result) -> int:
        backend = self._document.followed.backends.get(result.backend)
        its = backend.config.result_ttl_s if backend is not None else 0
        return int(min(plan.result_ttl_s or its or JOB_RESULT_TTL_S, MAX_RESULT_TTL_S))


def _with_stage(members: bytes, name: str) -> bytes:
    """Returns the members of a problem document, and the stage among them."""
    try:
        found = msgspec.json.decode(members, type=dict[str, Any]) if members else {}
    except UNPARSABLE:  # then nobody gets them
        found = {}
    return msgspec.json.encode({"stage": name, **found})


def _failed(kind: str, message: str, status: int = 500) -> Result:
    return Result(status=status, error=ErrorInfo(type=kind, message=message))
