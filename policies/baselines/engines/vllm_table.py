"""vLLM 0.32.0's number of draft tokens by batch size (``num_speculative_tokens_per_batch_size``).

Source: ``v1/spec_decode/dynamic/utils.py``, and ``docs/features/speculative_decoding/dynamic_speculative_decoding.md``.

The table is a list of (first size, last size, K), both ends included. A gap between two entries, and what lies behind
the last one, take the K before it. No K goes above ``num_speculative_tokens``. vLLM ships no table; the default here is
the one that its documentation shows for EAGLE 3. The size of a batch is read from the level's name, where it is rounded
up to a power of two.
"""

from __future__ import annotations

from typing import ClassVar

from policies.base import MAX_GAMMA, Context, Decision, Policy, PolicyError
from policies.level_features import batch_size

#: First size, last size, K, one after another.
TABLE = (1, 16, 5, 17, 32, 4, 33, 64, 3, 65, 128, 1, 129, 512, 0)


class VllmTable(Policy):
    """As many tokens as the table says for the size of the batch.

    Parameters
    ----------
    table : tuple of int
        First size, last size and K of each range, one after another: ``1/4/5/5/64/2``.
    most : int
        ``num_speculative_tokens``, an upper bound of every K; 0 for the table's largest.
    """

    summary = "vLLM's table: number of draft tokens by batch size"
    positional: ClassVar[str] = "table"

    def __init__(self, *, table: tuple[int, ...] = TABLE, most: int = 0, seed: int = 0, worker: int = 0) -> None:
        super().__init__(seed=seed, worker=worker)
        if not table or len(table) % 3:
            raise PolicyError(f"table must hold three numbers per range (first size, last size, K), got {table}")
        ranges = sorted(zip(*(iter(table),) * 3, strict=True))
        end = 0
        for first, last, k in ranges:
            if not end < first <= last:
                raise PolicyError(f"the sizes {first} to {last} must rise, from 1 on, and overlap with no other range")
            if not 0 <= k <= MAX_GAMMA:
                raise PolicyError(f"every K must be from 0 to {MAX_GAMMA}, got {k} for sizes {first} to {last}")
            end = last
        if ranges[0][0] != 1:
            raise PolicyError(f"the first range must start at size 1, got {ranges[0][0]}")
        largest = max(k for _, _, k in ranges)
        if not 0 <= most <= MAX_GAMMA:
            raise PolicyError(f"most must be from 0 to {MAX_GAMMA}, got {most}")
        self.ranges, self.most = ranges, most or largest

    def tokens(self, size: int) -> int:
        """K of a batch size."""
        return min(next(k for first, _, k in reversed(self.ranges) if first <= size), self.most)

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), min(self.tokens(batch_size(context.level)), context.max_gamma))
