"""Parses forms by Starlette's parsers but without an await: the whole body is in memory, so there is nothing to wait for."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine
from io import BytesIO
from typing import Any, TypeVar

from starlette.datastructures import FormData, Headers
from starlette.formparsers import FormParser, MultiPartException, MultiPartParser

from ..broker.values.codecs import media_type

MULTIPART, URLENCODED = "multipart/form-data", "application/x-www-form-urlencoded"
FORMS = (MULTIPART, URLENCODED)

T = TypeVar("T")


class BadForm(Exception):
    """The body is no form, or has more fields, files or bytes in a field than are allowed."""


class _File(BytesIO):
    """An uploaded file in memory. It needs no closing, and no thread to read it."""

    _rolled = False  # tells Starlette's UploadFile that the file is in memory


class _Parser(MultiPartParser):
    """Starlette's parser without the spooling of large files to disk, which runs in a thread and is all that the parser waits for."""

    spool_max_size = 0  # no limit
    is_whole = False

    def on_end(self) -> None:
        self.is_whole = True

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        if (upload := self._current_part.file) is not None:
            upload.file.close()
            upload.file = _File()


def parse_form(headers: Headers, body: bytes, **limits: Any) -> FormData:
    """Returns the fields, and files as `UploadFile`, whose `.file` can be read without an await. `limits` are those of Starlette's
    `form()`.

    Returns an empty form for a body of another type. Raises BadForm.
    """
    kind = media_type(headers.get("content-type", ""))
    if kind == URLENCODED:
        limits.pop("max_files", None)
        parser: FormParser | MultiPartParser = FormParser(headers, _whole(body), **limits)
    elif kind == MULTIPART:
        parser = _Parser(headers, _whole(body), **limits)
    else:
        return FormData()
    try:
        form = _run(parser.parse())
    except MultiPartException as error:
        raise BadForm(error.message) from error
    except (ValueError, LookupError) as error:  # from the parser itself, for example for an empty boundary
        raise BadForm(str(error)) from error
    if isinstance(parser, _Parser) and body and not parser.is_whole:  # its last part would be missing silently
        raise BadForm("the form ends before its closing boundary")
    return form


def as_dict(form: FormData) -> dict[str, Any]:
    """Returns the form as a dict, with a list of values for a field that came several times."""
    found: dict[str, Any] = {}
    for name in form:
        values = form.getlist(name)
        found[name] = values[0] if len(values) == 1 else values
    return found


async def _whole(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body


def _run(parsing: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine that never waits, and returns its result."""
    try:
        parsing.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    parsing.close()
    raise AssertionError("Starlette's form parser waits for something: it is to have all that it needs in memory")
