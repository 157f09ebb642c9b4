"""How a sequence is cut over ranks, and the way there and back."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from flexdga.config import BY_LANDMARKS, DGAConfig
from flexdga.handover import lookahead
from flexdga.parallel.collectives import all_gather
from flexdga.parallel.failures import watched


class Shards:
    """A sequence cut into chunks of whole units, and the chunks of each rank.

    Balanced, there are two chunks for each rank, an early one and a late one, so that queries with
    a short and with a long past come together (as in torch's own context parallel):

        chunk   0  1  2  3  4  5  6  7
        rank    0  1  2  3  3  2  1  0

    Otherwise there is one, and ranks stand in the order of the sequence. A length that does not
    divide is filled with padding behind the last token, inside: all shards are equally long.

    Args:
        length: L, the tokens of the whole sequence, the same on every rank.
        mesh: a mesh of one dimension (of a larger one `mesh["name"]`), or a process group.
        config: of the attention; several where layers differ.
        balanced: whether each rank gets an early and a late chunk.

    Attributes:
        rank, world: of this process in the group.
        count: C, chunks of a rank.
        size: tokens of a chunk.
        numbers: this rank's chunks, in the order in which it holds them.
        local_length: C·size, tokens of a shard.

    Raises:
        ValueError: the length is not positive, or the mesh has several dimensions.
        TypeError: an argument is of the wrong type.
    """

    def __init__(
        self,
        length: int,
        mesh: DeviceMesh | ProcessGroup,
        config: DGAConfig | Iterable[DGAConfig] | None = None,
        *,
        balanced: bool = True,
    ) -> None:
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"length: expected an int, got {length!r}")
        if length < 1:
            raise ValueError(f"length: expected at least 1, got {length}")
        if config is None:
            config = BY_LANDMARKS
        configs = [config] if isinstance(config, DGAConfig) else list(config)
        for one in configs:
            if not isinstance(one, DGAConfig):
                raise TypeError(f"config: expected a DGAConfig, got {type(one).__name__}")
        self.group = group_of(mesh)
        self.length, self.balanced = length, balanced
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.count = 2 if balanced else 1
        self.size = chunk_size(length, self.world * self.count, configs)
        self.numbers = self.numbers_of(self.rank)
        self.local_length = self.count * self.size
        self.agreed: set[str] = set()

    @property
    def total(self) -> int:
        """Tokens of all shards, padding included."""
        return self.world * self.local_length

    def numbers_of(self, rank: int) -> tuple[int, ...]:
        """The chunks of a rank, in the order in which it holds them."""
        last = 2 * self.world - 1
        return (rank, last - rank) if self.balanced else (rank,)

    def owner(self, number: int) -> int:
        """The rank that holds a chunk."""
        return min(number, 2 * self.world - 1 - number) if self.balanced else number

    def order(self) -> list[int]:
        """Of all ranks' chunks one after the other, where each chunk of the sequence stands."""
        held = [number for rank in range(self.world) for number in self.numbers_of(rank)]
        return sorted(range(len(held)), key=held.__getitem__)

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """(local_length,) int64: where this rank's tokens stand; padding is at `length` or later.

        They are what `position_ids` have to be.
        """
        inside = torch.arange(self.size, device=device)
        return torch.cat([number * self.size + inside for number in self.numbers])

    def shard(self, x: Tensor, dim: int, fill: float = 0) -> Tensor:
        """Of a whole tensor, which has L entries along `dim`, the part of this rank.

        Raises:
            ValueError: it has not.
        """
        if x.shape[dim] != self.length:
            raise ValueError(
                f"x: expected {self.length} entries along dimension {dim}, got {tuple(x.shape)}"
            )
        parts = []
        for number in self.numbers:
            first = min(number * self.size, self.length)
            after = min(first + self.size, self.length)
            part = x.narrow(dim, first, after - first)
            missing = list(part.shape)
            missing[dim] = self.size - (after - first)
            parts += [part, part.new_full(missing, fill)]
        return torch.cat(parts, dim)

    def unshard(self, x: Tensor, dim: int) -> Tensor:
        """The whole tensor, on every rank, from a shard of each; without gradient.

        Raises:
            ValueError: it is no shard.
            RankError: a rank does not answer.
        """
        if x.shape[dim] != self.local_length:
            raise ValueError(
                f"x: expected a shard of {self.local_length} entries along dimension {dim}, got "
                f"{tuple(x.shape)}"
            )
        with watched(self.group, "flexdga, unshard"):
            chunks = x.detach().movedim(dim, 0).unflatten(0, (self.count, self.size))
            chunks = funcol.wait_tensor(self.gathered(chunks, "unshard"))
        return chunks.flatten(0, 1)[: self.length].movedim(0, dim)

    def gathered(self, x: Tensor, what: str) -> Tensor:
        """Every rank's (C, ...), one entry for each of its chunks: all of them, in order."""
        return self.ordered(all_gather(x, self.group, what))

    def ordered(self, every: Tensor) -> Tensor:
        """Every rank's chunks (world·C, ...) in the order of the sequence."""
        order = self.order()
        return every if order == sorted(order) else every[order]

    def describe(self) -> str:
        """The picture of which rank holds which chunk."""
        width = len(str(self.world * self.count - 1)) + 2
        numbers = range(self.world * self.count)
        return "\n".join(
            [
                f"{self.length} tokens, chunks of {self.size}",
                "chunk " + "".join(f"{n:>{width}}" for n in numbers),
                "rank  " + "".join(f"{self.owner(n):>{width}}" for n in numbers),
            ]
        )


def chunk_size(length: int, chunks: int, configs: list[DGAConfig]) -> int:
    """Tokens of a chunk: whole units, and no fewer than its neighbours need of it."""
    step = math.lcm(*(whole_step(one) for one in configs))
    reach = max(max(before(one), beyond(one)) for one in configs)
    # At least two steps: compilers take a size of one for a constant.
    least = max(-(-length // chunks), reach, 2 * step)
    return -(-least // step) * step


def whole_step(config: DGAConfig) -> int:
    """Chunks begin at a multiple of this: a step of the plan, and a unit."""
    return math.lcm(config.step, config.unit_size)


def before(config: DGAConfig) -> int:
    """Raw tokens before a chunk that its queries may see, or that estimates compare with."""
    units = -(-max(config.window - 1, 0) // config.unit_size) * config.unit_size
    if config.opens:
        units = max(units, config.window + config.block_size[1])
    step = whole_step(config)
    return -(-units // step) * step


def beyond(config: DGAConfig) -> int:
    """Tokens after a chunk that help to decide on its own."""
    if not config.needs_importance or config.scope == "prompt":
        return 0
    step = whole_step(config)
    return -(-lookahead(config) // step) * step


def group_of(mesh: DeviceMesh | ProcessGroup) -> ProcessGroup:
    """The process group of a mesh of one dimension.

    Raises:
        ValueError: it has several.
        TypeError: it is something else.
    """
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(
                f"mesh: expected one dimension (mesh['name'] of several), got {mesh.ndim}: "
                f"{mesh.mesh_dim_names}"
            )
        return mesh.get_group()
    if not isinstance(mesh, ProcessGroup):
        raise TypeError(f"mesh: expected a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}")
    return mesh


def padded_to(x: Tensor, total: int, value: int) -> Tensor:
    """(B, L) filled up behind to (B, total)."""
    return F.pad(x, (0, total - x.shape[1]), value=value)
