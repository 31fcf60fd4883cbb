#pragma once
// The second pass's row and what its block shares; and the bins in which the filters' thresholds lie, with the mass
// that lies outside of these.

#include "sampler_row.cuh"

namespace nanoinfer::cuda {

constexpr int kPickThreads = 512;  // two blocks an SM have 64 registers a thread
constexpr int kPickWarps = kPickThreads / kWarp;
static_assert(kBins == kPickThreads, "a thread looks after a bin");
static_assert(kMaxSlices <= kPickThreads, "and some of them after a slice");

// Bins, counted from the row's largest logit downwards, in which thresholds lie.
struct Plan {
    int nucleus_first, nucleus_last;  // of top_p
    int cut;                          // first bin in which top_k or min_p may cut; kBins if both are off
    int last;                         // bins past this one are dropped

    // Bins before this one are kept.
    __device__ int kept() const { return min(min(nucleus_first, cut), kRest); }
    // Dropped by top_p, but a part of the mass that it is of.
    __device__ bool counts(int bin) const { return bin > nucleus_last && kept() <= bin && bin < cut && bin <= last; }
};

// The plan's bins as logits: candidates are >= lowest, and either < cut or in [nucleus_low, nucleus_high).
struct Edges {
    float lowest, cut, nucleus_low, nucleus_high;

    __device__ bool is_candidate(float logit) const {
        return logit >= lowest && (logit < cut || (nucleus_low <= logit && logit < nucleus_high));
    }
};

// What of a row lies in bins without candidates.
struct Outside {
    Mass kept;   // above the nucleus's first bin, or where there is none, above the cut
    Mass inner;  // between the nucleus's last bin and the cut
    int count;   // logits above the cut, in bins with candidates or not
};

// What the block shares.
struct Pick {
    float logits[kListRoom];    // candidates; once the threshold is known, the slice in which the draw falls
    uint8_t slices[kListRoom];  // of the candidates
    int listed;                 // candidates, also those for which the list has no room
    uint32_t low[kBins],
        high[kBins];            // halves of the mass of each slice, or of each digit; `low` alone: tiles in a bin
    float edge_weights[kBins];  // weight at a bin's upper edge
    int first_bin[kMaxSlices];  // of a slice's bins: the row's bin that it is
    double bound_scratch[kPickWarps][4];
    Mass mass_scratch[kPickWarps];
    Mass through_scratch[kPickWarps][1];
    float largest_scratch[kPickWarps];
    int count_scratch[kPickWarps];
    double least_total, most_total;
    int first_bins[5];  // lowest bin of which something is true
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
    const Workspace work;  // the row's
    int64_t vocab;
    float largest;
    int top;  // bin of `largest`

    // Bin of a logit, counted in bins from logit 0 upwards; saturates far beyond any sensible logit.
    __device__ static int bin_of(const RowParams& r, float logit) { return __float2int_rd(logit * r.bins_per_logit); }
    // Bins from the largest logit down to this one. Unsigned, as the difference may have 32 bits.
    __device__ int bins_below(float logit) const {
        return int(min(uint32_t(top) - uint32_t(bin_of(r, logit)), uint32_t(kRest)));
    }
    // Near 0 as sensible logits are. Far from it a bin has no more than a few floats, and edges say nothing.
    __device__ bool has_edges() const { return fabsf(largest) * r.bins_per_logit < 0x1p21f; }
    // The lowest logit above a bin, which is exact: an integer and a power of two.
    __device__ float logit_above(int bin) const { return float(top - bin + 1) / r.bins_per_logit; }
    // How far below the row's largest logit that of a tile is, as far as it matters.
    __device__ float below(int tile) const { return fminf(largest - work.maxima[tile], r.depth); }
    // What the filters keep of a logit at the most.
    __device__ Mass mass_of(float logit) const {
        const float weight = weigh(r, logit, largest);
        return weight < r.min_p ? 0 : to_mass(weight);
    }
    __device__ float weight_above(int bin) const { return weigh(r, logit_above(bin), largest); }

    __device__ Edges edges_of(const Plan& plan) const {
        // The lowest logit above a bin, or whatever is lower or higher than all that the bins divide.
        const auto above = [&](int bin) { return bin <= 0 ? INFINITY : bin < kBins ? logit_above(bin) : -INFINITY; };
        return {.lowest = fmaxf(above(plan.last + 1), largest - r.depth),
                .cut = above(plan.cut),
                .nucleus_low = above(plan.nucleus_last + 1),
                .nucleus_high = above(plan.nucleus_first)};
    }
};

// Bounds of one bin, then of all bins through it: mass, in weights, and number of logits at the least and at the most.
// A bin's mass is right to half a unit a logit, and a logit's part of it is above 2^-1/8 of 2^18.
enum { kLeast, kMost, kFewest, kMany };
constexpr double kDoubt = 4e-6;

// Mass of the row's bin threadIdx.x in units of 2^-18 of its upper edge. `own`: what the scan found in slice
// threadIdx.x.
__device__ inline Mass load_bin(const Row& row, const SliceSum& own, Pick& shared) {
    const int slices = slices_of(row.vocab), bin = threadIdx.x;
    if (bin < slices) shared.first_bin[bin] = own.mass > 0 ? row.bins_below(own.largest) : kRest;
    __syncthreads();  // all slices' first bins are known
    Mass units = 0;
#pragma unroll 4
    for (int slice = 0; slice < slices; ++slice) {
        const int at = bin - shared.first_bin[slice];
        if (at >= 0 && bin < kRest) units += row.work.bins[slice * kBins + at];
    }
    return units;
}

__device__ inline void load_bounds(const Row& row, Mass units, double (&bounds)[4]) {
    const int bin = threadIdx.x;
    const float upper = row.weight_above(bin);
    const double logits = double(units) / kBinUnits;  // at least; 1/8 of an octave more at the most
    bounds[kLeast] = logits * upper * (1 - kDoubt);
    bounds[kMost] = logits * upper * (1 + kDoubt);
    bounds[kFewest] = logits * (1 - kDoubt);
    bounds[kMany] = logits * exp2f(row.r.rate / row.r.bins_per_logit) * (1 + kDoubt);
    if (bin < kRest) return;
    bounds[kMost] = double(row.vocab) * upper;
    bounds[kFewest] = bounds[kMany] = double(row.vocab);
}

// The bins of the row's thresholds, none past `last`. `units`: mass of bin threadIdx.x; `all`: the mass of the whole
// row, in weights.
__device__ inline Plan find_bins(const Row& row, int last, Mass units, double all, Pick& shared) {
    enum { kCut, kDeepestCut, kNucleusFirst, kNucleusLast, kMinP };
    const RowParams& r = row.r;
    const int bin = threadIdx.x;
    const bool whole = r.top_k == 0 && r.min_p == 0;  // then top_p is of the mass of the whole row
    if (bin < 5) shared.first_bins[bin] = kRest;
    if (bin == 0) {
        shared.least_total = whole ? all * (1 - kDoubt) : 0;
        shared.most_total = all * (1 + kDoubt);
    }
    double bounds[4];
    load_bounds(row, units, bounds);
    sum_through(bounds, shared.bound_scratch);  // its barriers also let all see the first bins as they begin
    const auto note = [&](int what, bool holds) {
        if (holds) atomicMin(shared.first_bins + what, bin);
    };
    note(kCut, r.top_k > 0 && bounds[kMany] >= r.top_k);
    note(kDeepestCut, r.top_k > 0 && bounds[kFewest] >= r.top_k);
    note(kMinP, r.min_p > 0 && row.weight_above(bin + 1) < r.min_p * 1.001f);
    __syncthreads();  // the cuts are known
    const int cut = min(r.top_k > 0 ? shared.first_bins[kCut] : kBins, r.min_p > 0 ? shared.first_bins[kMinP] : kBins);
    const int deepest = min(last, shared.first_bins[kDeepestCut]);
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

// Puts into shared.low and shared.high the mass of each slice in bins that are kept, and returns that of the row; of
// bins without candidates, that is. A warp takes a slice.
__device__ inline Outside sum_outside(const Row& row, const Plan& plan, Mass units, Pick& shared) {
    constexpr double kMassUnits = 0x1p42 / kBinUnits;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    shared.edge_weights[threadIdx.x] = row.weight_above(threadIdx.x);
    __syncthreads();  // all bins' weights are there
    for (int slice = warp; slice < slices_of(row.vocab); slice += kPickWarps) {
        const int first = shared.first_bin[slice];
        double sum = 0;
#pragma unroll 4
        for (int bin = first + lane; bin < plan.kept(); bin += kWarp) {
            sum += double(row.work.bins[slice * kBins + bin - first]) * shared.edge_weights[bin];
        }
        const Mass mass = Mass(warp_reduce(sum, Add()) * kMassUnits);
        if (lane == 0) add_mass(shared, slice, mass);
    }
    const Mass inner =
        plan.counts(threadIdx.x) ? Mass(double(units) * shared.edge_weights[threadIdx.x] * kMassUnits) : 0;
    __syncthreads();  // all slices' masses are there
    const Mass kept = block_reduce(mass_at(shared, threadIdx.x), Add(), Mass(0), shared.mass_scratch);
    return {kept, block_reduce(inner, Add(), Mass(0), shared.mass_scratch), 0};
}

}  // namespace nanoinfer::cuda
