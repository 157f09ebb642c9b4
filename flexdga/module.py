"""`DGAttention`: a whole attention layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from flexdga.attention import dga_attention
from flexdga.config import DGAConfig

Rotary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class DGAttention(nn.Module):
    """Multi-head attention with its projections, through `dga_attention`.

    Args:
        embed_dim: width of the hidden states.
        num_heads: query heads.
        num_kv_heads: key and value heads; None = as many as query heads.
        head_dim: width of a head; None = embed_dim / num_heads.
        bias: whether the projections have one.
        config: of the attention; None = `DGAConfig()`.
        is_causal: whether a query sees only the tokens up to itself.

    Raises:
        ValueError: the numbers of heads do not fit.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        config: DGAConfig | None = None,
        is_causal: bool = True,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            if value < 1:
                raise ValueError(f"{name}: expected an int ≥ 1, got {value}")
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads ({num_heads}), got {num_kv_heads}"
            )
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"embed_dim: expected a multiple of num_heads ({num_heads}) when head_dim is not "
                f"given, got {embed_dim}"
            )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.config = config if config is not None else DGAConfig()
        self.is_causal = is_causal
        kv_dim = num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(embed_dim, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, kv_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, kv_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, embed_dim, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        rotary: Rotary | None = None,
        document_ids: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            hidden_states: (B, L, embed_dim).
            rotary: takes query (B, H, L, D) and key (B, Hkv, L, D), returns them rotated. Groups
                pool rotated keys (as the paper's predecessor does).
            document_ids: as in `dga_attention`.
            lengths: as in `dga_attention`.

        Returns:
            (B, L, embed_dim).
        """
        if hidden_states.dim() != 3:
            raise ValueError(
                f"hidden_states: expected 3 dimensions (B, L, embed_dim), got "
                f"{tuple(hidden_states.shape)}"
            )
        query, key, value = (
            proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotary is not None:
            query, key = rotary(query, key)
        out: Tensor = dga_attention(
            query, key, value, config=self.config, is_causal=self.is_causal,
            document_ids=document_ids, lengths=lengths,
        )  # fmt: skip
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        """The choices that the projections do not show."""
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, {self.config}"
