"""A model in the style of nanoGPT, which knows nothing of flexdga, reads 16384 tokens through it.

python examples/wrap_plain_torch.py
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flexdga


class Block(nn.Module):
    """Attention and a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """As anybody writes it."""
        batch, length, width = x.shape
        q, k, v = (
            y.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for y in self.qkv(self.norm_1(x)).split(width, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """Learned positions, tied head."""

    def __init__(self, vocabulary=256, width=512, heads=8, layers=2, block=16384) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(block, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, idx: Tensor) -> Tensor:
        """Logits of the next tokens."""
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def timed(function: Callable[[], Tensor]) -> tuple[Tensor, float]:
    start = time.perf_counter()
    out = function()
    return out, time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = GPT().eval()
    idx = torch.randint(256, (1, 16384))
    model(idx[:, :1000])  # warm up
    dense, dense_s = timed(lambda: model(idx))

    flexdga.wrap(model, flexdga.DGAConfig())
    _, first_s = timed(lambda: model(idx))
    out, dga_s = timed(lambda: model(idx))
    print(flexdga.report(model))
    print(f"\ndense {dense_s:.2f} s, DGA {dga_s:.2f} s, compiling {first_s - dga_s:.0f} s, once")
    # The weights are random: what a trained model would find important, this one does not.
    print(f"relative difference of the logits {(out - dense).norm() / dense.norm():.3f}")

    flexdga.unwrap(model)
    print(f"unwrapped, it is itself again: {torch.equal(model(idx), dense)}")


if __name__ == "__main__":
    main()
