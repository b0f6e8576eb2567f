"""What is said at the start, for people: what was chosen, and why. Pure; reads the core and a worker's facts."""

from __future__ import annotations

from scheduler.core import Core


def limits(core: Core) -> list[str]:
    """Lines about model, cache and steps, once the first worker has joined."""
    facts, config = core.facts, core.config
    assert facts is not None
    slots = facts.num_blocks * facts.block_size
    gib = slots * facts.kv_bytes_per_token / 2**30
    whole = slots // facts.max_model_len
    tokens = _least(core.token_budget, {"--max-step-tokens": config.max_step_tokens, "the worker": facts.max_step_tokens})
    rows = _least(
        core.rows.max_rows,
        {"--max-batch-rows": config.max_batch_rows, "the worker": facts.max_batch_rows, "one token each": core.token_budget},
    )
    itl = f"inter-token time of {config.target_itl_ns / 1e6:g} ms" if config.target_itl_ns else "no inter-token time"
    tenants = f"; {len(config.tenants)} tenants have limits of their own" if config.tenants else ""
    return [
        f"model: {facts.architecture} on {facts.device}, {facts.dtype}, at most {facts.max_model_len} tokens a request",
        f"KV cache: {facts.num_blocks} blocks of {facts.block_size} tokens, {slots} tokens, {gib:.2f} GiB: {whole} requests of"
        f" full length at once, prefix caching {'on' if config.prefix_caching else 'off'}",
        f"steps: at most {core.token_budget} tokens ({tokens}) of {core.rows.max_rows} sequences ({rows}); policy"
        f" {core.policy.name}, {itl}",
        f"queue: at most {config.max_queue_requests} requests and {config.max_queue_tokens} prompt tokens{tenants}",
    ]


def _least(value: int, limits: dict[str, int]) -> str:
    """Whose limit it is."""
    return "as " + " and ".join(name for name, limit in limits.items() if limit == value) + " says"
