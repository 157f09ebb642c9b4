"""What users may hand in, checked before any work is done."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from flexdga.config import DGAConfig
from flexdga.plan import Plan
from flexdga.storage import Columns

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8)


def check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: DGAConfig,
    is_causal: bool,
    scale: float | None,
    score_mod: Any,
    document_ids: Tensor | None,
    lengths: Tensor | None,
) -> None:
    """Raise ValueError or TypeError naming the argument, what came and what was expected."""
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions (B, H, L, D), got {_shape(tensor)}")
        exact = tensor.dtype == torch.float64 and tensor.device.type == "cpu"
        if tensor.dtype not in DTYPES and not exact:
            raise TypeError(
                f"{name}: expected float32, bfloat16, float16, or on CPU float64, got "
                f"{tensor.dtype}"
            )
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: expected {query.dtype} like the query, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: expected device {query.device}, got {tensor.device}")
    batch, heads, length, head_dim = query.shape
    if key.shape[0] != batch or key.shape[2:] != query.shape[2:]:
        raise ValueError(
            f"key: expected ({batch}, Hkv, {length}, {head_dim}) to fit the query's "
            f"{_shape(query)}, got {_shape(key)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: expected {_shape(key)[:3]} and a head_dim to fit the key, got {_shape(value)}"
        )
    for dim, size in zip(("batch", "heads", "length", "head_dim"), query.shape):
        if guard_or_false(size == 0):  # a compiler may be told that it does not know the batch
            raise ValueError(f"query: expected a {dim} of at least 1, got {_shape(query)}")
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(
            f"key: expected a number of heads that divides the query's {heads}, got {key.shape[1]}"
        )
    if value.shape[3] == 0:
        raise ValueError(f"value: expected a head_dim of at least 1, got {_shape(value)}")
    if not is_causal and config.scope == "causal":
        raise ValueError("is_causal: expected True with config.scope='causal', got False")
    if scale is not None and not (isinstance(scale, (int, float)) and abs(scale) < math.inf):
        raise ValueError(f"scale: expected a finite number or None, got {scale!r}")
    if score_mod is not None and not callable(score_mod):
        raise TypeError(f"score_mod: expected a callable, got {type(score_mod).__name__}")
    if document_ids is not None and lengths is not None:
        raise ValueError("lengths: expected either document_ids or lengths, got both")
    if document_ids is not None:
        check_documents(document_ids, (batch, length))
    if lengths is not None:
        _check_integers("lengths", lengths, (batch,))
        if not torch.compiler.is_compiling() and ((lengths < 0) | (lengths > length)).any():
            raise ValueError(f"lengths: expected 0 to {length}, got {lengths.tolist()}")


def check_documents(document_ids: Tensor, shape: tuple[int, int]) -> None:
    """Raise if these are no document ids of a (B, L) batch."""
    _check_integers("document_ids", document_ids, shape)
    if not torch.compiler.is_compiling():
        _check_order(document_ids)


def check_plan(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    config: DGAConfig,
    is_causal: bool,
    document_ids: Tensor | None,
    lengths: Tensor | None,
) -> None:
    """Raise if the plan is for another shape, or comes with what it already decides."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan, got {type(plan).__name__}")
    steps = -(-query.shape[2] // config.step)
    if not torch.compiler.is_compiling():
        steps = max(steps, 2)
    got = (*plan.start.shape[:2], plan.length)
    expected = (query.shape[0], key.shape[1], steps * config.step)
    if got != expected:
        raise ValueError(
            f"plan: expected one for (batch, KV heads, length in whole steps of "
            f"{config.step}) {expected}, got one for {got}"
        )
    if plan.start.device != query.device:
        raise ValueError(f"plan: expected device {query.device}, got {plan.start.device}")
    if config.group_weights == "importance" and plan.member_score is None:
        raise ValueError(
            "plan: group_weights='importance' needs a plan made with it, got one without "
            "member_score"
        )
    for name, given in (("document_ids", document_ids), ("lengths", lengths)):
        if given is not None:
            raise ValueError(f"{name}: the plan holds the documents; expected None, got a tensor")
    if not is_causal:
        raise ValueError("is_causal: the plan holds the causality; expected True (the default)")


def _check_integers(name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected integers, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {_shape(tensor)}")


def _check_order(ids: Tensor) -> None:
    """Real ids never decrease; padding may stand anywhere between documents."""
    highest = ids.cummax(-1).values
    wrong = (ids >= 0) & (ids < highest)
    # The same id again after padding would be a document with a hole in it.
    again = (ids[:, 1:] >= 0) & (ids[:, :-1] < 0) & (ids[:, 1:] == highest[:, :-1])
    if wrong.any() or again.any():
        row = int((wrong.any(-1) | again.any(-1)).nonzero()[0, 0])
        raise ValueError(
            "document_ids: expected ids that never decrease, each a run of neighbours, and "
            f"negative numbers for padding, got {ids[row].tolist()[:32]}… in row {row}"
        )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_step(
    query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor | None, held: Columns
) -> None:
    """The same for new tokens over a cache that holds these columns."""
    for name, tensor, like in (("key", key, held.key), ("value", value, held.value)):
        expected = (*like.shape[:2], query.shape[2], like.shape[3])
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name}: expected {expected} to fit the cache, got {tuple(tensor.shape)}"
            )
    if query.shape[0] != key.shape[0] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query: expected a batch of {key.shape[0]} and a multiple of {key.shape[1]} "
            f"heads, got {tuple(query.shape)}"
        )
    if document_ids is not None and tuple(document_ids.shape) != (query.shape[0], query.shape[2]):
        raise ValueError(
            f"document_ids: expected {(query.shape[0], query.shape[2])}, one for each new "
            f"token, got {tuple(document_ids.shape)}"
        )
