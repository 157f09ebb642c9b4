// What is known of far units: their keys, and the boxes of old ones, in eight bits.

namespace {

constexpr float WHOLE_BOX_SHARE = 0.35f;  // as in estimates.py

// The two corners (2, D) of the box around the keys (size, D) of a unit, and their power of two.
inline float enclose(
    const bfloat16* key, int64_t size, int64_t dim, std::vector<bfloat16>& corners,
    KeyNumber* to) {
  corners.resize(2 * dim);
  for (int64_t begin = 0; begin < dim; begin += LANES) {
    float sum[LANES] = {}, high[LANES], low[LANES];
    for (int64_t i = 0; i < LANES; ++i) high[i] = low[i] = to_float(key[begin + i]);
    for (int64_t j = 0; j < size; ++j)
      for (int64_t i = 0; i < LANES; ++i) {
        const float x = to_float(key[j * dim + begin + i]);
        sum[i] += x;
        high[i] = x > high[i] ? x : high[i];
        low[i] = x < low[i] ? x : low[i];
      }
    for (int64_t i = 0; i < LANES; ++i) {
      const float middle = sum[i] / size;
      corners[begin + i] = to_bfloat16(middle + WHOLE_BOX_SHARE * (high[i] - middle));
      corners[dim + begin + i] = to_bfloat16(middle + WHOLE_BOX_SHARE * (low[i] - middle));
    }
  }
  const float step = step_of(corners.data(), 2 * dim);
  to_integers(corners.data(), 2 * dim, step, to);
  return step;
}

// What far units are known by, of all heads: their keys as integers, and the boxes of old ones.
struct Known {
  std::vector<KeyNumber> key, box;
  std::vector<float> step, box_step;  // the powers of two, of units
  int64_t room;                       // for boxes, in whole tiles

  Known(
      const bfloat16* keys, int64_t heads, int64_t units, int64_t size, int64_t dim,
      int64_t boxed, int64_t threads)
      : key(heads * units * size * dim), step(heads * units),
        room((boxed + LANES - 1) / LANES * LANES) {
    box.resize(heads * room * 2 * dim), box_step.resize(heads * room);
#pragma omp parallel num_threads(threads)
    {
      std::vector<bfloat16> corners;
#pragma omp for collapse(2)
      for (int64_t head = 0; head < heads; ++head)
        for (int64_t unit = 0; unit < units; ++unit) {
          const int64_t at = head * units + unit, old = head * room + unit;
          const bfloat16* from = keys + at * size * dim;
          step[at] = step_of(from, size * dim);
          to_integers(from, size * dim, step[at], &key[at * size * dim]);
          if (unit < boxed)
            box_step[old] = enclose(from, size, dim, corners, &box[old * 2 * dim]);
        }
    }
  }
};

}  // namespace
