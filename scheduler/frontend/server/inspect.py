"""carousel.v1.Inspect: the core's step records, fanned out to whoever watches."""

from __future__ import annotations

from carousel.v1 import inspect_pb2 as pb
from carousel.v1.inspect_pb2_grpc import InspectServicer
from scheduler.frontend.core_link import CoreLink
from scheduler.frontend.server.status import Context, answers_with_status
from wire import StepRecord


class Inspect(InspectServicer):
    def __init__(self, link: CoreLink) -> None:
        self._link = link

    @answers_with_status
    async def WatchSteps(self, request: pb.WatchStepsRequest, context: Context) -> None:  # type: ignore[override]
        """Initial metadata says that the watch is on: steps planned after it are seen."""
        watcher = self._link.watch()
        try:
            await context.send_initial_metadata(())
            while True:
                record, skipped = await watcher.next()
                await context.write(_response(record, skipped))
        finally:
            self._link.unwatch(watcher)


def _response(record: StepRecord, skipped: int) -> pb.WatchStepsResponse:
    return pb.WatchStepsResponse(
        step_id=record.step_id,
        group=record.group,
        planned_ns=record.planned_ns,
        duration_ns=record.duration_ns,
        rows=[
            pb.StepRow(
                request_id=row.request_id,
                slot=row.slot,
                num_tokens=row.num_tokens,
                sampled=row.sampled,
                joined=row.joined,
                padding=row.padding,
            )
            for row in record.rows
        ],
        leaves=[pb.StepLeave(request_id=request_id, reason=reason) for request_id, reason in record.leaves],
        held_blocks=record.held_blocks,
        total_blocks=record.total_blocks,
        kv_tokens=record.kv_tokens,
        waiting_requests=record.waiting_requests,
        skipped_steps=skipped,
    )
