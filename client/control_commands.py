"""The commands that ask a running server about its scheduling, and change it: policy, requests, explain, blocks."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from carousel.v1 import control_pb2, generation_pb2, inspect_pb2
from client.api import CarouselClient
from client.options import on_a_server
from client.printing import closed_pipe, to_json, write_line, write_table

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_MS, _SECOND = 1_000_000, 1_000_000_000
_BY_ITSELF = (generation_pb2.FINISH_REASON_LENGTH, generation_pb2.FINISH_REASON_STOP)
_PAGE = 1000  # requests; the most that the server gives at once


def _asking(command: Callable[..., None]) -> Callable[..., int]:
    """With the options that all of them have; returns the exit code."""

    @on_a_server
    @click.option("--json", "as_json", is_flag=True, help="Print what the server says as JSON, an object a line.")
    @functools.wraps(command)
    def run(**parameters: Any) -> int:
        try:
            command(**parameters)
        except BrokenPipeError:
            return closed_pipe()
        return 0

    return run


def _utf8(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise click.BadParameter("it must be UTF-8 text") from None
    return value


@click.command(context_settings=_SETTINGS)
@click.argument("name", required=False, callback=_utf8)
@_asking
def policy(name: str | None, client: CarouselClient, as_json: bool) -> None:
    """Say which scheduling policy is in force; with NAME, change it.

    NAME is continuous, prefill_first or static. It counts from the next step on; running requests go on.
    """
    answer = control_pb2.SetPolicyResponse(policy=client.set_policy(name) if name else client.server_info().policy)
    write_line(to_json(answer) if as_json else answer.policy)


# -------------------------------------------------------------------------------------------------------------- requests


@click.command(context_settings=_SETTINGS)
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, metavar="N", help="Most requests to show.")
@_asking
def requests(limit: int, client: CarouselClient, as_json: bool) -> None:
    """List the requests that are alive, oldest first."""
    rows, total = [], 0
    for page in _pages(client, limit):
        total = page.total_requests
        for request in page.requests:
            if as_json:
                write_line(to_json(request))
            rows.append(_request_row(request, page.now_ns))
    if as_json:
        return
    if rows:
        write_table(("REQUEST", "STATE", "CLASS", "TENANT", "AGE", "PROMPT", "OUTPUT", "OUTPUTS", "BLOCKS"), rows)
    write_line(f"{len(rows)} of {total} requests" if len(rows) < total else f"{total} requests" if total != 1 else "1 request")


def _pages(client: CarouselClient, limit: int) -> Iterator[control_pb2.ListRequestsResponse]:
    """Until there is no more, or there are `limit` requests."""
    token = ""
    while limit:
        page = client.list_requests(min(limit, _PAGE), token)
        yield page
        limit -= min(limit, len(page.requests))
        token = page.next_page_token
        if not token:
            return


def _request_row(request: control_pb2.RequestSummary, now_ns: int) -> Sequence[object]:
    return (
        request.request_id,
        _state(request.state),
        _class(request.priority),
        request.tenant or "-",
        _time(now_ns - request.arrival_ns),
        request.prompt_tokens,
        request.output_tokens,
        request.num_outputs,
        request.held_blocks,
    )


# --------------------------------------------------------------------------------------------------------------- explain


@click.command(context_settings=_SETTINGS)
@click.argument("request_id", callback=_utf8)
@click.option("--tenant", callback=_utf8, metavar="NAME", help="Whose request it is. [default: the token's tenant]")
@_asking
def explain(request_id: str, tenant: str | None, client: CarouselClient, as_json: bool) -> None:
    """Say why a request waits, or where its time went. The server remembers those that ended not long ago."""
    told = client.explain(request_id, tenant)
    if as_json:
        write_line(to_json(told))
        return
    write_line(told.text)
    write_line("")
    write_table(("WHAT", "VALUE"), _facts(told))
    if told.preemptions:
        write_line("")
        write_table(("PREEMPTED", "FOR", "TOKENS LOST", "HOW"), _preemption_rows(told))


def _facts(told: control_pb2.ExplainRequestResponse) -> Iterator[tuple[str, str]]:
    usage, timing = told.usage, told.timing
    yield "state", _state(told.state) + (f" ({_reason(told.finish_reason)})" if told.HasField("finish_reason") else "")
    yield "class, tenant", f"{_class(told.priority)}, {told.tenant or '-'}"
    yield "arrived", f"{_time(told.now_ns - told.arrival_ns)} ago"
    if told.state == control_pb2.REQUEST_STATE_ENDED:
        lived_ns = _lived_ns(told)
        yield "ended", f"{_time(told.now_ns - told.arrival_ns - lived_ns)} ago, {_time(lived_ns)} after it arrived"
    elif told.hindrance != control_pb2.HINDRANCE_NONE:
        yield "hindered by", _hindrance(told)
    if told.state in (control_pb2.REQUEST_STATE_WAITING, control_pb2.REQUEST_STATE_PREEMPTED):
        yield "tenant was served", f"{told.tenant_tokens} weighted tokens; who is next: {told.least_tenant_tokens}"
    if told.HasField("predicted_start_ns"):
        wait_ns = told.predicted_start_ns - told.now_ns
        yield ("should start", f"in {_time(wait_ns)}") if wait_ns > 0 else ("started", f"{_time(-wait_ns)} ago")
    yield "tokens", f"prompt {usage.prompt_tokens} ({usage.cached_tokens} cached), output {usage.output_tokens}"
    yield "tokens in the cache", f"{told.computed_tokens}, {usage.recomputed_tokens} computed again"
    yield "queued", _time(timing.queued_ns)
    yield "prefill", _time(timing.prefill_ns)
    yield "decode", _time(timing.decode_ns)
    yield "preempted", f"{_time(timing.preempted_ns)}, {timing.preemptions} times"


def _hindrance(told: control_pb2.ExplainRequestResponse) -> str:
    said = [control_pb2.Hindrance.Name(told.hindrance).removeprefix("HINDRANCE_").lower()]
    if told.rank:
        said.append(f"{told.rank} before it")
    if told.missing_rows:
        said.append(f"missing rows: {told.missing_rows}")
    if told.missing_blocks:
        said.append(f"missing blocks: {told.missing_blocks} of {told.needed_blocks}")
    return "; ".join(said)


def _lived_ns(told: control_pb2.ExplainRequestResponse) -> int:
    """From its arrival to its end. Times in the queue after a preemption are part of the time to the first token when they came
    before it, and stand beside the time of decoding when they came after."""
    timing, first_ns = told.timing, told.timing.time_to_first_token_ns
    if not first_ns:
        return timing.queued_ns + timing.prefill_ns
    came_back_after = any(preemption.at_ns >= told.arrival_ns + first_ns for preemption in told.preemptions)
    return min(first_ns + timing.decode_ns + timing.preempted_ns * came_back_after, told.now_ns - told.arrival_ns)


def _preemption_rows(told: control_pb2.ExplainRequestResponse) -> Iterator[Sequence[object]]:
    """Of the last time it is not known that what was given up was computed again, unless the request went on."""
    went_on = told.state == control_pb2.REQUEST_STATE_RUNNING or told.finish_reason in _BY_ITSELF
    for number, preemption in enumerate(told.preemptions, 1):
        again = ", computed again" if went_on or number < len(told.preemptions) else ""
        how = "swapped to host memory" if preemption.swapped else f"given up{again}"
        ago = f"{_time(told.now_ns - preemption.at_ns)} ago"
        yield ago, preemption.by_request_id or "the worker was lost", preemption.lost_tokens, how


# ---------------------------------------------------------------------------------------------------------------- blocks


@click.command(context_settings=_SETTINGS)
@_asking
def blocks(client: CarouselClient, as_json: bool) -> None:
    """Show who holds which blocks of the KV cache, and how many are shared."""
    told = client.block_tables()
    if as_json:
        write_line(to_json(told))
        return
    states = Counter(told.states)
    shared = sum(count > 1 for count in told.ref_counts)
    counts = (
        f"{states[inspect_pb2.BLOCK_STATE_HELD]} held ({shared} shared)",
        f"{states[inspect_pb2.BLOCK_STATE_RETIRING]} retiring",
        f"{states[inspect_pb2.BLOCK_STATE_CACHED]} cached",
        f"{states[inspect_pb2.BLOCK_STATE_FREE]} free",
    )
    write_line(f"{told.num_blocks} blocks of {told.block_size} tokens: {', '.join(counts)}")
    if told.num_host_blocks:
        write_line(f"{told.num_host_blocks} blocks of host memory: {told.held_host_blocks} held")
    if told.tables:
        write_line("")
        rows = [_table_row(table, told.ref_counts) for table in told.tables]
        write_table(("REQUEST", "OUTPUT", "SLOT", "TOKENS", "BLOCKS", "SHARED", "IDS"), rows)


def _table_row(table: inspect_pb2.BlockTable, ref_counts: Sequence[int]) -> Sequence[object]:
    shared = sum(ref_counts[block - 1] > 1 for block in table.blocks)
    ids = _ranges(table.blocks)
    return (table.request_id, table.output_index, table.slot, table.computed_tokens, len(table.blocks), shared, ids)


def _ranges(blocks: Sequence[int]) -> str:
    """1, 2, 3, 7, 5 as 1-3 7 5."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


# ----------------------------------------------------------------------------------------------------------------- words


def _state(state: control_pb2.RequestState.ValueType) -> str:
    return control_pb2.RequestState.Name(state).removeprefix("REQUEST_STATE_").lower()


def _class(priority: generation_pb2.PriorityClass.ValueType) -> str:
    return generation_pb2.PriorityClass.Name(priority).removeprefix("PRIORITY_CLASS_").lower()


def _reason(reason: generation_pb2.FinishReason.ValueType) -> str:
    return generation_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()


def _time(ns: int) -> str:
    if ns < _SECOND:
        return f"{ns / _MS:.0f} ms"
    return f"{ns / _SECOND:.2f} s" if ns < 10 * _SECOND else f"{ns / _SECOND:.1f} s"


COMMANDS: tuple[Any, ...] = (policy, requests, explain, blocks)
