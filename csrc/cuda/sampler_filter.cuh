#pragma once
// min_p, top_k and top_p as one threshold: first how low it can lie, by bins or tiles, then a list of the logits that
// may be it, then the exact logit. All by one block.

#include "sampler_bins.cuh"

namespace nanoinfer::cuda {

// A logit that top_k tiles reach, and not many more: the lowest that top_k may keep is not below it. -infinity if there
// are less tiles. They are sorted into kBins steps from the row's largest logit down to the lowest one of a tile.
__device__ inline float reached_by_tiles(const Row& row, Pick& shared) {
    const int tiles = int((row.vocab + kTile - 1) / kTile);
    shared.low[threadIdx.x] = 0;
    if (threadIdx.x == 0) shared.first_bins[0] = kBins;
    float range = 0;
    for (int tile = threadIdx.x; tile < tiles; tile += kPickThreads) range = fmaxf(range, row.below(tile));
    range = block_reduce(range, Largest(), 0.f, shared.largest_scratch);  // its barriers also let all see empty steps
    const float steps = fminf(kRest / range, FLT_MAX);                    // in a logit
    for (int tile = threadIdx.x; tile < tiles; tile += kPickThreads) {
        atomicAdd(shared.low + min(int(row.below(tile) * steps), kRest), 1);
    }
    __syncthreads();  // all tiles are counted
    Mass through[1] = {shared.low[threadIdx.x]};
    sum_through(through, shared.through_scratch);
    if (through[0] >= row.r.top_k) atomicMin(shared.first_bins, int(threadIdx.x));
    __syncthreads();  // the first one is known
    const int reached = shared.first_bins[0];
    return reached < kBins ? row.largest - float(reached + 1) * 1.0001f / steps : -INFINITY;
}

// Adds the lane's logits that `flags` has bits for to the list. All lanes of the warp call it.
template <int kAhead>
__device__ inline void append(const float (&x)[kAhead][kLane], uint32_t flags, int slice, Pick& shared) {
    if (__ballot_sync(~0u, flags != 0) == 0) return;
    const int lane = threadIdx.x % kWarp, own = __popc(flags);
    int through = own;
    for (int apart = 1; apart < kWarp; apart *= 2) {
        const int before = __shfl_up_sync(~0u, through, apart);
        if (lane >= apart) through += before;
    }
    int at = 0;
    if (lane == kWarp - 1) at = atomicAdd(&shared.listed, through);  // once for the warp
    at = __shfl_sync(~0u, at, kWarp - 1) + through - own;
#pragma unroll
    for (int n = 0; n < kAhead * kLane; ++n) {
        if ((flags >> n & 1) == 0) continue;
        if (at < kListRoom) {
            shared.logits[at] = x[n / kLane][n % kLane];
            shared.slices[at] = uint8_t(slice);
        }
        ++at;
    }
}

// Fills the list with candidates, also those that min_p drops, as these come last anyway; returns how many logits lie
// above the cut. The list is too small where shared.listed says so.
template <int kVec>
__device__ inline int collect(const Row& row, const Edges& edges, Pick& shared) {
    constexpr int kAhead = kVec == kLane ? 3 : 2;  // tiles under way; more would not stay in registers
    const int lane = threadIdx.x % kWarp, tiles = int((row.vocab + kTile - 1) / kTile);
    int count = 0;
    // A warp takes 32 neighbouring tiles at a time, which belong to one slice.
    for (int first = threadIdx.x / kWarp * kWarp; first < tiles; first += kPickThreads) {
        const float own = first + lane < tiles ? row.work.maxima[first + lane] : -INFINITY;
        uint32_t wanted = __ballot_sync(~0u, own >= edges.lowest);
        while (wanted != 0) {
            float x[kAhead][kLane];
#pragma unroll
            for (int n = 0; n < kAhead; ++n) {
                const int tile = wanted != 0 ? first + __ffs(wanted) - 1 : tiles;  // `tiles`: none
                wanted &= wanted - 1;
                load_tile<kVec>(row.logits, tile < tiles ? row.vocab : 0, tile, x[n]);
            }
            uint32_t flags = 0;
#pragma unroll
            for (int n = 0; n < kAhead * kLane; ++n) {
                const float logit = x[n / kLane][n % kLane];
                count += logit >= edges.cut;
                flags |= uint32_t(edges.is_candidate(logit)) << n;
            }
            append(x, flags, first / kSliceTiles, shared);
        }
    }
    return block_reduce(count, Add(), 0, shared.count_scratch);  // its barriers also let all see the list
}

// visit(logit, slice, mass) for each candidate: those in the list, or, where it has no room for all, in the row.
template <typename Visit>
__device__ inline void for_each_candidate(const Row& row, const Edges& edges, const Pick& shared, Visit visit) {
    if (shared.listed <= kListRoom) {
        for (int n = threadIdx.x; n < shared.listed; n += kPickThreads) {
            visit(shared.logits[n], int(shared.slices[n]), row.mass_of(shared.logits[n]));
        }
        return;
    }
    // Where whole vocabularies have one logit, or min_p lets much through.
    for (int id = threadIdx.x; id < row.vocab; id += kPickThreads) {
        const float logit = row.logits[id];
        const Mass mass = edges.is_candidate(logit) ? row.mass_of(logit) : 0;
        if (mass > 0) visit(logit, id / kSliceSize, mass);
    }
}

// The largest logit t such that the candidates from t upwards have at least `goal` together of what measure(logit,
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
        candidates([&](float logit, int, Mass mass) {
            const uint32_t key = key_of(logit);
            if (shift < 24 && key >> (shift + 8) != prefix >> (shift + 8)) return;
            const int own = key >> shift & (kDigits - 1);
            if (own != digit && run > 0) add_mass(shared, digit, run);
            run = (own == digit ? run : 0) + measure(logit, mass);
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
// `all`: the mass of the whole row. `own`: what the scan found in slice threadIdx.x.
template <int kVec>
__device__ inline float apply_filters(const Row& row, Mass all, const SliceSum& own, Pick& shared) {
    const RowParams& r = row.r;
    shared.low[threadIdx.x] = shared.high[threadIdx.x] = 0;
    if (threadIdx.x == 0) shared.listed = 0;
    __syncthreads();  // list and masses are empty
    Outside outside = {0, 0, 0};
    // All logits that may be kept are candidates, unless bins tell more.
    Edges edges = {
        .lowest = row.largest - r.depth, .cut = INFINITY, .nucleus_low = -INFINITY, .nucleus_high = INFINITY};
    if (r.binned && row.has_edges()) {
        const Mass units = load_bin(row, own, shared);
        const Plan plan = find_bins(row, row.bins_below(edges.lowest), units, double(all) * 0x1p-42, shared);
        outside = sum_outside(row, plan, units, shared);
        edges = row.edges_of(plan);
    } else if (r.top_k > 0) {
        edges.lowest = fmaxf(edges.lowest, reached_by_tiles(row, shared));
        shared.low[threadIdx.x] = 0;  // of slice threadIdx.x, nothing is kept yet
    }
    outside.count = collect<kVec>(row, edges, shared);
    const Mass kept = mass_at(shared, threadIdx.x);  // of slice threadIdx.x
    const auto candidates = [&](auto visit) { for_each_candidate(row, edges, shared, visit); };
    float threshold = -INFINITY;
    if (r.top_k > 0) {
        threshold = reach(shared, max(r.top_k - outside.count, 1), candidates,
                          [&](float logit, Mass) { return Mass(logit < edges.cut); });
    }
    if (r.top_p < 1) {
        Mass total = 0;
        candidates([&](float logit, int, Mass mass) { total += logit >= threshold ? mass : 0; });
        total = block_reduce(total, Add(), Mass(0), shared.mass_scratch) + outside.kept + outside.inner;
        if (r.top_k == 0 && r.min_p == 0) total = all;
        const Mass goal = Mass(ceil(double(r.top_p) * double(total)));
        const float nucleus =
            reach(shared, goal > outside.kept ? goal - outside.kept : 1, candidates,
                  [&](float logit, Mass mass) { return logit >= edges.nucleus_low && logit >= threshold ? mass : 0; });
        threshold = fmaxf(threshold, nucleus);
    }
    __syncthreads();  // all have read their slice's mass
    shared.low[threadIdx.x] = uint32_t(kept);
    shared.high[threadIdx.x] = uint32_t(kept >> 32);
    __syncthreads();  // sums begin with what is kept for sure
    int slice = 0;
    Mass run = 0;  // of neighbours in one slice
    candidates([&](float logit, int own_slice, Mass mass) {
        if (logit < threshold) return;
        if (own_slice != slice && run > 0) add_mass(shared, slice, run);
        run = (own_slice == slice ? run : 0) + mass;
        slice = own_slice;
    });
    if (run > 0) add_mass(shared, slice, run);
    __syncthreads();  // sums are whole
    return threshold;
}

}  // namespace nanoinfer::cuda
