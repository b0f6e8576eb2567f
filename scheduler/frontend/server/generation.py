"""carousel.v1.Generation: a request's way in (check, tokenize, hand to the core) and its tokens' way out (deltas, end)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import Executor

import numpy as np

from carousel.v1 import generation_pb2 as pb
from carousel.v1.generation_pb2_grpc import GenerationServicer
from kvcache import prefix_index
from scheduler.errors import DeadlineError, InvalidFieldError, NotFoundError, UnavailableError
from scheduler.frontend.callers import core_id, options_of
from scheduler.frontend.core_link import CoreLink
from scheduler.frontend.defaults import ModelDefaults
from scheduler.frontend.ledger import Ledger
from scheduler.frontend.output import Output, StoppableOutput
from scheduler.frontend.resumption import ResumeState, check_resume, resumed_stream, skip
from scheduler.frontend.server.authentication import caller
from scheduler.frontend.server.many import Many
from scheduler.frontend.server.running import Running
from scheduler.frontend.server.status import Context, answers_with_status
from scheduler.frontend.stop_strings import StopStrings
from scheduler.frontend.streams import Inbox, ResumedStream, Stream
from scheduler.frontend.tokenizer import Tokenizer
from scheduler.frontend.validation import (
    MAX_OUTPUTS,
    Options,
    check_id,
    check_options,
    check_prompt_length,
    check_token_ids,
)
from wire import AddHeader, AddRequest, CancelOutcome, Facts, ResumeReply, WorkerFacts

_INLINE_CHARACTERS = 2_000  # shorter prompts are tokenized at once, well under a millisecond
_OUTCOMES = {
    CancelOutcome.CANCELLED: pb.CANCEL_OUTCOME_CANCELLED,
    CancelOutcome.ALREADY_FINISHED: pb.CANCEL_OUTCOME_ALREADY_FINISHED,
    CancelOutcome.NOT_FOUND: pb.CANCEL_OUTCOME_NOT_FOUND,
}


class Generation(GenerationServicer):
    """Serves requests while a worker is ready; `num_active` calls are under way."""

    def __init__(
        self,
        link: CoreLink,
        tokenizer: Tokenizer,
        defaults: ModelDefaults,
        served_model_name: str,
        threads: Executor,
        ledger: Ledger | None = None,
    ) -> None:
        self.num_active = 0
        self._link = link
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._served_model_name = served_model_name
        self._threads = threads
        self._ledger = ledger or Ledger()

    @answers_with_status
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        self.num_active += 1
        try:
            with self._ledger.open(request, context, caller()) as entry:
                running = entry.running = await self._open(request, context.time_remaining(), Inbox(self._link.pace))
                try:
                    await _write(context, running, self._link)
                finally:
                    self._link.drop(running.stream)
        finally:
            self.num_active -= 1

    @answers_with_status
    async def GenerateMany(  # type: ignore[override]
        self, request: AsyncIterator[pb.GenerateManyRequest], context: Context
    ) -> None:
        """A connection without requests is not active: it does not hold up a drain."""

        def count(more: int) -> None:
            self.num_active += more

        await Many(self._link, lambda each, inbox: self._open(each, None, inbox), context, count, self._ledger).run(request)

    @answers_with_status
    async def Resume(self, request: pb.ResumeRequest, context: Context) -> None:  # type: ignore[override]
        self.num_active += 1
        try:
            with self._ledger.open(request, context, caller(), is_resumed=True) as entry:
                running = entry.running = await self._reopen(request)
                try:
                    await _write(context, running, self._link)
                finally:
                    self._link.drop(running.stream)
        finally:
            self.num_active -= 1

    @answers_with_status
    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        check_id("request_id", request.request_id)
        reply = await self._link.cancel(core_id(caller(), request.request_id))
        return pb.CancelResponse(outcome=_OUTCOMES[reply.outcome])

    async def _open(self, request: pb.GenerateRequest, remaining_s: float | None, inbox: Inbox) -> Running:
        """Checked, tokenized, handed to the core; to be dropped in the end. Raises RequestError."""
        arrival_ns = time.monotonic_ns()
        limits = worker_facts(self._link.facts)
        options = options_of(caller(), check_options(request, limits, self._defaults))
        deadline_ns = deadline(options, remaining_s, arrival_ns)
        prompt = await self._prompt(request, options, limits)
        stream = Stream(self._outputs(options, prompt), options.include_stop, len(prompt), inbox)
        state = ResumeState(options, deadline_ns - arrival_ns, request.text)
        running = Running(options, stream, self._echo(state, prompt), state.allowed_ns)
        self._link.submit(self._add_request(options, prompt, limits, arrival_ns, deadline_ns, state), stream)
        return running

    async def _reopen(self, request: pb.ResumeRequest) -> Running:
        """Taken over from the core, without what the caller has; to be dropped in the end. Raises RequestError."""
        arrival_ns = time.monotonic_ns()
        check_resume(request)

        def make(reply: ResumeReply) -> ResumedStream:
            options = ResumeState.decode(reply.header.resume_state).options
            outputs = self._outputs(options, reply.prompt.tolist())
            return resumed_stream(reply, outputs, options.include_stop, Inbox(self._link.pace))

        found = await self._link.resume(core_id(caller(), request.request_id), MAX_OUTPUTS, arrival_ns, make)
        if found is None:
            raise NotFoundError(f"no request {request.request_id!r} can be resumed: it is not known, or its window is over")
        reply, stream = found
        state = ResumeState.decode(reply.header.resume_state)
        try:
            for outlet in stream.outlets:
                await outlet.replay(self._link)
            echoed = skip(request, stream, state.options.text)
            return Running(state.options, stream, self._echo(state, reply.prompt.tolist()), state.allowed_ns, echoed)
        except BaseException:
            self._link.drop(stream)
            raise

    async def _prompt(self, request: pb.GenerateRequest, options: Options, limits: WorkerFacts) -> list[int]:
        """Raises InvalidFieldError."""
        if request.WhichOneof("prompt") == "token_ids":
            token_ids = list(request.token_ids.ids)
            check_token_ids(token_ids, "prompt.token_ids", limits)
        else:
            token_ids = await self._tokenize(request.text, limits)
        check_prompt_length(len(token_ids), options.max_tokens, limits)
        return token_ids

    async def _tokenize(self, text: str, limits: WorkerFacts) -> list[int]:
        most = self._tokenizer.max_text_bytes(limits.max_model_len)
        if most is not None and len(text) > most:  # a character has at least one byte
            what = f"has {len(text)} characters; the model's length is {limits.max_model_len} tokens, at most {most} bytes"
            raise InvalidFieldError("prompt", what)
        if len(text) <= _INLINE_CHARACTERS:
            encoding = self._tokenizer.encode(text)
        else:
            encoding = await asyncio.get_running_loop().run_in_executor(self._threads, self._tokenizer.encode, text)
        check_prompt_length(len(encoding), 0, limits)  # before the ids of a long one become Python's
        token_ids: list[int] = encoding.ids
        check_token_ids(token_ids, "prompt.text", limits)
        return token_ids

    def _outputs(self, options: Options, prompt: list[int]) -> list[Output]:
        outputs, detokenizer = range(options.num_outputs), self._tokenizer.detokenizer
        if options.stop:  # they are looked for in the text, whether or not it is sent
            first = StopStrings(options.stop)
            return [StoppableOutput(detokenizer(prompt), first.another(), options.include_stop) for _ in outputs]
        return [Output(detokenizer(prompt) if options.text else None) for _ in outputs]

    def _add_request(
        self,
        options: Options,
        prompt: list[int],
        limits: WorkerFacts,
        arrival_ns: int,
        deadline_ns: int,
        state: ResumeState,
    ) -> AddRequest:
        tokens = np.array(prompt, np.int32)
        asks_prompt = options.sampling.prompt_logprobs >= 0  # all of it must be computed: it goes past the prefix cache
        key = b"" if asks_prompt else prefix_index.root(self._served_model_name, "", options.cache_salt)  # "": no adapter
        header = AddHeader(
            handle=self._link.new_handle(options.num_outputs),
            request_id=core_id(caller(), options.request_id),
            arrival_ns=arrival_ns,
            priority=options.priority,
            max_tokens=options.max_tokens,
            sampling=options.sampling,
            num_outputs=options.num_outputs,
            tenant=options.tenant,
            deadline_ns=deadline_ns,
            partial_at_deadline=options.partial_at_deadline,
            whole_by_deadline=options.whole_by_deadline,
            prefix_key=key,
            hash_block_size=0 if asks_prompt else limits.block_size,
            resume_window_ms=options.resume_window_ms,
            resume_state=state.encode() if options.resume_window_ms else b"",
        )
        hashes = b"" if asks_prompt else prefix_index.hash_blocks(key, tokens, limits.block_size)
        return AddRequest(header, tokens, np.frombuffer(hashes, np.uint8))

    def _echo(self, state: ResumeState, prompt: list[int]) -> pb.Delta | None:
        """The prompt as a delta, where it is wanted."""
        options = state.options
        if not options.echo and options.sampling.prompt_logprobs < 0:
            return None
        text = (state.prompt_text or self._tokenizer.decode(prompt)) if options.text else ""
        return pb.Delta(token_ids=prompt, text=text, is_prompt=True)


def worker_facts(facts: Facts | None) -> WorkerFacts:
    """The model's limits. Raises UnavailableError when no worker is ready, or none may take requests any more."""
    if facts is None:
        raise UnavailableError("the scheduler core is not connected")
    if facts.draining:
        raise UnavailableError(facts.reason or "the server is draining", reason="DRAINING")
    if not facts.ready or not facts.workers:
        raise UnavailableError(facts.reason or "no worker is ready")
    return facts.workers[0][2]


def deadline(options: Options, remaining_s: float | None, arrival_ns: int) -> int:
    """CLOCK_MONOTONIC nanoseconds at which the request's own time or that of its call is over, whichever is sooner; 0: never.
    Raises DeadlineError when it is over already."""
    times = [options.max_time_ns] if options.max_time_ns else []
    if remaining_s is not None:
        if remaining_s <= 0:
            raise DeadlineError("the deadline of the call has passed", {"left_ms": "0"})
        times.append(int(remaining_s * 1e9))
    return arrival_ns + min(times) if times else 0


# ----------------------------------------------------------------------------------------------------------- the way out


async def _write(context: Context, running: Running, link: CoreLink) -> None:
    """Until all outputs have ended. A write waits until the transport has taken it; meanwhile tokens gather in the stream."""
    events: list[pb.GenerateResponse] = []

    def new() -> pb.GenerateResponse:
        events.append(pb.GenerateResponse())
        return events[-1]

    stream = running.stream
    while not running.has_ended:
        await stream.inbox.wait()
        outlets, _ = stream.inbox.take()
        if stream.error is not None:
            raise stream.error
        for outlet in outlets:
            num_received = running.take(outlet, new)
            for event in events:
                await context.write(event)
            events.clear()
            outlet.accepted(num_received, link.report_after, link)
    running.summarize(new().summary)
    await context.write(events.pop())
