"""Score mods for any flex_attention call, and for flexdga, which hands them token positions.

Each function returns a `score_mod(score, b, h, q_idx, kv_idx)`. They depend on torch only.
"""

from score_mods.mods import (
    ScoreMod,
    alibi,
    attention_sinks,
    compose,
    group_mass,
    is_elementwise,
    needs_null_slot,
    relative_bias,
    softcap,
)

__all__ = [
    "ScoreMod",
    "alibi",
    "attention_sinks",
    "compose",
    "group_mass",
    "is_elementwise",
    "needs_null_slot",
    "relative_bias",
    "softcap",
]
