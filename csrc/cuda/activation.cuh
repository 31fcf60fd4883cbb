#pragma once
// SwiGLU: silu(gate) * up. Bound by memory: a thread has one vector of gates and one of ups under way, and an SM 2048
// threads, which is twice what its share of the memory needs to stay busy.

#include "launch.cuh"
#include "vec.cuh"

namespace nanoinfer::cuda {

struct SiluAndMul {
    const void* x;  // [rows, 2 dim], rows x_stride apart, the gates first
    void* out;      // [rows, dim]
    int64_t rows, dim, x_stride;
};

constexpr int kSiluThreads = 256;

__device__ inline float swiglu(float gate, float up) { return gate / (1.f + expf(-gate)) * up; }

// kVec: numbers a thread takes at a time. Rows are blockIdx.y, and every gridDim.y-th after that.
template <typename T, int kVec>
__global__ void __launch_bounds__(kSiluThreads) silu_and_mul_kernel(const __grid_constant__ SiluAndMul p) {
    let_next_kernel_start();
    wait_for_earlier_kernels();
    const int64_t i = (int64_t(blockIdx.x) * kSiluThreads + threadIdx.x) * kVec;
    if (i >= p.dim) return;
    for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
        const T* x = static_cast<const T*>(p.x) + row * p.x_stride + i;
        const Vec<T, kVec> gates = load<T, kVec>(x), ups = load<T, kVec>(x + p.dim);
        Vec<T, kVec> out;
        for (int j = 0; j < kVec; ++j) out.at[j] = from_float<T>(swiglu(to_float(gates.at[j]), to_float(ups.at[j])));
        store(static_cast<T*>(p.out) + row * p.dim + i, out);
    }
}

template <typename T, int kVec>
cudaError_t launch_silu_and_mul(const SiluAndMul& p, cudaStream_t stream) {
    const dim3 grid(ceil_div(p.dim, kSiluThreads * kVec), p.rows < kMaxGridRows ? p.rows : kMaxGridRows);
    return launch_kernel(silu_and_mul_kernel<T, kVec>, grid, kSiluThreads, 0, stream, p);
}

template <typename T>
cudaError_t silu_and_mul(const SiluAndMul& p, cudaStream_t stream) {
    if (p.rows * p.dim == 0) return cudaSuccess;
    constexpr int kVec = kFullVec<T>;
    const bool vectors = p.dim % kVec == 0 && fits_vectors<T>(p.x, p.x_stride);
    return vectors ? launch_silu_and_mul<T, kVec>(p, stream) : launch_silu_and_mul<T, 1>(p, stream);
}

}  // namespace nanoinfer::cuda
