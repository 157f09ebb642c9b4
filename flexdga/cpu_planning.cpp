// What cpu_planning.py calls: openings by exact estimates.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu_tiles.h"
#include "cpu_integers.h"
#include "cpu_units.h"
#include "cpu_task.h"

namespace {

constexpr int64_t TOGETHER = 128;  // queries of a task: keys are read once for all of them

}  // namespace

// Whether this process may use what the machine has.
extern "C" int flexdga_ready() {
#if AMX
  constexpr int ask_for_tiles = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, ask_for_tiles, tile_data) == 0;
#else
  return 1;
#endif
}

// query (B, G, R, L, D), key (B, G, L, D), first (B, L), home (B, N), since (B, G, R, T, N); sizes
// B, G, R, L, D, queries of a block, tokens of a unit, window, NEAR and SEGMENT of estimates.py in
// units, threads.
extern "C" void flexdga_openings(
    const float* query, const bfloat16* key, const int32_t* first, const int32_t* home,
    int32_t* since, const int64_t* sizes, float scale, float least, int causal, int prompt) {
  const int64_t batch = sizes[0], kv_heads = sizes[1], rep = sizes[2], length = sizes[3];
  const int64_t dim = sizes[4], rows = sizes[5], size = sizes[6], window = sizes[7];
  const int64_t blocks = length / rows, units = length / size;
  const int64_t each = std::max<int64_t>(TOGETHER / (rep * rows), 1);
  const int64_t parts = (blocks + each - 1) / each, heads = batch * kv_heads;
  const int64_t known = sizes[8], segment = sizes[9], threads = sizes[10];
  const int64_t last = std::max<int64_t>((blocks - 1) * rows - window + 1, 0) / size;
  const int64_t boxed = causal ? boxed_of(last, known, segment) : 0;
  const Known known_by(key, heads, units, size, dim, boxed, threads);
#ifdef MADV_HUGEPAGE
  // Fresh pages of so large a table would take longer than what is written to it.
  constexpr uintptr_t PAGE = 1 << 21;
  const uintptr_t from = (uintptr_t(since) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t to = uintptr_t(since + heads * rep * blocks * units) / PAGE * PAGE;
  if (from < to) madvise((void*)from, to - from, MADV_HUGEPAGE);
#endif
#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] Session session;
    Task task;
#pragma omp for schedule(dynamic, 1)
    for (int64_t number = 0; number < parts * heads; ++number) {
      // The longest of a head first, and head after head, whose keys stay in the cache.
      const int64_t part = parts - 1 - number % parts, head = number / parts;
      task.query = query + head * rep * length * dim;
      task.key = key + head * length * dim;
      task.number = &known_by.key[head * units * size * dim];
      task.step = &known_by.step[head * units];
      task.box = known_by.box.data() + head * known_by.room * 2 * dim;
      task.box_step = known_by.box_step.data() + head * known_by.room;
      task.mean = known_by.mean.data() + head * known_by.wide * 2 * dim;
      task.mean_step = known_by.mean_step.data() + head * known_by.wide;
      task.reach = known_by.reach.data() + head * known_by.wide;
      task.first = first + head / kv_heads * length;
      task.home = home + head / kv_heads * units;
      task.since = since + head * rep * blocks * units;
      task.rep = rep, task.length = length, task.blocks = blocks, task.rows = rows;
      task.units = units, task.size = size, task.dim = dim, task.window = window;
      task.known = known, task.segment = segment;
      task.scale = scale, task.least = least, task.share = 0.99f * std::exp(least);
      task.causal = causal, task.prompt = prompt;
      task.run(part * each, std::min((part + 1) * each, blocks));
    }
  }
}

// The best score of each unit's keys: out (heads, rows, units) of query (heads, rows, D) and key
// (heads, at least units·size, D) with a stride from head to head; sizes heads, rows, D, units,
// tokens of a unit, stride, threads.
extern "C" void flexdga_best_keys(
    const float* query, const bfloat16* key, float* out, const int64_t* sizes, float scale) {
  const int64_t heads = sizes[0], rows = sizes[1], dim = sizes[2], units = sizes[3];
  const int64_t size = sizes[4], stride = sizes[5];
  const int64_t part = 4096 / size, parts = (units + part - 1) / part;
  const int64_t groups = (rows + LANES - 1) / LANES, even = (groups + 1) / 2 * 2;
  const int64_t next = LANES * dim / IN_ONE;
#pragma omp parallel num_threads(sizes[6])
  {
    [[maybe_unused]] Session session;
    std::vector<float> rows_of(LANES * dim);
    std::vector<bfloat16> some;
    std::vector<PackedNumber> some_integers;
    std::vector<QueryNumber> integers(even * next);
    std::vector<Floats> query_step(even);
    std::vector<Sums> beyond(even);
    std::vector<KeyNumber> number(std::max(size, 2 * LANES) * dim);
    alignas(64) Sums made[2][2][LANES];
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < heads * parts; ++task) {
      const int64_t head = task / parts, first = task % parts * part;
      const int64_t end = std::min(first + part, units);
      for (int64_t z = 0; z < groups; ++z) {
        const int64_t from = z * LANES, to = std::min(from + LANES, rows);
        std::fill(rows_of.begin(), rows_of.end(), 0.0f);
        std::copy(query + (head * rows + from) * dim, query + (head * rows + to) * dim,
                  rows_of.begin());
        round_queries(rows_of.data(), dim, scale, some);
        pack_integers(
            some.data(), dim, false, some_integers, query_step[z], beyond[z], &integers[z * next]);
      }
      const int64_t tiles = size / LANES, both = tiles == 1 ? 2 : 1;  // units at a time
      for (int64_t unit = first; unit < end; unit += both) {
        const int64_t here = std::min(both, end - unit);
        float step[2];
        for (int64_t i = 0; i < here; ++i) {
          const bfloat16* at = key + head * stride + (unit + i) * size * dim;
          step[i] = step_of(at, size * dim);
          to_integers(at, size * dim, step[i], &number[i * size * dim]);
        }
        for (int64_t z = 0; z < groups; z += 2) {
          Sums best[2][2];  // of two units, or of tiles of one
          for (int64_t tile = 0; tile < std::max<int64_t>(tiles, 2); tile += 2) {
            const int64_t other = std::min(tile + 1, std::max<int64_t>(tiles, here) - 1);
            multiply(&number[tile * LANES * dim], &number[other * LANES * dim],
                     &integers[z * next], &integers[(z + 1) * next], dim, made);
            for (int i = 0; i < 2; ++i)
              for (int y = 0; y < 2; ++y) {
                const Sums x = largest(made[i][y]);
                best[i][y] = tile ? larger(best[i][y], x) : x;
              }
          }
          for (int64_t i = 0; i < here; ++i)
            for (int64_t r = z * LANES; r < std::min((z + 2) * LANES, rows); ++r) {
              const int64_t y = r / LANES - z;
              const Sums all = tiles == 1 ? best[i][y] : larger(best[0][y], best[1][y]);
              const Floats score = score_of(all, beyond[z + y], step[i], query_step[z + y]);
              out[(head * rows + r) * units + unit + i] = rounded(score)[r % LANES];
            }
        }
      }
    }
  }
}
