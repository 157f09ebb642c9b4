"""Small models in the styles that people write, which know nothing of flexdga."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

VOCABULARY = 61


class NanoAttention(nn.Module):
    """As in nanoGPT, but for the function, which it imports by name."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.heads, self.width, self.dropout = heads, width, dropout

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(self.width, dim=2)
        k = k.view(b, t, self.heads, c // self.heads).transpose(1, 2)
        q = q.view(b, t, self.heads, c // self.heads).transpose(1, 2)
        v = v.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        y = scaled_dot_product_attention(
            q, k, v, attn_mask=None, dropout_p=self.dropout if self.training else 0, is_causal=True
        )
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = NanoAttention(width, heads, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """nanoGPT: learned positions, tied head."""

    def __init__(self, width=64, heads=2, layers=2, block=512, dropout=0.0) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(block, width)
        self.h = nn.ModuleList(NanoBlock(width, heads, dropout) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class FastAttention(nn.Module):
    def __init__(
        self, width: int, heads: int, kv_heads: int, length: int, enable_gqa: bool
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.enable_gqa = enable_gqa
        self.wqkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(1, kv_heads, length, self.head_dim))

    def forward(self, x: Tensor, freqs: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        b, t, _ = x.shape
        qkv = self.wqkv(x).view(b, t, -1, self.head_dim)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        q, k, v = (
            rotate(q, freqs).transpose(1, 2),
            rotate(k, freqs).transpose(1, 2),
            v.transpose(1, 2),
        )
        self.k_cache[:, :, input_pos] = k
        self.v_cache[:, :, input_pos] = v
        k, v = self.k_cache, self.v_cache
        if not self.enable_gqa:
            k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
            v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=0.0, enable_gqa=self.enable_gqa
        )
        return self.wo(y.transpose(1, 2).contiguous().view(b, t, -1))


def rotate(x: Tensor, freqs: Tensor) -> Tensor:
    cos, sin = freqs.cos()[:, None], freqs.sin()[:, None]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).type_as(x)


class FastGPT(nn.Module):
    """gpt-fast: a static cache, rotary positions, grouped queries, a mask indexed by position."""

    def __init__(
        self, width=64, heads=4, kv_heads=2, layers=2, max_length=320, enable_gqa=False
    ) -> None:
        super().__init__()
        self.tok = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(
            FastAttention(width, heads, kv_heads, max_length, enable_gqa) for _ in range(layers)
        )
        self.out = nn.Linear(width, VOCABULARY, bias=False)
        half = width // heads // 2
        angles = torch.outer(torch.arange(max_length), 100.0 ** -(torch.arange(half) / half))
        self.register_buffer("freqs", angles)
        mask = torch.tril(torch.ones(max_length, max_length, dtype=torch.bool))
        self.register_buffer("causal_mask", mask)

    def forward(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        mask = self.causal_mask[None, None, input_pos]
        x = self.tok(idx)
        for layer in self.layers:
            x = x + layer(x, self.freqs[input_pos], mask, input_pos)
        return self.out(x)

    def run(self, idx: Tensor, prompt: int) -> Tensor:
        """Prefill, then one token at a time; the logits of all."""
        out = [self(idx[:, :prompt], torch.arange(prompt))]
        for i in range(prompt, idx.shape[1]):
            out.append(self(idx[:, i : i + 1], torch.tensor([i])))
        return torch.cat(out, 1)


class Encoder(nn.Module):
    """nn.TransformerEncoder, with a causal mask or in both directions."""

    def __init__(self, width=64, heads=2, layers=2, causal=True, dropout=0.0) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout, batch_first=True)
        self.tok = nn.Embedding(VOCABULARY, width)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.causal = causal

    def forward(self, idx: Tensor, padding: Tensor | None = None) -> Tensor:
        mask = None
        if self.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(idx.shape[1])
            # Masks of one kind: the function wants both boolean, or both to be added.
            padding = (
                None if padding is None else torch.zeros(idx.shape).masked_fill(padding, -torch.inf)
            )
        return self.encoder(self.tok(idx), mask=mask, src_key_padding_mask=padding)
