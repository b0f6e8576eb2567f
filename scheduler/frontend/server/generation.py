"""carousel.v1.Generation: a request's way in (check, tokenize, hand to the core) and its tokens' way out (deltas, end)."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from carousel.v1 import generation_pb2 as pb
from carousel.v1.generation_pb2_grpc import GenerationServicer
from scheduler.errors import CancelledElsewhereError, InvalidFieldError, RequestError, UnavailableError
from scheduler.frontend.core_link import CoreLink
from scheduler.frontend.defaults import ModelDefaults
from scheduler.frontend.output import Output, Piece, StoppableOutput
from scheduler.frontend.server.status import Context, answers_with_status, internal_error
from scheduler.frontend.stop_strings import StopStrings
from scheduler.frontend.streams import Stream
from scheduler.frontend.tokenizer import Tokenizer
from scheduler.frontend.validation import MAX_ID_CHARACTERS, Options, check_options, check_prompt_length, check_token_ids
from wire import AddHeader, AddRequest, CancelOutcome, EndReason, Facts, OutputEnded, WorkerFacts

_INLINE_CHARACTERS = 2_000  # shorter prompts are tokenized at once, well under a millisecond
_REASONS = {
    EndReason.STOP: pb.FINISH_REASON_STOP,
    EndReason.LENGTH: pb.FINISH_REASON_LENGTH,
    EndReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    EndReason.ERROR: pb.FINISH_REASON_ERROR,
    EndReason.UNAVAILABLE: pb.FINISH_REASON_ERROR,
}
_OUTCOMES = {
    CancelOutcome.CANCELLED: pb.CANCEL_OUTCOME_CANCELLED,
    CancelOutcome.ALREADY_FINISHED: pb.CANCEL_OUTCOME_ALREADY_FINISHED,
    CancelOutcome.NOT_FOUND: pb.CANCEL_OUTCOME_NOT_FOUND,
}


class Generation(GenerationServicer):
    """Serves requests while a worker is ready; `num_active` calls are under way."""

    def __init__(self, link: CoreLink, tokenizer: Tokenizer, defaults: ModelDefaults, tokenizer_threads: int) -> None:
        self.num_active = 0
        self._link = link
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._tokenizing = ThreadPoolExecutor(tokenizer_threads, thread_name_prefix="tokenizer")

    @answers_with_status
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        arrival_ns = time.monotonic_ns()
        self.num_active += 1
        try:
            limits = worker_facts(self._link.facts)
            options = check_options(request, limits, self._defaults)
            prompt = await self._prompt(request, options, limits)
            stream = Stream(self._output(options, prompt), options.include_stop)
            self._link.submit(_add_request(self._link.new_handle(), arrival_ns, options, prompt), stream)
            try:
                echo = self._echo(request, options, prompt) if options.echo else None
                await _write(context, stream, options, echo)
            finally:
                self._link.drop(stream)
        finally:
            self.num_active -= 1

    @answers_with_status
    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        if not 1 <= len(request.request_id) <= MAX_ID_CHARACTERS:
            raise InvalidFieldError("request_id", f"must have 1 to {MAX_ID_CHARACTERS} characters")
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
            encoding = await asyncio.get_running_loop().run_in_executor(self._tokenizing, self._tokenizer.encode, text)
        check_prompt_length(len(encoding), 0, limits)  # before the ids of a long one become Python's
        token_ids: list[int] = encoding.ids
        check_token_ids(token_ids, "prompt.text", limits)
        return token_ids

    def _output(self, options: Options, prompt: list[int]) -> Output:
        if options.stop:  # they are looked for in the text, whether or not it is sent
            detokenizer = self._tokenizer.detokenizer(prompt)
            return StoppableOutput(detokenizer, StopStrings(options.stop), options.include_stop)
        return Output(self._tokenizer.detokenizer(prompt) if options.text else None)

    def _echo(self, request: pb.GenerateRequest, options: Options, prompt: list[int]) -> pb.GenerateResponse:
        given = request.WhichOneof("prompt") == "text"
        text = "" if not options.text else request.text if given else self._tokenizer.decode(prompt)
        return pb.GenerateResponse(delta=pb.Delta(token_ids=prompt, text=text, is_prompt=True))


def worker_facts(facts: Facts | None) -> WorkerFacts:
    """The model's limits. Raises UnavailableError when no worker is ready, or none may take requests any more."""
    if facts is None:
        raise UnavailableError("the scheduler core is not connected")
    if facts.draining:
        raise UnavailableError(facts.reason or "the server is draining", reason="DRAINING")
    if not facts.ready or not facts.workers:
        raise UnavailableError(facts.reason or "no worker is ready")
    return facts.workers[0][2]


def _add_request(handle: int, arrival_ns: int, options: Options, prompt: list[int]) -> AddRequest:
    header = AddHeader(
        handle=handle,
        request_id=options.request_id,
        arrival_ns=arrival_ns,
        priority=options.priority,
        max_tokens=options.max_tokens,
        sampling=options.sampling,
    )
    return AddRequest(header, np.array(prompt, np.int32))


# ----------------------------------------------------------------------------------------------------------- the way out


async def _write(context: Context, stream: Stream, options: Options, echo: pb.GenerateResponse | None) -> None:
    """Until the output has ended. Each write waits until the transport has taken it; meanwhile tokens gather in the stream."""
    while stream.ended is None:
        await stream.wait()
        if echo is not None:
            await context.write(echo)
            echo = None
        piece = stream.output.take()
        if piece is not None and (piece.tokens or options.text):
            await context.write(_delta(piece, options.text))
    last = stream.output.take()  # it may have ended while the last piece was written
    if last is not None and (last.tokens or options.text):
        await context.write(_delta(last, options.text))
    ended = stream.ended
    await context.write(_finished(ended, stream.output.stop_string))
    if not stream.output.stop_string:
        _check_end(ended, options.request_id)
    await context.write(_summary(ended, stream.output, options))


def _delta(piece: Piece, with_text: bool) -> pb.GenerateResponse:
    delta = pb.Delta(token_offset=piece.token_offset, token_ids=piece.tokens)
    if with_text:
        delta.text_offset, delta.text = piece.text_offset, piece.text
    return pb.GenerateResponse(delta=delta)


def _finished(ended: OutputEnded, stop_string: str) -> pb.GenerateResponse:
    if stop_string:  # whatever the core saw at the same time came later
        finished = pb.Finished(reason=pb.FINISH_REASON_STOP, stop_match=pb.StopMatch(stop=stop_string))
    elif ended.stop_token_id >= 0:
        finished = pb.Finished(reason=pb.FINISH_REASON_STOP, stop_match=pb.StopMatch(token_id=ended.stop_token_id))
    else:
        finished = pb.Finished(reason=_REASONS[ended.reason])
    return pb.GenerateResponse(finished=finished)


def _check_end(ended: OutputEnded, request_id: str) -> None:
    """Raises the status of an output that did not end by itself."""
    if ended.reason is EndReason.CANCELLED:
        raise CancelledElsewhereError("the request was cancelled by its id")
    if ended.reason is EndReason.UNAVAILABLE:
        raise UnavailableError(ended.message or "the server is shutting down", reason="DRAINING")
    if ended.reason is EndReason.ERROR:
        raise _failed(ended, request_id)


def _failed(ended: OutputEnded, request_id: str) -> RequestError:
    return internal_error(f"request {request_id!r} failed: {ended.message}")


def _summary(ended: OutputEnded, output: Output, options: Options) -> pb.GenerateResponse:
    stats = ended.stats
    usage = pb.Usage(
        prompt_tokens=stats.prompt_tokens,
        cached_tokens=stats.cached_tokens,
        # the tokens that the stop string was found in count, those computed after it do not
        output_tokens=min(stats.output_tokens, output.num_tokens) if output.stop_string else stats.output_tokens,
        recomputed_tokens=stats.recomputed_tokens,
    )
    timing = pb.Timing(
        queued_ns=stats.queued_ns,
        prefill_ns=stats.prefill_ns,
        decode_ns=stats.decode_ns,
        preempted_ns=stats.preempted_ns,
        time_to_first_token_ns=stats.first_token_ns,
        preemptions=stats.preemptions,
        block_seconds=stats.block_ns / 1e9,
        seed=options.sampling.seed,
    )
    return pb.GenerateResponse(summary=pb.Summary(request_id=options.request_id, usage=usage, timing=timing))
