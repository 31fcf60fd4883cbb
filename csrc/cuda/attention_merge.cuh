#pragma once
// What follows the decode kernel: the partial results of a chunk's splits become its output.

#include "attention_tile.cuh"

namespace nanoinfer::cuda {

// Merges the splits of one query head of a chunk, token after token. A lane takes 4 numbers (8 of 256), and where a row
// has fewer than 32 times 4, groups of lanes take splits in turns. The order of sums depends on the number of splits
// alone. A block is one warp: rows spread over more multiprocessors, and each of these has more loads on their way.
template <int D>
struct MergeShape {
    static constexpr int kLanes = D < 128 ? D / 4 : 32;  // that share a row of one split
    static constexpr int kGroups = 32 / kLanes;          // some lanes have nothing to do for D = 96
    static constexpr int kVectors = D / 4 / kLanes;      // of 4 numbers, a lane's
    static constexpr int kAtOnce = 8;                    // turns whose loads are on their way together
};

template <typename T, int D>
__device__ void merge_row(const PagedAttention& p, const Chunk& chunk, int splits, int token, int head) {
    using Shape = MergeShape<D>;
    const int lane = threadIdx.x, group = lane / Shape::kLanes, column = lane % Shape::kLanes * 4;
    const int64_t first = part(p, chunk, 0, token) * p.q_heads + head, step = int64_t(chunk.q_len) * p.q_heads;
    float top = kNoScore;
    for (int s = lane; s < splits; s += 32) top = fmaxf(top, p.partial_sums[first + s * step].x);
    for (int i = 16; i > 0; i /= 2) top = fmaxf(top, __shfl_xor_sync(kWarp, top, i));
    float sums[Shape::kVectors * 4 + 1] = {};  // the last one of weights
    for (int begin = group; begin < splits; begin += Shape::kAtOnce * Shape::kGroups) {
#pragma unroll
        for (int i = 0; i < Shape::kAtOnce; ++i) {
            const int s = begin + i * Shape::kGroups;
            const int64_t at = first + s * step;
            const float2 totals = s < splits ? p.partial_sums[at] : float2{kNoScore, 0};
            const float share = power_of_two(totals.x - top);
            sums[Shape::kVectors * 4] += totals.y * share;
#pragma unroll
            for (int v = 0; v < Shape::kVectors; ++v) {
                const float* from = p.partial_out + at * D + v * 128 + column;
                const float4 x = s < splits ? *reinterpret_cast<const float4*>(from) : float4{0, 0, 0, 0};
                sums[4 * v] += x.x * share;
                sums[4 * v + 1] += x.y * share;
                sums[4 * v + 2] += x.z * share;
                sums[4 * v + 3] += x.w * share;
            }
        }
    }
    if constexpr (Shape::kGroups > 1) {
        for (float& sum : sums) {
            for (int i = Shape::kLanes; i < 32; i *= 2) sum += __shfl_xor_sync(kWarp, sum, i);
        }
    }
    if (group > 0) return;
    const float norm = sums[Shape::kVectors * 4] == 0 ? 0.f : 1 / sums[Shape::kVectors * 4];
    T* out = static_cast<T*>(p.out) + (int64_t(chunk.begin + token) * p.q_heads + head) * D + column;
#pragma unroll
    for (int v = 0; v < Shape::kVectors; ++v) {
        *reinterpret_cast<uint2*>(out + v * 128) = {pack<T>(sums[4 * v] * norm, sums[4 * v + 1] * norm),
                                                    pack<T>(sums[4 * v + 2] * norm, sums[4 * v + 3] * norm)};
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(32) merge_kernel(const __grid_constant__ PagedAttention p) {
    LoadedChunk loaded;
    load_chunk(p, blockIdx.y, loaded);
    const Chunk chunk = loaded.check(p, blockIdx.y);
    const bool decoded = chunk.q_len > 0 && chunk.q_len <= p.decode_tokens;
    const int splits = decoded ? split_keys(p, chunk).count : 0;
    wait_for_previous();      // the lengths were there before that began
    if (splits <= 1) return;  // not the decode kernel's, or it has stored the result
    for (int token = 0; token < chunk.q_len; ++token) merge_row<T, D>(p, chunk, splits, token, blockIdx.x);
}

}  // namespace nanoinfer::cuda
