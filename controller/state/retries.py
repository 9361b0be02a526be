"""When a job whose handler has failed is tried again: the setting `retry` of a backend, and the decision."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ...broker.errors import BadValue
from ...broker.failures import name_of

MAX_BACKOFF_S = 7 * 24 * 3600


def _named(kind: Any) -> Any:
    """Returns the name of an exception class. A str is a name already."""
    if isinstance(kind, type):
        if issubclass(kind, BaseException):
            return name_of(kind)
        raise BadValue(f"`on` names exceptions, and {name_of(kind)} is none")
    if not isinstance(kind, str):
        raise BadValue(f"`on` names exceptions, by their classes or as str, and {kind!r} is neither")
    return kind.removeprefix("builtins.")


def with_named_settings(settings: Any) -> Any:
    """Returns the settings of a Retry, before they are read. Raises BadValue for a dict that names one by anything but a str."""
    if isinstance(settings, dict):
        for name in settings:
            if not isinstance(name, str):
                raise BadValue(f"its settings have names, such as 'attempts', and {name!r} is none")
    return settings


def sentence_of(error: ValidationError, model: type[BaseModel]) -> str:
    """Returns what is wrong with the settings of a model, the first thing if there are several."""
    first = error.errors()[0]
    field, kind = ".".join(map(str, first["loc"])), first["type"]
    if not field:
        return first["msg"]
    if kind == "extra_forbidden":
        return f"there is no setting {field!r}; there are {', '.join(model.model_fields)}"
    if isinstance(known := first.get("ctx", {}).get("error"), BadValue):
        return f"{field}: {known}"
    if field == "retry" and kind == "model_type":
        return f"retry: give serve.Retry(…), or a dict of its settings, not {first.get('input')!r}"
    return f"{field}: {first['msg'].lower()}, not {first.get('input')!r}"


_Seconds = Annotated[float, Field(ge=0, le=MAX_BACKOFF_S)]


class Retry(BaseModel):
    """How a job is tried again whose handler raised an exception. Requests that somebody waits for are not.

    attempts: runs of one job, the first one included; after the last one the job has failed, and becomes a dead letter, too.
    on: classes of exceptions, or their names such as "OSError" and "httpx.ConnectError"; also those of their subclasses count.
    backoff_s, factor, max_backoff_s: seconds from the first run to the second; by what it grows each time; and at most.
    jitter: makes each pause shorter by up to a half, at random, so that jobs that failed together do not come together again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    attempts: Annotated[int, Field(gt=0, le=10_000)] = 5
    on: tuple[Annotated[str | type[BaseException], BeforeValidator(_named)], ...] = ("Exception",)  # validated to names
    backoff_s: _Seconds = 1.0
    factor: Annotated[float, Field(ge=1, le=100)] = 2.0
    max_backoff_s: _Seconds = 300.0
    jitter: bool = True

    if not TYPE_CHECKING:  # type checkers know the settings

        def __init__(self, **settings: Any) -> None:
            """Raises BadValue, naming the setting. BackendConfig, of which a Retry may be a part, makes that an error of its own."""
            try:
                super().__init__(**settings)
            except ValidationError as error:
                raise BadValue(f"bad serve.Retry: {sentence_of(error, type(self))}") from error

    def is_on(self, error_names: Sequence[str]) -> bool:
        """Whether an exception of this type is retried, by the names of its class and of those that it inherits from."""
        return not frozenset(self.on).isdisjoint(error_names)

    def pause_s(self, tries: int, chance: Callable[[], float] = random.random) -> float:
        """Returns the pause before the next run, after so many that have failed before the last one."""
        try:
            pause_s = min(self.max_backoff_s, self.backoff_s * self.factor**tries)
        except OverflowError:
            pause_s = self.max_backoff_s
        return pause_s * (1 - chance() / 2) if self.jitter else pause_s


def next_pause_s(retry: Retry | None, error_names: Sequence[str], again_after_s: float | None, tries: int) -> float | None:
    """Returns after how many seconds a job is tried again that has just failed, after `tries` runs that failed before; None if it is not,
    since it was the last run, or this failure is final. `again_after_s` is what the handler asked for, if it did (`RetryLater`): that needs
    no setting, but as many attempts as there are."""
    asked = again_after_s is not None
    rule = retry or Retry()
    if tries + 1 >= rule.attempts or not (asked or (retry is not None and retry.is_on(error_names))):
        return None
    return again_after_s if again_after_s is not None else rule.pause_s(tries)


def is_exhausted(retry: Retry | None, error_names: Sequence[str], again_after_s: float | None, tries: int) -> bool:
    """Whether a failed job is not tried again only because it has had all its attempts."""
    is_retried = again_after_s is not None or (retry is not None and retry.is_on(error_names))
    return is_retried and tries + 1 >= (retry or Retry()).attempts
