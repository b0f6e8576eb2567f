"""What is asked for: a job, and the tokens of its prompt. Numbers only: no scheduler, no client, no clock."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from wire.messages import I32, AddRequest

BATCH, NORMAL, INTERACTIVE = 1, 2, 3
PRIORITIES = {"batch": BATCH, "normal": NORMAL, "interactive": INTERACTIVE}
REPLY = 0  # key of a part that the model wrote
_REPLY_TOKEN = 1


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a prompt. Parts with the same key begin with the same tokens; key REPLY: what the model answered there."""

    key: int
    length: int  # tokens


@dataclass(frozen=True, slots=True)
class Job:
    """One request."""

    arrival_ns: int  # since the workload's start; of a following turn: since the end of the turn before it
    prompt: tuple[Part, ...]
    output_tokens: int  # it gets exactly so many
    max_tokens: int = 0  # what it asks for: it ends by itself before; 0: output_tokens, and an end token is ignored
    tenant: str = ""
    priority: int = NORMAL
    deadline_ns: int = 0  # since its arrival; 0: none
    num_outputs: int = 1
    then: Job | None = None  # the session's next turn
    cancel_ns: int = 0  # since its arrival; 0: it is not cancelled
    recorded: AddRequest | None = None  # what it was, where it is known: its prompt stands here, `prompt` says how long it is
    replies: tuple[I32, ...] = ()  # what was answered, likewise; one an output

    @property
    def prompt_tokens(self) -> int:
        return sum(part.length for part in self.prompt)

    def turns(self) -> Iterator[Job]:
        """This one and those that follow."""
        job: Job | None = self
        while job is not None:
            yield job
            job = job.then


def token_ids(prompt: tuple[Part, ...], vocab_size: int, reply: I32 | None = None) -> I32:
    """The prompt's tokens. Those of a part depend on its key and their position in it; those of all replies together are
    `reply` if it is given, else all the same."""
    pieces, answered = [], 0
    for part in prompt:
        if part.key != REPLY:
            pieces.append(_text(part, vocab_size))
        elif reply is None:
            pieces.append(np.full(part.length, _REPLY_TOKEN, np.int32))
        else:
            pieces.append(reply[answered : answered + part.length])
            answered += part.length
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _text(part: Part, vocab_size: int) -> I32:
    """splitmix64 of key and position."""
    with np.errstate(over="ignore"):
        words = np.arange(part.length, dtype=np.uint64) + np.uint64(part.key % 2**64) * np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        words ^= words >> np.uint64(31)
    return (words % np.uint64(vocab_size)).astype(np.int32)
