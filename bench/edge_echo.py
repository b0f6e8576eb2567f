"""`python -m bench.edge_echo`: a bare grpc.aio server that streams the same bytes again and again: the limit beside the edge.

A request is two numbers: how many messages, and of how many bytes. The server says its port on its first line, and serves until
its standard input is closed.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from typing import Any

import grpc.aio

PATH = "/bench.Echo/Stream"
_REQUEST = struct.Struct(">LL")


def request(messages: int, size: int) -> bytes:
    return _REQUEST.pack(messages, size)


class _Echo(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        return grpc.unary_stream_rpc_method_handler(_stream) if handler_call_details.method == PATH else None


async def _stream(asked: bytes, context: Any) -> None:
    messages, size = _REQUEST.unpack(asked)
    message = bytes(size)
    for _ in range(messages):
        await context.write(message)


async def _serve() -> None:
    options = [
        ("grpc.max_concurrent_streams", 20_000),
        ("grpc.max_send_message_length", -1),
        ("grpc.server.max_pending_requests", 20_000),
        ("grpc.server.max_pending_requests_hard_limit", 20_000),
    ]
    server = grpc.aio.server(handlers=[_Echo()], options=options)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(_serve())
