#pragma once
// Attention in float32, for chunks of any length: the precise version that others are compared with. Plain arithmetic,
// any block size; K and V come straight from global memory, where the caches make up for reading them often.

#include <math.h>

#include "attention_work.cuh"

namespace nanoinfer::cuda {

// A block takes one query head of one token, its warps the keys in turns of 32.
constexpr int kFloatWarps = 8;

// The chunk of a token: the last one that does not start behind it. False where that one ends before the token.
__device__ inline bool find_chunk(const PagedAttention& p, int token, Chunk& chunk) {
    int low = 0, high = p.chunks;  // chunks before `low` start at or before the token, those from `high` on behind it
    while (low < high) {
        const int middle = (low + high) / 2;
        if (p.q_starts[middle] <= token) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    if (low == 0) return false;
    LoadedChunk loaded;
    load_chunk(p, low - 1, loaded);
    chunk = loaded.check(p, low - 1);
    return token >= chunk.begin && token < chunk.begin + chunk.q_len;
}

// Eight sums side by side: one of D numbers would be less precise.
template <int D>
__device__ float dot(const float* a, const float* b) {
    float4 sums[2] = {};
#pragma unroll 4
    for (int i = 0; i < D / 4; ++i) {
        const float4 x = reinterpret_cast<const float4*>(a)[i], y = reinterpret_cast<const float4*>(b)[i];
        float4& sum = sums[i % 2];
        sum.x += x.x * y.x;
        sum.y += x.y * y.y;
        sum.z += x.z * y.z;
        sum.w += x.w * y.w;
    }
    return ((sums[0].x + sums[1].x) + (sums[0].y + sums[1].y)) + ((sums[0].z + sums[1].z) + (sums[0].w + sums[1].w));
}

__device__ inline float warp_max(float x) {
    for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, i));
    return x;
}

__device__ inline double warp_sum(double x) {
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(kAllLanes, x, i);
    return x;
}

// One warp's share of a row: lane l sums the columns l, l + 32, ... Weights and sums are float64, so that what is lost
// is lost in the scores, as with any other way to compute this in float32.
template <int D>
struct FloatRow {
    double out[D / 32] = {}, sum = 0;  // of this lane's weights
    float top = -INFINITY;

    // Keys first to first + 31, a lane each, of those below `end`.
    __device__ void add(const PagedAttention& p, const Chunk& chunk, const float* query, int head, int first, int end) {
        const int lane = threadIdx.x % 32, key = smaller(first + lane, end - 1);
        const float* kv = static_cast<const float*>(p.kv);
        const int64_t row = key_row(p, *table_entry(p, chunk.row, key), head, key);
        const float score = first + lane < end ? dot<D>(query, kv + row * D) * p.scale : -INFINITY;
        const float highest = fmaxf(top, warp_max(score)), offset = highest == -INFINITY ? 0.f : highest;
        const double shrink = exp(double(top) - offset), weight = exp(double(score) - offset);
        top = highest;
        sum = sum * shrink + weight;
        for (int i = 0; i < D / 32; ++i) out[i] *= shrink;
        const int64_t value = row + (p.kv_heads << p.block_bits);
        for (int j = 0; j < smaller(32, end - first); ++j) {
            const float* from = kv + __shfl_sync(kAllLanes, value, j) * D + lane;
            const double share = __shfl_sync(kAllLanes, weight, j);
            for (int i = 0; i < D / 32; ++i) out[i] += share * from[32 * i];
        }
    }
};

// The shares of a block's warps, in shared memory.
template <int D>
struct FloatShares {
    double outs[kFloatWarps][D], totals[kFloatWarps];
    float tops[kFloatWarps];
    alignas(16) float query[D];
};

// Their sum, a thread a column.
template <int D>
__device__ void store_row(const FloatShares<D>& shares, float* to) {
    float top = -INFINITY;
    for (float warp_top : shares.tops) top = fmaxf(top, warp_top);
    const float offset = top == -INFINITY ? 0.f : top;
    double sum = 0;
    for (int w = 0; w < kFloatWarps; ++w) sum += shares.totals[w] * exp(double(shares.tops[w]) - offset);
    for (int column = threadIdx.x; column < D; column += 32 * kFloatWarps) {
        double out = 0;
        for (int w = 0; w < kFloatWarps; ++w) out += shares.outs[w][column] * exp(double(shares.tops[w]) - offset);
        to[column] = sum == 0 ? 0.f : float(out / sum);
    }
}

template <int D>
__global__ void __launch_bounds__(32 * kFloatWarps) float_kernel(const __grid_constant__ PagedAttention p) {
    extern __shared__ __align__(128) unsigned char shared[];
    auto& shares = *reinterpret_cast<FloatShares<D>*>(shared);
    const int token = blockIdx.x / p.q_heads, q_head = blockIdx.x % p.q_heads, head = q_head / p.group;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Chunk chunk;
    if (!find_chunk(p, token, chunk)) return;
    const int position = chunk.position(token - chunk.begin), end = position + 1;
    const float* q = static_cast<const float*>(p.q) + token * p.q_stride + q_head * D;
    for (int i = threadIdx.x; i < D; i += 32 * kFloatWarps) shares.query[i] = q[i];
    __syncthreads();  // the query is there

    FloatRow<D> row;
    for (int key = Chunk::first_key(p, position) + 32 * warp; key < end; key += 32 * kFloatWarps) {
        row.add(p, chunk, shares.query, head, key, end);
    }
    const double total = warp_sum(row.sum);
    shares.totals[warp] = total;
    shares.tops[warp] = row.top;
    for (int i = 0; i < D / 32; ++i) shares.outs[warp][32 * i + lane] = row.out[i];
    __syncthreads();  // every warp's share is there
    store_row(shares, static_cast<float*>(p.out) + (int64_t(token) * p.q_heads + q_head) * D);
}

template <int D>
cudaError_t attend_float(const PagedAttention& p, cudaStream_t stream) {
    const unsigned blocks = unsigned(p.tokens) * p.q_heads;
    float_kernel<D><<<blocks, 32 * kFloatWarps, sizeof(FloatShares<D>), stream>>>(p);
    return cudaGetLastError();
}

}  // namespace nanoinfer::cuda
