"""flexdga: Dynamic Group Attention for PyTorch, inside the compiler.

`wrap` puts it into a model; `dga_attention` takes the place of scaled_dot_product_attention over
long sequences, and `DGACache` that of a decode cache. `DGAConfig` says how; `make_plan` makes a
plan alone; `DGAttention` is a whole attention layer. `export` takes a model out of Python.
"""

import sys
from typing import TYPE_CHECKING, Any

from flexdga.attention import dga_attention, make_plan
from flexdga.config import DGAConfig
from flexdga.lowering import lower
from flexdga.module import DGAttention
from flexdga.packaging import export, load
from flexdga.plan import Plan
from flexdga.wrap import applied, report, unwrap, wrap

if TYPE_CHECKING:
    from flexdga.cache import DGACache, dga_decode

__version__ = "0.1.0"
__all__ = [
    "DGACache",
    "DGAConfig",
    "DGAttention",
    "Plan",
    "applied",
    "dga_attention",
    "dga_decode",
    "export",
    "load",
    "lower",
    "make_plan",
    "report",
    "unwrap",
    "wrap",
]

if sys.modules.get("transformers") is not None:
    import flexdga.huggingface  # noqa: F401  (registers the attention implementation)


def __getattr__(name: str) -> Any:
    """The cache imports transformers where it is installed: only for those who ask for it."""
    if name in ("DGACache", "dga_decode"):
        from flexdga import cache

        return getattr(cache, name)
    raise AttributeError(f"module 'flexdga' has no attribute {name!r}")
