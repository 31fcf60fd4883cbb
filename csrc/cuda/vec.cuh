#pragma once
// Several numbers in one load or store, numbers as floats, sums and maxima over a block.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

namespace nanoinfer::cuda {

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;         // the widest load that a thread has
constexpr int64_t kMaxGridRows = 65535;  // largest gridDim.y

// kN numbers that move in one instruction; their address is a multiple of their size.
template <typename T, int kN>
struct alignas(sizeof(T) * kN) Vec {
    T at[kN];
};

template <typename T>
constexpr int kFullVec = kVectorBytes / sizeof(T);

// The compiler's own type of as many bytes.
template <int kBytes>
using Word =
    std::conditional_t<kBytes == 16, uint4,
                       std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;

template <typename T, int kN>
__device__ inline Vec<T, kN> load(const T* p) {
    const auto word = *reinterpret_cast<const Word<sizeof(Vec<T, kN>)>*>(p);
    Vec<T, kN> v;
    memcpy(&v, &word, sizeof(v));
    return v;
}

template <typename T, int kN>
__device__ inline void store(T* p, const Vec<T, kN>& v) {
    Word<sizeof(v)> word;
    memcpy(&word, &v, sizeof(v));
    if constexpr (sizeof(v) == 16) {  // the compiler makes four stores of a plain assignment, now and then
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                     :
                     : "l"(p), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
                     : "memory");
    } else {
        *reinterpret_cast<Word<sizeof(v)>*>(p) = word;
    }
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

// Rounded to the nearest, ties to even.
template <typename T>
__device__ inline T from_float(float x) {
    if constexpr (sizeof(T) == 4) {
        return x;
    } else if constexpr (std::is_same_v<T, __half>) {
        return __float2half_rn(x);
    } else {
        return __float2bfloat16_rn(x);
    }
}

// Whether vectors of kVectorBytes may be read at `p` and `stride` elements further on, again and again.
template <typename T>
bool fits_vectors(const void* p, int64_t stride = 0) {
    return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0 && stride % kFullVec<T> == 0;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Add {
    template <typename T>
    __device__ T operator()(T a, T b) const {
        return a + b;
    }
};

// All lanes' values joined by `op`, in every lane: in one order, so that sums of floats are the same every time.
template <typename T, typename Op>
__device__ inline T warp_reduce(T value, Op op) {
    for (int apart = kWarp / 2; apart > 0; apart /= 2) value = op(value, __shfl_xor_sync(~0u, value, apart));
    return value;
}

// The same over a block of whole warps; `none` is what op(none, x) == x holds for. `scratch` has room for a value a
// warp; the first barrier waits for those that still read it after an earlier call.
template <typename T, typename Op>
__device__ inline T block_reduce(T value, Op op, T none, T* scratch) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    value = warp_reduce(value, op);
    __syncthreads();
    if (lane == 0) scratch[warp] = value;
    __syncthreads();
    return warp_reduce(lane < warps ? scratch[lane] : none, op);
}

}  // namespace nanoinfer::cuda
