#pragma once
// What the sampler's passes share: arguments, workspace, a row's parameters, its weights and bins.
//
// The vocabulary is never sorted and its probabilities are never stored. Two kernels:
// - scan reads all logits once, a block for each slice of a row. Of the slice it writes the largest logit and the mass
//   relative to it; where the row has filters, the largest logit of every tile; and where these will not tell where the
//   filters' threshold lies, the mass of every bin, a bin being 1/16 to 1/8 of an octave of weights.
// - pick, one block a row, lists the logits that may be the threshold, and finds it among them; then the slice in which
//   the random number falls; and in that the id.
//
// top_k 50 keeps no logit that less than 50 tiles reach, and what min_p keeps the largest logit tells: such rows need
// no bins.
//
// Masses are integers: a weight, e^((logit - largest) / temperature) as a float, in units of 2^-42. Their sums depend
// on no order, so atomics may add them up, and a token is the same every time.

#include <float.h>

#include "../row_state.h"
#include "vec.cuh"

namespace nanoinfer::cuda {

struct Sample {
    const float* logits;         // [rows, vocab], rows logits_stride apart
    const int32_t* sample_rows;  // [rows] row of row_state
    int32_t* row_state;          // [num_rows, kRowStateWidth]; the last row belongs to no request
    int32_t* tokens;             // [rows]
    int64_t rows, vocab, logits_stride, num_rows;
    void* workspace;  // sample_workspace(rows, vocab) bytes
};

constexpr int kLane = 4;  // logits of a tile that a lane has: with one load, where rows are aligned
constexpr int kTile = kWarp * kLane;
constexpr int kScanThreads = 256;
constexpr int kScanWarps = kScanThreads / kWarp;
constexpr int kScanTiles = 8;  // a warp's tiles of a slice: all under way at once, 32 KB a block, and in registers
constexpr int kSliceTiles = kScanWarps * kScanTiles;
constexpr int kSliceSize = kSliceTiles * kTile;
constexpr int kMaxSlices = 64;  // 2^19 weights of up to 2^42 units stay far from 2^64
constexpr int64_t kMaxVocab = int64_t(kMaxSlices) * kSliceSize;

using Mass = unsigned long long;

// Room for logits that may be the threshold. A smaller vocabulary fits as a whole, and needs no bins.
constexpr int kListRoom = kSliceSize;
// The first 511 bins reach down to 2^-32 of the largest weight or further, the last has all that is smaller.
constexpr int kBins = 512;
constexpr int kRest = kBins - 1;
// Mass of a bin: of each logit the part of the bin's upper edge's weight that it has, in units of 2^-18. A slice's 2^13
// logits fit in 32 bits, for which shared memory has an addition of its own.
constexpr float kBinUnits = 0x1p18f;

// What a scan finds in a slice.
struct SliceSum {
    float largest;  // NaN if any logit is
    int best;       // lowest id of the largest; of greedy rows only
    Mass mass;      // relative to `largest`; of other rows only
};

struct Workspace {
    SliceSum* sums;  // [rows, slices]
    float* maxima;   // [rows, slices, kSliceTiles] largest logit of each tile; of rows with filters only
    uint32_t* bins;  // [rows, slices, kBins] from the bin of the slice's largest logit downwards; of binned rows only
};

__host__ __device__ inline int slices_of(int64_t vocab) { return int((vocab + kSliceSize - 1) / kSliceSize); }

inline int64_t sample_workspace(int64_t rows, int64_t vocab) {
    return rows * slices_of(vocab) * int64_t(sizeof(SliceSum) + kSliceTiles * sizeof(float) + kBins * sizeof(uint32_t));
}

// The parts that belong to slice `slice` of row i, and those after them.
__device__ inline Workspace workspace_at(const Sample& p, int64_t i, int slice) {
    const int64_t slices = slices_of(p.vocab), at = i * slices + slice, all = p.rows * slices;
    SliceSum* sums = static_cast<SliceSum*>(p.workspace);
    float* maxima = reinterpret_cast<float*>(sums + all);
    uint32_t* bins = reinterpret_cast<uint32_t*>(maxima + all * kSliceTiles);
    return {sums + at, maxima + at * kSliceTiles, bins + at * kBins};
}

// Row of the table that row i of the logits belongs to, or -1 for padding and what is out of range.
__device__ inline int table_row(const Sample& p, int64_t i) {
    const int row = p.sample_rows[i];
    return row >= 0 && row < p.num_rows - 1 ? row : -1;
}

constexpr float kLeastWeight = 0x1p-43f;  // what is smaller has no mass

// A row's sampling parameters, made ready.
struct RowParams {
    bool greedy, filtered, binned;
    int top_k;  // 0: off
    float top_p, min_p;
    // log2(e) / temperature as the sum of two floats, both positive: one alone would be wrong by 1e-7 of the exponent.
    float rate, rate_low;
    float depth;           // logits further below the row's largest need not be looked at; of filtered rows only
    float bins_per_logit;  // a power of two, so that multiplying by it rounds nothing
};

__device__ inline RowParams row_params(const Sample& p, int row) {
    const int32_t* state = p.row_state + int64_t(row) * kRowStateWidth;
    constexpr float kLog2E = 1.44269502f, kLog2ELow = 1.92596303e-8f;  // together log2(e)
    RowParams r;
    const float temperature = fminf(__int_as_float(state[kTemperature]), 1e30f);  // beyond, the rate is subnormal
    r.greedy = temperature == 0;
    r.top_k = state[kTopK] > 0 && state[kTopK] < p.vocab ? state[kTopK] : 0;
    r.top_p = __int_as_float(state[kTopP]);
    r.min_p = __int_as_float(state[kMinP]);
    r.filtered = !r.greedy && (r.top_k > 0 || r.top_p < 1 || r.min_p > 0);
    const bool tiles_tell = r.top_k == 0 ? r.top_p >= 1 : r.top_k <= p.vocab / kTile / 2;
    r.binned = r.filtered && !tiles_tell && p.vocab > kListRoom;
    // A little less than the quotient, so that what is missing is positive.
    r.rate = kLog2E / temperature * (1 - 0x1p-22f);
    r.rate_low = (fmaf(-r.rate, temperature, kLog2E) + kLog2ELow) / temperature;
    // Of top_p alone: weights below this hold less than half of what the nucleus may leave, as the largest alone is 1.
    const float beyond_nucleus = (1 - r.top_p) / (2 * float(p.vocab));
    const float smallest = r.min_p > 0 ? r.min_p : r.top_k > 0 ? 0 : beyond_nucleus;
    r.depth = (0.01f - log2f(fmaxf(smallest, kLeastWeight))) / r.rate;
    r.bins_per_logit = __int_as_float(__float_as_int(16 * r.rate) & 0x7f800000);  // largest 2^n <= 16 rate
    return r;
}

__device__ inline float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// e^((logit - largest) / temperature); 0 for -infinity, which both rates, being positive, leave as it is.
__device__ inline float weigh(const RowParams& r, float logit, float largest) {
    const float below = logit - largest;
    return exp2_of(fmaf(below, r.rate, below * r.rate_low));
}

// Sums of weights in units of 2^-21, and of what these leave in units of 2^-42. A float close to 2^23 has an integer in
// its last bits: that takes the place of conversions, of which an SM makes 16 a cycle. Its other bits are the same
// every time, and subtracted once at the end; the sums may overflow on the way there.
struct MassParts {
    uint32_t high = 0, low = 0;

    __device__ void add(float weight) {
        const float units = fmaf(weight, 0x1p21f, 0x1p23f);
        const float rest = fmaf(weight, 0x1p21f, 0x1p23f - units);  // exact, in [-1/2, 1/2]
        high += __float_as_uint(units);
        low += __float_as_uint(fmaf(rest, 0x1p21f, 0x1.8p23f));
    }
    // Of `count` weights, at most 2^10.
    __device__ Mass sum(uint32_t count) const {
        const uint32_t whole = high - count * __float_as_uint(0x1p23f), rest = low - count * __float_as_uint(0x1.8p23f);
        return (Mass(whole) << 21) + int64_t(int32_t(rest));
    }
};

__device__ inline Mass to_mass(float weight) {
    MassParts parts;
    parts.add(weight);
    return parts.sum(1);
}

// NaN if one of them is.
struct Largest {
    __device__ float operator()(float a, float b) const {
        float c;
        asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
        return c;
    }
};

struct Smallest {
    __device__ int operator()(int a, int b) const { return min(a, b); }
};

__device__ inline bool finite(float x) { return fabsf(x) <= FLT_MAX; }

// Unsigned integers that order as floats do.
__device__ inline uint32_t key_of(float x) {
    const uint32_t bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 1u << 31;
}
__device__ inline float float_of(uint32_t key) { return __uint_as_float(key >> 31 ? key & ~(1u << 31) : ~key); }

// Id within its tile of the n-th logit of a lane. kVec: logits in a load.
template <int kVec>
__device__ inline int id_in_tile(int lane, int n) {
    return kVec == kLane ? lane * kLane + n : n * kWarp + lane;
}

// The lane's logits of a tile that does not go past the vocabulary.
template <int kVec>
__device__ inline void load_whole_tile(const float* logits, int tile, float (&x)[kLane]) {
    const float* first = logits + tile * kTile + id_in_tile<kVec>(threadIdx.x % kWarp, 0);
    if constexpr (kVec == kLane) {
        const Vec<float, kVec> v = load<float, kVec>(first);
        for (int n = 0; n < kLane; ++n) x[n] = v.at[n];
    } else {
        for (int n = 0; n < kLane; ++n) x[n] = first[n * kWarp];
    }
}

// Of any tile; -infinity past the vocabulary.
template <int kVec>
__device__ inline void load_tile(const float* logits, int64_t vocab, int tile, float (&x)[kLane]) {
    if ((tile + 1) * kTile <= vocab) return load_whole_tile<kVec>(logits, tile, x);
    for (int n = 0; n < kLane; ++n) {
        const int id = tile * kTile + id_in_tile<kVec>(threadIdx.x % kWarp, n);
        x[n] = id < vocab ? logits[id] : -INFINITY;
    }
}

// What a warp of a scan has of a slice: each thread kScanTiles * kLane logits, whose ids ascend.
template <int kVec>
__device__ inline void load_slice(const float* logits, int64_t vocab, int slice, float (&x)[kScanTiles][kLane]) {
    const int first = slice * kSliceTiles + threadIdx.x / kWarp;  // the warp's first tile
    if (int64_t(slice + 1) * kSliceSize <= vocab) {               // without conditions all loads leave at once
#pragma unroll
        for (int j = 0; j < kScanTiles; ++j) load_whole_tile<kVec>(logits, first + j * kScanWarps, x[j]);
    } else {
#pragma unroll
        for (int j = 0; j < kScanTiles; ++j) load_tile<kVec>(logits, vocab, first + j * kScanWarps, x[j]);
    }
}

// Id within the slice of the thread's n-th logit.
template <int kVec>
__device__ inline int id_in_slice(int n) {
    const int tile = n / kLane * kScanWarps + threadIdx.x / kWarp;
    return tile * kTile + id_in_tile<kVec>(threadIdx.x % kWarp, n % kLane);
}

// Lowest id in the slice of a logit that equals `largest`, as the thread sees it; kSliceSize where none does.
template <int kVec>
__device__ inline int find_best(const float (&x)[kScanTiles][kLane], float largest) {
    int best = kSliceSize;
#pragma unroll
    for (int n = kScanTiles * kLane - 1; n >= 0; --n) {
        if (x[n / kLane][n % kLane] == largest) best = id_in_slice<kVec>(n);
    }
    return best;
}

// Sums of all threads' values up to and including this one's, kN of them side by side, in one order. `scratch`: values
// a warp; the first barrier waits for those who still read it after an earlier call.
template <typename T, int kN>
__device__ inline void sum_through(T (&values)[kN], T (*scratch)[kN]) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    for (int n = 0; n < kN; ++n) {
        for (int apart = 1; apart < kWarp; apart *= 2) {
            const T before = __shfl_up_sync(~0u, values[n], apart);
            if (lane >= apart) values[n] += before;
        }
    }
    __syncthreads();
    if (lane == kWarp - 1) {
        for (int n = 0; n < kN; ++n) scratch[warp][n] = values[n];
    }
    __syncthreads();
    for (int n = 0; n < kN; ++n) {
        T before = 0;
        for (int w = 0; w < warp; ++w) before += scratch[w][n];
        values[n] += before;
    }
}

}  // namespace nanoinfer::cuda
