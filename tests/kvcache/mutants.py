"""Mistakes that one could make in the code of the blocks: each is a line of it, and what it is mistaken for."""

# ruff: noqa: E501 (one mutant a line)

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import getsource, isclass, isfunction
from types import FunctionType, ModuleType
from typing import Any

from kvcache import block_pool, block_table, manager, prefix_index


@dataclass(frozen=True)
class Mutant:
    name: str
    module: ModuleType
    old: str  # stands in the module's source once
    new: str
    breaks_the_rules: bool = True  # the exploration against the specification alone must notice; else the exact tests do

    @property
    def source(self) -> str:
        source = getsource(self.module)
        assert source.count(self.old) == 1, f"{self.name}: {source.count(self.old)} places in {self.module.__name__}"
        return source.replace(self.old, self.new)


@contextmanager
def mutated(mutant: Mutant) -> Iterator[None]:
    """All functions of the module do what the mutant says, for everybody who has imported them."""
    namespace: dict[str, Any] = {"__name__": mutant.module.__name__}
    exec(compile(mutant.source, mutant.module.__file__ or "", "exec"), namespace)
    pairs = list(_functions(vars(mutant.module), namespace, mutant.module.__name__))
    before = [function.__code__ for function, _ in pairs]
    try:
        for function, other in pairs:
            function.__code__ = other.__code__
        yield
    finally:
        for (function, _), code in zip(pairs, before, strict=True):
            function.__code__ = code


def _functions(original: Any, other: Any, module: str) -> Iterator[tuple[FunctionType, FunctionType]]:
    for name, value in original.items():
        twin = other.get(name)
        if isinstance(value, property):
            value, twin = value.fget, twin.fget
        if isfunction(value) and value.__module__ == module:
            yield value, twin
        elif isclass(value) and value.__module__ == module:
            yield from _functions(vars(value), vars(twin), module)


def pool(name: str, old: str, new: str, breaks_the_rules: bool = True) -> Mutant:
    return Mutant(name, block_pool, old, new, breaks_the_rules)


MUTANTS = [
    # allocation
    pool("allocation begins at the first block each time", "            window = self._states[self._cursor :", "            self._cursor = 1 if missing == count else self._cursor\n            window = self._states[self._cursor :"),
    pool("the cursor stays on the block given out last", "int(found[-1]) + 1 if not missing", "int(found[-1]) if not missing"),
    pool("a block given out stays free", "        self._states[blocks] = HELD\n        self.ref_counts[blocks] = 1", "        self.ref_counts[blocks] = 1"),
    pool("a block given out has no reference", "        self.ref_counts[blocks] = 1\n", ""),
    pool("free blocks are not counted down", "        self.num_free -= count\n        return", "        return"),
    pool("cached blocks are not available", "return self.num_free + self.num_cached", "return self.num_free"),
    pool("retiring blocks are available", "return self.num_free + self.num_cached", "return self.num_free + self.num_cached + self.num_retiring"),
    pool("retiring blocks are given out", "(window == FREE).nonzero()[0][:count]", "(window != HELD).nonzero()[0][:count]"),
    pool("retiring blocks are given out if it takes a search", "(window == FREE).nonzero()[0]\n", "(window != HELD).nonzero()[0]\n"),
    pool("held blocks are counted without the retiring ones", " - self.num_cached - self.num_retiring", " - self.num_cached"),
    pool("a block with one reference is shared", "self.ref_counts > 1", "self.ref_counts > 0"),
    # eviction
    pool("all that is cached is evicted at once", "self._evict(max(count - self.num_free, ahead))", "self._evict(self.num_cached)"),
    pool("as much is evicted as is asked for", "self._evict(max(count - self.num_free, ahead))", "self._evict(min(count, self.num_cached))", False),
    pool("nothing is evicted ahead", "self._evict(max(count - self.num_free, ahead))", "self._evict(count - self.num_free)", False),
    pool("as much is evicted ahead as one likes", "self.num_blocks // _EVICTED_AHEAD, _MOST_AHEAD)", "self.num_blocks // _EVICTED_AHEAD)", False),
    pool("the first block of a table is evicted first", "at = blocks[::-1].astype(np.intp)", "at = blocks.astype(np.intp)"),
    pool("the block released last is evicted first", "found = self._live(self._log_start, entries).nonzero()[0][:count]", "found = self._live(self._log_start, entries).nonzero()[0][-count:]"),
    pool("an evicted block is still found", "            self.index.forget(blocks)\n", ""),
    pool("an evicted block is still cached", "            self._states[blocks] = FREE\n", ""),
    pool("evicted blocks are not counted", "        self.num_cached -= count\n", ""),
    pool("what was shared since is evicted", "        live &= self._states[entries] == CACHED\n", ""),
    pool("a block has its first place in the order for ever", "live: NDArray[np.bool_] = self._entry[entries] == np.arange(start, start + len(entries))", "live = np.ones(len(entries), np.bool_)"),
    pool("the log is not compacted", "            if self._log_end + len(known) > len(self._log):\n                self._compact()\n", "", False),
    pool("compaction forgets the new places", "        self._entry[live] = np.arange(len(live))\n", "", False),
    pool("compaction loses the oldest entry", "live = entries[self._live(self._log_start, entries)]", "live = entries[self._live(self._log_start, entries)][1:]", False),
    pool("compaction turns the order around", "live = entries[self._live(self._log_start, entries)]", "live = entries[self._live(self._log_start, entries)][::-1]", False),
    # sharing
    pool("a hit leaves the block evictable", "        self.num_cached -= cached\n        self._states[at] = HELD\n", "        self.num_cached -= 0\n"),
    pool("a hit on a cached block is not counted", "        self.num_cached -= cached\n        self._states", "        self._states"),
    pool("a hit on a retiring block is not counted", "        self.num_retiring -= retiring\n        self.num_cached -= cached\n", "        self.num_cached -= cached\n"),
    pool("a hit adds no reference", "        self.ref_counts[at] += 1\n", "        self.ref_counts[at] = 1\n"),
    pool("a free block can be shared", 'assert not free and 0 not in blocks, "a free', 'assert 0 not in blocks, "a free', False),
    pool("the dump can be shared", 'assert not free and 0 not in blocks, "a free', 'assert not free, "a free', False),
    pool("a retiring block costs as much as a cached one", "np.count_nonzero(self._states[blocks] == CACHED)", "np.count_nonzero(self._states[blocks] >= RETIRING)"),
    # release
    pool("release takes all references", "counts = self.ref_counts[at] - 1", "counts = self.ref_counts[at] * 0"),
    pool("release leaves the references", "        self.ref_counts[at] = counts\n", ""),
    pool("a block may be released twice", 'assert counts.min(initial=0) >= 0, "a block was', 'assert True, "a block was', False),
    pool("a shared block is given back with its first holder", "            at, last_steps = at[unused], last_steps[unused]\n", "            pass\n"),
    pool("a block is available while a plan names it", "        if last_steps.max(initial=returned_step) > returned_step:", "        if False:"),
    pool("a block retires although its plan has returned", "            for step in np.unique(last_steps[last_steps > returned_step]).tolist():\n                self._retire(at[last_steps == step], step)\n            at = at[last_steps <= returned_step]\n", "            for step in np.unique(last_steps).tolist():\n                self._retire(at[last_steps == step], step)\n            at = at[:0]\n", False),
    pool("only the last holder's plan counts", "np.maximum(self._last_step[at], last_step)", "np.maximum(last_step, np.zeros_like(at) - 1)"),
    pool("the last holder's plan does not count", "        self._last_step[at] = last_steps\n", "        self._last_step[at] = np.maximum(self._last_step[at], returned_step)\n"),
    pool("blocks of other plans become available too", "if entry[0] <= step_id), key", "if entry[0] <= step_id + 1), key"),
    pool("a plan's blocks wait for the next one", "if entry[0] <= step_id), key", "if entry[0] < step_id), key"),
    pool("a hit does not end a retirement", "blocks = blocks[(self._states[blocks] == RETIRING) & (self._entry[blocks] == entries)]", "blocks = np.unique(blocks)"),
    pool("an older retirement counts for a newer one", "(self._states[blocks] == RETIRING) & (self._entry[blocks] == entries)", "(self._states[blocks] == RETIRING)", False),
    pool("steps that return at once are taken as they were released", "due = sorted((entry for entry in self._retiring if entry[0] <= step_id), key=itemgetter(0, 1))", "due = [entry for entry in self._retiring if entry[0] <= step_id]", False),
    pool("what has retired is not counted down", "        self.num_retiring -= len(blocks)\n", ""),
    pool("the list of the retiring grows for ever", "        self._retiring = [entry for entry in self._retiring if entry[0] > step_id]\n", "", False),
    pool("published blocks become free", "unknown, known = blocks[~published], blocks[published]", "unknown, known = blocks, blocks[:0]"),
    pool("unpublished blocks are cached", "unknown, known = blocks[~published], blocks[published]", "unknown, known = blocks[:0], blocks"),
    # index
    Mutant("a later block takes over the digest", prefix_index, "owners = list(map(self._block_of.setdefault, digests, ids))", "self._block_of.update(zip(digests, ids, strict=True))\n        owners = ids"),
    Mutant("a duplicate is published too", prefix_index, "        if owners != ids:\n", "        if False:\n"),
    Mutant("a block may be known under two digests", prefix_index, "assert not known.any() or", "assert True or", False),
    Mutant("a duplicate hides those after it", prefix_index, "for digest, owner, block in zip(digests, owners, ids, strict=True) if owner == block]\n            ids = [block for owner, block in zip(owners, ids, strict=True) if owner == block]", "for digest, owner, block in zip(digests, owners, ids, strict=True) if owner == block][:1]\n            ids = [block for owner, block in zip(owners, ids, strict=True) if owner == block][:1]", False),
    Mutant("one block too many is found", prefix_index, "count, block_of, found = min(len(digests) // DIGEST_BYTES, most_blocks)", "count, block_of, found = min(len(digests) // DIGEST_BYTES, most_blocks + 1)"),
    Mutant("a missing block is skipped", prefix_index, "            if block is None:\n                break\n", "            if block is None:\n                continue\n", False),
    Mutant("a forgotten block stays marked", prefix_index, "        self.is_published[blocks] = False\n", ""),
    Mutant("a forgotten digest stays known", prefix_index, "            del self._block_of[digest]\n", "            pass\n"),
    Mutant("roots are made of the parts' letters only", prefix_index, 'hasher.update(len(data).to_bytes(8, "little") + data)', "hasher.update(data)", False),
    Mutant("the salt does not count", prefix_index, "    for part in parts:\n", "    for part in parts[:2]:\n", False),
    Mutant("a block's digest does not cover those before it", prefix_index, "        parent = hashlib.blake2b(parent + data[end - width : end]", "        parent = hashlib.blake2b(root + data[end - width : end]", False),
    Mutant("the first block is not keyed", prefix_index, "return hashlib.blake2b(parent + tokens.", "return hashlib.blake2b(tokens.", False),
    Mutant("the partly filled block is hashed too", prefix_index, "range(width, len(data) + 1, width)", "range(width, len(data) + width, width)", False),
    Mutant("a full last block is not hashed", prefix_index, "range(width, len(data) + 1, width)", "range(width, len(data), width)", False),
    Mutant("tokens are hashed as they are stored", prefix_index, 'tokens.astype("<i4", copy=False).tobytes(), 4', "tokens.tobytes(), 4", False),
    Mutant("many are chained to the first one's parent", prefix_index, "parents.view(np.uint8).reshape(count, DIGEST_BYTES)", "parents.view(np.uint8).reshape(count, DIGEST_BYTES)[:1]", False),
    # tables
    Mutant("a table is given back but not emptied", block_table, "        self.num_blocks[slot] = 0\n", ""),
    Mutant("what is given back is a view", block_table, "blocks = self.row(slot).copy()", "blocks = self.row(slot)", False),
    Mutant("a table that is wider forgets the others", block_table, "            wider[:, :width] = self.ids\n", "", False),
    Mutant("tables do not widen by what is appended", block_table, "self._widen(int(at.max(initial=0)) + 1)", "self._widen(int(at.max(initial=0)))", False),
    Mutant("the block goes to the wrong column", block_table, "        self.ids[slots, at] = blocks\n", "        self.ids[slots, at - 1] = blocks\n"),
    Mutant("a started slot is started again", block_table, "        assert self.num_blocks[slot] == 0\n", "", False),
    # manager
    Mutant("what is shared is taken last", manager, "        self.pool.share(shared)  # first, so that they are not evicted for the others\n        others = self.pool.allocate(self.blocks_for(num_tokens) - len(shared))\n", "        others = self.pool.allocate(self.blocks_for(num_tokens) - len(shared))\n        self.pool.share(shared)\n", False),
    Mutant("a hit is not shared", manager, "        self.pool.share(shared)  # first", "        # first"),
    Mutant("a hit comes on top of a whole table", manager, "others = self.pool.allocate(self.blocks_for(num_tokens) - len(shared))", "others = self.pool.allocate(self.blocks_for(num_tokens))"),
    Mutant("the fresh blocks come before the shared ones", manager, "np.concatenate([shared, others])", "np.concatenate([others, shared])"),
    Mutant("blocks are rounded down", manager, "return -(-num_tokens // self.block_size)", "return num_tokens // self.block_size"),
    Mutant("a cached block costs nothing", manager, " + copies_last + self.pool.num_cached_of(shared)", " + copies_last"),
    Mutant("a copy costs nothing", manager, " + copies_last + self.pool", " + self.pool"),
    Mutant("a copy does not replace the block", manager, "        self.tables.ids[slot, index] = new[0]\n", ""),
    Mutant("a copied block keeps the reference", manager, "        self.pool.release(old, last_step, returned_step)\n        return", "        return"),
    Mutant("a copied block may be taken before it is copied", manager, "self.pool.release(old, last_step, returned_step)\n        return", "self.pool.release(old, returned_step, returned_step)\n        return"),
    Mutant("what is copied is what is copied to", manager, "return int(old[0]), int(new[0])", "return int(new[0]), int(old[0])"),
    Mutant("a block that nobody holds is published", manager, "assert (self.pool.ref_counts[blocks] > 0).all()", "assert True", False),
    Mutant("a slot is full one token early", manager, "return num_computed >= self", "return num_computed + 1 >= self"),
    Mutant("a slot is full one token late", manager, "return num_computed >= self", "return num_computed > self"),
    Mutant("a grown table is not longer", manager, "        self.tables.append(slots, blocks)\n", ""),
    Mutant("a table's plans do not count", manager, "self.pool.release(self.tables.clear(slot), last_step, returned_step)", "self.pool.release(self.tables.clear(slot), returned_step, returned_step)"),
    Mutant("host blocks are those of the device", manager, "self.host = BlockPool(num_host_blocks)", "self.host = BlockPool(num_blocks)", False),
    Mutant("the host's count is not checked", manager, "        self.host.check_invariants()\n", "", False),
    Mutant("references are not compared with tables", manager, "assert (counts == self.pool.ref_counts).all()", "assert True", False),
]  # fmt: skip
