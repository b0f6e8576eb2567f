from __future__ import annotations

import numpy as np

from bench.jobs import REPLY, Job, Part, token_ids


def test_parts_of_one_key_begin_alike_and_others_do_not() -> None:
    long, short = token_ids((Part(5, 100),), 1000), token_ids((Part(5, 40),), 1000)
    assert long[:40].tolist() == short.tolist()
    assert (token_ids((Part(6, 100),), 1000) == long).mean() < 0.05
    assert long.dtype == np.int32 and 0 <= long.min() <= long.max() < 1000
    assert len(np.unique(long)) > 80, "it is no constant"


def test_a_prompt_is_its_parts_in_order_with_the_replies_where_they_belong() -> None:
    prompt = (Part(1, 3), Part(REPLY, 2), Part(2, 2), Part(REPLY, 1))
    ids = token_ids(prompt, 100, reply=np.array([7, 8, 9], np.int32)).tolist()
    assert ids[:3] == token_ids((Part(1, 3),), 100).tolist()
    assert ids[3:5] == [7, 8] and ids[7:] == [9]
    constant = token_ids(prompt, 100).tolist()
    assert constant[3:5] == [1, 1] and constant[:3] == ids[:3]


def test_negative_and_large_keys_have_texts_too() -> None:
    texts = [token_ids((Part(key, 8),), 1 << 30).tolist() for key in (-1, -2, 1 << 62, 1 << 70)]
    assert len({tuple(text) for text in texts}) == 4


def test_turns_are_this_job_and_those_after_it() -> None:
    last = Job(5, (Part(2, 1),), 1)
    first = Job(0, (Part(1, 1),), 1, then=last)
    assert list(first.turns()) == [first, last] and list(last.turns()) == [last]
