"""All worker groups under one scheduler: which of them has a request, to which a new one goes, and how requests change from one
to another when workers come and go. With one group, the usual number, none of that is done.

Decides by core/placement.py; knows groups, and of front ends only their numbers; no sockets.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from scheduler.config import EngineConfig
from scheduler.core import Core, Output
from scheduler.core.arrival import MOST_OUTPUTS, NOTHING_ELSEWHERE, Elsewhere
from scheduler.core.placement import place
from scheduler.core.request import QUEUED, Request
from scheduler.group import OWN_FAULT, Around, Group, group_config, num_known_outputs
from scheduler.links import PeerSocket
from scheduler.recorder import CoreFailureError
from scheduler.resumption import Key, Resumption
from scheduler.roster import Known, Roster
from wire import AddRequest, EndReason, OutputEnded, Refused, TokenBatch, TokenBatchHeader
from wire.messages import I32, U32

log = logging.getLogger(__name__)


class Groups:
    """By number, from 0. There is one from the start; more are made for workers that come, as many as there may be."""

    def __init__(
        self,
        config: EngineConfig,
        around: Around,
        workers: PeerSocket,
        roster: Roster,
        resumption: Resumption,
        started_ns: int,
    ) -> None:
        self._config = config
        self._around, self._workers, self._roster, self._resumption = around, workers, roster, resumption
        self._started_ns = started_ns
        self._groups = [Group(config, around, workers, roster, started_ns)]

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def first(self) -> Group:
        return self._groups[0]

    @property
    def cores(self) -> list[Core]:
        return [group.core for group in self._groups]

    @property
    def num_requests(self) -> int:
        return sum(group.core.num_requests for group in self._groups)

    def words(self, group: Group) -> str:
        """For the log."""
        return f" of group {group.number}" if self._config.max_groups > 1 else ""

    def each(self, do: Callable[[Group], list[Output] | None]) -> list[Output]:
        """With all groups. That the core of one fails keeps nothing from the others."""
        outputs: list[Output] = []
        for group in list(self._groups):
            try:
                outputs += do(group) or []
            except CoreFailureError as failure:
                outputs += self.begin_anew(failure)
        return outputs

    # -------------------------------------------------------------------------------------------------- who has what

    def of(self, key: Key) -> Group:
        """Whose request it is, as the cores know it; of one that nobody has any more, anybody's."""
        groups = self._groups
        if len(groups) == 1:
            return groups[0]
        return next((group for group in groups if group.core.has_handle(*key)), groups[0])

    def that_knows(self, request_id: str) -> Group:
        """Where it is alive, else where it ended; anybody's, if nobody knows of it."""
        alive = (group for group in self._groups if group.knows(request_id))
        ended = (group for group in self._groups if group.core.request(request_id) is not None)
        return next(alive, None) or next(ended, self.first)

    def credit(self, frontend: int, handles: U32, num_tokens: I32, now: int) -> list[Output]:
        """Each core hears of its own outputs."""
        if len(self._groups) == 1:
            self.first.inputs.credit(frontend, handles, num_tokens, now)
            return []

        def credit(group: Group) -> None:
            mine = np.fromiter((group.core.has_handle(frontend, handle) for handle in handles.tolist()), np.bool_, len(handles))
            if mine.any():
                group.inputs.credit(frontend, handles[mine], num_tokens[mine], now)

        return self.each(credit)

    def _others(self, group: Group) -> list[Group]:
        return [other for other in self._groups if other is not group]

    # -------------------------------------------------------------------------------------------------- a new request

    def add(self, add: AddRequest, frontend: int, now: int) -> Refused | None:
        """None: one of them has accepted it."""
        if len(self._groups) == 1:
            return self.first.inputs.add(add, frontend, now)
        group = self._place(add, frontend)
        return group.inputs.add(add, frontend, now, self._elsewhere(group, add.header.tenant))

    def _place(self, add: AddRequest, frontend: int) -> Group:
        """Who is to take it, or to say why not."""
        groups, header = self._groups, add.header
        handles = range(header.handle, header.handle + min(header.num_outputs, MOST_OUTPUTS))
        for group in groups:
            if group.knows(header.request_id) or any(group.core.has_handle(frontend, handle) for handle in handles):
                return group  # it says so
        number = place(len(add.prompt), [group.load_for_new(add) for group in groups])
        if number is not None:
            return groups[number]
        known = [group for group in groups if group.core.connected] or [group for group in groups if group.core.facts]
        return max(known or groups, key=lambda group: (group.core.kv.pool.num_blocks, -group.number))

    def _elsewhere(self, group: Group, tenant: str) -> Elsewhere:
        """The limits on who waits and on tenants are the whole server's."""
        if len(self._groups) == 1:
            return NOTHING_ELSEWHERE
        cores = [other.core for other in self._others(group)]
        standings = [core.tenants.standing(tenant) for core in cores]
        return Elsewhere(
            waiting_requests=sum(core.queue.num_requests for core in cores),
            waiting_tokens=sum(core.queue.num_tokens for core in cores),
            tenant_requests=sum(num_requests for num_requests, _ in standings),
            tenant_due_ns=max(due_ns for _, due_ns in standings),
        )

    # ------------------------------------------------------------------------------------------------ workers come and go

    def in_need(self, known: Known) -> Group | None:
        """Whom a worker is of most use to: a group without one, rather one whose requests it can take, that has any, that it
        asks for; else a new one. None: there may be no more, and it stands by."""
        free, asked = [group for group in self._groups if group.worker is None], known.hello.group

        def order(group: Group) -> tuple[bool, bool, bool, int]:
            return bool(group.why_too_small(known.facts)), group.core.is_idle, group.number != asked, group.number

        best = min(free, key=order, default=None)
        if best is not None and not best.why_too_small(known.facts):
            return best
        return self._new() or best

    def _new(self) -> Group | None:
        first = self.first.core
        if len(self._groups) >= self._config.max_groups or first.draining:
            return None
        config = group_config(self._config, len(self._groups), first.policy.name)
        self._groups.append(Group(config, self._around, self._workers, self._roster, self._started_ns))
        return self._groups[-1]

    def join(self, group: Group, known: Known) -> list[Output]:
        """The worker computes for this group."""
        outputs = group.join(known, self.words(group))
        for other in self._others(group):
            if other.worker is None:  # first the suspects, as nobody else is computed here yet
                outputs += self._move_suspects(other, group) + self.move_away(other)
            elif not group.core.trials.trials:
                outputs += self._even_out(other, group)
        return outputs

    def free_suspects(self) -> None:
        """Those that are tried apart wait a while for the next worker that comes, as it computes nobody else. Then another
        group makes way for them."""
        if len(self._groups) == 1:
            return
        now, patience_ns = time.monotonic_ns(), round(self._config.trial_patience_s * 1e9)
        for source in self._groups:
            if source.worker is not None or not source.core.trials.trials or now < source.lost_ns + patience_ns:
                continue
            source.lost_ns = now
            others = [other for other in self._others(source) if other.worker is not None and other.handover is None]
            others = [other for other in others if any(other.load_for_moved(each, 0).fits for each in _tried(source))]
            if others:
                target = min(others, key=lambda group: (group.core.num_requests, group.number))
                log.warning("group %d makes way for requests that may have crashed workers", target.number)
                target.makes_way = True

    def suspects_due_ns(self) -> int:
        """When `free_suspects` has something to do; 0: never."""
        if len(self._groups) == 1:
            return 0
        patience_ns = round(self._config.trial_patience_s * 1e9)
        waiting = [group.lost_ns for group in self._groups if group.worker is None and group.core.trials.trials]
        return min(waiting) + patience_ns if waiting else 0

    def make_way(self, group: Group) -> list[Output]:
        """Nothing of it is in flight: all that it has waits, without any blame, and those that are tried apart come in."""
        group.makes_way = False
        sources = [other for other in self._others(group) if other.worker is None and other.core.trials.trials]
        if not sources:
            return []
        assert group.core.facts is not None
        outputs = group.begin_epoch(group.core.facts)
        for source in sources:
            outputs += self._move_suspects(source, group) + self.move_away(source)
        return outputs

    # ----------------------------------------------------------------------------------------- requests change their group

    def move_away(self, source: Group) -> list[Output]:
        """From a group without a worker, whoever has a place elsewhere; but for those that are tried apart. They wait for a
        worker that computes nobody else."""
        outputs, tried = list[Output](), _tried(source)
        others = [other for other in self._others(source) if other.worker is not None and not other.makes_way]
        if not others:
            return outputs
        for request in list(source.core.live_requests()):
            if request in tried or not source.knows(request.request_id):
                continue
            loads = [other.load_for_moved(request, source.core.kv.block_size) for other in others]
            number = place(request.num_prompt_tokens + num_known_outputs(request), loads)
            if number is not None:
                outputs += self._move(request, source, self._groups[number])
        return outputs

    def _move_suspects(self, source: Group, target: Group) -> list[Output]:
        """Those that are tried apart, in order, to a group that computes nobody."""
        outputs: list[Output] = []
        for request in _tried(source):
            if source.knows(request.request_id) and target.load_for_moved(request, 0).fits:
                outputs += self._move(request, source, target)
        return outputs

    def _even_out(self, source: Group, target: Group) -> list[Output]:
        """Of those that wait in one group, the last to come that would do better in another."""
        core, tried, leaving, num_tokens = source.core, _tried(source), list[Request](), 0
        for request in reversed(list(core.live_requests())):
            waits = any(sequence.state in QUEUED for sequence in request.sequences)
            if not waits or request.num_running or request in tried or not core.can_give(request):
                continue
            here, there = (group.load_for_moved(request, core.kv.block_size) for group in (source, target))
            here = replace(here, waiting_tokens=here.waiting_tokens - num_tokens - request.num_prompt_tokens)
            there = replace(there, waiting_tokens=there.waiting_tokens + num_tokens)
            if place(request.num_prompt_tokens + num_known_outputs(request), [here, there]) != target.number:
                break
            leaving.append(request)
            num_tokens += request.num_prompt_tokens
        outputs: list[Output] = []
        for request in reversed(leaving):
            if source.knows(request.request_id):
                outputs += self._move(request, source, target)
        return outputs

    def _move(self, request: Request, source: Group, target: Group) -> list[Output]:
        now, key = time.monotonic_ns(), (request.frontend, request.header.handle)
        try:
            moved = source.inputs.give(*key, now)
            target.inputs.take(moved, request.frontend, now)
        except CoreFailureError as failure:
            outputs: list[Output] = []
            if not (source.core.has_handle(*key) or target.core.has_handle(*key)):
                outputs = self._resumption.core_failed(_lost_between(request, now), now, lambda key: False)
            return outputs + self.begin_anew(failure)
        return []

    # ---------------------------------------------------------------------------------------------------- our own faults

    def begin_anew(self, failure: CoreFailureError) -> list[Output]:
        """A core has failed: what it did last is written down, its requests end with ERROR, and a new one goes on."""
        group = self._groups[failure.group]
        num_requests = group.core.num_requests
        log.error("the core%s failed; %d requests are lost", self.words(group), num_requests, exc_info=failure.__cause__)
        group.dump(str(failure))
        return self.replace_core(group)

    def replace_core(self, group: Group) -> list[Output]:
        now, others = time.monotonic_ns(), [other.core for other in self._others(group)]

        def had(key: Key) -> bool:
            return not any(core.has_handle(*key) for core in others)

        outputs = self._resumption.core_failed(group.last_words(now), now, had)
        outputs += group.renew()
        self._around.facts_changed()
        return outputs


def _tried(group: Group) -> list[Request]:
    """Those that may crash workers, in the order in which they are to be tried."""
    return [request for trial in group.core.trials.trials for request in trial]


def _lost_between(request: Request, now: int) -> list[Output]:
    """For the reader of a request that one core gave and the other one could not take."""
    ended = tuple(
        OutputEnded(sequence.handle, EndReason.ERROR, sequence.stats(len(sequence.outputs), now), message=OWN_FAULT)
        for sequence in request.live()
    )
    return [Output(request.frontend, TokenBatch(TokenBatchHeader(-1, ended)))]
