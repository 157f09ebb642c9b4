"""Context parallelism: a sequence sharded over ranks, which exchange slots, not keys and values.

`Shards` cuts a sequence, `parallel_attention` is `dga_attention` over its shards, `ShardedCache`
goes on from there to decode, and `traffic` counts what ranks send.
"""

from flexdga.parallel.attention import parallel_attention
from flexdga.parallel.collectives import traffic
from flexdga.parallel.decoding import ShardedCache
from flexdga.parallel.failures import RankError
from flexdga.parallel.shards import Shards

__all__ = ["RankError", "ShardedCache", "Shards", "parallel_attention", "traffic"]
