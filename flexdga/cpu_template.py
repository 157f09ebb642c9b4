"""Edits of the text of flex_attention's CPU kernel, which `cpu_kernel.py` has Inductor render.

Pieces that are replaced are torch's own lines: they say where an edit goes.
"""

from __future__ import annotations

COLUMNS = 128
"""Keys over which one softmax goes: several key blocks."""

OWN_THREADS = """
  num_thread = at::get_num_threads();
"""


def scored(text: str) -> str:
    """The template's text for scores with a score mod: repair 1 of `cpu_kernel.py`."""
    return _with_transposed_keys(text)


def plain(text: str) -> str:
    """And without one: 1 and 2."""
    return _several_blocks_at_once(_without_idle_passes(scored(text)))


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
