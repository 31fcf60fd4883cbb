#pragma once
// What follows the decode kernel: the partial results of a chunk's splits become its output.

#include "attention_tile.cuh"
#include "launch.cuh"

namespace nanoinfer::cuda {

// A thread takes 4 columns of a row (one query head of one token). Few splits are one thread's, and a block takes
// kWays rows; many are shared out to kWays threads, and a block takes one row. Either way all loads of a call are on
// their way together for up to kAtOnce * kWays splits. The order of sums depends on the number of splits alone.
template <int D>
struct MergeShape {
    static constexpr int kLanes = D / 4, kWays = 128 / kLanes, kThreads = kLanes * kWays;
    static constexpr int kAtOnce = 8;  // splits that a thread loads before it uses the first
};

// Blocks of a launch: they all fit on a large GPU at once, where most have nothing to do but to start and to end.
constexpr int kMergeBlocks = 1024;

// The sum of some splits' partial results, relative to the largest weight among them.
struct Share {
    float4 sum = {0, 0, 0, 0};
    float top = kNoScore, total = 0;

    __device__ void grow_to(float new_top) {
        const float shrink = power_of_two(top - new_top);
        sum = {sum.x * shrink, sum.y * shrink, sum.z * shrink, sum.w * shrink};
        total *= shrink;
        top = new_top;
    }
    // Weights of the other's are at most `top`.
    __device__ void add(const float4& other, float other_top, float other_total) {
        const float share = power_of_two(other_top - top);
        sum.x += other.x * share;
        sum.y += other.y * share;
        sum.z += other.z * share;
        sum.w += other.w * share;
        total += other_total * share;
    }
};

// Splits first, first + step, ... of a row; `at` is where the row's split 0 is, `stride` how far the next one.
template <int D>
__device__ Share sum_splits(const PagedAttention& p, int64_t at, int64_t stride, int column, int first, int step,
                            int splits) {
    constexpr int kAtOnce = MergeShape<D>::kAtOnce;
    Share share;
    for (int begin = first; begin < splits; begin += kAtOnce * step) {
        float2 totals[kAtOnce];
        float4 sums[kAtOnce];
        float top = share.top;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int split = begin + i * step;
            const int64_t from = at + split * stride;
            totals[i] = split < splits ? p.partial_sums[from] : float2{kNoScore, 0};
            sums[i] = split < splits ? *reinterpret_cast<const float4*>(p.partial_out + from * D + column) : float4{};
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) top = fmaxf(top, totals[i].x);
        share.grow_to(top);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) share.add(sums[i], totals[i].x, totals[i].y);
    }
    return share;
}

template <typename T, int D>
__global__ void __launch_bounds__(MergeShape<D>::kThreads) merge_kernel(const __grid_constant__ PagedAttention p) {
    using Shape = MergeShape<D>;
    __shared__ Share shares[Shape::kWays][Shape::kLanes];
    let_next_kernel_start();  // a product, whose first weights come while attention runs; see its kSharedPercent
    LoadedChunk loaded;
    load_chunk(p, blockIdx.y, loaded);
    const Chunk chunk = loaded.check(p, blockIdx.y);
    const bool decoded = chunk.q_len > 0 && chunk.q_len <= p.decode_tokens;
    const int splits = decoded ? split_keys(p, chunk).count : 0;
    const int lane = threadIdx.x % Shape::kLanes, way = threadIdx.x / Shape::kLanes, column = 4 * lane;
    const bool many = splits > Shape::kAtOnce;
    const int rows = chunk.q_len * p.q_heads, at_once = many ? 1 : Shape::kWays, first = many ? 0 : way;
    wait_for_earlier_kernels();  // the decode kernel let this one start when those before it had ended
    if (splits <= 1) return;     // not the decode kernel's, or it has stored the result
    for (int row = blockIdx.x * at_once + first; row < rows; row += gridDim.x * at_once) {
        const int64_t at = part(p, chunk, 0, 0) * p.q_heads + row;
        Share share = sum_splits<D>(p, at, rows, column, way - first, many ? Shape::kWays : 1, splits);
        if (many) {
            shares[way][lane] = share;
            __syncthreads();  // every thread's share is there
            if (way == 0) {
#pragma unroll
                for (int other = 1; other < Shape::kWays; ++other) {
                    const Share& from = shares[other][lane];
                    share.grow_to(fmaxf(share.top, from.top));
                    share.add(from.sum, from.top, from.total);
                }
            }
            __syncthreads();  // they have been read
        }
        if (way > first) continue;
        const float norm = share.total == 0 ? 0.f : 1 / share.total;
        T* out = static_cast<T*>(p.out) + (int64_t(chunk.begin) * p.q_heads + row) * D + column;
        *reinterpret_cast<uint2*>(out) = {pack<T>(share.sum.x * norm, share.sum.y * norm),
                                          pack<T>(share.sum.z * norm, share.sum.w * norm)};
    }
}

}  // namespace nanoinfer::cuda
