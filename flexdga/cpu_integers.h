// Numbers in eight bits: integers up to 127 that share a power of two, as `in_eight_bits` of
// estimates.py rounds. In tiles they are bfloat16 numbers, else bytes where the CPU multiplies four
// of them at once (VNNI), else float32 ones. Their products are exact, and the same, in all three.

namespace {

#if INTEGERS
using KeyNumber = uint8_t;     // 128 more than the integer
using PackedNumber = int8_t;   // an integer of a query
using QueryNumber = uint32_t;  // fours of integers, of 16 queries side by side
using Sums = Ints;
constexpr int64_t IN_ONE = 4;  // integers in a QueryNumber
constexpr int32_t MORE = 128;
#else
using KeyNumber = bfloat16;
using PackedNumber = bfloat16;
using QueryNumber = Packed;
using Sums = Floats;
constexpr int64_t IN_ONE = 1;
constexpr int32_t MORE = 0;
#endif

// The power of two; not a number if any of them is none.
inline float step_of(const bfloat16* x, int64_t count) {
  Halves most = 27 * 128 - Halves{};  // 2^-100
  for (int64_t i = 0; i < count; i += LANES) {
    Halves size;
    std::memcpy(&size, x + i, sizeof size);
    size &= 0x7fff;
    most = size > most ? size : most;
  }
  bfloat16 largest = 0;
  for (int lane = 0; lane < LANES; ++lane) largest = std::max<bfloat16>(largest, most[lane]);
  if (largest >= 0x7f80) return std::numeric_limits<float>::quiet_NaN();
  return to_float(largest & 0x7f80) / 64;
}

inline Ints to_integers(const bfloat16* x, float step) {  // 16 of them
  Floats y = load(x) * (1 / step);
  y = larger(y, all(-127));  // -127 where it is no number
  y = y < 127 ? y : all(127);
  return __builtin_convertvector((y + 12582912.0f) - 12582912.0f, Ints);
}

inline void put(Ints x, KeyNumber* to) {
#if INTEGERS
  const Bytes bytes = __builtin_convertvector(x + MORE, Bytes);
  std::memcpy(to, &bytes, sizeof bytes);
#else
  store(__builtin_convertvector(x, Floats), to);
#endif
}

inline Floats taken(const KeyNumber* from) {  // what was put there
#if INTEGERS
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, Ints) - MORE, Floats);
#else
  return load(from);
#endif
}

inline void to_integers(const bfloat16* x, int64_t count, float step, KeyNumber* to) {
  for (int64_t i = 0; i < count; i += LANES) put(to_integers(x + i, step), to + i);
}

inline void put_packed(Ints x, PackedNumber* to) {
#if INTEGERS
  typedef int8_t Narrow __attribute__((vector_size(16)));
  const Narrow bytes = __builtin_convertvector(x, Narrow);
  std::memcpy(to, &bytes, sizeof bytes);
#else
  put(x, to);
#endif
}

// Numbers of 16 queries (16, D) as products take them; with signs, positive and negative parts
// apart. Their powers of two, and what `MORE` adds to their products; returns their lengths, over
// these powers.
inline Floats pack_integers(
    const bfloat16* query, int64_t dim, bool signs, std::vector<PackedNumber>& some, Floats& step,
    Sums& beyond, QueryNumber* to) {
  const int64_t wide = signs ? 2 * dim : dim;
  Floats length;
  some.resize(LANES * wide);
  for (int64_t lane = 0; lane < LANES; ++lane) {
    const float each = step_of(query + lane * dim, dim);
    PackedNumber* row = &some[lane * wide];
    Ints sum{}, squares{};
    for (int64_t d = 0; d < dim; d += LANES) {
      const Ints y = to_integers(query + lane * dim + d, each);
      sum += y, squares += y * y;
      put_packed(signs ? larger(y, Ints{}) : y, row + d);
      if (signs) put_packed(y - larger(y, Ints{}), row + dim + d);
    }
    int32_t total = 0, square = 0;
    for (int i = 0; i < LANES; ++i) total += sum[i], square += squares[i];
    step[lane] = each, beyond[lane] = MORE * total, length[lane] = std::sqrt(float(square));
  }
#if INTEGERS
  for (int64_t d = 0; d < wide; d += IN_ONE)
    for (int64_t lane = 0; lane < LANES; ++lane)
      std::memcpy(to + d / IN_ONE * LANES + lane, &some[lane * wide + d], IN_ONE);
#else
  pack(some.data(), wide, to);
#endif
  return length;
}

// The scores of 16 queries, packed with `query_step` and `beyond`, that were multiplied with keys.
inline Floats score_of(Sums sum, Sums beyond, float step, Floats query_step) {
  return __builtin_convertvector(sum - beyond, Floats) * step * query_step;
}

#if INTEGERS

// `sum` and the products of fours. GCC 12 copies registers around its own function for this.
inline __m512i plus_products(__m512i sum, __m512i keys, __m512i queries) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(keys), "v"(queries));
  return sum;
}

inline void multiply(
    const uint8_t* key0, const uint8_t* key1, const uint32_t* query0, const uint32_t* query1,
    int64_t dim, Ints (*out)[2][LANES]) {
  constexpr int SUMS = 8;  // of each group of queries, as many as there are registers for
  for (int tile = 0; tile < 2; ++tile)
    for (int64_t first = 0; first < LANES; first += SUMS) {
      const uint8_t* key = (tile ? key1 : key0) + first * dim;
      __m512i some[SUMS], others[SUMS];
      for (int j = 0; j < SUMS; ++j) some[j] = others[j] = _mm512_setzero_si512();
      for (int64_t d = 0; d < dim; d += IN_ONE) {
        const __m512i x = _mm512_loadu_si512(query0 + d / IN_ONE * LANES);
        const __m512i y = _mm512_loadu_si512(query1 + d / IN_ONE * LANES);
        for (int j = 0; j < SUMS; ++j) {
          int32_t four;
          std::memcpy(&four, key + j * dim + d, IN_ONE);
          some[j] = plus_products(some[j], _mm512_set1_epi32(four), x);
          others[j] = plus_products(others[j], _mm512_set1_epi32(four), y);
        }
      }
      for (int j = 0; j < SUMS; ++j) {
        out[tile][0][first + j] = (Ints)some[j];
        out[tile][1][first + j] = (Ints)others[j];
      }
    }
}

#endif

}  // namespace
