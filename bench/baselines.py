"""The ways to compute attention that are compared, and which of them this machine has."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from flexdga import DGAConfig, Plan, dga_attention, make_plan
from flexdga.block_mask import visible_blocks
from flexdga.cost_model import dense_below

from .workloads import QKV

DGA = "DGA"
DISPATCHED = "dispatched"
"""`dga_attention` where it picks by itself, dense attention or DGA."""
MATH_LIMIT = 2**28
"""Bytes of a float32 score matrix above which SDPA's math backend is left out."""

_SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA eff.": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}


@dataclasses.dataclass(frozen=True)
class Bound:
    """A method on its inputs, ready to be called and timed.

    `computed` is the score entries in the blocks that it visits over those of dense causal
    attention, L(L+1)/2; a function, because finding out may run the planner.
    """

    call: Callable[[], Tensor]
    computed: Callable[[], float] = lambda: 1.0
    plan: Callable[[], object] | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to compute causal attention.

    Attributes:
        name: in tables.
        bind: everything that stays outside of the time.
        refuses: why it is left out for these inputs, or None.
    """

    name: str
    bind: Callable[[QKV], Bound]
    refuses: Callable[[QKV], str | None] = lambda _: None

    @property
    def is_sdpa(self) -> bool:
        """Whether it counts for the best SDPA backend."""
        return self.name in _SDPA


def reference(x: QKV) -> Tensor:
    """Dense causal attention in float32, which errors are measured against."""
    q, k, v = x.query.float(), x.key.float(), x.value.float()
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=x.scale, enable_gqa=x.grouped
    )


def methods(
    config: DGAConfig, called: DGAConfig, sample: QKV
) -> tuple[list[Method], dict[str, str]]:
    """What can run on `sample`'s device, dtype and heads, tried on it, and why the rest cannot.

    Args:
        config: of DGA.
        called: of `dga_attention` where it picks by itself.
        sample: should be short: what this machine may lack runs on it once.
    """
    present, missing = [], {}
    device = sample.query.device
    for method in [*(_sdpa(name) for name in _SDPA), *_optional(device)]:
        reason = _trial(method, sample)
        if reason is None:
            present.append(method)
        else:
            missing[method.name] = f"not here on {device.type}: {reason}"
    if device.type != "cuda":
        missing |= {"flash-attn": "needs CUDA", "flex flash": "needs CUDA"}
    ours = [
        Method("flex dense", _bind_flex),
        Method(DGA, lambda x: _bind_dga(x, config)),
        Method(DISPATCHED, lambda x: dataclasses.replace(_bind_dga(x, called), plan=None)),
    ]
    return [*present, *ours], missing


def _trial(method: Method, sample: QKV) -> str | None:
    """Why the method does not run, in a few words, or None."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        try:
            method.bind(sample).call()
        except Exception as error:  # each backend has its own ways to say no
            said = [str(note.message) for note in notes] or [str(error) or type(error).__name__]
            return said[-1].strip().splitlines()[0].partition(". ")[0][:120]
    return None


def _sdpa(name: str) -> Method:
    backend = _SDPA[name]

    def bind(x: QKV) -> Bound:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    x.query, x.key, x.value, is_causal=True, scale=x.scale, enable_gqa=x.grouped
                )

        return Bound(call)

    def refuses(x: QKV) -> str | None:
        size = 4 * x.query.shape[0] * x.query.shape[1] * x.length**2
        if backend is not SDPBackend.MATH or size <= MATH_LIMIT:
            return None
        return f"{size >> 20} MiB of scores, more than {MATH_LIMIT >> 20} MiB"

    return Method(name, bind, refuses=refuses)


def _optional(device: torch.device) -> list[Method]:
    """Methods that only CUDA has."""
    if device.type != "cuda":
        return []
    return [
        Method("flash-attn", _bind_flash_attn),
        Method("flex flash", lambda x: _bind_flex(x, {"BACKEND": "FLASH"})),
    ]


def _bind_flash_attn(x: QKV) -> Bound:
    from flash_attn import flash_attn_func

    q, k, v = (t.transpose(1, 2).contiguous() for t in (x.query, x.key, x.value))
    return Bound(
        lambda: flash_attn_func(q, k, v, softmax_scale=x.scale, causal=True).transpose(1, 2)
    )


_flex = torch.compile(flex_attention)


def _causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def _bind_flex(x: QKV, kernel_options: dict[str, Any] | None = None) -> Bound:
    # Not DGA: the baseline's mask is made once, outside of the time.
    mask = create_block_mask(_causal, None, None, x.length, x.length, device=x.query.device.type)

    def call() -> Tensor:
        out = _flex(
            x.query,
            x.key,
            x.value,
            block_mask=mask,
            scale=x.scale,
            enable_gqa=x.grouped,
            kernel_options=kernel_options,  # type: ignore[arg-type]
        )
        assert isinstance(out, Tensor)
        return out

    return Bound(call, lambda: _share(_mask_blocks(mask), mask.BLOCK_SIZE, x.length))


def _mask_blocks(mask: BlockMask) -> float:
    full = mask.full_kv_num_blocks
    return mask.kv_num_blocks.sum().item() + (0 if full is None else full.sum().item())


def _bind_dga(x: QKV, config: DGAConfig) -> Bound:
    # Tensor objects of its own: it marks their lengths as dynamic, and Dynamo would compile the
    # other methods anew for tensors marked so.
    q, k, v = x.query.detach(), x.key.detach(), x.value.detach()

    def call() -> Tensor:
        return dga_attention(q, k, v, config=config, scale=x.scale)

    def plan() -> Plan:
        return make_plan(q, k, v, config=config, scale=x.scale)

    def computed() -> float:
        made = plan()
        part, whole = visible_blocks(made, config.block_size)
        blocks = (part | whole).sum().item() / (part.shape[0] * part.shape[1])
        return _share(blocks, config.block_size, x.length)

    if x.length < dense_below(config, q, k):  # exact dense attention: no plan
        return Bound(call)
    return Bound(call, computed, plan)


def _share(blocks: float, block_size: tuple[int, ...], length: int) -> float:
    """Entries in so many blocks of a head, over L(L+1)/2."""
    return blocks * block_size[0] * block_size[1] / (length * (length + 1) / 2)
