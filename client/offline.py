"""Offline batches in Python: a model with a server of its own, from prompts to results.

    with Carousel("./my-checkpoint") as carousel:
        for result in carousel.generate(["def fibonacci(n):", "class Stack:"], max_tokens=64):
            print(result.text)

Starts the server as a process and imports nothing of it; or uses one that runs (target).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from client.api import CarouselClient
from client.batch import BatchResult, Prompt, Run, check_parameters, request_of
from client.connection import File
from client.errors import CarouselError
from client.printing import say
from client.requests import Parameters
from client.server import OwnServer, ServerFailedError, server_options

# Own servers listen on a free port of loopback; who may call is nobody's question there.
_NOT_FOR_OWN = ("host", "port", "tls_client_ca", "tokens")


class Carousel:
    """model: a folder or hub id, loaded by a server that this object starts for itself and ends with `close`, at the end of a
    `with`, when the object is dropped, and when this process ends, however it does. device: "auto", "cpu", "cuda", or "sim" for
    invented tokens. More options are those of `carousel serve`, as max_batch_rows=16. Or target: HOST:PORT of a server that
    runs, with what CarouselClient takes.

    Returns once the model is loaded, and says on stderr what it waits for when that takes long. Raises ServerFailedError with
    the server's own words when it can't be.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        device: str | None = None,
        target: str | None = None,
        tls_ca: File | None = None,
        tls_cert: File | None = None,
        tls_key: File | None = None,
        token: str | None = None,
        **options: Any,
    ) -> None:
        if (model is None) == (target is None):
            raise TypeError("Carousel needs either a model to load or the target of a server that runs")
        connection: dict[str, Any] = {"tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key, "token": token}
        self._server: OwnServer | None = None
        if model is None:
            if wrong := [name for name in ("device", *options) if name != "device" or device is not None]:
                raise TypeError(f"{', '.join(wrong)}: options of a server that is started, not of one that runs")
            assert target is not None
        else:
            given = [name for name, value in connection.items() if value is not None]
            if wrong := given + [name for name in _NOT_FOR_OWN if name in options]:
                raise TypeError(f"{', '.join(wrong)}: not for a server that is started here, for this process only")
            self._server = OwnServer(server_options({"model": model, "device": device or "auto", **options}), tell=say)
            self._server.start()
            target = self._server.target
        # For all else that a server can be asked, such as `client.tokenize`.
        self.client = CarouselClient(target, **connection)

    def generate(
        self, prompts: Prompt | Iterable[Prompt], *, concurrency: int | None = None, **parameters: Unpack[Parameters]
    ) -> list[BatchResult]:
        """Results in the prompts' order. prompts: text, a list of token ids, an object with prompt or messages (a conversation,
        for the model's own chat template) and parameters of its own; or any number of these. parameters: of those without.

        A prompt that fails is a result with an error. Raises CarouselError or ServerFailedError when the server is gone before
        there is any result, ValueError for parameters that no request can have.
        """
        prompts = list(_as_many(prompts))
        results: dict[int, BatchResult] = {}
        try:
            for result in self.iterate(prompts, concurrency=concurrency, **parameters):
                results[result.index] = result
        except (CarouselError, ServerFailedError) as error:
            if not results:
                raise
            failed = error if isinstance(error, CarouselError) else CarouselError(grpc.StatusCode.UNAVAILABLE, str(error))
            for index, prompt in enumerate(prompts):
                results.setdefault(index, BatchResult("", index=index, prompt=prompt, error=failed))
        return [results[index] for index in range(len(prompts))]

    def iterate(
        self, prompts: Prompt | Iterable[Prompt], *, concurrency: int | None = None, **parameters: Unpack[Parameters]
    ) -> Iterator[BatchResult]:
        """The same in order of completion, as they are done. Prompts are taken as there is room, in a thread of its own, so
        there may be any number of them. Leaving it early cancels what runs. concurrency: most at a time. [default: twice the
        rows of the server's batch]"""
        if concurrency is not None and concurrency < 1:
            raise ValueError("concurrency: it is 1 or more")
        check_parameters(parameters)
        return self._iterate(_as_many(prompts), dict(parameters), concurrency)

    def _iterate(self, prompts: Iterable[Prompt], parameters: dict[str, Any], concurrency: int | None) -> Iterator[BatchResult]:
        check = None if self._server is None else self._server.check
        with contextlib.closing(
            iter(Run(self.client, prompts, lambda prompt: request_of(self.client, prompt, parameters), concurrency, check))
        ) as results:
            yield from results

    def close(self) -> None:
        """Ends the server that was started here. May be called again."""
        if self._server is not None:
            self._server.stop()
        self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _as_many(prompts: Prompt | Iterable[Prompt]) -> Iterable[Any]:
    """One prompt is a list of one."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if isinstance(prompts, Iterable) and not isinstance(prompts, Iterator):
        first = next(iter(prompts), None)
        if isinstance(first, Integral):
            return [prompts]
    return prompts
