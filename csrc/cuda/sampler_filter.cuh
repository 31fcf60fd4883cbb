#pragma once
// min_p, top_k and top_p as one threshold: first the tiles in which it can lie, then a list of the logits that may be
// it, then the exact logit. All by one block.

#include "sampler_row.cuh"

namespace nanoinfer::cuda {

constexpr int kPickThreads = 512;  // two blocks an SM have 64 registers a thread
constexpr int kPickWarps = kPickThreads / kWarp;
// Room for logits that may be the threshold. A language model's row has a few of them.
constexpr int kListRoom = 4096;
// Where there are more, their masses in bins tell which of them are close to it. A bin is 1/16 to 1/8 of an octave of
// weights wide: of 151,936 logits from a normal distribution it has up to 3000. The first 511 reach down to 2^-32 of
// the largest weight or further; the last, kRest, has all that is smaller.
constexpr int kBins = kPickThreads;
constexpr int kRest = kBins - 1;

struct Candidate {
    float logit;
    int id;
};

// Bins, counted from the row's largest logit downwards, in which thresholds lie.
struct Plan {
    int nucleus_first, nucleus_last;  // of top_p
    int cut;                          // first bin in which top_k may cut; kBins if it is off
    int last;                         // bins past this one are dropped

    __device__ bool has_candidates(int bin) const {
        return bin >= cut || (nucleus_first <= bin && bin <= nucleus_last);
    }
};

// Mass of a row's logits outside the bins with candidates.
struct Outside {
    Mass kept;   // above the nucleus's first bin, or where there is none, above the cut
    Mass inner;  // between the nucleus's last bin and the cut: dropped, but a part of the mass that top_p is of
    int count;   // logits above the cut, in bins with candidates or not
};

// What the block shares.
struct Pick {
    union {
        Candidate list[kListRoom];  // until the threshold is known,
        float logits[kSliceSize];   // then the slice in which the draw falls
    };
    int listed;                        // candidates, also those for which the list has no room
    uint32_t low[kBins], high[kBins];  // halves of the mass of each slice, or of each digit; `low` alone: of each bin
    double bound_scratch[kPickWarps][4];
    Mass mass_scratch[kPickWarps];
    Mass through_scratch[kPickWarps][1];
    float largest_scratch[kPickWarps];
    int count_scratch[kPickWarps];
    double least_total, most_total;
    int first_bins[4];  // lowest bin of which something is true
    Mass goal;
    uint32_t found;  // digit, slice or id in which a running sum passes the goal
    Mass before;     // the sum before it
    Mass mass;       // its own
};

// Shared memory has no addition of 64 bits: two of 32, and the carry of the lower one.
__device__ inline void add_mass(Pick& shared, int at, Mass mass) {
    const uint32_t low = uint32_t(mass), before = atomicAdd(shared.low + at, low);
    atomicAdd(shared.high + at, uint32_t(mass >> 32) + (before + low < before));
}
__device__ inline Mass mass_at(const Pick& shared, int at) { return Mass(shared.high[at]) << 32 | shared.low[at]; }

// A row on its way to its threshold.
struct Row {
    const RowParams& r;
    const float* logits;
    const float* maxima;  // of its tiles
    int64_t vocab;
    float largest;
    int top;  // bin of `largest`

    // Bin of a logit, counted in bins from logit 0 upwards; saturates far beyond any sensible logit.
    __device__ static int bin_of(const RowParams& r, float logit) { return __float2int_rd(logit * r.bins_per_logit); }
    // Bins from the largest logit down to this one. Unsigned, as the difference may have 32 bits.
    __device__ int bins_below(float logit) const {
        return int(min(uint32_t(top) - uint32_t(bin_of(r, logit)), uint32_t(kRest)));
    }
    // So far from 0 that a bin has no more than a few floats, edges say nothing.
    __device__ bool has_edges() const { return fabsf(largest) * r.bins_per_logit < 0x1p22f; }
    // Weight at a bin's upper edge, which is exact: an integer and a power of two.
    __device__ float weight_above(int bin) const { return weigh(r, float(top - bin + 1) / r.bins_per_logit, largest); }
};

// The last bin that the filters may keep, by what the tiles' largest logits tell. As many tiles as top_k have a logit
// in it or above. Of top_p alone: weights below (1 - top_p) / (2 vocab) hold less than half of what the nucleus may
// leave, as the largest weight alone is 1.
__device__ inline int last_bin(const Row& row, Pick& shared) {
    const RowParams& r = row.r;
    const float smallest = r.min_p > 0 ? r.min_p : r.top_k > 0 ? 0 : (1 - r.top_p) / (2 * float(row.vocab));
    shared.low[threadIdx.x] = 0;
    if (threadIdx.x == 0) shared.first_bins[0] = kRest;
    __syncthreads();  // bins are empty
    for (int tile = threadIdx.x; r.top_k > 0 && tile * kTile < row.vocab; tile += kPickThreads) {
        const int bin = row.bins_below(row.maxima[tile]);
        if (bin < kRest) atomicAdd(shared.low + bin, 1);
    }
    __syncthreads();  // all tiles are counted
    Mass through[1] = {shared.low[threadIdx.x]};
    sum_through(through, shared.through_scratch);
    const bool enough = r.top_k > 0 && through[0] >= r.top_k;
    const bool small = row.has_edges() && row.weight_above(threadIdx.x) < smallest * 0.999f;
    if (enough || small) atomicMin(shared.first_bins, int(threadIdx.x));
    __syncthreads();  // the first one is known
    return shared.first_bins[0];
}

// visit(logit, id, bin, mass) for each logit of the row that is not dropped for sure, then flush(slice) once for all
// that the lane has seen of a slice; the warp's lanes call flush together. Stops early where `enough()` says so.
template <int kVec, typename Visit, typename Flush, typename Enough>
__device__ inline void for_each_logit(const Row& row, int last, Visit visit, Flush flush, Enough enough) {
    constexpr int kAhead = kVec == kLane ? 4 : 2;  // tiles under way; more would not stay in registers
    const int lane = threadIdx.x % kWarp, tiles = int((row.vocab + kTile - 1) / kTile);
    // A warp takes 32 neighbouring tiles at a time, which belong to one slice.
    for (int first = threadIdx.x / kWarp * kWarp; first < tiles; first += kPickThreads) {
        const float own = first + lane < tiles ? row.maxima[first + lane] : -INFINITY;
        uint32_t wanted = __ballot_sync(~0u, row.bins_below(own) <= last);
        while (wanted != 0 && !enough()) {
            int tile[kAhead];
            float x[kAhead][kLane];
#pragma unroll
            for (int n = 0; n < kAhead; ++n) {
                tile[n] = wanted != 0 ? first + __ffs(wanted) - 1 : tiles;  // `tiles`: none
                wanted &= wanted - 1;
                load_tile<kVec>(row.logits, tile[n] < tiles ? row.vocab : 0, tile[n], x[n]);
            }
#pragma unroll
            for (int n = 0; n < kAhead * kLane; ++n) {
                const float logit = x[n / kLane][n % kLane], weight = weigh(row.r, logit, row.largest);
                const int bin = row.bins_below(logit);
                const Mass mass = bin > last || weight < row.r.min_p ? 0 : to_mass(weight);
                if (mass > 0) visit(logit, tile[n / kLane] * kTile + id_in_tile<kVec>(lane, n % kLane), bin, mass);
            }
        }
        flush(first / kSliceTiles);
    }
}

// Fills the list with candidates, and adds to each slice's mass what is kept for sure. The list is too small where
// shared.listed says so; the rest means nothing then, unless the plan is `final`.
template <int kVec>
__device__ inline Outside collect(const Row& row, const Plan& plan, bool final, Pick& shared) {
    shared.low[threadIdx.x] = shared.high[threadIdx.x] = 0;
    if (threadIdx.x == 0) shared.listed = 0;
    __syncthreads();  // list and masses are empty
    Outside own = {0, 0, 0};
    Mass kept = 0;  // since the last flush
    const auto visit = [&](float logit, int id, int bin, Mass mass) {
        own.count += bin < plan.cut;
        if (plan.has_candidates(bin)) {
            const int at = atomicAdd(&shared.listed, 1);
            if (at < kListRoom) shared.list[at] = {logit, id};
        } else if (bin < plan.nucleus_first) {
            kept += mass;
        } else {
            own.inner += mass;
        }
    };
    const auto flush = [&](int slice) {
        const Mass sum = warp_reduce(kept, Add());
        if (threadIdx.x % kWarp == 0 && sum > 0) add_mass(shared, slice, sum);
        own.kept += kept;
        kept = 0;
    };
    for_each_logit<kVec>(row, plan.last, visit, flush, [&] { return !final && shared.listed > kListRoom; });
    own.kept = block_reduce(own.kept, Add(), Mass(0), shared.mass_scratch);  // its barriers also let all see the list
    own.inner = block_reduce(own.inner, Add(), Mass(0), shared.mass_scratch);
    own.count = block_reduce(own.count, Add(), 0, shared.count_scratch);
    return own;
}

// A logit's part in its bin's mass, in units of 2^-11 of the upper edge's weight: 2^19 of them fit in 32 bits, for
// which shared memory has an addition of its own.
constexpr float kBinUnits = 0x1p11f;

__device__ inline uint32_t mass_in_bin(const RowParams& r, float logit) {
    const float at = logit * r.bins_per_logit;
    const float t = (at - floorf(at) - 1) * (r.rate / r.bins_per_logit);  // octaves below the edge, at most 1/8
    // 2^t: the first term left out of its series is below 3e-6.
    const float weight = fmaf(t, fmaf(t, fmaf(t, 0.0555041087f, 0.240226507f), 0.693147181f), 1.f);
    return __float_as_uint(fmaf(weight, kBinUnits, 0x1p23f)) - __float_as_uint(0x1p23f);
}

// Bounds of one bin, then of all bins through it: mass, in weights, and number of logits at the least and at the most.
// A unit is 5e-4 of a logit's part.
enum { kLeast, kMost, kFewest, kMany };
constexpr double kDoubt = 3e-4;

__device__ inline void load_bounds(const Row& row, const Pick& shared, double (&bounds)[4]) {
    const int bin = threadIdx.x;
    const float upper = row.weight_above(bin);
    const double units = double(shared.low[bin]) / kBinUnits;
    bounds[kLeast] = units * upper * (1 - kDoubt);
    bounds[kMost] = units * upper * (1 + kDoubt);
    bounds[kFewest] = units * (1 - kDoubt);
    bounds[kMany] = units * exp2f(row.r.rate / row.r.bins_per_logit) * (1 + kDoubt);
    if (bin < kRest) return;
    bounds[kMost] = double(row.vocab) * upper;
    bounds[kFewest] = bounds[kMany] = double(row.vocab);
}

// The bins of the row's thresholds, none past `last`. `all`: the mass of the whole row, in weights.
template <int kVec>
__device__ inline Plan find_bins(const Row& row, int last, double all, Pick& shared) {
    enum { kCut, kDeepestCut, kNucleusFirst, kNucleusLast };
    const RowParams& r = row.r;
    const int bin = threadIdx.x;
    const bool whole = r.top_k == 0 && r.min_p == 0;  // then top_p is of the mass of the whole row
    shared.low[bin] = 0;
    if (bin < 4) shared.first_bins[bin] = kRest;
    if (bin == 0) {
        shared.least_total = whole ? all * (1 - kDoubt) : 0;
        shared.most_total = all * (1 + kDoubt);
    }
    __syncthreads();  // bins are empty
    const auto visit = [&](float logit, int, int own, Mass) {
        if (own < kRest) atomicAdd(shared.low + own, mass_in_bin(r, logit));
    };
    for_each_logit<kVec>(row, last, visit, [](int) {}, [] { return false; });
    __syncthreads();  // bins are full
    double bounds[4];
    load_bounds(row, shared, bounds);
    sum_through(bounds, shared.bound_scratch);
    const auto note = [&](int what, bool holds) {
        if (holds) atomicMin(shared.first_bins + what, bin);
    };
    note(kCut, r.top_k > 0 && bounds[kMany] >= r.top_k);
    note(kDeepestCut, r.top_k > 0 && bounds[kFewest] >= r.top_k);
    __syncthreads();  // the cut is known
    const int cut = r.top_k > 0 ? shared.first_bins[kCut] : kBins, deepest = min(last, shared.first_bins[kDeepestCut]);
    if (!whole && bin == min(cut - 1, kRest)) shared.least_total = bounds[kLeast];
    if (!whole && bin == deepest) shared.most_total = bounds[kMost];
    __syncthreads();  // both totals are known
    note(kNucleusFirst, bounds[kMost] >= r.top_p * shared.least_total);
    note(kNucleusLast, bounds[kLeast] >= r.top_p * shared.most_total);
    __syncthreads();
    if (r.top_p >= 1) return {kBins, -1, cut, deepest};
    const int nucleus_last = min(deepest, shared.first_bins[kNucleusLast]);
    return {min(deepest, shared.first_bins[kNucleusFirst]), nucleus_last, cut, whole ? nucleus_last : deepest};
}

// visit(logit, id, bin, mass) for each candidate: those in the list, or, where it has no room for all, in the row.
template <int kVec, typename Visit>
__device__ inline void for_each_candidate(const Row& row, const Plan& plan, const Pick& shared, Visit visit) {
    if (shared.listed <= kListRoom) {
        for (int n = threadIdx.x; n < shared.listed; n += kPickThreads) {
            const Candidate& c = shared.list[n];
            visit(c.logit, c.id, row.bins_below(c.logit), to_mass(weigh(row.r, c.logit, row.largest)));
        }
        return;
    }
    // Rare, as where whole vocabularies have one logit: not worth the code of for_each_logit.
    for (int id = threadIdx.x; id < row.vocab; id += kPickThreads) {
        const float logit = row.logits[id], weight = weigh(row.r, logit, row.largest);
        const int bin = row.bins_below(logit);
        const Mass mass = bin > plan.last || weight < row.r.min_p ? 0 : to_mass(weight);
        if (mass > 0 && plan.has_candidates(bin)) visit(logit, id, bin, mass);
    }
}

// The largest logit t such that the candidates from t upwards have at least `goal` together of what measure(logit, bin,
// mass) says; the lowest one with any if all have less, and -infinity if none has any. `candidates(visit)` visits them.
//
// Radix search: four rounds of 8 bits, each going on with the digit in which the sum, from the largest down, reaches
// the goal.
template <typename Candidates, typename Measure>
__device__ inline float reach(Pick& shared, Mass goal, Candidates candidates, Measure measure) {
    constexpr int kDigits = 256;
    uint32_t prefix = 0;  // digits known so far
    for (int shift = 24; shift >= 0; shift -= 8) {
        shared.low[threadIdx.x] = shared.high[threadIdx.x] = 0;
        __syncthreads();  // all digits are cleared
        // Neighbours often share a digit, and in the first rounds all do: what they have is joined first.
        int digit = 0;
        Mass run = 0;
        candidates([&](float logit, int, int bin, Mass mass) {
            const uint32_t key = key_of(logit);
            if (shift < 24 && key >> (shift + 8) != prefix >> (shift + 8)) return;
            const int own = key >> shift & (kDigits - 1);
            if (own != digit && run > 0) add_mass(shared, digit, run);
            run = (own == digit ? run : 0) + measure(logit, bin, mass);
            digit = own;
        });
        if (run > 0) add_mass(shared, digit, run);
        __syncthreads();  // all candidates are counted
        const int descending = (kDigits - 1 - int(threadIdx.x)) & (kDigits - 1);
        const Mass own = threadIdx.x < kDigits ? mass_at(shared, descending) : 0;
        Mass through[1] = {own};
        sum_through(through, shared.through_scratch);
        if (threadIdx.x == kPickThreads - 1) shared.goal = min(goal, through[0]);
        __syncthreads();
        if (shared.goal == 0) return -INFINITY;
        if (through[0] - own < shared.goal && shared.goal <= through[0]) {
            shared.found = descending;
            shared.before = through[0] - own;
        }
        __syncthreads();  // one thread has found its digit
        prefix |= shared.found << shift;
        goal = shared.goal - shared.before;
    }
    return float_of(prefix);
}

// Leaves in `shared` the mass of each slice that the filters keep, and returns their threshold, the lowest logit kept.
// `all`: the mass of the whole row.
template <int kVec>
__device__ inline float apply_filters(const Row& row, Mass all, Pick& shared) {
    const RowParams& r = row.r;
    Plan plan = {kBins, kRest, 0, last_bin(row, shared)};  // all logits that may be kept are candidates
    Outside outside = collect<kVec>(row, plan, false, shared);
    if (shared.listed > kListRoom) {
        __syncthreads();  // all have seen that
        if (row.has_edges()) plan = find_bins<kVec>(row, plan.last, double(all) * 0x1p-42, shared);
        outside = collect<kVec>(row, plan, true, shared);
    }
    const Mass kept = mass_at(shared, threadIdx.x);  // of slice threadIdx.x
    const auto candidates = [&](auto visit) { for_each_candidate<kVec>(row, plan, shared, visit); };
    float threshold = -INFINITY;
    if (r.top_k > 0) {
        threshold = reach(shared, max(r.top_k - outside.count, 1), candidates,
                          [&](float, int bin, Mass) { return Mass(bin >= plan.cut); });
    }
    if (r.top_p < 1) {
        Mass total = 0;
        candidates([&](float logit, int, int, Mass mass) { total += logit >= threshold ? mass : 0; });
        total = block_reduce(total, Add(), Mass(0), shared.mass_scratch) + outside.kept + outside.inner;
        if (r.top_k == 0 && r.min_p == 0) total = all;
        const Mass goal = Mass(ceil(double(r.top_p) * double(total)));
        const float nucleus = reach(
            shared, goal > outside.kept ? goal - outside.kept : 1, candidates,
            [&](float logit, int bin, Mass mass) { return bin <= plan.nucleus_last && logit >= threshold ? mass : 0; });
        threshold = fmaxf(threshold, nucleus);
    }
    __syncthreads();  // all have read their slice's mass
    shared.low[threadIdx.x] = uint32_t(kept);
    shared.high[threadIdx.x] = uint32_t(kept >> 32);
    __syncthreads();  // sums begin with what is kept for sure
    candidates([&](float logit, int id, int, Mass mass) {
        if (logit >= threshold) add_mass(shared, id / kSliceSize, mass);
    });
    __syncthreads();  // sums are whole
    return threshold;
}

}  // namespace nanoinfer::cuda
