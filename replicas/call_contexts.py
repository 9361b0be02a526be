"""The contexts in which user code is called: one for construction, and a copy of it for each request.

A context variable that one request sets (a user, a tenant, a trace id) is not seen by the next one; one that construction set
is seen by all. The copy is shallow: a list in a context variable is shared, like a global one. Only the decimal context is
copied, too, since code that sets its precision changes it in place.
"""

from __future__ import annotations

import decimal
from contextvars import Context

from .context import ReplicaContext, note_replica


class CallContexts:
    """The contexts of one replica. Construction and `reconfigure` run in `own`."""

    def __init__(self, replica: ReplicaContext) -> None:
        self.own = Context()
        self.own.run(note_replica, replica)
        self._decimal: decimal.Context | None = None

    def __repr__(self) -> str:
        return f"<CallContexts with {len(self.own)} variables>"

    def note_changes(self) -> None:
        """Must be called after each run in `own`, which may have set a decimal context."""
        self._decimal = next((value for value in self.own.values() if issubclass(type(value), decimal.Context)), None)

    def new(self) -> Context:
        """Returns a context for one request."""
        context = self.own.copy()
        if self._decimal is not None:
            context.run(decimal.setcontext, self._decimal.copy())
        return context
