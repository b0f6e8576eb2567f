"""Messages that are none of their type, told to their caller as INVALID_ARGUMENT: grpc says UNKNOWN, and logs a stack trace.

Stands between the services' handlers and the server, for stock services as for ours. Knows grpc's handlers; no service.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from scheduler.errors import UnreadableMessageError
from scheduler.frontend.server.status import Context, refuse


class Registrar:
    """What a service is added to, in place of the server itself."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        self._server.add_generic_rpc_handlers([_Reading(each) for each in handlers])

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """The asyncio server looks at the generic ones only."""


class _Reading(grpc.GenericRpcHandler):
    """Handlers that read their messages here."""

    def __init__(self, inner: grpc.GenericRpcHandler) -> None:
        self._inner = inner
        self._reading: dict[str, Any] = {}  # by method

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        found = self._reading.get(handler_call_details.method)
        if found is None:
            handler: Any = self._inner.service(handler_call_details)
            if handler is None:
                return None
            found = self._reading[handler_call_details.method] = _reading(handler)
        return found


def _reading(handler: Any) -> Any:
    """The same, but for reading."""
    encode, decode = handler.response_serializer, handler.request_deserializer
    if handler.unary_unary:
        return grpc.unary_unary_rpc_method_handler(_of_one(handler.unary_unary, decode), None, encode)
    if handler.unary_stream:
        return grpc.unary_stream_rpc_method_handler(_of_one(handler.unary_stream, decode), None, encode)
    if inspect.isasyncgenfunction(handler.stream_stream):
        return grpc.stream_stream_rpc_method_handler(_of_many(handler.stream_stream), decode, encode)
    return handler  # ours: `answers_with_status` knows of messages that can't be read


def _of_one(answer: Callable[[Any, Context], Awaitable[Any]], decode: Callable[[bytes], Message]) -> Any:
    """A call with one message. Handlers are coroutines; any other is what the stubs have in place of one."""
    if not inspect.iscoroutinefunction(answer):
        return _is_not_there

    async def read_and_answer(raw: bytes, context: Context) -> Any:
        try:
            request = decode(raw)
        except DecodeError:
            await refuse(context, UnreadableMessageError())
        return await answer(request, context)

    return read_and_answer


def _of_many(answer: Callable[[AsyncIterator[Message], Context], AsyncIterator[Any]]) -> Any:
    """A call with a stream of messages, whose handler is a generator."""

    async def read_and_answer(requests: AsyncIterator[Message], context: Context) -> AsyncIterator[Any]:
        try:
            async for response in answer(requests, context):
                yield response
        except DecodeError:
            await refuse(context, UnreadableMessageError())

    return read_and_answer


async def _is_not_there(raw: bytes, context: Context) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server does not have this method")
