"""The prefix index: digests as bytes that must not change, and which block stands for which."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from kvcache.prefix_index import DIGEST, DIGEST_BYTES, PrefixIndex, chain, chain_many, hash_blocks, root


def ids(*blocks: int) -> np.ndarray:
    return np.array(blocks, np.int32)


def digests(letters: str) -> list[bytes]:
    """One for each letter."""
    return [letter.encode() * DIGEST_BYTES for letter in letters]


def known(index: PrefixIndex, letters: str, most_blocks: int = 100) -> list[int]:
    return index.lookup(b"".join(digests(letters)), most_blocks).tolist()


# ------------------------------------------------------------------------------------------------------------- digests


def test_digests_are_those_of_other_processes_and_versions() -> None:
    assert root("model", "", "").hex() == "ec9fa347afc29101a89ac43162c0a076"
    tokens = np.array([0, 1, 258, 2**31 - 1], np.int32)
    assert chain(root("model", "", ""), tokens).hex() == "c20c9f5591d7a54cdd0c086c3bd181e3"
    assert (
        hash_blocks(root("model", "", ""), tokens, 2).hex()
        == "00966e06675d1168a0fd52ac5817bfcdddf2cd87cd0210ffa6a2aba083d8ada2"
    )


def test_a_digest_is_blake2b_of_its_parent_and_its_tokens() -> None:
    parent, tokens = root("m"), np.array([7, 300, 70_000], np.int32)
    expected = hashlib.blake2b(parent + b"\7\0\0\0\x2c\1\0\0\x70\x11\1\0", digest_size=16).digest()
    assert chain(parent, tokens) == expected == hash_blocks(parent, tokens, 3)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("model", "", ""), ("model", "", "salt")),
        (("model", "", ""), ("model", "adapter", "")),
        (("model", "", ""), ("other", "", "")),
        (("model", "a", ""), ("model", "", "a")),
        (("ab", "c"), ("a", "bc")),
        (("a",), ("a", "")),
        ((), ("",)),
        (("é",), ("e",)),
    ],
)
def test_other_parts_give_another_root(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert root(*one) == root(*one) != root(*other)
    assert len(root(*one)) == DIGEST_BYTES


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 17, 48, 100])
def test_hashing_all_blocks_is_chaining_one_after_the_other(block_size: int, num_tokens: int) -> None:
    tokens = np.random.default_rng(num_tokens).integers(0, 2**31, num_tokens).astype(np.int32)
    parent, expected = root("m"), b""
    for block in range(num_tokens // block_size):
        parent = chain(parent, tokens[block * block_size : (block + 1) * block_size])
        expected += parent
    assert hash_blocks(root("m"), tokens, block_size) == expected


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_many_are_chained_as_one_by_one(count: int, block_size: int) -> None:
    tokens = np.random.default_rng(count).integers(0, 2**31, (count, block_size)).astype(np.int32)
    parents = [root(str(i)) for i in range(count)]
    assert chain_many(np.frombuffer(b"".join(parents), DIGEST), tokens) == list(map(chain, parents, tokens))


def test_digests_do_not_depend_on_how_the_tokens_are_stored() -> None:
    tokens = np.arange(64, dtype=np.int32)
    expected = hash_blocks(root("m"), tokens, 16)
    for other in (tokens.astype(">i4"), tokens.astype(np.int64), tokens.astype(np.uint32), np.repeat(tokens, 2)[::2]):
        assert hash_blocks(root("m"), other, 16) == expected


def test_a_digest_covers_all_tokens_before_it() -> None:
    tokens = np.arange(12, dtype=np.int32)
    other = tokens.copy()
    other[5] = 99
    one, two = (np.frombuffer(hash_blocks(root("m"), some, 4), "V16") for some in (tokens, other))
    assert (one == two).tolist() == [True, False, False]
    salted = np.frombuffer(hash_blocks(root("m", "salt"), tokens, 4), "V16")
    assert not (one == salted).any()


# --------------------------------------------------------------------------------------------------------------- index


def test_the_longest_known_prefix_is_found() -> None:
    index = PrefixIndex(9)
    index.publish(ids(3, 1, 7), digests("abc"))
    assert known(index, "abcd") == [3, 1, 7]
    assert known(index, "abx") == [3, 1]
    assert known(index, "xbc") == [] and known(index, "") == []
    assert index.lookup(b"", 5).dtype == np.int32


def test_a_prefix_ends_where_a_block_is_missing() -> None:
    index = PrefixIndex(9)
    index.publish(ids(3, 7), digests("ac"))
    assert known(index, "abc") == [3]


def test_no_more_blocks_than_asked_for() -> None:
    index = PrefixIndex(9)
    index.publish(ids(3, 1, 7), digests("abc"))
    assert [known(index, "abc", most) for most in (0, 1, 2, 3, 4)] == [[], [3], [3, 1], [3, 1, 7], [3, 1, 7]]


def test_looking_changes_nothing() -> None:
    index = PrefixIndex(2)
    known(index, "ab")
    assert len(index) == 0 and not index.is_published.any()


def test_of_two_blocks_with_the_same_content_the_first_is_known() -> None:
    index = PrefixIndex(9)
    index.publish(ids(1), digests("a"))
    index.publish(ids(2, 3), digests("ab"))
    assert known(index, "ab") == [1, 3] and len(index) == 2
    assert np.flatnonzero(index.is_published).tolist() == [1, 3]
    index.check_invariants()


def test_two_blocks_with_the_same_content_at_the_same_time() -> None:
    index = PrefixIndex(9)
    index.publish(ids(5, 4, 6), digests("aab"))
    assert known(index, "ab") == [5, 6]
    assert np.flatnonzero(index.is_published).tolist() == [5, 6]
    index.check_invariants()


def test_publishing_again_changes_nothing() -> None:
    index = PrefixIndex(9)
    index.publish(ids(5, 4), digests("ab"))
    index.publish(ids(4), digests("b"))
    assert known(index, "ab") == [5, 4] and len(index) == 2
    index.check_invariants()


def test_a_forgotten_block_is_not_found_and_can_be_published_under_another_digest() -> None:
    index = PrefixIndex(9)
    index.publish(ids(1, 2, 3), digests("abc"))
    index.forget(np.array([2, 3]))
    assert known(index, "abc") == [1] and known(index, "c") == [] and len(index) == 1
    index.check_invariants()
    index.publish(ids(3, 9), digests("bc"))
    assert known(index, "abc") == [1, 3, 9]
    index.check_invariants()


def test_a_digest_may_end_in_zeros() -> None:
    index = PrefixIndex(9)
    names = [bytes(16), b"a" + bytes(15), b"a" * 8 + bytes(8)]
    index.publish(ids(1, 2, 3), names)
    assert index.lookup(b"".join(names), 3).tolist() == [1, 2, 3]
    index.check_invariants()
    index.forget(np.array([1, 3]))
    assert index.lookup(names[1], 1).tolist() == [2] and len(index) == 1


def test_a_block_under_two_digests_is_our_mistake() -> None:
    index = PrefixIndex(9)
    index.publish(ids(1), digests("a"))
    with pytest.raises(AssertionError, match="something else already"):
        index.publish(ids(1), digests("b"))


def test_forgetting_what_is_not_known_is_our_mistake() -> None:
    index = PrefixIndex(9)
    index.publish(ids(1), digests("a"))
    with pytest.raises(AssertionError, match="not known"):
        index.forget(np.array([1, 2]))


def test_blocks_and_digests_come_in_pairs() -> None:
    with pytest.raises(AssertionError):
        PrefixIndex(9).publish(ids(1, 2), digests("a"))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda index: index._block_of.pop(b"a" * 16),
        lambda index: index._block_of.update({b"x" * 16: 2}),
        lambda index: index._block_of.update({b"a" * 16: 2}),
        lambda index: index.is_published.__setitem__(3, True),
        lambda index: index.is_published.__setitem__(1, False),
        lambda index: index._digest_of.__setitem__(2, index._digest_of[1]),
    ],
)
def test_every_way_to_mistake_a_block_is_noticed(spoil) -> None:
    index = PrefixIndex(4)
    index.publish(ids(1, 2), digests("ab"))
    index.check_invariants()
    spoil(index)
    with pytest.raises(AssertionError):
        index.check_invariants()
