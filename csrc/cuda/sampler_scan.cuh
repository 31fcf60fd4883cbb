#pragma once
// The sampler's first pass: every logit once, a block for each slice of a row.

#include "launch.cuh"
#include "sampler_row.cuh"

namespace nanoinfer::cuda {

// Writes the largest logit of each of the warp's tiles.
__device__ inline void write_maxima(const float (&x)[kScanTiles][kLane], float* maxima) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    float largest = 0;  // of the tile that this lane writes
#pragma unroll
    for (int j = 0; j < kScanTiles; ++j) {
        const float own = fmaxf(fmaxf(x[j][0], x[j][1]), fmaxf(x[j][2], x[j][3]));
        const uint32_t key = __reduce_max_sync(~0u, key_of(own));  // one instruction, but for integers only
        if (lane == j) largest = float_of(key);
    }
    if (lane < kScanTiles) maxima[lane * kScanWarps + warp] = largest;
}

// Writes the mass of each of the slice's bins. `bins`: shared memory for them.
//
// A float close to 1.5 * 2^23 has an integer in its last bits, so that one multiplication, rounded down, makes the
// bin's number. It is wrong for logits far from 0; Row::has_edges tells of those, and here they must only keep inside
// the array.
__device__ inline void write_bins(const float (&x)[kScanTiles][kLane], const RowParams& r, float largest,
                                  uint32_t* bins, uint32_t* out) {
    constexpr float kShift = 0x1.8p23f;
    for (int bin = threadIdx.x; bin < kBins; bin += kScanThreads) bins[bin] = 0;
    __syncthreads();  // bins are empty
    const int top = __float_as_int(__fmaf_rd(largest, r.bins_per_logit, kShift));
    const float octaves = r.rate / r.bins_per_logit;  // of a bin
    const uint32_t depth = min(int(r.depth * r.bins_per_logit) + 2, kRest);
#pragma unroll
    for (int n = 0; n < kScanTiles * kLane; ++n) {
        const float logit = x[n / kLane][n % kLane], shifted = __fmaf_rd(logit, r.bins_per_logit, kShift);
        const uint32_t below = uint32_t(top) - __float_as_uint(shifted);
        const float from_edge = fmaf(logit, r.bins_per_logit, kShift - shifted) - 1;  // in bins
        const float units = fmaf(exp2_of(from_edge * octaves), kBinUnits, 0x1p23f);
        if (below < depth) atomicAdd(bins + below, __float_as_uint(units) - __float_as_uint(0x1p23f));
    }
    __syncthreads();  // bins are full
    for (int bin = threadIdx.x; bin < kBins; bin += kScanThreads) out[bin] = bins[bin];
}

// kVec: logits in a load. Block b: slice b % slices of row b / slices. Four blocks an SM leave 64 registers a thread,
// and have 128 KB under way; with three, greedy rows take 6 % longer on an H200, others 10 %.
template <int kVec>
__global__ void __launch_bounds__(kScanThreads, 4) sample_scan_kernel(const __grid_constant__ Sample p) {
    __shared__ float largest_scratch[kScanWarps];
    __shared__ Mass mass_scratch[kScanWarps];
    __shared__ int best_scratch[kScanWarps];
    __shared__ uint32_t bins[kBins];
    let_next_kernel_start();
    wait_for_earlier_kernels();
    const int slices = slices_of(p.vocab), i = blockIdx.x / slices, slice = blockIdx.x % slices;
    const int row = table_row(p, i);
    if (row < 0) return;
    const float* logits = p.logits + i * p.logits_stride;
    float x[kScanTiles][kLane];
    load_slice<kVec>(logits, p.vocab, slice, x);
    const RowParams r = row_params(p, row);
    const Workspace work = workspace_at(p, i, slice);
    float own = x[0][0];
#pragma unroll
    for (int n = 1; n < kScanTiles * kLane; ++n) own = Largest()(own, x[n / kLane][n % kLane]);
    SliceSum sum = {.largest = block_reduce(own, Largest(), -INFINITY, largest_scratch), .best = 0, .mass = 0};
    if (r.greedy) {
        const int best = find_best<kVec>(x, sum.largest);
        sum.best = slice * kSliceSize + block_reduce(best, Smallest(), kSliceSize, best_scratch);
    } else if (finite(sum.largest)) {
        MassParts mass;
#pragma unroll
        for (int n = 0; n < kScanTiles * kLane; ++n) mass.add(weigh(r, x[n / kLane][n % kLane], sum.largest));
        sum.mass = block_reduce(mass.sum(kScanTiles * kLane), Add(), Mass(0), mass_scratch);
    }
    if (threadIdx.x == 0) *work.sums = sum;
    if (r.filtered) write_maxima(x, work.maxima);
    if (r.binned && finite(sum.largest)) write_bins(x, r, sum.largest, bins, work.bins);
}

}  // namespace nanoinfer::cuda
