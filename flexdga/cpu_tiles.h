// Scores of 16 keys by 16 queries at a time: in tiles of AMX where the CPU has them, else in vectors.
//
// A vector holds a number of each of 16 queries, so that nothing is ever summed up across one.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define AMX 1
#else
#define AMX 0
#endif
#if !AMX && defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define INTEGERS 1
#else
#define INTEGERS 0
#endif

namespace {

constexpr int64_t LANES = 16;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

using bfloat16 = uint16_t;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef bfloat16 Halves __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
using Tile = Floats[LANES];  // scores of 16 keys

inline Floats all(float x) { return x - Floats{}; }

inline Floats larger(Floats a, Floats b) {
#if AMX || INTEGERS
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }

template <class Numbers>
inline Numbers largest(const Numbers (&scores)[LANES]) {  // of 16 keys
  Numbers best = scores[0], other = scores[1];  // two at a time, for neither waits for the other
  for (int64_t j = 2; j < LANES; j += 2) {
    best = larger(best, scores[j]);
    other = larger(other, scores[j + 1]);
  }
  return larger(best, other);
}

inline int first_of(Ints where) {  // of the lanes that are not zero; LANES if all are
#if AMX || INTEGERS
  const uint32_t mask = _mm512_test_epi32_mask((__m512i)where, (__m512i)where);
  return mask ? __builtin_ctz(mask) : LANES;
#else
  int lane = 0;
  while (lane < LANES && !where[lane]) ++lane;
  return lane;
#endif
}

inline Floats rounded(Floats x) {  // to bfloat16
  Bits bits = (Bits)x;
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return (Floats)(bits & 0xffff0000u);
}

inline bfloat16 to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline void store(Floats x, bfloat16* to) {  // rounded
  const Ints none = x != x;
  const Bits bits = none ? 0x7fc0 + Bits{} : (Bits)rounded(x) >> 16;
  const Halves halves = __builtin_convertvector(bits, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

inline Floats load(const bfloat16* x) {
  Halves halves;
  std::memcpy(&halves, x, sizeof halves);
  return (Floats)(__builtin_convertvector(halves, Bits) << 16);
}

inline float to_float(bfloat16 x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline Floats exponential(Floats x) {  // to 2e-5; of numbers up to 80
  x = larger(x, all(-87));
  const Floats number = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest integer
  const Floats rest = x - number * 0.69314718f;  // |rest| < 0.35
  Floats y = rest * 0.0416666f + 0.1666666f;
  y = y * rest + 0.5f;
  y = y * rest + 1.0f;
  y = y * rest + 1.0f;
  return (Floats)((Ints)y + (__builtin_convertvector(number, Ints) << 23));
}

#if AMX

using Packed = bfloat16;  // pairs of numbers, of 16 queries side by side

inline void to_bfloat16s(const float* from, int64_t count, float scale, bfloat16* to) {
  for (int64_t i = 0; i < count; i += LANES) {
    const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(from + i), _mm512_set1_ps(scale));
    _mm256_storeu_si256((__m256i*)(to + i), (__m256i)_mm512_cvtneps_pbh(x));
  }
}

struct Session {  // of a thread that multiplies tiles
  Session() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } tiles;
    for (int i = 0; i < 8; ++i) tiles.bytes[i] = 64, tiles.rows[i] = 16;
    _tile_loadconfig(&tiles);
  }
  ~Session() { _tile_release(); }
};

inline void pack(const bfloat16* query, int64_t dim, Packed* to) {
  const uint32_t* pairs = (const uint32_t*)query;
  uint32_t* out = (uint32_t*)to;
  const Ints step = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const __m512i rows = (__m512i)(step * int32_t(dim / 2));
  for (int64_t pair = 0; pair < dim / 2; ++pair)
    _mm512_storeu_si512(out + pair * LANES, _mm512_i32gather_epi32(rows, pairs + pair, 4));
}

// Scores of 16 and 16 keys, by 16 and 16 queries.
inline void multiply(
    const bfloat16* key0, const bfloat16* key1, const Packed* query0, const Packed* query1,
    int64_t dim, Tile (*out)[2]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t d = 0; d < dim; d += 32) {
    _tile_loadd(4, key0 + d, dim * 2);
    _tile_loadd(6, query0 + d * LANES, 64);
    _tile_loadd(5, key1 + d, dim * 2);
    _tile_loadd(7, query1 + d * LANES, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out[0][0], 64);
  _tile_stored(1, out[0][1], 64);
  _tile_stored(2, out[1][0], 64);
  _tile_stored(3, out[1][1], 64);
}

#else

using Packed = float;

inline void to_bfloat16s(const float* from, int64_t count, float scale, bfloat16* to) {
  for (int64_t i = 0; i < count; i += LANES) {
    Floats x;
    std::memcpy(&x, from + i, sizeof x);
    store(x * scale, to + i);
  }
}

struct Session {};

inline void pack(const bfloat16* query, int64_t dim, Packed* to) {
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t lane = 0; lane < LANES; ++lane)
      to[d * LANES + lane] = to_float(query[lane * dim + d]);
}

inline void multiply(
    const bfloat16* key0, const bfloat16* key1, const Packed* query0, const Packed* query1,
    int64_t dim, Tile (*out)[2]) {
  constexpr int SUMS = 8, PART = 32;  // as many sums as there are registers for; PART divides dim
  for (int tile = 0; tile < 2; ++tile)
    for (int64_t first = 0; first < LANES; first += SUMS) {
      const bfloat16* key = (tile ? key1 : key0) + first * dim;
      Floats some[SUMS] = {}, others[SUMS] = {};
      for (int64_t begin = 0; begin < dim; begin += PART) {
        float wide[SUMS][PART];
        for (int j = 0; j < SUMS; ++j)
          for (int d = 0; d < PART; d += LANES) {
            const Floats x = load(key + j * dim + begin + d);
            std::memcpy(&wide[j][d], &x, sizeof x);
          }
        for (int d = 0; d < PART; ++d) {
          Floats x, y;
          std::memcpy(&x, query0 + (begin + d) * LANES, sizeof x);
          std::memcpy(&y, query1 + (begin + d) * LANES, sizeof y);
          for (int j = 0; j < SUMS; ++j) {
            some[j] += wide[j][d] * x;
            others[j] += wide[j][d] * y;
          }
        }
      }
      std::copy(some, some + SUMS, out[tile][0] + first);
      std::copy(others, others + SUMS, out[tile][1] + first);
    }
}

#endif

}  // namespace
