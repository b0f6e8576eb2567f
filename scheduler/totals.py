"""What several groups say together: sums, and lists one after the other. Pure; with one group it is that group's own word."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from scheduler.core import Core
from scheduler.core.observe import list_requests
from wire import Distribution, GroupLoadReply, ListReply, LoadReply, MetricsReply, RequestSummary

_GROUP_BITS = 48  # of a place in the list, below the group's number
_OF_A_POOL = ("total_blocks", "free_blocks", "held_blocks", "retiring_blocks", "cached_blocks", "held_host_blocks")


def total_load(cores: Sequence[Core], query_id: int) -> LoadReply:
    """Of blocks only those count that a worker has; where none is there, those that the last ones had."""
    if len(cores) == 1:
        return cores[0].load(query_id)
    connected, loads = any(core.connected for core in cores), [core.load(query_id) for core in cores]
    total = dict.fromkeys(LoadReply.__struct_fields__, 0)
    for core, load in zip(cores, loads, strict=True):
        for name in total:
            if core.connected or not connected or name not in _OF_A_POOL:
                total[name] += getattr(load, name)
    return LoadReply(**total | {"query_id": query_id})


def total_metrics(replies: Sequence[MetricsReply], load: LoadReply) -> MetricsReply:
    """One of each group in, with `load` for all of them; facts, epoch and block size are those of the first that computes."""
    if len(replies) == 1:
        return replies[0]
    computing = {group for group, _, _ in replies[0].facts.workers}
    first = next((reply for reply in replies if reply.group in computing), replies[0])
    return msgspec.structs.replace(
        first,
        load=load,
        shared_blocks=sum(reply.shared_blocks for reply in replies),
        empty_slots=sum(reply.empty_slots for reply in replies),
        step_seconds=_together([reply.step_seconds for reply in replies]),
        step_tokens=_together([reply.step_tokens for reply in replies]),
        inter_token_seconds=_together([reply.inter_token_seconds for reply in replies]),
        groups=tuple(GroupLoadReply(reply.group, reply.group in computing, reply.epoch, reply.load) for reply in replies),
    )


def _together(parts: Sequence[Distribution]) -> Distribution:
    counts = tuple(map(sum, zip(*(part.counts for part in parts), strict=True)))
    return Distribution(parts[0].bounds, counts, sum(part.total for part in parts))


def listed(cores: Sequence[Core], query_id: int, after: int, limit: int) -> ListReply:
    """Those alive, group by group, in each by arrival; `after` is the `next` of the page before, 0 for the first."""
    if len(cores) == 1:
        return list_requests(cores[0], query_id, after, limit)
    number, after = after >> _GROUP_BITS, after & ((1 << _GROUP_BITS) - 1)
    total, following, requests = sum(core.num_requests for core in cores), 0, list[RequestSummary]()
    for core in cores[number:]:
        if len(requests) == limit:
            following = core.config.group << _GROUP_BITS
            break
        reply = list_requests(core, query_id, after, limit - len(requests))
        requests += reply.requests
        after = 0
        if reply.next:
            following = core.config.group << _GROUP_BITS | reply.next
            break
    return ListReply(query_id, tuple(requests), following, total)
