#pragma once
// The instructions for copies and matrix products (sm_80 and later) that C++ has no name for.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <type_traits>

namespace nanoinfer::cuda {

__device__ inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of 16 bytes from global to shared memory, both `offset` bytes further, past L1 (each byte is used by
// one block). As a constant the offset is part of the instruction: addresses in registers, changed from copy to copy,
// would make each copy wait until the one before has been issued.
template <int offset>
__device__ inline void copy_async(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0 + %2], [%1 + %2], 16;" ::"r"(to), "l"(from), "n"(offset)
                 : "memory");
}

__device__ inline void store_zeros(uint32_t to) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
}

// Makes one group of this thread's copies since the last call; possibly an empty one.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but this thread's last `pending` groups have arrived.
template <int pending>
__device__ inline void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8x8 matrices of two-byte numbers; lanes 8 i to 8 i + 7 give the addresses of matrix i's rows. Lane l gets the
// numbers 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each.
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row_address)
                 : "memory");
}

// The same of the matrices' transposes.
__device__ inline void load_transposed(uint32_t (&to)[4], uint32_t row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row_address)
                 : "memory");
}

// The transpose of an 8x8 matrix that is spread over the lanes as load_matrices() does it.
__device__ inline uint32_t transpose(uint32_t pair) {
    uint32_t result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

// c += a b with float32 sums; a 16 x 16, b 16 x 8, c 16 x 8. Lane l, with g = l / 4 and t = l % 4, holds of a the rows
// g, g + 8, g, g + 8 at columns 2 t and on, twice, then 2 t + 8 and on, twice; of b the rows 2 t and on, then 2 t + 8
// and on, of column g; of c the columns 2 t and 2 t + 1 of row g, then of row g + 8.
template <typename T>
__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
    // Sums go in and out as separate operands, so that a first product takes zeros that are in no register.
    const float in[4] = {c[0], c[1], c[2], c[3]};
    if constexpr (std::is_same_v<T, __half>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%10, %11, %12, %13};"
            : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(in[0]), "f"(in[1]), "f"(in[2]),
              "f"(in[3]));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%10, %11, %12, %13};"
            : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(in[0]), "f"(in[1]), "f"(in[2]),
              "f"(in[3]));
    }
}

// Two floats as two rounded numbers of type T, the first in the low half.
template <typename T>
__device__ uint32_t pack(float first, float second);
template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ inline uint32_t pack<__half>(float first, float second) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// 2^x, relative error below 2^-22: far below what rounding weights to two bytes costs.
__device__ inline float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A load that is issued where it stands: without this, loads whose results only one branch needs move into it and wait
// for each other.
__device__ inline int load_now(const void* from) {
    int value;
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(value) : "l"(from));
    return value;
}

// The same where `wanted`, in the register that holds `value`: a copy from another one would wait for the load.
__device__ inline void load_now(int& value, const void* from, bool wanted) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.nc.b32 %0, [%1]; }"
                 : "+r"(value)
                 : "l"(from), "r"(int(wanted)));
}

}  // namespace nanoinfer::cuda
