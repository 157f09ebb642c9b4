"""`Plan`: which slots exist, and which queries see them. Tensors only."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from rich.console import RenderableType

NEVER = 2**31 - 1
"""The `start` of a slot that no query sees (its `end` is 0)."""


class Documents(NamedTuple):
    """Where each token's document lies. Padding has `first = NEVER` and `after = 0`.

    Attributes:
        first: (B, L) int32, the document's first token.
        after: (B, L) int32, the first token after it.
        packed: whether a row may hold several documents.
    """

    first: Tensor
    after: Tensor
    packed: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """The slots of one attention call, and the interval of queries that sees each.

    Slots stand in three sections, one after the other: `raw` (the L tokens), `focal` (copies of
    the focal tokens) and `group` (one per group). Query q sees slot s of its KV head if
    `start[b, h, s] <= q < end[b, h, s]`. A slot that stands for nothing has `start = NEVER` and
    `end = 0`; such slots also fill sections up to the kernel's key block.

    Plans are pytrees: they can be returned from compiled functions, saved with `torch.save`, and
    used again for another layer of the same shape.

    Attributes:
        start: (B, Hkv, S) int32, first query that sees the slot.
        end: (B, Hkv, S) int32, first query after it that does not.
        position: (B, Hkv, S) int32, where the slot stands in the sequence: a token's own
            position, or the mean of the group's (rounded down). Score mods read it.
        focal: (B, Hkv, F) int32, the token that each focal slot copies; -1 for none.
        members: (B, Hkv, G, m) int32, the tokens of each group; -1 for none.
        member_score: (B, Hkv, G, m) float32, their importance, where the weights need it.
        open: (B, H, query blocks, units) int32 or None, where units open: from this query of
            the block on, to the end of the block, the unit's tokens are seen raw by this query
            head, and its slots are hidden; NEVER where it stays closed.
    """

    start: Tensor
    end: Tensor
    position: Tensor
    focal: Tensor
    members: Tensor
    member_score: Tensor | None = None
    open: Tensor | None = None

    @property
    def num_slots(self) -> int:
        """S, the slots of all three sections."""
        return self.start.shape[-1]

    @property
    def length(self) -> int:
        """L, the tokens of the sequence (and the slots of the raw section)."""
        return self.num_slots - self.num_stand_ins

    @property
    def num_stand_ins(self) -> int:
        """F + G, the slots that stand in for raw tokens."""
        return self.focal.shape[-1] + self.members.shape[-2]

    def visible(self, query_index: Tensor) -> Tensor:
        """Which slots the queries see.

        Args:
            query_index: (Q,) positions of queries.

        Returns:
            (B, Hkv, Q, S) bool; with openings (B, H, Q, S), for they are those of a query head.
            Meant for inspection and tests: it grows with Q·S.
        """
        q = query_index.to(self.start).unsqueeze(-1)
        inside = (self.start.unsqueeze(-2) <= q) & (q < self.end.unsqueeze(-2))
        if self.open is None:
            return inside
        heads, blocks, units = self.open.shape[1:]
        rep = heads // self.start.shape[1]
        inside, position = (t.repeat_interleave(rep, 1) for t in (inside, self.position))
        since = self.open[:, :, query_index // (self.length // blocks)]
        home = (position // (self.length // units)).clamp(min=0).long()
        opened = since.gather(-1, home[:, :, None].expand(-1, -1, len(query_index), -1)) <= q
        # Padding sees nothing, whatever its block opens.
        real = (self.start[..., : self.length] < NEVER)[..., query_index].repeat_interleave(rep, 1)
        raw = position == torch.arange(self.num_slots, device=q.device)
        hidden = opened & (position >= 0)[:, :, None]
        return torch.where(raw[:, :, None], inside | opened, inside & ~hidden) & real[..., None]

    def queries_per_slot(self) -> Tensor:
        """(B, Hkv, S) int64: how many queries see each slot; openings apart."""
        return (self.end.long() - self.start.long()).clamp(min=0)

    def opened(self) -> Tensor:
        """(B, H) int64: score entries of open units, each computed for its whole query block."""
        if self.open is None:
            return self.start.new_zeros(self.start.shape[:2], dtype=torch.int64)
        _, _, blocks, units = self.open.shape
        tile = (self.length // blocks) * (self.length // units)
        return (self.open < NEVER).sum((-2, -1)) * tile

    def real_length(self) -> Tensor:
        """(B, Hkv) int64: tokens from the first real one to the last, padding around them apart."""
        return (self.end.amax(-1).long() - self.start.amin(-1).long()).clamp(min=0)

    def cost(self, *, is_causal: bool = True) -> float:
        """Score entries to compute, as a share of dense attention's over the same tokens.

        The slots that queries see, and of open units all entries of the blocks that open them.
        Planning is not in it.
        """
        length = self.real_length().double()
        dense = length * (length + 1) / 2 if is_causal else length**2
        seen = self.queries_per_slot().sum() / dense.sum().clamp(min=1)
        rep = self.opened().shape[1] // dense.shape[1]
        extra = self.opened().sum() / (rep * dense.sum().clamp(min=1))
        return (seen + extra).item()

    def describe(self) -> str:
        """A few lines for people: the slots by section, and what they save."""
        tokens = self.real_length().double().mean().item()
        sizes = [self.length, self.focal.shape[-1], self.members.shape[-2]]
        parts = [part.double() for part in self.queries_per_slot().split(sizes, -1)]
        alive = [part.gt(0).double().sum(-1).mean().item() for part in parts]
        seen = [part.sum(-1).mean().item() / max(tokens, 1) for part in parts]
        lines = [
            f"Plan for {tokens:.0f} tokens: batch {self.start.shape[0]}, "
            f"KV heads {self.start.shape[1]}, {self.num_slots} slots",
            "section   slots in use   seen by a query",
        ]
        lines += [
            f"{name:<9} {count:>12.0f}   {mean:>15.1f}"
            for name, count, mean in zip(("raw", "focal", "group"), alive, seen)
        ]
        if self.open is not None:
            mean = self.opened().double().mean().item() / max(tokens, 1)
            count = (self.open < NEVER).double().sum(-1).mean().item()
            lines.append(f"opened    {count:>10.1f} at a time {mean:>10.1f}")
            seen.append(mean)
        lines.append(
            f"together {sum(seen):.1f}; with dense causal attention {(tokens + 1) / 2:.1f}: "
            f"cost {self.cost():.3f}"
        )
        return "\n".join(lines)

    def draw(
        self, *, batch: int = 0, head: int = 0, width: int = 72, height: int = 24
    ) -> RenderableType:
        """Who sees what, for the terminal: print it with rich. One head of one sequence."""
        from flexdga.drawing import draw_plan

        return draw_plan(self, batch=batch, head=head, width=width, height=height)

    def save_png(self, path: str, *, batch: int = 0, head: int = 0) -> None:
        """Who sees what, as a picture. Needs matplotlib (the `plot` extra)."""
        from flexdga.drawing import save_plan_png

        save_plan_png(self, path, batch=batch, head=head)


def with_null_slot(plan: Plan) -> Plan:
    """The plan with one slot more that every query sees: an empty group, key and value 0.

    Its position is -1. Attention sinks in the score live there.
    """
    edge = plan.start[..., :1]
    score = plan.member_score
    return dataclasses.replace(
        plan,
        start=torch.cat([plan.start, torch.zeros_like(edge)], -1),
        end=torch.cat([plan.end, torch.full_like(edge, plan.length)], -1),
        position=torch.cat([plan.position, torch.full_like(edge, -1)], -1),
        members=F.pad(plan.members, (0, 0, 0, 1), value=-1),
        member_score=None if score is None else F.pad(score, (0, 0, 0, 1)),
    )


def _flatten(plan: Plan) -> tuple[list[Tensor], list[str]]:
    names = [f.name for f in dataclasses.fields(plan) if getattr(plan, f.name) is not None]
    return [getattr(plan, name) for name in names], names


torch.utils._pytree.register_pytree_node(
    Plan,
    _flatten,
    lambda values, names: Plan(**dict(zip(names, values))),
    serialized_type_name="flexdga.Plan",
)
torch.serialization.add_safe_globals([Plan])
