"""The contexts in which user code is called: construction's own, and a copy of it for each request.

A context variable that one request sets (a user, a tenant, a trace id) is not seen by the next one, and what construction
set is there in all of them. Values are not copied, only which variable has which: a list in a context variable is shared, as
anything global is. The decimal context is the one exception, since code that sets its precision changes it in place.
"""

from __future__ import annotations

import decimal
from contextvars import Context


class CallContexts:
    """The contexts of one replica. Construction and `reconfigure` run in `own`."""

    def __init__(self) -> None:
        self.own = Context()
        self._decimal: decimal.Context | None = None

    def __repr__(self) -> str:
        return f"<CallContexts with {len(self.own)} variables>"

    def note_changes(self) -> None:
        """To be called after something ran in `own`: it may have set a decimal context."""
        self._decimal = next((value for value in self.own.values() if issubclass(type(value), decimal.Context)), None)

    def new(self) -> Context:
        """For one request."""
        context = self.own.copy()
        if self._decimal is not None:
            context.run(decimal.setcontext, self._decimal.copy())
        return context
