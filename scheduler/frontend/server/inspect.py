"""carousel.v1.Inspect: the core's step records, fanned out to whoever watches, and its block tables."""

from __future__ import annotations

from carousel.v1 import inspect_pb2 as pb
from carousel.v1.inspect_pb2_grpc import InspectServicer
from scheduler.errors import InvalidFieldError
from scheduler.frontend.callers import clear_id
from scheduler.frontend.core_link import CoreLink
from scheduler.frontend.server.authentication import caller
from scheduler.frontend.server.status import Context, answers_with_status
from wire import BlockTablesReply, StepRecord

_STATES = (pb.BLOCK_STATE_FREE, pb.BLOCK_STATE_HELD, pb.BLOCK_STATE_RETIRING, pb.BLOCK_STATE_CACHED)  # as on the inner wire


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

    @answers_with_status
    async def GetBlockTables(self, request: pb.GetBlockTablesRequest, context: Context) -> pb.GetBlockTablesResponse:
        group = request.group
        reply = await self._link.block_tables(group)
        if request.HasField("group") and reply.header.group != group:
            raise InvalidFieldError("group", f"{group} is none of the worker groups that there are")
        return _tables(reply)


def _response(record: StepRecord, skipped: int) -> pb.WatchStepsResponse:
    return pb.WatchStepsResponse(
        step_id=record.step_id,
        group=record.group,
        planned_ns=record.planned_ns,
        duration_ns=record.duration_ns,
        rows=[
            pb.StepRow(
                request_id=clear_id(caller(), row.request_id),
                slot=row.slot,
                num_tokens=row.num_tokens,
                sampled=row.sampled,
                joined=row.joined,
                padding=row.padding,
                output_index=row.output_index,
                tenant=row.tenant,
                cached_tokens=row.num_cached_tokens,
            )
            for row in record.rows
        ],
        leaves=[pb.StepLeave(request_id=clear_id(caller(), core_id), reason=reason) for core_id, reason in record.leaves],
        held_blocks=record.held_blocks,
        total_blocks=record.total_blocks,
        kv_tokens=record.kv_tokens,
        waiting_requests=record.waiting_requests,
        skipped_steps=skipped,
        cached_blocks=record.cached_blocks,
        free_blocks=record.free_blocks,
        token_budget=record.token_budget,
        copied_blocks=record.num_copies,
        swapped_out_blocks=record.swapped_out_blocks,
        swapped_in_blocks=record.swapped_in_blocks,
        policy=record.policy,
    )


def _tables(reply: BlockTablesReply) -> pb.GetBlockTablesResponse:
    header = reply.header
    return pb.GetBlockTablesResponse(
        group=header.group,
        block_size=header.block_size,
        num_blocks=header.num_blocks,
        tables=[
            pb.BlockTable(
                request_id=clear_id(caller(), table.request_id),
                output_index=table.output_index,
                slot=table.slot,
                computed_tokens=table.num_tokens,
                blocks=table.blocks,
            )
            for table in header.tables
        ],
        ref_counts=reply.ref_counts.tolist(),
        states=[_STATES[state] for state in reply.states.tolist()],
        num_host_blocks=header.num_host_blocks,
        held_host_blocks=header.held_host_blocks,
    )
