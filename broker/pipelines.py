"""Pipelines: jobs in a row, each of which gets the result of the one before it.

A pipeline is a record with an id, like any job, and no message. Its stages are ordinary jobs, whose ids follow from its own. The first one
is sent with it, the others by the leading controller when the one before has ended (`controller/next_stages.py`). Each message carries all
that the later ones need, so that a store that lost everything holds up no pipeline.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from .envelope import Member, Stage, Whole
from .errors import BadEnvelope
from .jobs import JobFacts, Pipeline
from .values.sealed_structs import open_struct, seal_struct
from .values.signing import SealScope, Signer

VERSION = 1
_CONTENT_TYPE = "application/x-mqserve-pipeline"


class Stages(NamedTuple):
    """What a request goes through whose endpoint is a pipeline."""

    pipeline: str  # its name
    endpoints: tuple[str, ...]
    shard_key: str = ""
    done: tuple[str, ...] = ()  # the ids of stages that are not run again

    @property
    def first(self) -> str:
        """The endpoint that the request itself goes to."""
        return self.endpoints[len(self.done)]


class Plan(msgspec.Struct, frozen=True, array_like=True):
    """What all stages of one pipeline have in common."""

    v: int
    id: str
    name: str
    stages: tuple[str, ...]
    done: tuple[str, ...]
    origin: str
    shard_key: str
    created_ms: Whole
    not_before_ms: Whole
    expires_ms: Whole
    result_ttl_s: Whole  # 0: as the backend of each stage says
    priority: int
    tag: str
    retry_of: str
    callback: str
    member: Member | None = None

    def sealed(self, signer: Signer) -> bytes:
        return seal_struct(self, signer, _SCOPE)

    @classmethod
    def opened(cls, raw: bytes, signer: Signer) -> Plan:
        """Raises BadEnvelope and BadSignature, as `open_struct`."""
        return open_struct(cls, raw, signer, _SCOPE, VERSION, "the plan of a pipeline")

    @property
    def facts(self) -> JobFacts:
        """What the record of the pipeline says of it."""
        return JobFacts(
            "", self.name, self.created_ms, self.expires_ms, self.not_before_ms, self.priority, self.tag, self.retry_of, self.callback,
            stages=self.stages, done=self.done, member=self.member,
        )  # fmt: skip

    def begun_by(self, index: int) -> Pipeline:
        """Returns what its record is told when that stage begins."""
        if not 0 <= index < len(self.stages):
            raise BadEnvelope(f"a pipeline of {len(self.stages)} stages has no stage {index}: another program wrote it")
        return Pipeline(self.id, self.facts, f"stage {self.stages[index]} ({index + 1} of {len(self.stages)})")


def stage_id(pipeline_id: str, index: int) -> str:
    """Returns the id of a stage. It is the same whoever sends the stage, so a second sending is recognized: also if the secret key is
    rotated on the way. The pipeline's id, which is a right, cannot be told from it."""
    return hmac.digest(pipeline_id.encode(), b"mqserve stage %d" % index, "sha256")[:16].hex()


def message_id(job_id: str, stages: Stages | None) -> str:
    """Returns the id of the message that a job sends: its own, or that of its first stage."""
    return job_id if stages is None else stage_id(job_id, len(stages.done))


def stage_ids(pipeline_id: str, facts: JobFacts) -> Sequence[str]:
    """Returns the ids of all stages, also of those that are not sent yet."""
    return [*facts.done, *(stage_id(pipeline_id, index) for index in range(len(facts.done), len(facts.stages)))]


def place_of(stage: Stage, signer: Signer) -> Pipeline:
    """Returns the pipeline of a stage that begins. Raises BadEnvelope."""
    return Plan.opened(stage.plan, signer).begun_by(stage.index)


_SCOPE = SealScope("pipeline", content_type=_CONTENT_TYPE)
