"""Focal tokens of a whole prompt, chosen as in one process.

Each rank weighs its own tokens by the probes of all; maxima and sums of the softmax are reduced.
Then a number or two for each token and KV head are gathered, and every rank ranks all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor

from flexdga.config import DGAConfig
from flexdga.focal import focal_capacity, focal_of_prompt
from flexdga.importance import (
    attention_weights,
    over_heads,
    over_neighbours,
    over_probes,
    probe_positions,
)
from flexdga.indexing import take_rows
from flexdga.parallel.collectives import all_reduce
from flexdga.parallel.shards import Shards
from flexdga.plan import Documents

SOME = 16
"""Focal slots of chunks are made for whole multiples of so many."""


class WholeFocal(NamedTuple):
    """Of all tokens of a sequence with its padding.

    Attributes:
        chosen: (B, Hkv, total) bool.
        score: (B, Hkv, total) float32 importance.
    """

    chosen: Tensor
    score: Tensor

    def around(self, shards: Shards, head: int) -> tuple[Tensor, Tensor]:
        """Both for this rank's chunks with what stands before them, (C·B, Hkv, head + n)."""
        padded = [F.pad(t, (head, 0)) for t in self]
        cut = [slice(n * shards.size, (n + 1) * shards.size + head) for n in shards.numbers]
        chosen, score = (torch.cat([t[..., part] for part in cut]) for t in padded)
        return chosen, score

    def slots(self, shards: Shards, head: int) -> int:
        """Focal slots that hold what any chunk, with what stands before it, has of them."""
        counts = F.pad(self.chosen, (head, 0)).cumsum(-1)
        counts = F.pad(counts, (1, 0))
        span = head + shards.size
        begin = torch.arange(0, shards.total, shards.size, device=counts.device)
        most = int((counts[..., begin + span] - counts[..., begin]).amax())
        return -(-max(most, 1) // SOME) * SOME


@torch.no_grad()
def whole_focal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    docs: Documents,
    shards: Shards,
    config: DGAConfig,
    scale: float,
) -> WholeFocal:
    """The focal tokens of the whole sequence, on every rank.

    Args:
        query: (B, H, C·n, D), this rank's.
        key: (B, Hkv, C·n, D).
        value: (B, Hkv, C·n, Dv).
        docs: of the whole sequence.
        shards: how it is cut.
        config: the choices.
        scale: of the scores.
    """
    # As long as it is planned in one process: means over neighbours end where it ends.
    length = -(-shards.length // config.step) * config.step
    first, after = docs.first[:, :length], docs.after[:, :length]
    at = shards.positions(query.device).to(torch.int32)
    probe_BP, real_BP = probe_positions(after, config)
    here = at == probe_BP[..., None]  # (B, P, C·n)
    index = here.int().argmax(-1)[:, None].expand(-1, query.shape[1], -1)
    mine = take_rows(query, index).masked_fill(~here.any(-1)[:, None, :, None], 0)
    probes = all_reduce(mine, "sum", shards.group, "probes")
    q_BGXD = probes.view(key.shape[0], key.shape[1], -1, key.shape[-1])  # X = R·P
    score = (q_BGXD @ key.mT).unflatten(2, (-1, config.probes)).float() * scale

    start, stop = first.gather(1, probe_BP.long()), after.gather(1, probe_BP.long())
    far = at - probe_BP[..., None]
    seen = (at >= start[..., None]) & (at < stop[..., None]) & real_BP[..., None] & (far <= 0)

    def total(x: Tensor) -> Tensor:
        return all_reduce(x.sum(-1), "sum", shards.group, "importance")

    def highest(x: Tensor) -> Tensor:
        return all_reduce(x.amax(-1), "max", shards.group, "importance")

    weight = attention_weights(score, seen[:, None, None], total, highest)
    beyond = seen & (-far >= config.window)
    own = over_probes(over_heads(weight, config), seen[:, None], beyond[:, None], config)
    parts = [own, value.float().norm(dim=-1)] if config.importance == "far_mean" else [own]
    every = torch.stack(parts, -1).unflatten(2, (shards.count, -1)).movedim(2, 0)
    every = funcol.wait_tensor(shards.gathered(every, "importance"))
    own, *norm = every.permute(4, 1, 2, 0, 3).flatten(3)[..., :length]
    importance = over_neighbours(own, norm[0] if norm else None, config)
    chosen = focal_of_prompt(importance, Documents(first, after, docs.packed), config, True)
    chosen = chosen & (chosen.cumsum(-1) <= focal_capacity(length // config.step, config))
    more = (0, shards.total - length)
    return WholeFocal(F.pad(chosen, more), F.pad(importance, more))
