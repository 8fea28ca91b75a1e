"""Who holds which KV block: a pool of counted block ids, without the memory behind them."""

from __future__ import annotations

from array import array


class BlockManager:
    """Hands out the ids ``0 .. num_blocks - 1`` of KV blocks of ``block_size`` tokens each.

    A block counts its holders, so that sequences can share the blocks of a common prefix, and is
    free when the last one lets go. Freed blocks are used again newest first, while their memory is
    still in the CPU's caches, and memory that was never needed is never touched.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the end is handed out next

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def grow(self, table: array[int], num_tokens: int) -> bool:
        """Append blocks to ``table`` until it has room for ``num_tokens`` tokens.

        Returns False, and changes nothing, when the free blocks do not suffice.
        """
        missing = self.num_blocks_for(num_tokens) - len(table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block = self._free.pop()
            self.ref_counts[block] = 1
            table.append(block)
        return True

    def share(self, table: array[int]) -> array[int]:
        """A second table of the same blocks, each of which now has one more holder."""
        for block in table:
            self.ref_counts[block] += 1
        return table[:]

    def release(self, table: array[int]) -> None:
        """Let go of every block of ``table`` and empty it; blocks without a holder become free."""
        while table:
            block = table.pop()
            self.ref_counts[block] -= 1
            if not self.ref_counts[block]:
                self._free.append(block)
