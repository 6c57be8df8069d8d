"""The owners of the KV cache's blocks, and the prefix cache: an index of full blocks by the tokens in them.

A cached block is a free block that keeps its hash: there is no second pool and nothing to flush. Hashes are
chained (a block's digest covers all tokens before it), 128 bits of BLAKE2b, and tokens are compared on every hit, so a
collision cannot hand one prompt the keys and values of another.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple, Protocol

from brlite.errors import EngineError

DIGEST_BYTES = 16


class BlockOwner(Protocol):
    """A sequence as the manager sees it. `token_ids` only grow; the manager sets the other fields but `cache_root`.

    A `block_table` is replaced, never changed: steps under way have it as it was.
    """

    token_ids: list[int]
    cache_root: bytes
    block_table: list[int]
    block_digests: list[bytes]
    num_sealed_blocks: int
    num_computed_tokens: int

    @property
    def num_tokens(self) -> int: ...


class Block:
    """One block: how many sequences use it and, once it is full and computed, what it holds.

    `content` is the digest of the block before (for the first block: the cache root) and the tokens, as long as the
    block is in the prefix cache.
    """

    __slots__ = ("content", "digest", "ref_count")

    def __init__(self) -> None:
        self.ref_count = 0
        self.digest: bytes | None = None
        self.content: tuple[bytes, list[int]] | None = None


class PrefixMatch(NamedTuple):
    """A chain of sealed blocks that `match_prefix` found, with what they held then and the tokens in all of them."""

    block_ids: list[int]
    digests: list[bytes]
    contents: list[tuple[bytes, list[int]] | None]
    token_ids: list[int]


class BlockManager:
    """Hands out blocks 0 to `num_blocks` - 1: first those that hold nothing, then the least recently freed."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._pack = struct.Struct(f"{block_size}i").pack  # a block's tokens; an array takes longer
        self._blocks = [Block() for _ in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._sealed: dict[bytes, int] = {}
        self._last_match = PrefixMatch([], [], [], [])

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match_prefix(self, seq: BlockOwner) -> list[int]:
        """The longest chain of sealed blocks that holds the beginning of the sequence. Takes no reference.

        At least one token is left out: a step must compute a token to get logits.
        """
        most = (seq.num_tokens - 1) // self.block_size
        # A waiting sequence is looked up in each step, and so are the completions of one prompt. Comparing lists with
        # those of the last lookup takes a tenth of the time of hashing and looking up each block.
        last = self._last_match
        num = min(len(last.digests), len(seq.block_digests), most)
        while num and last.digests[num - 1] != seq.block_digests[num - 1]:
            num -= 1
        matched, end = last.block_ids[:num], num * self.block_size
        is_unchanged = [self._blocks[block_id].content for block_id in matched] == last.contents[:num]
        if not is_unchanged or last.token_ids[:end] != seq.token_ids[:end]:
            matched = []
        parent_digest = seq.block_digests[len(matched) - 1] if matched else seq.cache_root
        for index in range(len(matched), most):
            digest = self._digest(seq, index)
            block_id = self._sealed.get(digest)
            if block_id is None or self._blocks[block_id].content != (parent_digest, self._tokens(seq, index)):
                break
            matched.append(block_id)
            parent_digest = digest
        self._last_match = PrefixMatch(
            matched,
            seq.block_digests[: len(matched)],
            [self._blocks[block_id].content for block_id in matched],
            seq.token_ids[: len(matched) * self.block_size],
        )
        return matched.copy()

    def num_missing(self, matched: list[int], num_tokens: int) -> int:
        """How many free blocks a new sequence of `num_tokens` would take, given the blocks it can share."""
        num_revived = sum(self._blocks[block_id].ref_count == 0 for block_id in matched)
        return self.num_blocks_for(num_tokens) - len(matched) + num_revived

    def share(self, seq: BlockOwner, matched: list[int]) -> None:
        """Give a sequence that owns nothing the blocks that `match_prefix` found."""
        for block_id in matched:
            self._blocks[block_id].ref_count += 1
            self._free.pop(block_id, None)
        seq.block_table = list(matched)
        seq.num_sealed_blocks = len(matched)
        seq.num_computed_tokens = len(matched) * self.block_size

    def grow(self, seq: BlockOwner, num_tokens: int) -> bool:
        """Make room for the first `num_tokens` of the sequence. If blocks are lacking, take none and return False."""
        num_new = self.num_blocks_for(num_tokens) - len(seq.block_table)
        if num_new > len(self._free):
            return False
        taken = [self._free.popitem(last=False)[0] for _ in range(num_new)]
        for block_id in taken:
            block = self._blocks[block_id]
            block.ref_count = 1
            self._forget(block)
        seq.block_table = seq.block_table + taken
        return True

    def num_spare_slots(self, seq: BlockOwner, num_reserved: int) -> int:
        """How many more tokens the sequence can get blocks for if `num_reserved` free blocks are left to others."""
        num_spare = max(0, len(self._free) - num_reserved)
        return (len(seq.block_table) + num_spare) * self.block_size - seq.num_tokens

    def seal(self, seq: BlockOwner) -> None:
        """Make the sequence's full, computed blocks findable. Of equal blocks only the first is findable."""
        for index in range(seq.num_sealed_blocks, seq.num_computed_tokens // self.block_size):
            digest = self._digest(seq, index)
            if digest not in self._sealed:
                block = self._blocks[seq.block_table[index]]
                block.digest = digest
                parent_digest = seq.block_digests[index - 1] if index else seq.cache_root
                block.content = (parent_digest, self._tokens(seq, index))
                self._sealed[digest] = seq.block_table[index]
            seq.num_sealed_blocks = index + 1

    def fork(self, seq: BlockOwner, parent: BlockOwner) -> None:
        """Replace the sequence's blocks by the parent's sealed ones. Blocks that both have stay as they are.

        Takes time linear in the blocks that differ. The caller has set the sequence's tokens: the parent's and more.
        """
        num_sealed = parent.num_sealed_blocks
        same = min(len(seq.block_table), num_sealed)
        while same and seq.block_table[same - 1] != parent.block_table[same - 1]:
            same -= 1
        for block_id in parent.block_table[same:num_sealed]:
            self._blocks[block_id].ref_count += 1
        self._drop(seq.block_table[same:])
        seq.block_table = seq.block_table[:same] + parent.block_table[same:num_sealed]
        seq.block_digests[same:] = parent.block_digests[same:num_sealed]
        seq.num_sealed_blocks = num_sealed
        seq.num_computed_tokens = num_sealed * self.block_size

    def release(self, seq: BlockOwner) -> None:
        """Free the sequence's blocks. Sealed ones stay findable until reused; its last blocks are reused first."""
        self._drop(seq.block_table)
        seq.block_table = []
        seq.num_sealed_blocks = 0
        seq.num_computed_tokens = 0

    def _drop(self, block_ids: list[int]) -> None:
        for block_id in reversed(block_ids):
            block = self._blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free[block_id] = None
                if block.digest is None:
                    self._free.move_to_end(block_id, last=False)

    def unseal(self, seq: BlockOwner) -> None:
        """Remove the sequence's blocks from the prefix cache: their contents may be wrong."""
        for block_id in seq.block_table:
            self._forget(self._blocks[block_id])

    def check_integrity(self, seqs: Iterable[BlockOwner]) -> None:
        """Raise `EngineError` unless each block is free or owned by exactly the given sequences that list it."""
        owners = Counter(block_id for seq in seqs for block_id in seq.block_table)
        for block_id, block in enumerate(self._blocks):
            if block.ref_count != owners[block_id]:
                raise EngineError(f"block {block_id} counts {block.ref_count} owners, but has {owners[block_id]}")
            if (block_id in self._free) != (block.ref_count == 0):
                raise EngineError(
                    f"block {block_id} with {block.ref_count} owners is on the wrong side of the free list"
                )
            if block.digest is not None and self._sealed.get(block.digest) != block_id:
                raise EngineError(f"block {block_id} is sealed but cannot be found")
        if len(self._sealed) != sum(block.digest is not None for block in self._blocks):
            raise EngineError("a digest leads to a block that is not sealed")

    def _forget(self, block: Block) -> None:
        if block.digest is not None:
            del self._sealed[block.digest]
            block.digest = block.content = None

    def _tokens(self, seq: BlockOwner, index: int) -> list[int]:
        return seq.token_ids[index * self.block_size : (index + 1) * self.block_size]

    def _digest(self, seq: BlockOwner, index: int) -> bytes:
        """The digest of block `index`, kept on the sequence: its tokens never change once the block is full."""
        digests = seq.block_digests
        while len(digests) <= index:
            parent = digests[-1] if digests else seq.cache_root
            tokens = self._pack(*self._tokens(seq, len(digests)))
            digests.append(blake2b(tokens, digest_size=DIGEST_BYTES, key=parent).digest())
        return digests[index]
