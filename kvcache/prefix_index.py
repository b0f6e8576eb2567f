"""Which block holds which content: a chain of hashes over full blocks. Knows digests and block ids, no requests and no tensors.

The digest of a block covers its tokens and, through its parent's digest, all tokens before it and the root, which keys the
chain by model, adapter and salt (vLLM's automatic prefix caching; Kwon et al. 2023 share blocks by the same idea). BLAKE2b with
128 bits: collisions can't be made on purpose, so that no request can be given another's keys and values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wire.messages import I32

DIGEST_BYTES = 16
DIGEST = np.dtype((np.void, DIGEST_BYTES))


def root(*parts: str) -> bytes:
    """Where a chain begins: model, adapter, salt. Equal for equal parts only."""
    hasher = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        data = part.encode()
        hasher.update(len(data).to_bytes(8, "little") + data)
    return hasher.digest()


def chain(parent: bytes, tokens: I32) -> bytes:
    """Digest of a full block. parent: digest of the block before, or the root."""
    return hashlib.blake2b(parent + tokens.astype("<i4", copy=False).tobytes(), digest_size=DIGEST_BYTES).digest()


def chain_many(parents: NDArray[np.void], tokens: I32) -> list[bytes]:
    """`chain` of parents[i], of dtype DIGEST, and tokens[i, block_size], for all i."""
    count, size = tokens.shape
    data = np.empty((count, DIGEST_BYTES + 4 * size), np.uint8)
    data[:, :DIGEST_BYTES] = parents.view(np.uint8).reshape(count, DIGEST_BYTES)
    data[:, DIGEST_BYTES:] = tokens.astype("<i4", copy=False).view(np.uint8)
    blake2b = hashlib.blake2b
    return [blake2b(block, digest_size=DIGEST_BYTES).digest() for block in data.view((np.void, data.shape[1]))[:, 0].tolist()]


def hash_blocks(root: bytes, tokens: I32, block_size: int) -> bytes:
    """Digests of the full blocks of these tokens, one after the other: [16 F] bytes."""
    data, width = tokens.astype("<i4", copy=False).tobytes(), 4 * block_size
    digests, parent = [], root
    for end in range(width, len(data) + 1, width):
        parent = hashlib.blake2b(parent + data[end - width : end], digest_size=DIGEST_BYTES).digest()
        digests.append(parent)
    return b"".join(digests)


class PrefixIndex:
    """Digest to block and back, one to one."""

    def __init__(self, num_blocks: int) -> None:
        self.is_published: NDArray[np.bool_] = np.zeros(num_blocks + 1, np.bool_)  # [block]
        self._digest_of = np.zeros(num_blocks + 1, DIGEST)  # [block], where it is published
        self._block_of: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    def publish(self, blocks: I32, digests: Sequence[bytes]) -> None:
        """These blocks hold what hashes to these digests. One whose digest another block has already stays unknown."""
        assert len(blocks) == len(digests)
        ids = blocks.tolist()
        owners = list(map(self._block_of.setdefault, digests, ids))
        if owners != ids:
            digests = [digest for digest, owner, block in zip(digests, owners, ids, strict=True) if owner == block]
            ids = [block for owner, block in zip(owners, ids, strict=True) if owner == block]
        at, new = np.array(ids, np.intp), np.frombuffer(b"".join(digests), DIGEST)
        known = self.is_published[at]
        assert not known.any() or (self._digest_of[at] == new)[known].all(), "a block holds something else already"
        self._digest_of[at] = new
        self.is_published[at] = True

    def lookup(self, digests: bytes, most_blocks: int) -> I32:
        """Blocks of the longest known prefix of this chain, at most so many."""
        count, block_of, found = min(len(digests) // DIGEST_BYTES, most_blocks), self._block_of.get, []
        for digest in np.frombuffer(digests, DIGEST, count).tolist():
            block = block_of(digest)
            if block is None:
                break
            found.append(block)
        return np.array(found, np.int32)

    def forget(self, blocks: NDArray[np.intp]) -> None:
        """These published blocks get other contents."""
        assert self.is_published[blocks].all(), "a block that is not known is forgotten"
        self.is_published[blocks] = False
        for digest in self._digest_of[blocks].tolist():
            del self._block_of[digest]

    def check_invariants(self) -> None:
        """Raises AssertionError unless digests and blocks correspond one to one."""
        published = np.flatnonzero(self.is_published)
        digests = self._digest_of[published].tolist()
        assert dict(zip(digests, published.tolist(), strict=True)) == self._block_of, "digests and blocks differ"
        assert len(self._block_of) == len(published), "a digest stands for two blocks"
