"""mqserve: serve Python functions and models from a message queue.

    import mqserve as serve

    @serve.endpoint("/hello/{name}")
    def hello(request):
        return f"Hello, {request.path_params['name']}!"

and `mqserve run hello.py`. See docs/ for the rest.
"""

from . import early_interrupts  # noqa: F401, I001  # before what takes time to import
from starlette.exceptions import HTTPException

from .client.api import (
    connect,
    create_backend,
    create_endpoint,
    create_pipeline,
    delete_backend,
    delete_endpoint,
    delete_pipeline,
    delete_schedule,
    deploying,
    future,
    get_backend_config,
    get_handle,
    group,
    job,
    list_backends,
    list_endpoints,
    list_pipelines,
    list_schedules,
    mount,
    pause_schedule,
    register_convertor,
    resume_schedule,
    run_schedule,
    schedule,
    set_traffic,
    shadow_traffic,
    shutdown,
    start,
    stream,
    submit_many,
    update_backend,
    update_backend_config,
)
from .broker.errors import (
    BackendFailed,
    BackendGone,
    BadEnvelope,
    BadSignature,
    BadType,
    BadValue,
    BrokerUnavailable,
    Cancelled,
    InstanceEnded,
    InstanceError,
    JobGoesOn,
    KeyMisused,
    MembersFailed,
    MQServeError,
    NoReplica,
    NotEncodable,
    NotRouted,
    Overloaded,
    RemoteError,
    ReplicaLost,
    RequestTimeout,
    ResultGone,
    StoreUnavailable,
    TooLarge,
    UnknownBackend,
    UnknownEndpoint,
    UnknownJob,
)
from .client.client import Client
from .controller.state.config import BackendConfig
from .controller.state.retries import Retry
from .client.declared import endpoint
from .client import pickled_clients  # noqa: F401  # says how clients and handles pickle
from .client.futures import Future, get, wait
from .client.gathering import as_completed, gather
from .client.groups import Group, GroupStatus
from .client.handle import AsyncHandle, Handle, StreamHandle
from .client.jobs import Job, JobAttempt, JobEvent, JobEvents, JobStage, JobStatus
from .client.schedules import ScheduleStatus
from .client.streams import Stream
from .broker.jobs import JobState
from .replicas.batch_decorators import END, BadBatch, accept_batch, batch
from .replicas.context import ReplicaContext, cancelled, get_current_backend_tag, get_current_replica_tag, get_replica_context
from .replicas.asgi_apps import NoHttpRequest
from .replicas.handler import NoSuchMethod
from .replicas.job_words import RetryLater, log, progress
from .replicas.ingress import ingress
from .replicas.requests import BadBody, Request, ServeRequest

__version__ = "0.1.0"

__all__ = [
    "END",
    "AsyncHandle",
    "BackendConfig",
    "BackendFailed",
    "BackendGone",
    "BadBatch",
    "BadBody",
    "BadEnvelope",
    "BadSignature",
    "BadType",
    "BadValue",
    "BrokerUnavailable",
    "Cancelled",
    "Client",
    "Future",
    "Group",
    "GroupStatus",
    "HTTPException",
    "Handle",
    "InstanceEnded",
    "InstanceError",
    "Job",
    "JobAttempt",
    "JobEvent",
    "JobEvents",
    "JobGoesOn",
    "JobStage",
    "JobState",
    "JobStatus",
    "KeyMisused",
    "MQServeError",
    "MembersFailed",
    "NoHttpRequest",
    "NoReplica",
    "NoSuchMethod",
    "NotEncodable",
    "NotRouted",
    "Overloaded",
    "RemoteError",
    "ReplicaContext",
    "ReplicaLost",
    "Request",
    "RequestTimeout",
    "ResultGone",
    "Retry",
    "RetryLater",
    "ScheduleStatus",
    "ServeRequest",
    "StoreUnavailable",
    "Stream",
    "StreamHandle",
    "TooLarge",
    "UnknownBackend",
    "UnknownEndpoint",
    "UnknownJob",
    "accept_batch",
    "as_completed",
    "batch",
    "cancelled",
    "connect",
    "create_backend",
    "create_endpoint",
    "create_pipeline",
    "delete_backend",
    "delete_endpoint",
    "delete_pipeline",
    "delete_schedule",
    "deploying",
    "endpoint",
    "future",
    "gather",
    "get",
    "get_backend_config",
    "get_current_backend_tag",
    "get_current_replica_tag",
    "get_handle",
    "get_replica_context",
    "group",
    "ingress",
    "job",
    "list_backends",
    "list_endpoints",
    "list_pipelines",
    "list_schedules",
    "log",
    "mount",
    "pause_schedule",
    "progress",
    "register_convertor",
    "resume_schedule",
    "run_schedule",
    "schedule",
    "set_traffic",
    "shadow_traffic",
    "shutdown",
    "start",
    "stream",
    "submit_many",
    "update_backend",
    "update_backend_config",
    "wait",
]
