// What some query blocks open: a thread's work, from its queries to the table.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr int32_t NEVER = std::numeric_limits<int32_t>::max();
constexpr float BEYOND = 60;  // as in opening.py

// 16 scaled queries in bfloat16.
inline void round_queries(const float* query, int64_t dim, float scale, std::vector<bfloat16>& to) {
  to.resize(LANES * dim);
  for (int64_t i = 0; i < LANES; ++i) to_bfloat16s(query + i * dim, dim, scale, &to[i * dim]);
}

// `units_beyond`, of units.
inline int64_t boxed_of(int64_t before, int64_t known, int64_t segment) {
  return std::max<int64_t>(before / segment * segment - known, 0);
}

// Of a rounded score, beside `base`.
inline Floats mass_of(Floats score, Floats base) {
  return exponential(-larger(base - score, all(-BEYOND)));
}

struct Group {  // 16 queries of one head, in one query block
  int64_t head, block, begin;  // of the queries
  int64_t before, after;       // the units that the block may open, and for which document:
  int32_t document;
  int64_t boxed;  // the first units, so many that the block knows by their boxes alone
};

struct Sixteen {  // old units, and two groups
  int64_t number;
  Floats mass[2], most[2];  // so much they hold together at least, and so much one of them may hold
};

struct Task {  // some query blocks of the heads of one KV head
  // As `flexdga_openings` has them:
  const float* query;
  const bfloat16* key;
  const int32_t *first, *home;
  // Of `Known`:
  const KeyNumber *number, *box, *mean;
  const float *step, *box_step, *mean_step, *reach;
  int64_t rep, length, blocks, rows, units, size, dim, window, known, segment;
  float scale, least, share;
  bool causal, prompt;
  int32_t* since;
  // Of this thread:
  std::vector<Group> groups;
  int64_t count, even;  // of groups, and rounded up
  std::vector<Packed> packed;                // queries,
  std::vector<QueryNumber> integers, halves;  // as integers, their positive and negative parts,
  std::vector<Floats> query_step;             // and what these are to be multiplied by
  std::vector<Sums> beyond, part;
  std::vector<bfloat16> some;
  std::vector<PackedNumber> some_integers;
  std::vector<Floats> base, mass, scores, extent;
  // What may be asked for in the end: so many units of each group, and their scores.
  std::vector<int64_t> wishes;
  std::vector<int32_t> wished;
  std::vector<Floats> wish;
  std::vector<Sixteen> sixteens;

  const float* queries_of(int64_t group) const {
    return query + (groups[group].head * length + groups[group].begin) * dim;
  }
  const Packed* queries(int64_t group) const { return packed.data() + group * LANES * dim; }
  const bfloat16* tile(int64_t n) const { return key + n * LANES * dim; }
  Floats score(Sums sum, float step, int64_t z) const {
    return score_of(sum, beyond[z], step, query_step[z]);
  }

  void run(int64_t from, int64_t to) {
    groups.clear();
    for (int64_t t = from; t < to; ++t) {
      const int64_t start = t * rows, before = std::max<int64_t>(start - window + 1, 0) / size;
      const int64_t after = (start + rows + window - 1 + size - 1) / size;
      const int64_t boxed = causal ? boxed_of(before, known, segment) : 0;
      int32_t document = -1;
      for (int64_t i = start; i < start + rows; ++i)
        if (first[i] != NEVER) document = std::max(document, first[i]);
      for (int64_t head = 0; head < rep; ++head) {
        std::fill_n(since + (head * blocks + t) * units, units, NEVER);
        if (document < 0) continue;  // padding opens nothing
        for (int64_t i = start; i < start + rows; i += LANES)
          groups.push_back(
              {head, t, i, before, causal ? units : std::min(after, units), document, boxed});
      }
    }
    count = groups.size(), even = (count + 1) / 2 * 2;
    if (!count) return;
    packed.assign(even * LANES * dim, 0);
    integers.assign(even * LANES * dim / IN_ONE, 0);
    if (groups.back().boxed > oldest()) halves.assign(even * LANES * 2 * dim / IN_ONE, 0);
    wishes.assign(count, 0);
    wished.resize(units * count), wish.resize(units * count);
    for (auto* each : {&base, &mass, &query_step, &extent}) each->assign(even, Floats{});
    for (auto* each : {&beyond, &part}) each->assign(even, Sums{});
    for (int64_t z = 0; z < count; ++z) {
      round_queries(queries_of(z), dim, scale, some);
      pack(some.data(), dim, &packed[z * LANES * dim]);
      auto in_eight_bits = [&](bool signs, QueryNumber* to) {
        return pack_integers(
            some.data(), dim, signs, some_integers, query_step[z], beyond[z], to);
      };
      in_eight_bits(false, &integers[z * LANES * dim / IN_ONE]);
      if (groups.back().boxed > oldest()) {
        extent[z] = in_eight_bits(true, &halves[z * LANES * 2 * dim / IN_ONE]);
        extent[z] *= query_step[z];
      }
    }
    for (int64_t z = 0; z < count; z += 2) weigh_near(z);
    size == LANES ? weigh_far<1>() : size == 2 * LANES ? weigh_far<2>() : weigh_far<0>();
    if (groups.back().boxed > oldest()) weigh_boxes();
    for (int64_t z = 0; z < count; ++z) open(z);
  }

  // The first unit that is of the document of any group.
  int64_t oldest() const { return groups.front().document / size; }

  // Mass of what two groups may not open.
  void weigh_near(int64_t pair) {
    const Group& last = groups[std::min(pair + 1, count - 1)];
    const int64_t from = groups[pair].before * size / LANES;
    const int64_t end =
        (causal ? last.begin / LANES + 1 : std::min(last.after * size, length) / LANES);
    scores.resize((end - from) * LANES * 2);
    alignas(64) Tile made[2][2];
    for (int64_t n = from; n < end; n += 2) {
      multiply(tile(n), tile(std::min(n + 1, end - 1)), queries(pair), queries(pair + 1), dim, made);
      for (int64_t i = 0; i < 2 && n + i < end; ++i)
        for (int y = 0; y < 2; ++y)
          std::copy(made[i][y], made[i][y] + LANES, &scores[((n + i - from) * 2 + y) * LANES]);
    }
    for (int64_t z = pair; z < std::min(pair + 2, count); ++z) {
      const Group& mine = groups[z];
      const int64_t least = mine.before * size;
      const int64_t most = causal ? mine.begin + LANES : std::min(mine.after * size, length);
      Floats top = all(NOTHING), sum{};
      auto score = [&](int64_t at) -> Floats& {
        return scores[((at / LANES - from) * 2 + z - pair) * LANES + at % LANES];
      };
      for (int64_t at = least; at < most; ++at) {
        Floats& x = score(at);
        x = first[at] == mine.document ? rounded(x) : all(NOTHING);
        if (causal)
          for (int64_t lane = 0; lane < at - mine.begin; ++lane) x[lane] = NOTHING;
        top = larger(top, x);
      }
      base[z] = top > NOTHING ? top : Floats{};
      for (int64_t at = least; at < most; ++at) {
        const Floats x = score(at);
        sum += x > NOTHING ? exponential(x - base[z]) : Floats{};
      }
      for (int lane = 0; lane < LANES; ++lane) {  // masses are those of what is near from here on
        base[z][lane] = sum[lane] > 0 ? base[z][lane] + std::log(sum[lane]) : 0;
        mass[z][lane] = sum[lane] > 0 ? 1 : sum[lane];
      }
    }
  }

  // Scores of the best keys of units, and the mass of those that may be opened: the newest first, so
  // that soon few are worth keeping. A number of tiles of a unit that the compiler knows saves
  // divisions.
  template <int64_t KNOWN>
  void weigh_far() {
    const int64_t per_unit = KNOWN ? KNOWN : size / LANES;
    const int64_t begin = std::max(groups.front().boxed, oldest()) * per_unit;
    const int64_t end = (causal ? groups.back().before : units) * per_unit;
    alignas(64) Sums made[2][2][2][LANES];  // while one is filled, the other is read
    int64_t last = -1, last_pair = 0;
    int turn = 0;
    for (int64_t n = begin + (end - begin - 1) / 2 * 2; n >= begin && n < end; n -= 2)
      for (int64_t z = 0; z < even; z += 2) {
        const int64_t other = std::min(n + 1, end - 1), next = LANES * dim / IN_ONE;
        const QueryNumber* rows = &integers[z * next];
        multiply(number + n * LANES * dim, number + other * LANES * dim, rows, rows + next, dim,
                 made[turn]);
        if (last >= 0) note(last, last_pair, end, per_unit, made[1 - turn]);
        last = n, last_pair = z, turn = 1 - turn;
      }
    if (last >= 0) note(last, last_pair, end, per_unit, made[1 - turn]);
  }

  inline void note(
      int64_t n, int64_t pair, int64_t end, int64_t per_unit, Sums (*made)[2][LANES]) {
    for (int64_t i = std::min<int64_t>(end - n, 2) - 1; i >= 0; --i) {
      const int64_t unit = (n + i) / per_unit, left = (n + i) % per_unit;
      for (int64_t z = pair; z < std::min(pair + 2, count); ++z) {
        if (unit < groups[z].boxed) continue;
        Sums best = largest(made[i][z - pair]);
        if (left != per_unit - 1) best = larger(best, part[z]);
        if (left)
          part[z] = best;
        else
          weigh(score(best, step[unit], z), unit, z);
      }
    }
  }

  void weigh(Floats score, int64_t unit, int64_t z) { weigh(&score, unit, unit + 1, z); }

  // Units that follow each other.
  void weigh(const Floats* scores, int64_t begin, int64_t end, int64_t z) {
    const Group& mine = groups[z];
    const Floats at = base[z], least = share * mass[z];
    Floats sum = mass[z];
    int64_t place = z * units + wishes[z];
    for (int64_t unit = begin; unit < end; ++unit) {
      if (!may_open(mine, unit)) continue;
      const Floats score = rounded(scores[unit - begin]), each = mass_of(score, at);
      sum += each;
      // The mass only grows: what is too little of it now stays so.
      if (first_of(each >= least) == LANES) continue;
      wished[place] = unit, wish[place] = score, ++place;
    }
    mass[z] = sum, wishes[z] = place - z * units;
  }

  // The same of old units, of which only the boxes count. Sixteen of them count as so many of their
  // mean, which is no more than they hold, where none of them can be expected to be worth opening.
  void weigh_boxes() {
    for (int64_t z = 0; z < even; z += 2) {
      weigh_sixteens(z);
      const auto hopeless = [&](const Sixteen& some) { return !promising(some, z); };
      sixteens.erase(
          std::remove_if(sixteens.begin(), sixteens.end(), hopeless), sixteens.end());
      for (size_t i = 0; i < sixteens.size(); i += 2) weigh_each(z, i);
    }
  }

  bool promising(const Sixteen& some, int64_t pair) const {
    for (int64_t z = pair; z < std::min(pair + 2, count); ++z)
      if (first_of(some.most[z - pair] >= share * mass[z]) < LANES) return true;
    return false;
  }

  // Together; `sixteens` are those of which one may be worth opening.
  void weigh_sixteens(int64_t pair) {
    const int64_t begin = oldest() / LANES, end = (groups.back().boxed + LANES - 1) / LANES;
    const int64_t next = LANES * 2 * dim, last = (end - 1) / LANES;
    const QueryNumber* half = &halves[pair * next / IN_ONE];
    alignas(64) Sums made[2][2][LANES];
    sixteens.clear();
    for (int64_t n = begin; n < end; ++n) {
      const int64_t tile = n / LANES / 2 * 2;
      if (n == begin || n % (2 * LANES) == 0)
        multiply(mean + tile * next, mean + std::min(tile + 1, last) * next, half,
                 half + next / IN_ONE, 2 * dim, made);
      Sixteen some = {n};
      const int64_t least = n * LANES, after = least + LANES;
      bool one = after <= groups.back().boxed && mean_step[n] == mean_step[n];  // all numbers
      for (int64_t unit = least; unit < after && one; ++unit) one = home[unit] == home[least];
      for (int64_t z = pair; z < std::min(pair + 2, count); ++z) {
        const Group& mine = groups[z];
        if (least >= mine.boxed || (one && home[least] != mine.document)) continue;
        if (!one || after > mine.boxed) {
          some.most[z - pair] = all(-NOTHING);
          continue;
        }
        const Sums made_of = made[n / LANES - tile][z - pair][n % LANES];
        const Floats middle = score(made_of, mean_step[n], z);
        const Floats most = middle + reach[n] * extent[z];
        some.mass[z - pair] = float(LANES) * mass_of(rounded(middle), base[z]);
        some.most[z - pair] = mass_of(rounded(most), base[z]);
        mass[z] += some.mass[z - pair];
      }
      if (promising(some, pair)) sixteens.push_back(some);
    }
  }

  // Of two sixteens each unit by itself.
  void weigh_each(int64_t pair, size_t first) {
    const int64_t next = LANES * 2 * dim, here = std::min<int64_t>(sixteens.size() - first, 2);
    const QueryNumber* half = &halves[pair * next / IN_ONE];
    const Sixteen* some = &sixteens[first];
    alignas(64) Sums made[2][2][LANES];
    multiply(box + some[0].number * next, box + some[here - 1].number * next, half,
             half + next / IN_ONE, 2 * dim, made);
    for (int64_t i = 0; i < here; ++i)
      for (int64_t z = pair; z < std::min(pair + 2, count); ++z) {
        const int64_t least = some[i].number * LANES;
        const int64_t most = std::min(least + LANES, groups[z].boxed);
        Floats scores[LANES];
        for (int64_t j = 0; j < LANES; ++j)
          scores[j] = score(made[i][z - pair][j], box_step[least + j], z);
        mass[z] -= some[i].mass[z - pair];
        weigh(scores, least, most, z);
      }
  }

  bool may_open(const Group& mine, int64_t unit) const {
    return (unit < mine.before || unit >= mine.after) && home[unit] == mine.document;
  }

  // What 16 queries ask for.
  void open(int64_t z) {
    const Group& mine = groups[z];
    Floats bound;
    for (int lane = 0; lane < LANES; ++lane) {
      const float total = base[z][lane] + std::log(mass[z][lane]);
      const int32_t own = first[mine.begin + lane];
      bound[lane] = (own == NEVER ? -1 : own) == mine.document ? total + least : -NOTHING;
    }
    int32_t* out = since + (mine.head * blocks + mine.block) * units;
    const int64_t begin = mine.block * rows;
    for (int64_t i = z * units; i < z * units + wishes[z]; ++i) {
      const int lane = first_of(wish[i] > bound);
      if (lane == LANES) continue;
      const int64_t at = prompt ? std::max<int64_t>(begin, mine.document) : mine.begin + lane;
      out[wished[i]] = std::min(out[wished[i]], int32_t(at));
    }
  }
};

}  // namespace
