"""Blocks: sharing by content, reuse in order of age, and no confusion of look-alikes."""

from __future__ import annotations

from typing import Any, cast

import pytest

from brlite.engine.block_manager import BlockManager
from brlite.engine.request import RequestState, Sequence
from brlite.errors import EngineError

SIZE = 4


class _State:
    def __init__(self, salt: bytes) -> None:
        self.cache_root = salt


def make_sequence(token_ids: list[int], salt: bytes = b"") -> Sequence:
    state = cast(RequestState, _State(salt))
    return Sequence(0, 0, state, list(token_ids), len(token_ids), 0, cast(Any, None), None, state.cache_root)


def computed(blocks: BlockManager, token_ids: list[int], salt: bytes = b"") -> Sequence:
    seq = make_sequence(token_ids, salt)
    blocks.share(seq, blocks.match_prefix(seq))
    assert blocks.grow(seq, len(token_ids))
    seq.num_computed_tokens = len(token_ids)
    blocks.seal(seq)
    return seq


def test_growing_takes_all_the_blocks_or_none() -> None:
    blocks = BlockManager(num_blocks=2, block_size=SIZE)
    seq = make_sequence([1] * 9)

    has_grown = blocks.grow(seq, 9)

    assert not has_grown
    assert blocks.num_free == 2


def test_released_blocks_are_found_again_by_their_tokens() -> None:
    blocks = BlockManager(num_blocks=4, block_size=SIZE)
    first = computed(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    table = first.block_table
    blocks.release(first)

    matched = blocks.match_prefix(make_sequence([1, 2, 3, 4, 5, 6, 7, 8, 0]))

    assert matched == table[:2]
    assert blocks.num_free == 4


def test_a_block_is_not_found_after_another_beginning() -> None:
    blocks = BlockManager(num_blocks=4, block_size=SIZE)
    computed(blocks, [1, 2, 3, 4, 5, 6, 7, 8])

    assert blocks.match_prefix(make_sequence([5, 6, 7, 8, 9])) == []
    assert blocks.match_prefix(make_sequence([0, 0, 0, 0, 5, 6, 7, 8, 9])) == []


def test_a_digest_that_collides_does_not_match_other_tokens() -> None:
    blocks = BlockManager(num_blocks=4, block_size=SIZE)
    seq = computed(blocks, [1, 2, 3, 4, 5])
    impostor = make_sequence([9, 9, 9, 9, 5])
    impostor.block_digests = list(seq.block_digests)

    assert blocks.match_prefix(impostor) == []


def test_the_last_token_is_always_left_to_compute() -> None:
    blocks = BlockManager(num_blocks=4, block_size=SIZE)
    computed(blocks, [1, 2, 3, 4, 5, 6, 7, 8])

    assert len(blocks.match_prefix(make_sequence([1, 2, 3, 4, 5, 6, 7, 8]))) == 1


def test_salts_keep_equal_prompts_apart() -> None:
    blocks = BlockManager(num_blocks=4, block_size=SIZE)
    computed(blocks, [1, 2, 3, 4, 5], salt=b"one")

    assert blocks.match_prefix(make_sequence([1, 2, 3, 4, 5], salt=b"two")) == []


def test_the_end_of_a_prompt_is_reused_before_its_beginning() -> None:
    blocks = BlockManager(num_blocks=3, block_size=SIZE)
    first = computed(blocks, list(range(12)))
    first_block = first.block_table[0]
    blocks.release(first)

    computed(blocks, [50] * 8)

    assert blocks.match_prefix(make_sequence(list(range(12)))) == [first_block]


def test_sharing_revives_a_free_block() -> None:
    blocks = BlockManager(num_blocks=3, block_size=SIZE)
    blocks.release(computed(blocks, [1, 2, 3, 4, 5]))
    seq = make_sequence([1, 2, 3, 4, 6])
    matched = blocks.match_prefix(seq)

    missing = blocks.num_missing(matched, 5)
    blocks.share(seq, matched)

    assert missing == 2
    assert blocks.num_free == 2
    blocks.check_integrity([seq])


def test_a_lost_block_is_noticed() -> None:
    blocks = BlockManager(num_blocks=3, block_size=SIZE)
    seq = computed(blocks, [1, 2, 3, 4, 5])

    with pytest.raises(EngineError, match="counts 1 owners, but has 0"):
        blocks.check_integrity([])

    blocks.check_integrity([seq])


def test_a_second_lookup_finds_what_the_first_found_unless_a_block_was_reused() -> None:
    blocks = BlockManager(num_blocks=4, block_size=SIZE)
    blocks.release(computed(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 9]))
    seq = make_sequence([1, 2, 3, 4, 5, 6, 7, 8, 9, 9])
    first, second = blocks.match_prefix(seq), blocks.match_prefix(seq)

    blocks.grow(make_sequence([0] * 12), 12)  # takes the two empty blocks and the last one that was released

    assert first == second
    assert blocks.match_prefix(seq) == first[:1]


def test_a_second_lookup_does_not_find_the_equal_block_of_another_salt() -> None:
    blocks = BlockManager(num_blocks=1, block_size=SIZE)
    first, waiting = computed(blocks, [1, 2, 3, 4], b"a"), make_sequence([1, 2, 3, 4, 5], b"a")
    other = make_sequence([1, 2, 3, 4], b"b")  # takes the only block without a lookup, as for prompt_logprobs
    matched = blocks.match_prefix(waiting)
    blocks.release(first)
    blocks.grow(other, 4)
    other.num_computed_tokens = 4
    blocks.seal(other)

    again = blocks.match_prefix(waiting)

    assert (matched, again) == ([0], [])


def test_a_digest_that_collides_with_the_last_lookup_does_not_match_other_tokens() -> None:
    blocks = BlockManager(num_blocks=4, block_size=SIZE)
    seq = computed(blocks, [1, 2, 3, 4, 5])
    impostor = make_sequence([9, 9, 9, 9, 5])
    impostor.block_digests = list(seq.block_digests)

    assert blocks.match_prefix(seq) == seq.block_table[:1]
    assert blocks.match_prefix(impostor) == []


def test_a_fork_shares_the_full_blocks_of_its_parent_and_frees_its_own() -> None:
    blocks = BlockManager(num_blocks=6, block_size=SIZE)
    parent = computed(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    seq = computed(blocks, [1, 2, 3, 4, 0, 0, 0, 0, 0])
    seq.token_ids = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]

    blocks.fork(seq, parent)

    assert seq.block_table == parent.block_table[:2]
    assert seq.num_computed_tokens == 8
    assert blocks.num_used == 3
    blocks.check_integrity([seq, parent])
    assert computed(blocks, seq.token_ids).block_table[:2] == parent.block_table[:2]


def test_the_table_that_a_step_got_does_not_change_afterwards() -> None:
    blocks = BlockManager(num_blocks=8, block_size=SIZE)
    parent = computed(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    seq = computed(blocks, [1, 2, 3, 4, 0, 0, 0, 0, 0])
    given = [seq.block_table]
    copies = [seq.block_table.copy()]

    for change in (
        lambda: blocks.grow(seq, 14),
        lambda: blocks.fork(seq, parent),
        lambda: blocks.release(seq),
        lambda: blocks.share(seq, blocks.match_prefix(seq)),
    ):
        change()
        given.append(seq.block_table)
        copies.append(seq.block_table.copy())

    assert given == copies
    assert len({tuple(table) for table in given}) == 5
