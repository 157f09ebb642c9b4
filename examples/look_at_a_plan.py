"""Plan a sequence, and look at who sees what: in the terminal, and as plan.png if asked.

python examples/look_at_a_plan.py [plan.png]
"""

import sys

import torch
from rich import print

from flexdga import DGAConfig, make_plan


def main() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 4096, 64) for heads in (8, 2, 2))
    plan = make_plan(query, key, value, config=DGAConfig())
    print(plan.describe())
    print(plan.draw())
    if len(sys.argv) > 1:
        plan.save_png(sys.argv[1])


if __name__ == "__main__":
    main()
