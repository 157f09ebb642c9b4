// What is known of far units: their keys, and the boxes of old ones, in eight bits.

namespace {

constexpr float WHOLE_BOX_SHARE = 0.35f;  // as in estimates.py
constexpr float COSINES = 4;  // standard deviations of that between two directions

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

// The mean (2, D) of 16 boxes, and its power of two: a query gives it the mean of what it gives them.
// `reach` is how much more it may give to one of them, if it is of length 1: the length of what tells
// that from the mean, times the cosine between the two.
inline float mean_of(
    const KeyNumber* box, const float* box_step, int64_t dim, std::vector<bfloat16>& some,
    KeyNumber* to, float& reach) {
  some.resize(2 * dim);
  auto number = [&](int64_t j, int64_t d) { return taken(box + j * 2 * dim + d) * box_step[j]; };
  for (int64_t d = 0; d < 2 * dim; d += LANES) {
    Floats sum{};
    for (int64_t j = 0; j < LANES; ++j) sum += number(j, d);
    store(sum / float(LANES), &some[d]);
  }
  const float step = step_of(some.data(), 2 * dim);
  to_integers(some.data(), 2 * dim, step, to);
  reach = 0;
  for (int64_t j = 0; j < LANES; ++j) {
    Floats squares{};
    for (int64_t d = 0; d < dim; d += LANES) {  // of each number a query meets one corner's
      const Floats high = number(j, d) - taken(to + d) * step;
      const Floats low = number(j, dim + d) - taken(to + dim + d) * step;
      squares += larger(high * high, low * low);
    }
    float sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += squares[lane];
    reach = std::max(reach, std::sqrt(sum));
  }
  reach *= std::min(COSINES / std::sqrt(float(dim)), 1.0f);
  return step;
}

// What far units are known by, of all heads: their keys as integers, and of old ones the boxes, and
// the means of 16 of these.
struct Known {
  std::vector<KeyNumber> key, box, mean;
  std::vector<float> step, box_step, mean_step, reach;  // powers of two, and as `mean_of` says
  int64_t room, wide;  // for boxes, and for means, in whole tiles

  Known(
      const bfloat16* keys, int64_t heads, int64_t units, int64_t size, int64_t dim,
      int64_t boxed, int64_t threads)
      : key(heads * units * size * dim), step(heads * units),
        room((boxed + LANES - 1) / LANES * LANES),
        wide((room / LANES + LANES - 1) / LANES * LANES) {
    box.resize(heads * room * 2 * dim), box_step.resize(heads * room);
    mean.resize(heads * wide * 2 * dim), mean_step.resize(heads * wide);
    reach.resize(heads * wide);
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
#pragma omp for collapse(2)
      for (int64_t head = 0; head < heads; ++head)
        for (int64_t sixteen = 0; sixteen < boxed / LANES; ++sixteen) {
          const int64_t at = head * wide + sixteen, old = head * room + sixteen * LANES;
          mean_step[at] = mean_of(
              &box[old * 2 * dim], &box_step[old], dim, corners, &mean[at * 2 * dim], reach[at]);
        }
    }
  }
};

}  // namespace
