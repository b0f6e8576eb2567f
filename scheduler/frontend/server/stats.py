"""A request's counts and times, from the core's words to the API's. Summary and ExplainRequest tell them alike."""

from __future__ import annotations

from carousel.v1 import generation_pb2 as pb
from wire import EndReason, RequestStats

FINISH_REASONS = {
    EndReason.STOP: pb.FINISH_REASON_STOP,
    EndReason.LENGTH: pb.FINISH_REASON_LENGTH,
    EndReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    EndReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
    EndReason.ERROR: pb.FINISH_REASON_ERROR,
    EndReason.UNAVAILABLE: pb.FINISH_REASON_ERROR,
}


def usage(stats: RequestStats) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=stats.prompt_tokens,
        cached_tokens=stats.cached_tokens,
        output_tokens=stats.output_tokens,
        recomputed_tokens=stats.recomputed_tokens,
    )


def timing(stats: RequestStats) -> pb.Timing:
    """Without the seed."""
    return pb.Timing(
        queued_ns=stats.queued_ns,
        prefill_ns=stats.prefill_ns,
        decode_ns=stats.decode_ns,
        preempted_ns=stats.preempted_ns,
        time_to_first_token_ns=stats.first_token_ns,
        preemptions=stats.preemptions,
        block_seconds=stats.block_ns / 1e9,
    )
