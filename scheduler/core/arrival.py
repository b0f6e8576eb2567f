"""What the core says to a request at its arrival: why it is refused, how long it may get, when it would come to its turn.

Reads the core and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from wire import AddRequest, Refused

if TYPE_CHECKING:
    from scheduler.core.core import Core

MOST_OUTPUTS = 1024  # of one request
_SECOND = 1_000_000_000
_UNKNOWN_TENANT = "no tenant {!r} is served here, and none without an entry of its own: the server knows tenants by --tenant"


class Elsewhere(NamedTuple):
    """What the server's other cores hold that counts against its limits, when a request comes to this one."""

    waiting_requests: int = 0
    waiting_tokens: int = 0  # prompt tokens of these
    tenant_requests: int = 0  # alive, of the tenant whose request it is
    tenant_due_ns: int = 0  # when the tenant's next one would come, if they came at equal distances


NOTHING_ELSEWHERE = Elsewhere()


def why_not(core: Core, add: AddRequest, frontend: int, now: int, elsewhere: Elsewhere = NOTHING_ELSEWHERE) -> Refused | None:
    """None: it is welcome."""
    header, num_prompt, facts = add.header, len(add.prompt), core.facts

    def refused(code: str, message: str, field: str = "", retry_after_ns: int = 0) -> Refused:
        return Refused(header.handle, code, message, field, retry_after_ns)

    if facts is None or core.draining:
        why = "the server is draining" if core.draining else "no worker has joined yet"
        return refused("UNAVAILABLE", why, retry_after_ns=_SECOND)
    if not 1 <= header.num_outputs <= MOST_OUTPUTS:
        return refused("INVALID_ARGUMENT", f"num_outputs is 1 to {MOST_OUTPUTS}", "sampling.num_outputs")
    request = core.request(header.request_id)
    handles = range(header.handle, header.handle + header.num_outputs)
    if (request is not None and request.num_live) or any(core.has_handle(frontend, handle) for handle in handles):
        return refused("ALREADY_EXISTS", "a request with this request_id is alive")
    if not core.queue.knows(header.priority):
        return refused("INVALID_ARGUMENT", f"unknown priority class {header.priority}", "scheduling.priority")
    if num_prompt == 0:
        return refused("INVALID_ARGUMENT", "the prompt is empty", "prompt")
    if int(add.prompt.min()) < 0 or int(add.prompt.max()) >= facts.vocab_size:
        return refused("INVALID_ARGUMENT", f"a token id is not below {facts.vocab_size}", "prompt.token_ids")
    if not all(0 <= token < facts.vocab_size for token in header.sampling.stop_token_ids):
        return refused("INVALID_ARGUMENT", f"a token id is not below {facts.vocab_size}", "stopping.stop_token_ids")
    if num_prompt >= facts.max_model_len:
        limit = facts.max_model_len
        return refused("INVALID_ARGUMENT", f"the prompt has {num_prompt} tokens, the model's length is {limit}", "prompt")
    if num_prompt + header.max_tokens > facts.max_model_len:
        what = f"prompt ({num_prompt}) + max_tokens ({header.max_tokens})"
        return refused("INVALID_ARGUMENT", f"{what} pass the model's length ({facts.max_model_len})", "stopping.max_tokens")
    num_hashes = num_prompt // core.kv.block_size if header.hash_block_size == core.kv.block_size else None
    if num_hashes is not None and len(add.prefix_hashes) != num_hashes * 16:
        return refused("INTERNAL", f"{len(add.prefix_hashes)} bytes of hashes for {num_hashes} blocks")
    return (
        _not_large(core, add, refused)
        or _not_of_this_tenant(core, add, now, elsewhere, refused)
        or _not_now(core, add, now, elsewhere, refused)
    )


def _not_large(core: Core, add: AddRequest, refused: Callable[..., Refused]) -> Refused | None:
    """Larger than the whole pool, or than its tenant's part of it."""
    header, num_prompt, kv = add.header, len(add.prompt), core.kv
    tenant = core.tenants.index_of(header.tenant)
    if tenant is None:
        return refused("PERMISSION_DENIED", _UNKNOWN_TENANT.format(header.tenant), "scheduling.tenant")
    wanted = num_prompt + max(header.max_tokens, 1)
    if max_outputs(core, num_prompt, header.max_tokens, tenant) >= max(header.max_tokens, 1):
        return None
    quota = int(core.tenants.max_blocks[tenant])
    holder, num_blocks = ("the whole KV cache has", kv.pool.num_blocks)
    if 0 < quota < num_blocks:
        holder, num_blocks = (f"tenant {header.tenant!r} may hold", quota)
    return refused(
        "FAILED_PRECONDITION",
        f"the request needs {kv.blocks_for(wanted - 1)} blocks for {wanted} tokens, "
        f"{holder} {num_blocks} of {kv.block_size} tokens: ask for a lower max_tokens or send a shorter prompt",
    )


def _not_of_this_tenant(
    core: Core, add: AddRequest, now: int, elsewhere: Elsewhere, refused: Callable[..., Refused]
) -> Refused | None:
    """It has as many requests as it may have, or as many came in a second."""
    tenants, name = core.tenants, add.header.tenant
    tenant = tenants.index_of(name)
    assert tenant is not None
    most, wait_ns = int(tenants.max_requests[tenant]), tenants.wait_ns(tenant, now, elsewhere.tenant_due_ns)
    if 0 < most <= tenants.num_requests[tenant] + elsewhere.tenant_requests:
        after_ns = max(core.mean_end_interval() or _SECOND, _SECOND // 100)
        refusal = refused("RESOURCE_EXHAUSTED", f"tenant {name!r} may have {most} requests at a time", retry_after_ns=after_ns)
        refusal.details = {"reason": "TENANT_REQUESTS", "max_requests": str(most)}
        return refusal
    if wait_ns:
        most = int(tenants.max_per_s[tenant])
        refusal = refused("RESOURCE_EXHAUSTED", f"tenant {name!r} may send {most} requests a second", retry_after_ns=wait_ns)
        refusal.details = {"reason": "TENANT_RATE", "max_requests_per_s": str(most)}
        return refusal
    return None


def _not_now(core: Core, add: AddRequest, now: int, elsewhere: Elsewhere, refused: Callable[..., Refused]) -> Refused | None:
    """The queue is full, or the deadline can't be met."""
    header, queue = add.header, core.queue
    if header.deadline_ns:
        estimate = time_to_finish(core, add) if header.whole_by_deadline else time_to_first_token(core, add)
        left = header.deadline_ns - now
        if left <= 0 or estimate > left:
            what = "all its tokens" if header.whole_by_deadline else "its first token"
            said = f"the deadline passed {-left / 1e6:.0f} ms ago" if left <= 0 else f"{left / 1e6:.0f} ms are left"
            refusal = refused("DEADLINE_EXCEEDED", f"{what} would take about {estimate / 1e6:.0f} ms, {said}")
            refusal.details = {"estimate_ms": f"{estimate / 1e6:.0f}", "left_ms": f"{left / 1e6:.0f}"}
            return refusal
    others, other_tokens = elsewhere.waiting_requests, elsewhere.waiting_tokens
    if not queue.has_room_for(len(add.prompt), others, other_tokens):
        num_requests, num_tokens = queue.num_requests + others, queue.num_tokens + other_tokens
        message = f"{num_requests} requests with {num_tokens} prompt tokens wait already"
        refusal = refused("RESOURCE_EXHAUSTED", message, retry_after_ns=drain_time(core, len(add.prompt), other_tokens))
        refusal.details = {"waiting_requests": str(num_requests), "waiting_tokens": str(num_tokens)}
        return refusal
    return None


def max_outputs(core: Core, num_prompt: int, max_tokens: int, tenant: int) -> int:
    """Output tokens that an output may have: what it asks for (0: no limit of its own), as far as the model's length, the whole
    pool and the tenant's quota allow. The last one needs no block: nothing is computed after it."""
    facts = core.facts
    assert facts is not None
    quota = int(core.tenants.max_blocks[tenant])
    num_blocks = min(facts.num_blocks, quota) if quota else facts.num_blocks
    room = min(facts.max_model_len, num_blocks * facts.block_size + 1) - num_prompt
    return min(max_tokens, room) if max_tokens else room


def fits(core: Core, num_prompt: int, max_tokens: int, num_outputs: int = 0) -> bool:
    """Whether the model's length and the whole pool have room for so many tokens. max_tokens: of an output; 0: no limit of its
    own, and it has num_outputs already."""
    facts = core.facts
    if facts is None:
        return False
    return num_prompt + (max_tokens or num_outputs + 1) <= min(facts.max_model_len, facts.num_blocks * facts.block_size + 1)


def time_to_first_token(core: Core, add: AddRequest) -> int:
    """Nanoseconds, by the step costs measured so far (0: none measured): the prompts that go before, then its own; and when
    nobody can be admitted, as long as those before it take to find places."""
    queue = core.queue
    hashes = add.prefix_hashes.tobytes() if add.header.hash_block_size == core.kv.block_size else b""
    own, pairs = tokens_to_compute(core, len(add.prompt), hashes)
    alone = core.step_cost.prefill_ns(own, core.token_budget, pairs)
    order_ns = add.header.deadline_ns - alone if add.header.deadline_ns else None
    tenant = core.tenants.index_of(add.header.tenant) or 0
    ahead = queue.tokens_ahead(add.header.priority, tenant, order_ns) + unfinished_prompts(core)
    mean = queue.num_tokens // max(1, queue.num_requests)  # tokens of a prompt that waits
    computing = core.step_cost.prefill_ns(ahead + own, core.token_budget, pairs + ahead * mean // 2)
    if core.rows.num_free and core.hindered is None:
        return computing
    return max(computing, core.mean_end_interval() + alone)


def tokens_to_compute(core: Core, num_prompt: int, hashes: bytes) -> tuple[int, int]:
    """(tokens of a prompt with these blocks' hashes that are not in the prefix cache now, pairs that they attend over)."""
    size = core.kv.block_size
    hits = len(core.kv.lookup(hashes, (num_prompt - 1) // size)) * size if hashes and not core.policy.reserves_outputs else 0
    own = num_prompt - hits
    return own, own * hits + own * (own + 1) // 2


def unfinished_prompts(core: Core) -> int:
    """Tokens of admitted prompts that no plan computes yet."""
    running = core.running()
    missing = core.missing(running)
    return int(missing[missing > 1].sum())


def time_to_finish(core: Core, add: AddRequest) -> int:
    """… and all its max_tokens after that, at the pace of a batch with one row more."""
    rows = len(core.rows.in_order()) + add.header.num_outputs
    step = core.step_cost.predict(rows, rows, core.num_kv_tokens + rows * len(add.prompt))
    return time_to_first_token(core, add) + max(0, add.header.max_tokens - 1) * step


def drain_time(core: Core, num_tokens: int, other_tokens: int = 0) -> int:
    """Nanoseconds until so many tokens should have room in the queue, from the rate at which requests have been ending.
    other_tokens: that wait in other cores."""
    interval = core.mean_end_interval()
    if not interval:
        return _SECOND
    queue = core.queue
    mean = max(1, queue.num_tokens // max(1, queue.num_requests))
    places = max(1, -(-(queue.num_tokens + other_tokens + num_tokens - queue.max_tokens) // mean))
    return min(max(places * interval, _SECOND // 100), 60 * _SECOND)
