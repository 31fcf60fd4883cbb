#pragma once
// The next token of each row: the largest logit, or a draw from what min_p, top_k and top_p leave. The second pass, and
// the launch of both; sampler_row.cuh tells how they work together.

#include "launch.cuh"
#include "sampler_filter.cuh"
#include "sampler_row.cuh"
#include "sampler_scan.cuh"

namespace nanoinfer::cuda {

// 53 random bits from (seed, position): Philox4x32 with ten rounds (Salmon et al., SC 2011).
__device__ inline uint64_t random_bits(uint32_t seed_lo, uint32_t seed_hi, uint32_t position) {
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
    return uint64_t(c[0] >> 5) << 26 | c[1] >> 6;
}

// Finds the slice in which the sum through the slices' masses passes u times their total, where u = bits / 2^53, and
// returns at what part of the slice's mass that is. `mass`: of slice threadIdx.x.
__device__ inline double find_slice(Pick& shared, uint64_t bits, Mass mass) {
    Mass through[1] = {mass};
    sum_through(through, shared.through_scratch);
    if (threadIdx.x == kPickThreads - 1) shared.goal = __umul64hi(bits << 11, through[0]);  // below the total
    __syncthreads();
    if (through[0] - mass <= shared.goal && shared.goal < through[0]) {
        shared.found = threadIdx.x;
        shared.before = through[0] - mass;
        shared.mass = mass;
    }
    __syncthreads();  // one thread has found it
    return double(shared.goal - shared.before) / double(shared.mass);
}

// The id in `slice` in whose weight that part `place` of the slice's mass lies, counted from the slice's beginning.
// `largest`: what weights are relative to; logits below `threshold` and weights below min_p are dropped.
template <int kVec>
__device__ inline int find_id(const Row& row, Pick& shared, int slice, float largest, float threshold, double place) {
    constexpr int kOwn = kSliceSize / kPickThreads, kTiles = kOwn / kLane;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    // Read as it lies, tile by tile; then a thread goes on with neighbours.
    float x[kTiles][kLane];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
        load_tile<kVec>(row.logits, row.vocab, slice * kSliceTiles + n * kPickWarps + warp, x[n]);
    }
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
        const int tile = n / kLane * kPickWarps + warp;
        shared.logits[tile * kTile + id_in_tile<kVec>(lane, n % kLane)] = x[n / kLane][n % kLane];
    }
    __syncthreads();  // the slice is there
    const int first = threadIdx.x * kOwn;
    const auto mass_of = [&](int n) -> Mass {
        const float logit = shared.logits[first + n], weight = weigh(row.r, logit, largest);
        return logit >= threshold && weight >= row.r.min_p ? to_mass(weight) : 0;
    };
    Mass own = 0;
    // Lanes begin at different places, or half of them would want the same bank of shared memory.
    for (int n = 0; n < kOwn; ++n) own += mass_of((n + threadIdx.x) % kOwn);
    Mass through[1] = {own};
    sum_through(through, shared.through_scratch);
    if (threadIdx.x == kPickThreads - 1) shared.goal = min(Mass(place * double(through[0])), through[0] - 1);
    __syncthreads();  // the goal is known
    const Mass goal = shared.goal;
    if (through[0] - own <= goal && goal < through[0]) {
        Mass left = goal - (through[0] - own);
        int n = 0;
        for (Mass mass = mass_of(0); left >= mass; mass = mass_of(++n)) left -= mass;
        shared.found = uint32_t(slice * kSliceSize + first + n);
    }
    __syncthreads();  // one thread has found it
    return int(shared.found);
}

// A draw. `own`: what the scan found in slice threadIdx.x.
template <int kVec>
__device__ inline int draw(const Row& row, Pick& shared, uint64_t bits, const SliceSum& own) {
    // The slice's mass relative to the row's largest logit instead of its own.
    const Mass mass = own.mass == 0 ? 0 : Mass(double(own.mass) * weigh(row.r, own.largest, row.largest));
    if (row.r.filtered) {
        const Mass all = block_reduce(mass, Add(), Mass(0), shared.mass_scratch);
        const float threshold = apply_filters<kVec>(row, all, own, shared);
        const double place = find_slice(shared, bits, mass_at(shared, threadIdx.x));
        return find_id<kVec>(row, shared, shared.found, row.largest, threshold, place);
    }
    const double place = find_slice(shared, bits, mass);
    return find_id<kVec>(row, shared, shared.found, row.work.sums[shared.found].largest, -INFINITY, place);
}

// Row of logits: blockIdx.x. kVec: logits in a load.
template <int kVec>
__global__ void __launch_bounds__(kPickThreads, 2) sample_pick_kernel(const __grid_constant__ Sample p) {
    __shared__ Pick shared;
    let_next_kernel_start();
    wait_for_earlier_kernels();
    const int64_t i = blockIdx.x;
    const int table = table_row(p, i);
    if (table < 0) {
        if (threadIdx.x == 0) p.tokens[i] = -1;
        return;
    }
    int32_t* state = p.row_state + int64_t(table) * kRowStateWidth;
    const RowParams r = row_params(p, table);
    const uint64_t bits = random_bits(state[kSeedLo], state[kSeedHi], state[kLength]);
    const Workspace work = workspace_at(p, i, 0);
    SliceSum own = {.largest = -INFINITY, .best = INT32_MAX, .mass = 0};
    if (threadIdx.x < slices_of(p.vocab)) own = work.sums[threadIdx.x];
    const float largest = block_reduce(own.largest, Largest(), -INFINITY, shared.largest_scratch);
    int token = -1;
    if (finite(largest) && r.greedy) {
        const int best = own.largest == largest ? own.best : INT32_MAX;
        token = block_reduce(best, Smallest(), INT32_MAX, shared.count_scratch);
    } else if (finite(largest)) {
        const Row row = {r, p.logits + i * p.logits_stride, work, p.vocab, largest, Row::bin_of(r, largest)};
        token = draw<kVec>(row, shared, bits, own);
    }
    if (threadIdx.x > 0) return;
    p.tokens[i] = token;
    state[kLastToken] = max(token, 0);
    ++state[kLength];
}

template <int kVec>
cudaError_t launch_sample(const Sample& p, cudaStream_t stream) {
    const dim3 scan_grid(uint32_t(p.rows * slices_of(p.vocab)));
    const cudaError_t error = launch_kernel(sample_scan_kernel<kVec>, scan_grid, kScanThreads, 0, stream, p);
    return error ? error : launch_kernel(sample_pick_kernel<kVec>, dim3(p.rows), kPickThreads, 0, stream, p);
}

// Takes up to kMaxSlices * kSliceSize = 524,288 ids.
inline cudaError_t sample(const Sample& p, cudaStream_t stream) {
    if (p.rows == 0) return cudaSuccess;
    constexpr int kVec = kFullVec<float>;
    return fits_vectors<float>(p.logits, p.logits_stride) ? launch_sample<kVec>(p, stream)
                                                          : launch_sample<1>(p, stream);
}

}  // namespace nanoinfer::cuda
