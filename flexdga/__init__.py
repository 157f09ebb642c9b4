"""flexdga: Dynamic Group Attention for PyTorch, inside the compiler.

`dga_attention` takes the place of scaled_dot_product_attention over long sequences; `DGAConfig`
says how, `make_plan` makes its plan alone, and `DGAttention` is a whole attention layer.
"""

from flexdga.attention import dga_attention, make_plan
from flexdga.config import DGAConfig
from flexdga.module import DGAttention
from flexdga.plan import Plan

__version__ = "0.1.0"
__all__ = ["DGAConfig", "DGAttention", "Plan", "dga_attention", "make_plan"]
