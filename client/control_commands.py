"""The commands that ask a running server about its work, and change it: policy, load, requests, explain, blocks, drain,
replace-worker."""

from __future__ import annotations

import functools
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from carousel.v1 import control_pb2, generation_pb2, inspect_pb2
from client.api import CarouselClient
from client.options import of_a_group, on_a_server
from client.printing import closed_pipe, to_json, write_line, write_table

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_MS, _SECOND = 1_000_000, 1_000_000_000
_BY_ITSELF = (generation_pb2.FINISH_REASON_LENGTH, generation_pb2.FINISH_REASON_STOP)
_INTERRUPTED = 130  # 128 + SIGINT
_PAGE = 1000  # requests; the most that the server gives at once
_INTERVALS_S = click.FloatRange(0.1, 60)  # as the server takes them
_MOST_S = (2**32 - 1) // 1000  # what the request can hold
_LOAD = "{:>7} {:>7} {:>9} {:>9} {:>9} {:>6} {:>9} {:>8} {:>10}"  # a line of `load --watch`


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

    \b
    Examples:
      carousel policy
      carousel policy static --target 127.0.0.1:50051
    """
    answer = control_pb2.SetPolicyResponse(policy=client.set_policy(name) if name else client.server_info().policy)
    write_line(to_json(answer) if as_json else answer.policy)


# ------------------------------------------------------------------------------------------------------------------ load


@click.command(context_settings=_SETTINGS)
@click.option("--watch", is_flag=True, help="A line time and again, until Ctrl-C or the server's end.")
@click.option("--interval", type=_INTERVALS_S, metavar="S", help="Seconds between two lines, 0.1 to 60. [default: 1]")
@_asking
def load(watch: bool, interval: float | None, client: CarouselClient, as_json: bool) -> None:
    """Say how many requests run and wait, who fills the KV cache, and what was done since the start.

    \b
    Examples:
      carousel load
      carousel load --watch --interval 0.5 --json
    """
    if interval is not None and not watch:
        raise click.UsageError("--interval is the time between the lines of --watch: give both")
    if watch:
        _watch_load(client, interval, as_json)
        return
    told = client.load()
    if as_json:
        write_line(to_json(told))
    else:
        write_table(("WHAT", "VALUE"), _load_rows(told))


def _watch_load(client: CarouselClient, interval_s: float | None, as_json: bool) -> None:
    if not as_json:
        write_line(_LOAD.format("RUNNING", "WAITING", "HELD", "CACHED", "FREE", "WASTE", "STEPS", "TOKENS", "PREEMPTED"))
    # Not by KeyboardInterrupt: in the middle of grpc's own work it leaves a channel that never closes.
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
    try:
        with client.watch_load(interval_s) as loads:
            for told in loads:
                write_line(to_json(told.load) if as_json else _load_line(told.load))
    finally:
        signal.signal(signal.SIGINT, before)


def _load_line(told: control_pb2.GetLoadResponse) -> str:
    blocks = (told.held_blocks, told.cached_blocks, told.free_blocks)
    done = (told.steps, told.output_tokens, told.preemptions)
    return _LOAD.format(told.running_requests, told.waiting_requests, *blocks, f"{told.kv_waste:.1%}", *done)


def _load_rows(told: control_pb2.GetLoadResponse) -> Iterator[tuple[str, str]]:
    yield "requests", f"{told.running_requests} running, {told.waiting_requests} waiting with {told.waiting_tokens} tokens"
    blocks = (f"{told.held_blocks} held", f"{told.retiring_blocks} retiring", f"{told.cached_blocks} cached")
    yield "blocks", f"{', '.join(blocks)}, {told.free_blocks} free, of {told.total_blocks}"
    yield "tokens in held blocks", f"{told.kv_tokens}, {told.kv_waste:.1%} of their room is unused"
    yield "blocks of host memory", f"{told.held_host_blocks} held, {told.swapped_blocks} swapped out so far"
    yield "since the start", f"{told.steps} steps, {told.output_tokens} output tokens"
    prompts = f"{told.prompt_tokens}, {told.cached_tokens} of them cached"
    yield "prompt tokens", f"{prompts}; {told.recomputed_tokens} tokens computed again after {told.preemptions} preemptions"
    ends = (f"{told.finished_requests} finished", f"{told.cancelled_requests} cancelled", f"{told.refused_requests} refused")
    yield "requests so far", f"{told.accepted_requests} accepted, {', '.join(ends)}"


# ----------------------------------------------------------------------------------------------------------------- drain


@click.command(context_settings=_SETTINGS)
@click.option(
    "--timeout",
    type=click.FloatRange(0, _MOST_S),
    metavar="S",
    help="Seconds that the requests alive get, at most; 0: none. [default: the server's --drain-timeout,"
    " which can't be lengthened]",
)
@_asking
def drain(timeout: float | None, client: CarouselClient, as_json: bool) -> None:
    """End the server: it takes no new requests, those alive run to their end, then it exits with code 0, as after SIGTERM.

    Returns at once. Called again, it can give those alive less time, not more.

    \b
    Example:
      carousel drain --timeout 10
    """
    told = client.drain(timeout)
    if as_json:
        write_line(to_json(told))
        return
    count = {0: "no request is", 1: "1 request is"}.get(told.live_requests, f"{told.live_requests} requests are")
    write_line(f"draining: {count} alive; ends within {_time(told.left_ms * _MS)}")


# -------------------------------------------------------------------------------------------------------- replace-worker


@click.command("replace-worker", context_settings=_SETTINGS)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "sim"]),
    help="Where the new worker computes. [default: as the server was told]",
)
@click.option(
    "--group",
    type=click.IntRange(0),
    metavar="N",
    help="Worker group whose worker is replaced, of several. [default: the first that has one]",
)
@_asking
def replace_worker(device: str | None, group: int | None, client: CarouselClient, as_json: bool) -> None:
    """Start a new worker, of the code that is installed now, in place of the one that computes. No request fails.

    Returns once the new one computes. When it does not come to that, the old one goes on, and the exit code is 1.

    \b
    Example:
      carousel replace-worker
    """
    told = client.replace_worker(device, group)
    write_line(to_json(told) if as_json else f"worker (pid {told.pid}) computes now, epoch {told.epoch}")


# -------------------------------------------------------------------------------------------------------------- requests


@click.command(context_settings=_SETTINGS)
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, metavar="N", help="Most requests to show.")
@_asking
def requests(limit: int, client: CarouselClient, as_json: bool) -> None:
    """List the requests that are alive, oldest first.

    \b
    Examples:
      carousel requests --limit 20
      carousel requests --json | jq -r .request_id
    """
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
    """Say why a request waits, or where its time went. The server remembers those that ended not long ago.

    \b
    Example:
      carousel explain 3f6c1f0e-7a52-4f4e-9d3c-8f1c0a1b2c3d
    """
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
@of_a_group
@_asking
def blocks(group: int, client: CarouselClient, as_json: bool) -> None:
    """Show who holds which blocks of the KV cache, and how many are shared.

    \b
    Examples:
      carousel blocks
      carousel blocks --json | jq .num_blocks
    """
    told = client.block_tables(group)
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


COMMANDS: tuple[Any, ...] = (policy, load, requests, explain, blocks, drain, replace_worker)
