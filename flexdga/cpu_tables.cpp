// What cpu_tables.py calls: tables of blocks.

#include <cstdint>
#include <cstring>

extern "C" int flexdga_ready() { return 1; }

// `use` of each of a row's blocks that is of some kind.
template <class Use>
inline void each_of_a_kind(const uint8_t* kind, int64_t blocks, Use use) {
  for (int64_t block = 0; block < blocks; ++block) {
    uint64_t some;
    if (block + 8 <= blocks && (std::memcpy(&some, kind + block, 8), !some))
      block += 7;  // most are of none
    else if (kind[block])
      use(block);
  }
}

// How many blocks of kind 1 and of kind 2 each row of kinds (rows, blocks) has: counts (2, rows);
// sizes rows, blocks, threads.
extern "C" void flexdga_count_kinds(
    const uint8_t* kinds, int32_t* counts, const int64_t* sizes) {
  const int64_t rows = sizes[0], blocks = sizes[1];
#pragma omp parallel for num_threads(sizes[2])
  for (int64_t row = 0; row < rows; ++row) {
    int32_t count[3] = {};
    const uint8_t* kind = kinds + row * blocks;
    each_of_a_kind(kind, blocks, [&](int64_t block) { ++count[kind[block]]; });
    counts[row] = count[1], counts[rows + row] = count[2];
  }
}

// Which they are, in order: tables of the same width, one for each kind; sizes rows, blocks, width,
// threads.
extern "C" void flexdga_list_kinds(
    const uint8_t* kinds, int32_t* part, int32_t* whole, const int64_t* sizes) {
  const int64_t rows = sizes[0], blocks = sizes[1], width = sizes[2];
#pragma omp parallel for num_threads(sizes[3])
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* kind = kinds + row * blocks;
    int32_t* next[3] = {nullptr, part + row * width, whole + row * width};
    each_of_a_kind(kind, blocks, [&](int64_t block) { *next[kind[block]]++ = block; });
  }
}
