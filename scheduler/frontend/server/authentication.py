"""Who may call which service: looked at before a call's first message is read, by its bearer token."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from contextvars import ContextVar
from typing import Any

import grpc.aio

from scheduler.errors import PermissionDeniedError, RequestError, UnauthenticatedError
from scheduler.frontend.callers import Caller, Callers
from scheduler.frontend.server.status import Context, refuse

_SCHEME = "bearer"
_CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)  # each call runs in a context of its own


def caller() -> Caller | None:
    """Who makes the call that this code runs for; None: nobody needs a token here."""
    return _CALLER.get()


class Authentication(grpc.aio.ServerInterceptor):
    """Services by their full names: `admin` ones are for admins, `public` ones for everybody, all others for all callers."""

    def __init__(self, callers: Callers, admin: Collection[str], public: Collection[str]) -> None:
        self._callers, self._admin, self._public = callers, frozenset(admin), frozenset(public)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        service = handler_call_details.method.removeprefix("/").partition("/")[0]
        if service not in self._public:
            try:
                _CALLER.set(self._welcome(service, handler_call_details.invocation_metadata))
            except RequestError as error:
                return _refusal(error)
        return await continuation(handler_call_details)

    def _welcome(self, service: str, metadata: Any) -> Caller:
        """Raises UnauthenticatedError, PermissionDeniedError."""
        words = [value for name, value in metadata or () if name == "authorization"]
        if not words:
            raise UnauthenticatedError("a token is needed: send it as metadata, authorization: Bearer TOKEN")
        scheme, _, key = words[0].partition(" ")
        found = self._callers.of(key.strip()) if len(words) == 1 and scheme.lower() == _SCHEME else None
        if found is None:
            raise UnauthenticatedError("the token is not known here")
        if service in self._admin and not found.is_admin:
            raise PermissionDeniedError(f"{service} is for admins, and this token is not an admin's")
        return found


def _refusal(error: RequestError) -> Any:
    """A handler for any kind of call; it reads no message."""

    async def answer(requests: Any, context: Context) -> None:
        await refuse(context, error)

    return grpc.stream_stream_rpc_method_handler(answer)
