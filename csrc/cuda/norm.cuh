#pragma once
// Root mean square normalisation, with or without adding to the residual stream first. One block a row.

#include "launch.cuh"
#include "vec.cuh"

namespace nanoinfer::cuda {

struct RmsNorm {
    const void* x;       // [rows, dim], rows x_stride apart
    void* residual;      // [rows, dim], rows residual_stride apart; null: none
    const void* weight;  // [dim]
    void* out;           // [rows, dim]
    int64_t rows, x_stride, residual_stride;
    int dim;
    float eps;
};

// A row of up to 512 vectors (4096 halves) has a thread for each: all of it is under way at once and stays in registers
// between the sum and the product. What is left of a longer row is read again, from the cache. (Two vectors a thread
// give long prompts 6 % more bandwidth, and cost a decode step's norm 0.1 of 1.8 us.)
constexpr int kNormThreads = 512;
constexpr int kMaxNormDim = 1 << 30;  // places in a row are ints, also those a step past its end
// Longest blocks that an SM shall hold, which leaves 40 registers a thread: with 48, and so two blocks, 16,384 rows of
// 3584 bf16 numbers take 109 us on an H200 in place of 94.
constexpr int kNormBlocks = 3;

template <typename T, int kVec>
__device__ inline float sum_of_squares(const Vec<T, kVec>& v) {
    float sum = 0;
    for (int j = 0; j < kVec; ++j) sum = fmaf(to_float(v.at[j]), to_float(v.at[j]), sum);
    return sum;
}

// Adds x to the residual in place; returns the sum as stored, so that the norm is that of what the next layer reads.
template <typename T, int kVec>
__device__ inline Vec<T, kVec> add_to(T* residual, const Vec<T, kVec>& x) {
    const Vec<T, kVec> old = load<T, kVec>(residual);
    Vec<T, kVec> sum;
    for (int j = 0; j < kVec; ++j) sum.at[j] = from_float<T>(to_float(old.at[j]) + to_float(x.at[j]));
    store(residual, sum);
    return sum;
}

template <typename T, int kVec>
__device__ inline void store_scaled(T* out, const Vec<T, kVec>& v, float scale, const Vec<T, kVec>& weight) {
    Vec<T, kVec> result;
    for (int j = 0; j < kVec; ++j) result.at[j] = from_float<T>(to_float(v.at[j]) * scale * to_float(weight.at[j]));
    store(out, result);
}

// kVec: numbers a thread takes at a time. kAdd: x is added to the residual first. Row: blockIdx.x.
template <typename T, int kVec, bool kAdd>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks) rms_norm_kernel(const __grid_constant__ RmsNorm p) {
    __shared__ float scratch[kNormThreads / kWarp];
    let_next_kernel_start();
    constexpr int kStep = kNormThreads * kVec;
    const int64_t row = blockIdx.x;
    const int first = threadIdx.x * kVec;
    const T* weight = static_cast<const T*>(p.weight);
    Vec<T, kVec> held, held_weight;
    // Ahead of the wait: the second cache has x, but not weights, for which memory takes 1 us or more while the next
    // product loads its own.
    if (first < p.dim) held_weight = load<T, kVec>(weight + first);
    wait_for_earlier_kernels();
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    T* residual = static_cast<T*>(p.residual) + row * p.residual_stride;  // of no use unless kAdd
    float sum = 0;
    if (first < p.dim) {
        held = load<T, kVec>(x + first);
        if constexpr (kAdd) held = add_to(residual + first, held);
        sum = sum_of_squares(held);
    }
#pragma unroll 1  // rare: not worth registers
    for (int i = first + kStep; i < p.dim; i += kStep) {
        Vec<T, kVec> v = load<T, kVec>(x + i);
        if constexpr (kAdd) v = add_to(residual + i, v);
        sum += sum_of_squares(v);
    }
    const float scale = rsqrtf(block_reduce(sum, Add(), 0.f, scratch) / float(p.dim) + p.eps);
    T* out = static_cast<T*>(p.out) + row * p.dim;
    if (first < p.dim) store_scaled(out + first, held, scale, held_weight);
    const T* again = kAdd ? residual : x;
#pragma unroll 1
    for (int i = first + kStep; i < p.dim; i += kStep) {
        store_scaled(out + i, load<T, kVec>(again + i), scale, load<T, kVec>(weight + i));
    }
}

template <typename T, int kVec>
cudaError_t launch_rms_norm(const RmsNorm& p, cudaStream_t stream) {
    const int64_t warps = ceil_div(p.dim, kVec * kWarp), most = kNormThreads / kWarp;
    const int threads = int(warps < most ? warps : most) * kWarp;
    const auto kernel = p.residual ? rms_norm_kernel<T, kVec, true> : rms_norm_kernel<T, kVec, false>;
    return launch_kernel(kernel, dim3(p.rows), threads, 0, stream, p);
}

template <typename T>
cudaError_t rms_norm(const RmsNorm& p, cudaStream_t stream) {
    if (p.rows * p.dim == 0) return cudaSuccess;
    constexpr int kVec = kFullVec<T>;
    const bool vectors = p.dim % kVec == 0 && fits_vectors<T>(p.x, p.x_stride) &&
                         fits_vectors<T>(p.residual, p.residual_stride) && fits_vectors<T>(p.weight);
    return vectors ? launch_rms_norm<T, kVec>(p, stream) : launch_rms_norm<T, 1>(p, stream);
}

}  // namespace nanoinfer::cuda
