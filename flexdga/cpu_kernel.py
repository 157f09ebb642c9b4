"""Repairs to flex_attention's CPU kernel, for the versions of torch where they were verified.

1. Speed. The fp32 kernel multiplies q·kᵀ by generated code that reaches half of what the machine
   can do. Here keys are transposed once, block by block, and ATen's own GEMM (`brgemm`), which the
   template takes for the second product already, takes the first as well.
2. Speed. Without a score mod the template still copies every score through the identity, scales it
   in a pass of its own, and allocates index vectors for each block. Here blocks that are seen whole
   do none of it, and one softmax goes over several key blocks: of each row and block it costs a
   pass over the output, and of 16 keys that was most of its time.
3. Speed. In blocks seen in part the template hands the mask its indices in vectors, so that every
   table is gathered, number by number. Here the mask computes them (`_with_places`).
4. Correctness. The template renames the symbols of its tile sizes by replacing text: `ks2` also
   inside `ks22`, and names the symbols of a table's size anew unless dynamo hands them in, so that
   a graph with dynamic shapes may not compile (`CppFlexAttentionTemplate.modification`).
5. Correctness. The template has buffers for as many threads as there are while it compiles. Where
   an exported program runs there may be more, which wrote beyond them (`_OWN_THREADS`).
6. Compile time. Buffers in the source are numbered through the whole graph, so that no two layers
   of a model shared their kernel (`score_buf_idx`, `mask_buf_idx`).

7. Correctness. Inductor fuses what is computed of the output with the kernel, which then refuses.

1 and 2 are edits of the template's text. All act only while Inductor lowers a call that carries
flexdga's mark in its `kernel_options`; everybody else's kernels stay as they are.
FLEXDGA_STOCK_CPU_KERNEL=1 switches them off. What moved what: bench/NOTES.md.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
import threading
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from flexdga.saying import log, warn_once

VERIFIED = ("2.13.",)
"""Versions of torch on which the repairs were tested."""
PLAIN, SCORED = "plain", "scored"
"""The mark of a call whose scores are q·k times a positive scale, and of any other."""
_MARK = "FLEXDGA_CPU_KERNEL"
_EDITION = f"-{zlib.crc32(Path(__file__).read_bytes()):x}"
"""Part of the mark: Inductor's caches on disk do not see the edits, and outlive an update."""
COLUMNS = 128
"""Keys over which one softmax goes: several key blocks."""


def mark(*, plain: bool) -> dict[str, Any]:
    """Kernel options that ask for the repaired kernel, or none where it is not to be had.

    The mark is part of the graph, so that Inductor's caches tell repaired kernels from others.

    Args:
        plain: whether the scale is positive, so that what is masked may be scaled after it is
            masked, and there is no score mod.
    """
    return {_MARK: (PLAIN if plain else SCORED) + _EDITION} if available() else {}


@functools.cache
def ask_for_instructions() -> None:
    """Have Inductor find out which vector instructions there are, while Dynamo traces.

    It starts a process for each kind and waits: 16 s if they were never compiled for, then 1 to 2.
    """

    def ask() -> None:
        with contextlib.suppress(Exception):  # it will be raised again where the answer is needed
            from torch._inductor.cpu_vec_isa import pick_vec_isa

            pick_vec_isa()

    threading.Thread(target=ask, daemon=True).start()


def switched_off() -> bool:
    """Whether the environment asks for nothing of flexdga's own on CPU."""
    return os.environ.get("FLEXDGA_STOCK_CPU_KERNEL", "0") not in ("", "0")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> bool:
    """Whether the repairs are to be had; installs them on first use.

    A compiler that traces this runs it.
    """
    if switched_off():
        return False
    if not torch.__version__.startswith(VERIFIED):
        warn_once(
            f"flexdga: torch {torch.__version__} is not among the verified versions "
            f"({', '.join(VERIFIED)}…): the stock CPU kernel of flex_attention runs, a slower one"
        )
        return False
    _install()
    return True


@functools.cache
def products() -> str:
    """What this CPU multiplies fastest: `tiles` (AMX), `bytes` (AVX-512 VNNI), else `floats`."""
    if _has("_is_amx_tile_supported"):
        return "tiles"
    return "bytes" if _has("_is_vnni_supported") else "floats"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def multiplies(dtype: torch.dtype) -> bool:
    """Whether the kernel has fast products of this dtype.

    Of half precision it has those of AMX. Without them it takes twice as long as in float32.
    """
    if not available() or dtype not in _HALVES:
        return True
    return _has(_HALVES[dtype])


_HALVES = {torch.bfloat16: "_is_amx_tile_supported", torch.float16: "_is_amx_fp16_supported"}


def _has(capability: str) -> bool:
    return bool(getattr(torch.cpu, capability, bool)())


@functools.cache
def _install() -> None:
    import torch._inductor.lowering  # noqa: F401, I001  (before the next: they import each other)
    from torch._inductor import config
    from torch._inductor.codegen import cpp, cpp_flex_attention_template as template
    from torch._inductor.kernel.flex import flex_attention

    lowering: Any = flex_attention
    fusion: Any = cpp
    flex: Any = template.CppFlexAttentionTemplate
    stock_lower, stock_init = lowering.lower_cpu, flex.__init__
    stock_modification, stock_choose = flex.modification, flex.choose_flex_template
    stock_text = template.FLEX_ATTENTION_TEMPLATE
    scored_text = _with_transposed_keys(stock_text)
    plain_text = _several_blocks_at_once(_without_idle_passes(scored_text))
    texts = {SCORED: scored_text, PLAIN: plain_text}
    marked = ""

    def lower_cpu(*args: Any) -> Any:
        nonlocal marked
        marked = args[6].get(_MARK, "").removesuffix(_EDITION)  # of the kernel options
        try:
            return stock_lower(*args)
        finally:
            marked = ""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_init(self, *args, **kwargs)
        self.flexdga = marked  # the source is rendered again later, when lower_cpu has returned
        if marked:  # numbers of buffers of the whole graph: layers would not share their kernel
            self.score_buf_idx, self.mask_buf_idx = 0, 1

    def choose_flex_template(self: Any, *args: Any) -> Any:
        text = stock_choose(self, *args)
        self.flexdga_prefill = self.flexdga and text == stock_text
        if self.flexdga_prefill:
            text = texts[self.flexdga]
        return _OWN_THREADS + text if self.flexdga else text

    def modification(self: Any, buffer: Any, name: str, number: int) -> Any:
        places: dict[Any, str] = {}
        if self.flexdga_prefill and name == self.mask_buf_name:
            buffer, places = _with_places(buffer, self)

        class KernelGroup(cpp.KernelGroup):
            """Knows the tile sizes by their final names before it invents any."""

            def __init__(group) -> None:  # noqa: N805  (self is the template)
                super().__init__()
                # The kernel's own names; what `torch.export` traced is not handed in by name.
                sizes = {s for x in self.input_nodes for n in x.get_size() for s in _symbols(n)}
                names = ("cur_qSplitSize", "cur_kvSplitSize")
                group.args.sizevars.update({s: f"k{s}" for s in sizes})
                group.args.sizevars.update(zip(self.block_vars, names))
                group.args.sizevars.update(places)

        with (
            patch.object(cpp, "KernelGroup", KernelGroup if self.flexdga else cpp.KernelGroup),
            config.patch(assert_indirect_indexing=config.assert_indirect_indexing and not places),
        ):
            return stock_modification(self, buffer, name, number)

    stock_fuses = fusion.template_fusion_with_epilogues_supported

    def fuses(node: Any, epilogues: Any) -> tuple[bool, bool]:
        kernel = getattr(node.get_template_node(), "template", None)
        return (False, False) if getattr(kernel, "flexdga", "") else stock_fuses(node, epilogues)

    fusion.template_fusion_with_epilogues_supported = fuses
    lowering.lower_cpu = lower_cpu
    flex.__init__, flex.modification = init, modification
    flex.choose_flex_template = choose_flex_template
    log.info("flexdga: flex_attention's CPU kernel is repaired for flexdga's own calls")


def _with_places(buffer: Any, template: Any) -> tuple[Any, dict[Any, str]]:
    """The mask's buffer with indices where it loaded them, and the symbols that these use.

    An index that is computed turns reads of a table into vector loads, or into one for the whole
    block; what is loaded from a vector of indices is gathered, number by number.
    """
    from torch._inductor.ops_handler import WrapperHandler
    from torch._inductor.utils import sympy_index_symbol_with_prefix
    from torch._inductor.virtualized import V
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.symbol import SymT
    from torch.utils._sympy.value_ranges import ValueRanges

    symbols = [sympy_index_symbol_with_prefix(SymT.UNBACKED_INT, _PLACES + i) for i in range(4)]
    b, h, row, column = symbols
    blocks = (template.q_block_size, template.kv_block_size)
    ranges = V.graph.sizevars.shape_env.var_to_range
    ranges.update({symbol: ValueRanges(0, int_oo) for symbol in symbols})
    ranges.update({v: ValueRanges(2, most) for v, most in zip(template.block_vars, blocks)})
    base = {"b": b, "h": h, "q_idx": row * blocks[0], "kv_idx": column * blocks[1]}

    class Handler(WrapperHandler):
        def load(self, name: str, index: Any) -> Any:
            if name in base:
                return self._inner.index_expr(base[name] + index, torch.int64)
            return self._inner.load(name, index)

    inner = buffer.data.inner_fn

    def inner_fn(index: Any) -> Any:
        with V.set_ops_handler(Handler(V.get_ops_handler())):
            return inner(index)

    placed = copy.copy(buffer)
    placed.data = dataclasses.replace(buffer.data, inner_fn=inner_fn)
    return placed, dict(zip(symbols, ("i", "j", "k", "cur_n")))  # the template's own names


_PLACES = 10**6
"""Number of the first of these symbols: beyond all that a graph has."""


# The template's text. The pieces below are torch's own lines, which say where an edit goes.

_OWN_THREADS = """
  num_thread = at::get_num_threads();
"""


def _with_transposed_keys(text: str) -> str:
    text = _replace(
        text,
        "  // Attention loop below\n",
        """
  constexpr bool transposed = std::is_same_v<scalar_t, float>;
  if constexpr (transposed) {
    at::parallel_for(0, batchSize_k * num_head_k * kvSlice, 1, [&](int64_t begin, int64_t end) {
      for (int64_t z = begin; z < end; ++z) {
        int64_t n = z % kvSlice * kvSplitSize;
        int64_t head = z / kvSlice;
        int64_t columns = std::min(kvSplitSize, kvSize - n);
        at::native::utils::transpose<float>(
            columns, headSize,
            reinterpret_cast<const float*>(  // seen by the compiler for every type
                k_data + head / num_head_k * kStrideB + head % num_head_k * kStrideH
                + n * kStrideN),
            kStrideN,
            reinterpret_cast<float*>(key_reorder_ptr + (head * kvSize + n) * headSize), columns);
      }
    });
  }
  // Attention loop below
""",
    )
    return _replace(
        text,
        """        if (!need_pack) {
          auto k_addr =
""",
        """        if constexpr (transposed) {
          at::native::cpublas::brgemm(
              cur_qSplitSize, cur_kvSplitSize, headSize, qStrideM, cur_kvSplitSize,
              cur_kvSplitSize, false,
              q_data + i * qStrideB + j * qStrideH + m * qStrideM,
              key_reorder_ptr + ((i_kv * num_head_k + j_kv) * kvSize + n) * headSize,
              qk_data, false);
        } else if (!need_pack) {
          auto k_addr =
""",
    )


def _without_idle_passes(text: str) -> str:
    text = _replace(
        text,
        "        {{kernel.kernel_name}}_mul_scale_kernel<accum_t>"
        "(qk_data, scaling_factor, cur_qSplitSize*cur_kvSplitSize);\n",
        "",
    )
    text = _replace(
        text, "              static_cast<accum_t>(1),\n", "              scaling_factor,\n"
    )
    text = _replace(
        text,
        "        // TODO: reduce the number of calls of q_idx and kv_idx initialization\n",
        "        if (n_idx < kv_indice_num) {  // blocks that are seen in part come first\n",
    )
    begin, end = (
        text.index("        std::vector<int64_t> q_idx(cur_qSplitSize);\n"),
        text.index("        if ((std::find(kv_indice_list.begin()"),
    )
    text = text[:begin] + "        accum_t* in_ptr0 = qk_data;\n" + text[end:]
    return _replace(
        text,
        "        if ((std::find(kv_indice_list.begin(), kv_indice_list.end(), cur_n)"
        " != kv_indice_list.end()) ){\n",
        "",
    )


def _several_blocks_at_once(text: str) -> str:
    """One softmax for `together` key blocks, each with scores of its own, in rows of its own."""
    block = "qSplitSize * kvSplitSize"
    text = _replace(
        text,
        "  // Allocate per thread temp buf (accumulate type)\n",
        f"  const int64_t together = std::max<int64_t>({COLUMNS} / kvSplitSize, 1);\n",
    )
    text = _replace(text, f"/* qk     */ {block} +", f"/* qk     */ together * {block} +")
    text = _replace(text, f"qk_data + {block};", f"qk_data + together * {block};")
    text = _replace(
        text,
        '"scalar_t", "num_thread*qSplitSize*ekvSplitSize"',
        '"scalar_t", "num_thread*together*qSplitSize*ekvSplitSize"',
    )
    text = _replace(
        text,
        "buf_reduced_data + ompIdx * qSplitSize * ekvSplitSize\n",
        "buf_reduced_data + ompIdx * together * qSplitSize * ekvSplitSize\n",
    )
    loop = (
        "      for (int64_t n_idx = 0; n_idx < kv_indice_num + full_kv_indice_num ; n_idx += 1) {\n"
    )
    begin = text.index("        auto n = n_idx < kv_indice_num")
    place = text[begin : text.index("        // Calculate scale * q @ k.T", begin)]
    place = place.replace(
        place[place.index("{%- else %}") : place.index("{%- endif %}") + len("{%- endif %}\n")], ""
    )
    each = """
        for (int64_t n_idx = n_first; n_idx < n_after; ++n_idx) {
        accum_t* qk_data = scores + (n_idx - n_first) * qSplitSize * kvSplitSize;
        [[maybe_unused]] scalar_t* qk_reduced_data =
            weights ? weights + (n_idx - n_first) * qSplitSize * ekvSplitSize : nullptr;
"""
    text = _replace(
        text,
        loop,
        """      accum_t* const scores = qk_data;
      scalar_t* const weights = qk_reduced_data;
      const int64_t n_count = kv_indice_num + full_kv_indice_num;
      for (int64_t n_first = 0; n_first < n_count; n_first += together) {
        const int64_t n_after = std::min(n_first + together, n_count);
"""
        + each,
    )
    begin = text.index("        // Update coefficients with Softmax")
    end = text.index("        // Calculate Softmax(q @ k.T) @ v")
    softmax = """        }
        // Of these key blocks one at most is cut off: the last of all.
        const int64_t tail = kvSize % kvSplitSize;
        int64_t short_one = -1;
        for (int64_t i = 0; tail && i < n_after - n_first; ++i) {
          const int64_t n_idx = n_first + i;
          const int64_t n = n_idx < kv_indice_num ? kv_indice_list[n_idx]
                                                  : full_kv_indice_list[n_idx - kv_indice_num];
          if (n == kvSize / kvSplitSize) short_one = i;
        }
        for (int64_t row = 0; row < cur_qSplitSize; ++row) {
          // What is no number is lost in the maximum, but its weight is none, or infinite.
          Vec largest(-std::numeric_limits<accum_t>::infinity());
          for (int64_t i = 0; i < n_after - n_first; ++i) {
            const int64_t count = i == short_one ? tail : kvSplitSize;
            const accum_t* x = scores + i * qSplitSize * kvSplitSize + row * count;
            int64_t c = 0;
            for (; c + Vec::size() <= count; c += Vec::size())
              largest = at::vec::clamp_min(Vec::loadu(x + c), largest);
            if (c < count) {
              Vec rest = Vec::set(largest, Vec::loadu(x + c, count - c), count - c);
              largest = at::vec::clamp_min(rest, largest);
            }
          }
          const accum_t before = qk_max_data[row];
          accum_t now = scaling_factor * at::vec::vec_reduce_all<accum_t>(
              [](Vec& x, Vec& y) { return at::vec::clamp_min(x, y); }, largest);
          now = before > now ? before : now;
          const bool blank = now == -std::numeric_limits<accum_t>::infinity();
          Vec total(0);
          accum_t rest = 0;
          for (int64_t i = 0; i < n_after - n_first; ++i) {
            const int64_t count = i == short_one ? tail : kvSplitSize;
            const int64_t padded = need_pack ? count + count % 2 : count;
            accum_t* x = scores + i * qSplitSize * kvSplitSize + row * count;
            auto weight = {{kernel.kernel_name}}_conditional_data_ptr(
                scores + i * qSplitSize * kvSplitSize,
                weights ? weights + i * qSplitSize * ekvSplitSize : nullptr)
                + row * padded;
            int64_t c = 0;
            if (blank) {
              {{kernel.kernel_name}}_fill_stub(weight, static_cast<scalar_t>(0), count);
              c = count;
            }
            for (; c + Vec::size() <= count; c += Vec::size()) {
              Vec y = (Vec::loadu(x + c) * Vec(scaling_factor) - Vec(now)).exp_u20();
              total += y;
              at::native::_store(weight + c, y);
            }
            for (; c < count; ++c) {
              accum_t y = std::exp(x[c] * scaling_factor - now);
              rest += y;
              weight[c] = y;
            }
            if (padded > count) weight[count] = static_cast<scalar_t>(0);
          }
          if (blank) continue;
          rest += at::vec::vec_reduce_all<accum_t>(
              [](Vec& x, Vec& y) { return x + y; }, total);
          if (before == now) {  // as most often after the first blocks
            qk_sum_data[row] += rest;
            continue;
          }
          const accum_t kept = std::exp(before - now);
          qk_sum_data[row] = rest + kept * qk_sum_data[row];
          qk_max_data[row] = now;
          if (n_first > 0)
            at::vec::map<accum_t>(
                [kept](Vec x) { return x * Vec(kept); }, dst_data + row * headSize_v,
                dst_data + row * headSize_v, headSize_v);
        }
"""
    second = (
        each
        + place
        + """        auto i_kv = is_broadcast_bs_kv ? i/bs_shards : i;
        auto j_kv = is_broadcast_head_kv ? j/gqa_shards : j;
"""
    )
    text = text[:begin] + softmax + second + text[end:]
    return _replace(
        text, "      // dst <- dst / sum[row]\n", "      }\n      // dst <- dst / sum[row]\n"
    )


def _replace(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, old  # of a verified version of torch
    return text.replace(old, new)


def _symbols(size: Any) -> Any:
    """The symbols of a size, in a fixed order; none of a plain number."""
    return sorted(getattr(size, "free_symbols", ()), key=str)
