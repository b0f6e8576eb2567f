"""carousel.v1.Generation: a request's way in (check, tokenize, hand to the core) and its tokens' way out (deltas, end)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor

import msgspec
import numpy as np

from carousel.v1 import generation_pb2 as pb
from carousel.v1.generation_pb2_grpc import GenerationServicer
from kvcache import prefix_index
from scheduler.errors import CancelledElsewhereError, DeadlineError, InvalidFieldError, UnavailableError
from scheduler.frontend.core_link import CoreLink
from scheduler.frontend.defaults import ModelDefaults
from scheduler.frontend.output import Output, Piece, StoppableOutput
from scheduler.frontend.server.stats import FINISH_REASONS, timing, usage
from scheduler.frontend.server.status import Context, answers_with_status, internal_error
from scheduler.frontend.stop_strings import StopStrings
from scheduler.frontend.streams import Outlet, Stream, Told
from scheduler.frontend.tokenizer import Tokenizer
from scheduler.frontend.validation import Options, check_id, check_options, check_prompt_length, check_token_ids
from wire import AddHeader, AddRequest, CancelOutcome, EndReason, Facts, OutputEnded, RequestStats, WorkerFacts

_INLINE_CHARACTERS = 2_000  # shorter prompts are tokenized at once, well under a millisecond
_OUTCOMES = {
    CancelOutcome.CANCELLED: pb.CANCEL_OUTCOME_CANCELLED,
    CancelOutcome.ALREADY_FINISHED: pb.CANCEL_OUTCOME_ALREADY_FINISHED,
    CancelOutcome.NOT_FOUND: pb.CANCEL_OUTCOME_NOT_FOUND,
}


class Generation(GenerationServicer):
    """Serves requests while a worker is ready; `num_active` calls are under way."""

    def __init__(
        self, link: CoreLink, tokenizer: Tokenizer, defaults: ModelDefaults, served_model_name: str, threads: Executor
    ) -> None:
        self.num_active = 0
        self._link = link
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._served_model_name = served_model_name
        self._threads = threads

    @answers_with_status
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        arrival_ns = time.monotonic_ns()
        self.num_active += 1
        try:
            limits = worker_facts(self._link.facts)
            options = check_options(request, limits, self._defaults)
            deadline_ns = deadline(options, context.time_remaining(), arrival_ns)
            prompt = await self._prompt(request, options, limits)
            stream = Stream(self._outputs(options, prompt), options.include_stop, len(prompt))
            self._link.submit(self._add_request(options, prompt, limits, arrival_ns, deadline_ns), stream)
            try:
                echo = self._echo(request, options, prompt)
                await _write(context, stream, options, echo, self._link)
                _check_ends(stream, options, deadline_ns - arrival_ns)
                await context.write(_summary(stream, options))
            finally:
                self._link.drop(stream)
        finally:
            self.num_active -= 1

    @answers_with_status
    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        check_id("request_id", request.request_id)
        reply = await self._link.cancel(request.request_id)
        return pb.CancelResponse(outcome=_OUTCOMES[reply.outcome])

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
        self, options: Options, prompt: list[int], limits: WorkerFacts, arrival_ns: int, deadline_ns: int
    ) -> AddRequest:
        tokens = np.array(prompt, np.int32)
        asks_prompt = (
            options.sampling.prompt_logprobs >= 0
        )  # every token of it must be computed, so it goes past the prefix cache
        key = b"" if asks_prompt else prefix_index.root(self._served_model_name, "", options.cache_salt)  # "": no adapter
        header = AddHeader(
            handle=self._link.new_handle(options.num_outputs),
            request_id=options.request_id,
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
        )
        hashes = b"" if asks_prompt else prefix_index.hash_blocks(key, tokens, limits.block_size)
        return AddRequest(header, tokens, np.frombuffer(hashes, np.uint8))

    def _echo(self, request: pb.GenerateRequest, options: Options, prompt: list[int]) -> pb.Delta | None:
        """The prompt as a delta, where it is wanted."""
        if not options.echo and options.sampling.prompt_logprobs < 0:
            return None
        given = request.WhichOneof("prompt") == "text"
        text = "" if not options.text else request.text if given else self._tokenizer.decode(prompt)
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


async def _write(context: Context, stream: Stream, options: Options, echo: pb.Delta | None, link: CoreLink) -> None:
    """Until all outputs have ended. A write waits until the transport has taken it; meanwhile tokens gather in the stream."""
    num_open = len(stream.outlets)
    unechoed = set(range(num_open) if options.echo else range(1))
    while num_open:
        outlet = await stream.next()
        if echo is not None and outlet.index in unechoed and (outlet.num_received or options.echo):
            unechoed.discard(outlet.index)
            echo.output_index = outlet.index
            if outlet.num_received and options.sampling.prompt_logprobs >= 0 and not echo.logprobs:
                _fill(echo, [stream.prompt_logprobs.get(position) for position in range(stream.num_prompt)])
            await context.write(pb.GenerateResponse(delta=echo))
        num_received, ended = outlet.num_received, outlet.ended
        piece = outlet.output.take()
        if piece is not None and (piece.tokens or options.text):
            await context.write(_delta(outlet, piece, options))
        outlet.accepted(num_received, link.report_after, link)
        if ended is not None:  # before the piece was taken
            await context.write(_finished(outlet.index, ended, outlet.output.stop_string))
            num_open -= 1


def _delta(outlet: Outlet, piece: Piece, options: Options) -> pb.GenerateResponse:
    event = pb.GenerateResponse()
    delta = event.delta  # filled in place: half the time of building it apart
    delta.output_index, delta.token_offset = outlet.index, piece.token_offset
    delta.token_ids.extend(piece.tokens)
    if options.text:
        delta.text_offset, delta.text = piece.text_offset, piece.text
    if options.sampling.logprobs >= 0:
        offset = piece.token_offset
        _fill(delta, [outlet.logprobs.pop(offset + i) for i in range(len(piece.tokens))])
    return event


def _fill(delta: pb.Delta, told: Sequence[Told | None]) -> None:
    """None: of a prompt's first token, which nothing precedes."""
    for each in told:
        entry = delta.logprobs.add()
        if each is not None:
            values, token_ids = each
            entry.logprob = values[0]
            for token_id, value in zip(token_ids[1:], values[1:], strict=True):
                entry.top.add(token_id=token_id, logprob=value)


def _finished(output_index: int, ended: OutputEnded, stop_string: str) -> pb.GenerateResponse:
    finished = pb.Finished(output_index=output_index, reason=pb.FINISH_REASON_STOP)
    if stop_string:  # whatever the core saw at the same time came later
        finished.stop_match.stop = stop_string
    elif ended.stop_token_id >= 0:
        finished.stop_match.token_id = ended.stop_token_id
    else:
        finished.reason = FINISH_REASONS[ended.reason]
    return pb.GenerateResponse(finished=finished)


def _check_ends(stream: Stream, options: Options, allowed_ns: int) -> None:
    """Raises the status of a request of which an output did not end by itself."""
    for outlet in stream.outlets:
        if outlet.ended is not None and not outlet.output.stop_string:
            _check_end(outlet.ended, stream, options, allowed_ns)


def _check_end(ended: OutputEnded, stream: Stream, options: Options, allowed_ns: int) -> None:
    match ended.reason:
        case EndReason.CANCELLED:
            raise CancelledElsewhereError("the request was cancelled by its id")
        case EndReason.DEADLINE if not options.partial_at_deadline:
            allowed_ms, num_tokens = allowed_ns // 1_000_000, _total(stream).output_tokens
            said = f"the request's time, {allowed_ms} ms, is over after {num_tokens} tokens"
            raise DeadlineError(said, {"allowed_ms": str(allowed_ms), "output_tokens": str(num_tokens)})
        case EndReason.UNAVAILABLE:
            raise UnavailableError(ended.message or "the server is shutting down", reason="DRAINING")
        case EndReason.ERROR:
            raise internal_error(f"request {options.request_id!r} failed: {ended.message}")


def _summary(stream: Stream, options: Options) -> pb.GenerateResponse:
    stats = _total(stream)
    summary = pb.Summary(request_id=options.request_id, usage=usage(stats), timing=timing(stats))
    summary.timing.seed = options.sampling.seed
    return pb.GenerateResponse(summary=summary)


def _total(stream: Stream) -> RequestStats:
    """Of all outputs, once they have ended: counts are summed; the prompt and the times are those of output 0."""
    outputs = [_stats(outlet) for outlet in stream.outlets]
    return msgspec.structs.replace(
        outputs[0],
        output_tokens=sum(stats.output_tokens for stats in outputs),
        recomputed_tokens=sum(stats.recomputed_tokens for stats in outputs),
        preemptions=sum(stats.preemptions for stats in outputs),
        block_ns=sum(stats.block_ns for stats in outputs),
    )


def _stats(outlet: Outlet) -> RequestStats:
    """The tokens that a stop string was found in count, those computed after it do not."""
    assert outlet.ended is not None
    stats = outlet.ended.stats
    if not outlet.output.stop_string:
        return stats
    return msgspec.structs.replace(stats, output_tokens=min(stats.output_tokens, outlet.output.num_tokens))
