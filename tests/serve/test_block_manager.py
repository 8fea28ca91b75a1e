"""The pool of KV blocks: nothing leaks, nothing is handed out twice."""

from __future__ import annotations

from array import array
from random import Random

import pytest

from qserve.serve.block_manager import BlockManager


def test_a_table_grows_to_cover_its_tokens_and_no_further() -> None:
    blocks = BlockManager(num_blocks=4, block_size=16)
    table = array("i")
    assert blocks.grow(table, 16)
    assert len(table) == 1
    assert blocks.grow(table, 17)
    assert len(table) == 2
    assert blocks.grow(table, 32)
    assert len(table) == 2
    assert blocks.num_free == 2


def test_growing_beyond_the_free_blocks_changes_nothing() -> None:
    blocks = BlockManager(num_blocks=3, block_size=4)
    table, other = array("i"), array("i")
    assert blocks.grow(table, 8)
    assert not blocks.grow(other, 8)
    assert not other
    assert blocks.num_free == 1
    assert blocks.grow(other, 4)


def test_tables_never_hold_the_same_block() -> None:
    blocks = BlockManager(num_blocks=6, block_size=2)
    first, second = array("i"), array("i")
    assert blocks.grow(first, 6)
    assert blocks.grow(second, 6)
    assert sorted([*first, *second]) == list(range(6))


def test_a_released_block_is_the_next_to_be_used() -> None:
    blocks = BlockManager(num_blocks=8, block_size=1)
    table = array("i")
    blocks.grow(table, 3)
    used = list(table)
    blocks.release(table)
    assert not table
    blocks.grow(table, 3)
    assert list(table) == used


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    blocks = BlockManager(num_blocks=4, block_size=8)
    table = array("i")
    blocks.grow(table, 16)
    shared = blocks.share(table)
    assert shared == table
    blocks.release(table)
    assert blocks.num_free == 2
    assert [blocks.ref_counts[block] for block in shared] == [1, 1]
    blocks.release(shared)
    assert blocks.num_free == 4


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (160, 10)]
)
def test_blocks_are_rounded_up(num_tokens: int, expected: int) -> None:
    assert BlockManager(16, 16).num_blocks_for(num_tokens) == expected


def test_random_growing_sharing_and_releasing_keeps_count() -> None:
    random = Random(0)
    blocks = BlockManager(num_blocks=40, block_size=4)
    tables: list[array[int]] = []
    for _ in range(5000):
        action = random.random()
        if action < 0.5 or not tables:
            table = array("i") if random.random() < 0.5 or not tables else random.choice(tables)
            before = list(table)
            grown = blocks.grow(table, (len(table) + random.randrange(5)) * 4)
            if not grown:
                assert list(table) == before
            if table and not any(table is other for other in tables):
                tables.append(table)
        elif action < 0.6:
            tables.append(blocks.share(random.choice(tables)))
        else:
            blocks.release(tables.pop(random.randrange(len(tables))))
        holders = [0] * blocks.num_blocks
        for table in tables:
            assert len(set(table)) == len(table)
            for block in table:
                holders[block] += 1
        assert holders == blocks.ref_counts
        assert blocks.num_free == holders.count(0)
