"""The code that Inductor generates for CUDA, run on the CPU by Triton's interpreter.

`python interpreted.py SHIM backward|forward`: compiles one call of `dga_attention` for a pretended
H100, runs what comes of it on real numbers, and prints errors against the float64 oracle as JSON.

Tensors of the pretended device have no data. Each gets a twin on the CPU, by its storage: kernels
are interpreted on the twins, and what ATen computes between them is computed on the twins too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

from flexdga_bench import cuda_pretend

cuda_pretend.load_shim(sys.argv[1])  # before torch
cuda_pretend.pretend(cuda_pretend.ARCHITECTURES["sm_90"], lambda tuner: None)  # before Inductor

import torch
import triton.language as tl
from torch import Tensor
from torch._inductor.output_code import CompiledFxGraph
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_heuristics import CachingAutotuner, GridExpr
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from flexdga import DGAConfig, Plan, dga_attention, make_plan, reference

LENGTH, HEADS, KV_HEADS, HEAD_DIM = 224, 3, 1, 64
"""No multiple of 128 tokens: the last blocks of the mask's tables are cut off."""
CONFIG = DGAConfig(
    scope="causal", dense_below=0, window=40, rest="group", group_size=8, group_bias="mass",
    open_mass=0.2,
)  # fmt: skip


class Twins:
    """What the tensors of the pretended device hold."""

    def __init__(self) -> None:
        self._bytes: dict[
            int, tuple[Any, Tensor]
        ] = {}  # the storage is kept: its number is its own

    def knows(self, fake: Tensor) -> bool:
        return fake.untyped_storage()._cdata in self._bytes

    def of(self, fake: Tensor) -> Tensor:
        """The twin; where nothing was written yet, NaN."""
        storage = fake.untyped_storage()
        with _disable_current_modes():
            if not self.knows(fake):
                room = torch.full((int(storage.nbytes()) + 16 & ~15,), 255, dtype=torch.uint8)
                self._bytes[storage._cdata] = (storage, room)
            held = self._bytes[storage._cdata][1].view(fake.dtype)
            return held.as_strided(fake.shape, fake.stride(), fake.storage_offset())

    def put(self, fake: Tensor, numbers: Tensor) -> None:
        with _disable_current_modes():
            self.of(fake).copy_(numbers)

    def on_device(self, real: Tensor) -> Tensor:
        """A tensor of the pretended device with these numbers."""
        fake = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="cuda")
        self.put(fake, real)
        return fake


class Mirror(TorchDispatchMode):
    """Does to the twins what is done to the tensors."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = [
            twins.knows(t) for t in tree_flatten((args, kwargs))[0] if isinstance(t, FakeTensor)
        ]
        out = function(*args, **kwargs)
        if known and "empty" not in function.__name__:
            with _disable_current_modes():
                made = function(*tree_map(self.real, args), **tree_map(self.real, kwargs))
            for fake, real in zip(tree_flatten(out)[0], tree_flatten(made)[0]):
                if isinstance(fake, FakeTensor) and not twins.knows(fake):
                    twins.put(fake, real)
        return out

    @staticmethod
    def real(x: Any) -> Any:
        if isinstance(x, FakeTensor):
            return twins.of(x)
        return torch.device("cpu") if isinstance(x, torch.device) else x


twins = Twins()
launched: list[str] = []


def interpret(self: CachingAutotuner, *args: Any, stream: Any = None, **_: Any) -> None:
    """In place of a launch."""
    settings = {**self.triton_meta["constants"], **self.configs[0].kwargs}
    names = [name for name in self.fn.arg_names if name not in settings]
    given = dict(zip([*names, *self.inductor_meta.get("extra_launcher_args", ())], args))
    numbers = {name: x for name, x in given.items() if isinstance(x, int)}
    size = GridExpr.from_meta(self.inductor_meta, settings).eval_slow(numbers)
    real = {n: twins.of(x) if isinstance(x, Tensor) else x for n, x in given.items() if n in names}
    with _disable_current_modes():
        self.fn[size](**real, **settings)
    launched.append(self.fn.__name__)


class Libdevice:
    """NVIDIA's functions, which the interpreter has not, in Triton's own words."""

    exp = staticmethod(lambda x: tl.exp(x))
    log = staticmethod(lambda x: tl.log(x))
    isnan = staticmethod(lambda x: x != x)


def install() -> None:
    helpers: Any = triton_helpers
    helpers.libdevice = Libdevice
    tuner: Any = CachingAutotuner
    tuner.precompile, tuner.run = (lambda *args, **kwargs: None), interpret
    stock = CompiledFxGraph.__call__

    def call(self: Any, inputs: Any) -> Any:
        with Mirror():
            return stock(self, inputs)

    CompiledFxGraph.__call__ = call


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def main(backward: bool) -> None:
    torch.manual_seed(0)
    query, key, value, direction = (
        torch.randn(1, heads, LENGTH, HEAD_DIM).half()
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    slope = torch.rand(HEADS)
    torch.compiler.set_stance("force_eager")
    plan = make_plan(query, key, value, config=CONFIG)
    torch.compiler.set_stance("default")

    install()
    got = on_pretended_device((query, key, value, slope), direction, plan, backward)
    errors = {}
    for name, other in (("right", plan), ("late", late(plan)), ("shut", shut(plan))):
        want = oracle((query, key, value, slope), direction, other, backward)
        errors[name] = {k: relative_error(twins.of(got[k]), want[k]) for k in want}
    print(json.dumps({"errors": errors, "launched": launched}))


def on_pretended_device(inputs, direction, plan, backward) -> dict[str, Tensor]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [twins.on_device(t).requires_grad_(backward) for t in inputs]
        planned = torch.utils._pytree.tree_map(twins.on_device, plan)
        slope = fakes[3]

        def score_mod(score, b, h, q, k):
            return score + slope[h] * 0.01 * (k - q)

        with torch.set_grad_enabled(backward):
            out = dga_attention(*fakes[:3], config=CONFIG, plan=planned, score_mod=score_mod)
            if not backward:
                return {"out": out}
            grads = torch.autograd.grad(out, fakes, twins.on_device(direction))
    return {"out": out, "query": grads[0], "key": grads[1], "value": grads[2], "slope": grads[3]}


def oracle(inputs, direction, plan, backward) -> dict[str, Tensor]:
    query, key, value, slope = (t.double().requires_grad_(backward) for t in inputs)

    def score_mod(score, b, h, q, k):
        return score + slope[h] * 0.01 * (k - q)

    out = reference.attend(query, key, value, plan, group_bias="mass", score_mod=score_mod)
    if not backward:
        return {"out": out}
    grads = torch.autograd.grad(out, (query, key, value, slope), direction.double())
    return {"out": out.detach(), **dict(zip(("query", "key", "value", "slope"), grads))}


def late(plan: Plan) -> Plan:
    """What stands for old tokens is seen one query later than it should be."""
    raw = torch.arange(plan.num_slots) < plan.length
    alive = plan.start < plan.end
    start = torch.where(alive & ~raw & (plan.start + 1 < plan.end), plan.start + 1, plan.start)
    end = torch.where(alive & raw & (plan.end < LENGTH), plan.end + 1, plan.end)
    return dataclasses.replace(plan, start=start, end=end)


def shut(plan: Plan) -> Plan:
    """Units open one query later than they should."""
    assert plan.open is not None
    return dataclasses.replace(plan, open=torch.where(plan.open < LENGTH, plan.open + 1, plan.open))


if __name__ == "__main__":
    main(backward=sys.argv[2] == "backward")
