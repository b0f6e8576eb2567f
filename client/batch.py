"""Any number of prompts over one connection, a bounded number of them at a time: results as they are done.

A request that fails is a result with its error. What the server refuses for the moment, and what runs when the connection
breaks, is sent again. Knows the public protos and the client; nothing of files.
"""

from __future__ import annotations

import difflib
import random
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from queue import SimpleQueue
from typing import Any, TypeAlias, cast

import grpc
from google.protobuf.descriptor import FieldDescriptor

from carousel.v1 import generation_pb2 as pb
from client.api import CarouselClient
from client.errors import CarouselError, error_of_failed
from client.many import Many
from client.requests import ON_TIMEOUT, PRIORITIES, Parameters, make_request
from client.result import Collected, Output, Result
from client.retries import is_retryable

# Text, token ids, or an object with "prompt" or "messages" and parameters of its own.
Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]

_CONCURRENCY = 128  # where the server does not say how many rows its batch has
_PER_ROW = 2  # requests at a time for each row of the batch: so there is always one that waits
_DELAYS_S = (0.1, 0.3, 1, 2, 5, 10, 20, 30, 30, 30)  # before the n-th repetition; longer where the server says so
_CHAT_FIELDS = ("tools", "add_generation_prompt", "template_name")  # beside messages
# The ids of requests are made here, a new one for each repetition.
_PARAMETERS = tuple(name for name in Parameters.__annotations__ if name != "request_id")
FIELDS = ("prompt", "messages", *_CHAT_FIELDS, *_PARAMETERS)


@dataclass
class BatchResult(Result):
    """What became of a prompt. index: its place among the prompts, from 0. prompt: as it was given. error: why it failed;
    outputs are what came before that, and there is no summary."""

    index: int = 0
    prompt: Any = None
    error: CarouselError | None = None

    @property
    def finish_reason(self) -> str:
        """Of output 0: "stop", "length", "deadline"; "" when it did not come to its end."""
        return finish_reason(self.outputs[0]) if self.outputs else ""


def finish_reason(output: Output) -> str:
    """ "stop", "length", "deadline"; "" when it did not come to its end."""
    if output.finished is None:
        return ""
    return pb.FinishReason.Name(output.finished.reason).removeprefix("FINISH_REASON_").lower()


# --------------------------------------------------------------------------------------------------------------- requests


def check_names(names: Iterable[str], known: Sequence[str]) -> None:
    """Raises ValueError for a name that is none, with the nearest that is."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"{name}: there is no such field{f'; did you mean {near[0]}?' if near else ''}")


def check_parameters(parameters: Mapping[str, Any]) -> None:
    """Raises ValueError for a parameter that is none, or whose field can't hold its value."""
    check_names(parameters, _PARAMETERS)
    for name, value in parameters.items():
        try:
            make_request("", **{name: value})
        except (ValueError, TypeError, KeyError, OverflowError):
            raise ValueError(f"{name}: {value!r:.80} is not {_expected(name)}") from None


def request_of(
    client: CarouselClient, prompt: Prompt, parameters: Mapping[str, Any]
) -> tuple[str | Sequence[int], dict[str, Any]]:
    """Words and parameters for `submit`; a prompt's own parameters go before. Raises ValueError for what can't be sent,
    CarouselError when the server has no chat template."""
    if not isinstance(prompt, Mapping):
        return _words(prompt), dict(parameters)
    check_names(prompt, FIELDS)
    own = {name: value for name, value in prompt.items() if name in _PARAMETERS and value is not None}
    if isinstance(bias := own.get("logit_bias"), Mapping):
        own["logit_bias"] = _token_biases(bias)
    check_parameters(own)
    if ("prompt" in prompt) == ("messages" in prompt):
        raise ValueError("it needs either prompt or messages")
    given = dict(parameters) | own
    chat = {name: prompt[name] for name in _CHAT_FIELDS if prompt.get(name) is not None}
    if "messages" not in prompt:
        if chat:
            raise ValueError(f"{next(iter(chat))}: it goes with messages")
        return _words(prompt["prompt"]), given
    return _chat(client, prompt["messages"], chat), given


def _words(prompt: Any) -> str | Sequence[int]:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, (bytes, Mapping)) or not isinstance(prompt, Iterable):
        raise ValueError("prompt: it is not text, nor a list of token ids")
    ids = list(prompt)
    for token in ids:
        if not isinstance(token, Integral) or isinstance(token, bool) or not 0 <= int(token) < 2**32:
            raise ValueError(f"prompt: {token!r:.80} is not a token id")
    return ids


def _chat(client: CarouselClient, messages: Any, chat: dict[str, Any]) -> list[int]:
    right = isinstance(messages, Sequence) and not isinstance(messages, str)
    if not right or not all(isinstance(each, Mapping) and isinstance(each.get("role"), str) for each in messages):
        raise ValueError('messages: it is not a list of objects with role and content, as {"role": "user", "content": "Hello"}')
    try:
        return client.apply_chat_template(messages, **chat)
    except (TypeError, ValueError) as error:
        raise ValueError(f"messages: {error}") from None


def _token_biases(bias: Mapping[Any, Any]) -> dict[int, Any]:
    """The keys of a JSON object are text."""
    try:
        return {int(token): value for token, value in bias.items()}
    except (TypeError, ValueError):
        raise ValueError("logit_bias: its keys are token ids") from None


def _expected(name: str) -> str:
    """In words, what this parameter's field holds."""
    words: dict[str, dict[str, Any]] = {"priority": PRIORITIES, "on_timeout": ON_TIMEOUT}
    if name in words:
        return "one of " + ", ".join(words[name])
    groups = (pb.SamplingParams, pb.StoppingParams, pb.OutputParams, pb.SchedulingParams)
    fields = {each.name: each for group in groups for each in group.DESCRIPTOR.fields}
    if name == "logit_bias":
        return "a number for each token id"
    if name == "stop":
        return "text, or a list of texts"
    kinds = {
        FieldDescriptor.CPPTYPE_UINT32: "whole number from 0 to 4294967295",
        FieldDescriptor.CPPTYPE_UINT64: "whole number from 0 to 18446744073709551615",
        FieldDescriptor.CPPTYPE_FLOAT: "number",
        FieldDescriptor.CPPTYPE_BOOL: "yes or no (true, false)",
        FieldDescriptor.CPPTYPE_STRING: "text",
    }
    kind = kinds[fields[name].cpp_type]
    return f"a list of token ids, each a {kind}" if fields[name].is_repeated else f"a {kind}"


# -------------------------------------------------------------------------------------------------------------------- run


@dataclass(slots=True)
class _Job:
    """A prompt on its way."""

    index: int
    item: Any
    words: str | Sequence[int] = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    tries: int = 0  # since another one ended
    ended_before: int = 0  # how many others had ended at the last try
    collected: Collected = field(default_factory=lambda: Collected(""))  # of this try

    def result(self, error: CarouselError | None) -> BatchResult:
        done = self.collected.result()
        return BatchResult(done.request_id, done.outputs, done.summary, self.index, self.item, error)


class Run:
    """To be iterated over once: results in order of completion. prepare: words and parameters of an item, for `submit`; its
    ValueError or CarouselError is that item's result. concurrency: most requests at a time, those included whose results are
    not done with yet; None: by the server's batch. check: raises when there is no sense in calling the server again.

    Items are taken, and the server is heard, in threads of their own: an item that is long in coming does not hold up results,
    and Ctrl-C never falls into the middle of a call.
    """

    def __init__(
        self,
        client: CarouselClient,
        items: Iterable[Any],
        prepare: Callable[[Any], tuple[str | Sequence[int], dict[str, Any]]],
        concurrency: int | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        assert concurrency is None or concurrency > 0
        self._check = check
        self._client, self._items, self._prepare, self._concurrency = client, items, prepare, concurrency
        self._slots = threading.Semaphore(concurrency or 0)
        self._results: SimpleQueue[BatchResult | None] = SimpleQueue()  # None: that was the last
        self._closing = threading.Event()
        self._error: BaseException | None = None  # why there are no more
        self._lock = threading.Lock()  # for what follows
        self._jobs: dict[str, _Job] = {}  # by request id, those that were sent on the connection at hand
        self._unfinished = self._num_ended = 0
        self._all_taken = self._heard = False
        self._many: Many

    def __iter__(self) -> Generator[BatchResult]:
        """Raises CarouselError when the connection is gone for good, and what the items' own iterator raises, after the results
        of all that could be done."""
        self._many = self._client.generate_many()
        threads = [threading.Thread(target=work, daemon=True) for work in (self._feed, self._hear_all)]
        for thread in threads:
            thread.start()
        try:
            while (result := self._results.get()) is not None:
                yield result
                self._slots.release()
            if self._error is not None:
                raise self._error
        finally:
            self.close()

    def close(self) -> None:
        """Cancels all that runs."""
        self._closing.set()
        with self._lock:
            self._many.close()
        self._slots.release()

    # -------------------------------------------------------------------------------------------------------- one thread

    def _feed(self) -> None:
        """Takes items and sends them, while there is room."""
        try:
            if self._concurrency is None:
                self._slots.release(self._room())
            for index, item in enumerate(self._taken()):
                self._send(_Job(index, item))
        except BaseException as error:
            self._error = self._error or error
        finally:
            with self._lock:
                self._all_taken = True
                self._finish_if_done()

    def _taken(self) -> Iterator[Any]:
        """Each item only when there is room for it."""
        items = iter(self._items)
        while True:
            self._slots.acquire()
            if self._closing.is_set():
                return
            try:
                item = next(items)
            except StopIteration:
                return
            yield item

    def _room(self) -> int:
        try:
            return self._client.server_info().max_batch_rows * _PER_ROW or _CONCURRENCY
        except CarouselError as error:
            if error.code is grpc.StatusCode.PERMISSION_DENIED:  # such facts are for administrators
                return _CONCURRENCY
            raise

    def _send(self, job: _Job) -> None:
        with self._lock:
            self._unfinished += 1
        try:
            job.words, job.parameters = self._prepare(job.item)
            self._submit(job)
        except CarouselError as error:
            self._end(job, error)
        except (ValueError, TypeError, OverflowError) as error:
            self._end(job, CarouselError(grpc.StatusCode.INVALID_ARGUMENT, str(error)))
        except BaseException:
            with self._lock:
                self._unfinished -= 1
            raise

    def _submit(self, job: _Job) -> None:
        with self._lock:  # its first event may come before its id is known here
            request_id = self._many.submit(job.words, **job.parameters)
            job.collected = Collected(request_id)
            self._jobs[request_id] = job

    # ---------------------------------------------------------------------------------------------------- another thread

    def _hear_all(self) -> None:
        """Until the last request has ended, or the connection is gone for good."""
        breaks = 0
        try:
            while True:
                try:
                    for event in self._many:
                        breaks = 0
                        self._hear(event)
                    if self._unfinished and not self._closing.is_set():
                        raise CarouselError(grpc.StatusCode.UNAVAILABLE, "the server has ended the call")
                    return
                except CarouselError as error:
                    if error.code is not grpc.StatusCode.UNAVAILABLE or breaks >= len(_DELAYS_S) or not self._heard:
                        raise
                    if self._closing.wait(_DELAYS_S[breaks]):
                        return
                    if self._check is not None:
                        self._check()
                    breaks += 1
                    self._connect_again(error)
        except BaseException as error:
            self._error = self._error or error
        finally:
            self._results.put(None)

    def _connect_again(self, error: CarouselError) -> None:
        """Sends again what had not ended."""
        with self._lock:
            if self._closing.is_set():
                return
            jobs, self._jobs = list(self._jobs.values()), {}
            self._many.close()
            self._many = self._client.generate_many()
        for job in jobs:
            job.tries += 1
            if job.tries > len(_DELAYS_S):  # it may be the one that breaks it
                self._end(job, error)
            else:
                self._submit(job)
        with self._lock:
            self._finish_if_done()

    def _hear(self, event: pb.RequestEvent) -> None:
        self._heard = True
        with self._lock:
            job = self._jobs.get(event.request_id)
            if job is None:
                return
            job.collected.take(cast(pb.GenerateResponse, event))  # its events go by the same names
            kind = event.WhichOneof("event")
            if kind in ("summary", "failed"):
                del self._jobs[event.request_id]
        if kind == "summary":
            self._end(job, None)
        elif kind == "failed":
            self._failed(job, error_of_failed(event.failed))

    def _failed(self, job: _Job, error: CarouselError) -> None:
        if self._num_ended != job.ended_before:  # the server gets on: its turn will come
            job.tries, job.ended_before = 0, self._num_ended
        if not is_retryable(error, idempotent=False) or job.tries >= len(_DELAYS_S) or self._closing.is_set():
            self._end(job, error)
            return
        delay_s = max(_DELAYS_S[job.tries], error.retry_after_s or 0.0) * random.uniform(1, 1.5)
        job.tries += 1
        again = threading.Timer(delay_s, self._submit, (job,))  # at most one for each that may run at a time
        again.daemon = True
        again.start()

    def _end(self, job: _Job, error: CarouselError | None) -> None:
        self._results.put(job.result(error))
        with self._lock:
            self._unfinished -= 1
            self._num_ended += 1
            self._finish_if_done()

    def _finish_if_done(self) -> None:
        if self._all_taken and not self._unfinished:
            self._many.finish()
