"""The workers that the core process knows: who computes for which group, who stands by, who was heard of when. Pure: the clock
is an argument; knows no sockets.

A worker is lost when its connection closes; when its heartbeats stop, as when a process is stopped or a machine is gone; when
the step under way has used no processor time for as long (worker/heartbeat.py says where that counts); and when one step takes
longer than any may. A long step that computes is none of these.
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.links import Peer
from wire import Heartbeat, WorkerFacts, WorkerHello

_MS = 1_000_000
_MOST_BLOCKS, _MOST_TOKENS, _MOST_ROWS = 1 << 26, 1 << 30, 65_535
_LEAST_BEATS = 4  # that must be missing, however short the time is
STANDS_BY = -1  # in place of a group's number


@dataclass(slots=True, eq=False)
class Known:
    """A worker that has said hello and has not left."""

    peer: Peer
    hello: WorkerHello
    heard_ns: int
    group: int = STANDS_BY  # that it computes for, or is about to
    stalled_ms: int = 0
    is_silent: bool = False  # given up: its beats stopped or its step hung; comes back with its next beat

    @property
    def facts(self) -> WorkerFacts:
        return self.hello.facts


class Roster:
    """timeout_ns: without a heartbeat, or of a step that uses no processor time."""

    def __init__(self, timeout_ns: int) -> None:
        self._timeout_ns = timeout_ns
        self._known: dict[int, Known] = {}  # by the peer's number, in the order of their hellos
        self._last_look_ns = 0

    def get(self, peer: Peer) -> Known | None:
        return self._known.get(peer.number)

    def come(self, peer: Peer, hello: WorkerHello, now: int) -> Known:
        known = self._known[peer.number] = Known(peer, hello, now)
        return known

    def go(self, peer: Peer) -> None:
        self._known.pop(peer.number, None)

    def beat(self, beat: Heartbeat, now: int) -> Known | None:
        """Returns a worker that had been given up and is there again."""
        for known in self._known.values():
            if known.hello.link_id and known.hello.link_id == beat.link_id:
                known.heard_ns, known.stalled_ms = now, beat.stalled_ms
                if known.is_silent and not self._hangs(known):
                    known.is_silent = False
                    return known
        return None

    def next_standby(self) -> Known | None:
        """Who takes over when one that computes is lost: the first that came."""
        idle = (known for known in self._known.values() if known.group == STANDS_BY and not known.is_silent)
        return next(idle, None)

    def lost(self, now: int) -> list[tuple[Known, str]]:
        """Those that are to be given up, and why. When this process itself stood still, nobody is: it could not hear them."""
        if now - self._last_look_ns > self._timeout_ns // 2 and self._last_look_ns:
            for known in self._known.values():
                known.heard_ns = max(known.heard_ns, now - self._timeout_ns // 2)
        self._last_look_ns = now
        found = [(known, self._why_lost(known, now)) for known in self._known.values() if not known.is_silent]
        gone = [(known, why) for known, why in found if why]
        for known, _ in gone:
            known.is_silent = True
        return gone

    def next_look_ns(self, now: int) -> int:
        """When `lost` is to be asked again at the latest; 0: never."""
        beating = any(known.hello.heartbeat_ms and not known.is_silent for known in self._known.values())
        return now + self._timeout_ns // 4 if beating else 0

    def _why_lost(self, known: Known, now: int) -> str:
        silent_ns = now - known.heard_ns
        if known.hello.heartbeat_ms and silent_ns > max(self._timeout_ns, _LEAST_BEATS * known.hello.heartbeat_ms * _MS):
            return f"nothing was heard of it for {silent_ns / 1e9:.1f} s"
        if self._hangs(known):
            return f"its step has used no processor time for {known.stalled_ms / 1e3:.1f} s"
        return ""

    def _hangs(self, known: Known) -> bool:
        return known.stalled_ms * _MS > self._timeout_ns


def why_unfit(facts: WorkerFacts) -> str:
    """What is wrong with the facts of whoever says that it is a worker; empty: nothing."""
    ranges = {
        "vocab_size": (1, _MOST_TOKENS),
        "max_model_len": (2, _MOST_TOKENS),
        "block_size": (1, 65_536),
        "num_blocks": (1, _MOST_BLOCKS),
        "max_batch_rows": (1, _MOST_ROWS),
        "max_step_tokens": (1, _MOST_TOKENS),
        "num_host_blocks": (0, _MOST_BLOCKS),
        "swap_block_ns": (0, 1 << 62),
        "kv_bytes_per_token": (0, 1 << 62),
        "num_parameters": (0, 1 << 62),
    }
    for name, (least, most) in ranges.items():
        if not least <= getattr(facts, name) <= most:
            return f"its {name} is {getattr(facts, name)}"
    return ""


def why_another(new: WorkerFacts, old: WorkerFacts) -> str:
    """Why a worker can't take the place of this one, as it has another model; empty: it can."""
    for name in ("architecture", "vocab_size"):
        if getattr(new, name) != getattr(old, name):
            return f"its {name} is {getattr(new, name)}, and {getattr(old, name)} is served"
    if new.num_parameters != old.num_parameters and new.num_parameters and old.num_parameters:
        return f"its model has {new.num_parameters} parameters, and one of {old.num_parameters} is served"
    if new.max_model_len < old.max_model_len:
        return f"its max_model_len is {new.max_model_len}, and {old.max_model_len} is served"
    return ""
