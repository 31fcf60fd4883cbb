#pragma once
// The next token of each row: the largest logit, or a draw from what min_p, top_k and top_p leave.
//
// The vocabulary is never sorted and its probabilities are never stored. A row is read in tiles of kTile logits. The
// first pass takes the largest logit of every tile; greedy rows are done then. Each filter is a threshold on the weight
// e^((logit - largest) / temperature): what cannot reach it is skipped by whole tiles, and the rest, few ids as a rule,
// is searched with a histogram. Then a pass over the tiles that reach the threshold sums them, and the tile in which
// the running sum passes the random number is read once more.
//
// Weights are doubles: their rounding could move a draw past a border between two ids with a probability near 1e-11
// (floats: 1e-3 for a large vocabulary), so tokens are those of the plain-torch sampler.

#include "../row_state.h"
#include "kernels.h"
#include "vec.h"

namespace nanoinfer {

// Logits of a tile. Long enough that what is done once a tile costs little; short enough that top_k = 20 leaves most
// of a vocabulary unread.
constexpr int64_t kTile = 512;

struct Sample {
    const float* logits;         // [L, vocab], rows logits_stride apart
    const int32_t* sample_rows;  // [L] row of row_state
    int32_t* row_state;          // [num_rows, kRowStateWidth]; the last row belongs to no request
    int32_t* tokens;             // [L]
    int64_t vocab, logits_stride, num_rows;
    double* scratch;  // sample_scratch(vocab) numbers that no other thread uses
};

static constexpr int64_t tiles_of(int64_t vocab) { return (vocab + kTile - 1) / kTile; }

// Numbers that hold something for each tile, with room for a whole vector's store at the end.
static constexpr int64_t per_tile(int64_t vocab) { return tiles_of(vocab) + 16; }

// Two numbers for each id, the weights of one tile, three numbers for each tile.
static constexpr int64_t sample_scratch(int64_t vocab) {
    return (2 * tiles_of(vocab) + 1) * kTile + 3 * per_tile(vocab);
}

namespace NANOINFER_ISA {

constexpr int kHalf = kLanes / 2;
typedef double F64 __attribute__((vector_size(kHalf * 8)));
typedef int64_t I64 __attribute__((vector_size(kHalf * 8)));
typedef float HalfF32 __attribute__((vector_size(kHalf * 4)));

NANOINFER_INLINE F64 fma(F64 a, F64 b, F64 c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_pd(a, b, c);
#else
    return a * b + c;
#endif
}

// e^x for x <= 0 within 2 ulp; 0 below -708, where doubles turn subnormal. The same steps as in the float's exp.
NANOINFER_INLINE F64 exp(F64 x) {
    const F64 zero = {}, clamped = x < -708. ? zero - 708. : x;
    const F64 n = fma(clamped, zero + 0x1.71547652b82fep+0, zero + 0x1.8p52) - 0x1.8p52;
    const F64 r = fma(n, zero - 0x1.abc9e3b39803fp-56, fma(n, zero - 0x1.62e42fefa39efp-1, clamped));
    // Taylor: the first term left out is r^14 / 14! < 5e-18.
    constexpr double kTaylor[] = {
        1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040, 1. / 720,
        1. / 120,       1. / 24,       1. / 6,       1. / 2,      1.,         1.};
    F64 sum = zero + 1. / 6227020800;
    for (const double c : kTaylor) sum = fma(sum, r, zero + c);
    const I64 exponent = (__builtin_convertvector(n, I64) + 1023) << 52;
    return x < -708. ? zero : sum * bit_cast<F64>(exponent);
}

// Largest of x[0..n), or infinity where one of them is NaN.
static float maximum(const float* x, int64_t n) {
    F32 best[4];
    I32 nan = {};
    for (F32& b : best) b = broadcast(-INFINITY);  // four side by side: each waits for itself alone
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
        for (int j = 0; j < 4; ++j) {
            const F32 v = load(x + i + j * kLanes);
            best[j] = max(v, best[j]);
            nan |= v != v;
        }
    }
    const F32 all = max(max(best[0], best[1]), max(best[2], best[3]));
    float largest = reduce_max(nan ? broadcast(INFINITY) : all);
    for (; i < n; ++i) {
        if (!(x[i] <= largest)) largest = x[i] != x[i] ? INFINITY : x[i];
    }
    return largest;
}

// One row on its way to a token.
struct Row {
    const float* logits;
    int64_t vocab, tiles;
    double largest, inverse_temperature;
    float* maxima;  // [tiles] largest logit of each
    double* tops;   // [tiles] its weight
    double* sums;   // [tiles] sum of the weights that are kept
    double* tile;   // [kTile] weights of one tile
    double* kept;   // [vocab] weights that passed the filters so far
    double* spare;  // [vocab] for searches in them
};

NANOINFER_INLINE int64_t tile_size(const Row& row, int64_t tile) {
    const int64_t left = row.vocab - tile * kTile;
    return left < kTile ? left : kTile;
}

// Weights of n logits; out has room for whole vectors.
static void weigh(const Row& row, const float* logits, int64_t n, double* out) {
    for_each_vector(n, [&](int64_t i, auto count) {
        const F32 x = load(logits + i, count);
        HalfF32 halves[2];
        memcpy(halves, &x, sizeof(x));
        for (int j = 0; j < 2; ++j) {
            const F64 above = __builtin_convertvector(halves[j], F64) - row.largest;
            const F64 weight = exp(above * row.inverse_temperature);
            memcpy(out + i + j * kHalf, &weight, sizeof(weight));
        }
    });
}

// The first pass: fills maxima and largest, and returns the id of the largest logit; -1 where that is not finite.
static int32_t find_largest(Row& row) {
    float largest = -INFINITY;
    int64_t best_tile = 0;
    for (int64_t t = 0; t < row.tiles; ++t) {
        row.maxima[t] = maximum(row.logits + t * kTile, tile_size(row, t));
        if (row.maxima[t] > largest) {
            largest = row.maxima[t];
            best_tile = t;
        }
    }
    if (largest == INFINITY || largest == -INFINITY) return -1;
    row.largest = largest;
    int64_t id = best_tile * kTile;
    while (row.logits[id] != largest) ++id;
    return int32_t(id);
}

enum class Measure { count, mass };

// The first of n >= 1 weights, from the largest down, at which the running count or sum reaches `goal`; if none does,
// the smallest. `spare` has room for n.
//
// Radix search: a non-negative double's bits order as it does. Each round splits the weights by 9 bits, the highest
// first (seven rounds make 63), and goes on with the part in which the running measure reaches the goal.
static double reach(const double* weights, int64_t n, Measure measure, double goal, double* spare) {
    constexpr int kDigit = 9, kParts = 1 << kDigit;
    double above = 0;  // measure of the weights that are larger than those that are left
    for (int shift = 63 - kDigit; shift >= 0; shift -= kDigit) {
        const auto part_of = [&](double weight) { return int((bit_cast<uint64_t>(weight) >> shift) % kParts); };
        double parts[kParts] = {};
        bool filled[kParts] = {};
        for (int64_t i = 0; i < n; ++i) {
            const int part = part_of(weights[i]);
            parts[part] += measure == Measure::mass ? weights[i] : 1;
            filled[part] = true;
        }
        int found = -1;
        for (int part = kParts - 1; part >= 0; --part) {
            if (!filled[part]) continue;
            if (found >= 0) above += parts[found];
            found = part;
            if (above + parts[part] >= goal) break;
        }
        int64_t left = 0;
        for (int64_t i = 0; i < n; ++i) {
            spare[left] = weights[i];
            left += part_of(weights[i]) == found;
        }
        weights = spare;
        n = left;
    }
    return weights[0];
}

// Sum of the weights of a tile that are kept; weighs it again into row.tile, the others as 0.
static double keep_tile(const Row& row, int64_t t, double bound) {
    const int64_t size = tile_size(row, t);
    weigh(row, row.logits + t * kTile, size, row.tile);
    for (int64_t i = size; i < kTile; ++i) row.tile[i] = 0;
    F64 sums[4] = {};
    for (int64_t i = 0; i < kTile; i += 4 * kHalf) {
        for (int j = 0; j < 4; ++j) {
            F64 weight;
            memcpy(&weight, row.tile + i + j * kHalf, sizeof(weight));
            weight = weight >= bound ? weight : F64{};
            memcpy(row.tile + i + j * kHalf, &weight, sizeof(weight));
            sums[j] += weight;
        }
    }
    const F64 four = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double sum = 0;
    for (int lane = 0; lane < kHalf; ++lane) sum += four[lane];
    return sum;
}

// What the filters of a row ask for; top_k 0, top_p 1 and min_p 0 let everything through.
struct Filters {
    int64_t top_k;
    double top_p, min_p;
};

// Collects in row.kept the weights of at least `bound`, and returns how many. Tiles that do not reach the bound are
// skipped, unless all are to be summed up in `total`.
static int64_t collect(const Row& row, double bound, bool sum_all, double& total) {
    int64_t n = 0;
    for (int64_t t = 0; t < row.tiles; ++t) {
        if (row.tops[t] < bound && !sum_all) continue;
        total += keep_tile(row, t, 0);
        for (int64_t i = 0; i < tile_size(row, t) && row.tops[t] >= bound; ++i) {
            row.kept[n] = row.tile[i];
            n += row.tile[i] >= bound;
        }
    }
    return n;
}

// A weight that top_k and min_p keep nothing below, found without looking into the tiles.
static double lower_bound(const Row& row, const Filters& filters) {
    if (filters.top_k == 0 || filters.top_k > row.tiles) return filters.min_p;
    // At least top_k weights, one a tile, reach the top_k-th largest of the tiles' largest.
    const double bound = reach(row.tops, row.tiles, Measure::count, double(filters.top_k), row.spare);
    return bound > filters.min_p ? bound : filters.min_p;
}

// The smallest weight that the filters keep.
static double threshold(const Row& row, const Filters& filters) {
    if (filters.top_k == 0 && filters.top_p == 1) return filters.min_p;
    // With top_p alone, what top_k and min_p would have dropped counts in the total. Weights below this bound sum up to
    // less than half of 1 - top_p, and the largest is 1: the others reach top_p of the total without them.
    const bool top_p_alone = filters.top_k == 0 && filters.min_p == 0;
    double bound = top_p_alone ? (1 - filters.top_p) / (2 * double(row.vocab)) : lower_bound(row, filters);
    double total = 0;
    const int64_t n = collect(row, bound, top_p_alone, total);
    if (0 < filters.top_k && filters.top_k < n) {
        bound = reach(row.kept, n, Measure::count, double(filters.top_k), row.spare);
    }
    if (filters.top_p == 1) return bound;
    if (!top_p_alone) {
        total = 0;
        for (int64_t i = 0; i < n; ++i) total += row.kept[i] >= bound ? row.kept[i] : 0;
    }
    const double nucleus = reach(row.kept, n, Measure::mass, filters.top_p * total, row.spare);
    return nucleus > bound ? nucleus : bound;
}

// The id at which the running sum of the kept weights passes u times their total.
static int32_t pick(const Row& row, double bound, double u) {
    double total = 0;
    for (int64_t t = 0; t < row.tiles; ++t) {
        row.sums[t] = row.tops[t] < bound ? 0 : keep_tile(row, t, bound);
        total += row.sums[t];
    }
    // Rounding may bring u * total up to the total: the last tile, and in it the last id, that has any weight serves
    // then.
    const double goal = u * total;
    double before = 0, running = 0;
    int64_t tile = 0;
    for (int64_t t = 0; t < row.tiles && running <= goal; ++t) {
        if (row.sums[t] == 0) continue;
        before = running;
        running += row.sums[t];
        tile = t;
    }
    keep_tile(row, tile, bound);
    int64_t id = 0;
    running = before;
    for (int64_t i = 0; i < kTile && running <= goal; ++i) {
        if (row.tile[i] == 0) continue;
        running += row.tile[i];
        id = i;
    }
    return int32_t(tile * kTile + id);
}

// A number in [0, 1) with 53 random bits from (seed, position): Philox4x32 with ten rounds (Salmon et al., SC 2011).
static double uniform(uint32_t seed_lo, uint32_t seed_hi, uint32_t position) {
    uint32_t c[4] = {position, 0, 0, 0}, key[2] = {seed_lo, seed_hi};
    for (int round = 0; round < 10; ++round) {
        const uint64_t first = uint64_t(0xD2511F53) * c[0], second = uint64_t(0xCD9E8D57) * c[2];
        c[0] = uint32_t(second >> 32) ^ c[1] ^ key[0];
        c[1] = uint32_t(second);
        c[2] = uint32_t(first >> 32) ^ c[3] ^ key[1];
        c[3] = uint32_t(first);
        key[0] += 0x9E3779B9;
        key[1] += 0xBB67AE85;
    }
    return (double(c[0] >> 5) * 0x1p26 + double(c[1] >> 6)) * 0x1p-53;
}

static int32_t sample_row(const Sample& p, const float* logits, const int32_t* state) {
    const float temperature = bit_cast<float>(state[kTemperature]);
    double* const spare = p.scratch + tiles_of(p.vocab) * kTile;
    double* const tile = spare + tiles_of(p.vocab) * kTile;
    Row row = {
        .logits = logits,
        .vocab = p.vocab,
        .tiles = tiles_of(p.vocab),
        .largest = 0,
        .inverse_temperature = 1 / double(temperature),
        .maxima = reinterpret_cast<float*>(tile + kTile),
        .tops = tile + kTile + per_tile(p.vocab),
        .sums = tile + kTile + 2 * per_tile(p.vocab),
        .tile = tile,
        .kept = p.scratch,
        .spare = spare,
    };
    const int32_t best = find_largest(row);
    if (best < 0 || temperature == 0) return best;
    weigh(row, row.maxima, row.tiles, row.tops);
    const bool use_k = 0 < state[kTopK] && state[kTopK] < p.vocab;
    const Filters filters = {
        .top_k = use_k ? state[kTopK] : 0,
        .top_p = bit_cast<float>(state[kTopP]),
        .min_p = bit_cast<float>(state[kMinP]),
    };
    return pick(row, threshold(row, filters),
                uniform(uint32_t(state[kSeedLo]), uint32_t(state[kSeedHi]), uint32_t(state[kLength])));
}

static inline void sample(const Sample& p, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        p.tokens[i] = -1;
        if (p.sample_rows[i] == p.num_rows - 1) continue;
        int32_t* state = p.row_state + int64_t(p.sample_rows[i]) * kRowStateWidth;
        const int32_t token = sample_row(p, p.logits + i * p.logits_stride, state);
        p.tokens[i] = token;
        state[kLastToken] = token < 0 ? 0 : token;
        ++state[kLength];
    }
}

}  // namespace NANOINFER_ISA
}  // namespace nanoinfer
