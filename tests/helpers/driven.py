"""The asyncio client behind the blocking client's face: what must hold of both is one test. Its loop runs in a thread."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable, Coroutine, Iterator
from types import AsyncGeneratorType
from typing import Any, Self

from client import AsyncCarouselClient, AsyncMany, AsyncStream

WAIT_S = 60.0


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """One for all, in a thread of its own: grpc.aio hands a loop's late events to the others, which stumble over one that is
    closed."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run_coroutine_threadsafe(coroutine, _loop()).result(WAIT_S)


async def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


class Driven:
    """Stands for an object of the asyncio client: awaits what is to be awaited, iterates by `anext`, runs all in the loop."""

    def __init__(self, inner: Any) -> None:
        self._inner, self._iterator = inner, None

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found) or isinstance(found, dict):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            result = run(_call(found, *args, **kwargs))
            return _driven(run(result) if inspect.iscoroutine(result) else result)

        return call

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = run(_call(aiter, self._inner))
        try:
            return run(_anext(self._iterator))
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> Self:
        run(self._inner.__aenter__())
        return self

    def __exit__(self, *error: Any) -> None:
        run(self._inner.__aexit__(*error))


async def _anext(iterator: Any) -> Any:
    return await anext(iterator)


def _driven(value: Any) -> Any:
    return Driven(value) if isinstance(value, (AsyncStream, AsyncMany, AsyncGeneratorType)) else value


class DrivenClient(Driven):
    """Made as CarouselClient is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(run(_call(AsyncCarouselClient, *args, **kwargs)))
