"""A transformer layer with Dynamic Group Attention over packed documents.

python examples/layer.py
"""

import torch

from flexdga import DGAConfig, DGAttention


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    layer = DGAttention(512, num_heads=8, num_kv_heads=2, config=DGAConfig(scope="causal"))
    hidden_states = torch.randn(1, 6400, 512)
    document_ids = (torch.arange(6400) // 4800)[None]  # a long document, and a short one
    out = layer(hidden_states, document_ids=document_ids)
    print(layer)
    print(f"{tuple(hidden_states.shape)} -> {tuple(out.shape)}, standard deviation {out.std():.3f}")


if __name__ == "__main__":
    main()
