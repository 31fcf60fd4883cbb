#pragma once
// The instructions of Hopper (sm_90a) for asynchronous copies and matrix products that C++ has no name for.

#include <cuda.h>

#include "attention_ptx.cuh"

namespace nanoinfer::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Barriers in shared memory, by address. Each completes phase after phase; waiting names the phase's parity.
__device__ inline void init_barrier(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void arrive_expecting(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void wait_barrier(uint32_t barrier, int parity) {
    asm volatile(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1; @!done bra again; }" ::"r"(
            barrier),
        "r"(parity)
        : "memory");
}

// kThreads threads, whole warps, meet at one of the block's barriers: they see what all of them wrote before.
template <int kThreads>
__device__ inline void sync_threads(int barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// Starts to copy 16 rows of 64 numbers, from column and row of the map's tensor on.
__device__ inline void copy_box(uint32_t to, const CUtensorMap& map, int column, int row, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

// Registers that products read or add to are in order before the next product, and products are before what follows
// wait_products(), but for the last `pending` committed groups of them.
__device__ inline void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ inline void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Products change registers behind the compiler's back: nothing may read these before, or write them after this point.
template <int n>
__device__ void settle(float (&tiles)[n][4]) {
#pragma unroll
    for (auto& tile : tiles) {
#pragma unroll
        for (float& number : tile) asm volatile("" : "+f"(number)::"memory");
    }
}

// Describes a panel's rows from `address` on: swizzled by 128 bytes, 8 rows to 1024 bytes.
__device__ inline uint64_t describe(uint32_t address) {
    return uint64_t(address >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

#define NANOINFER_FOUR(c, i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define NANOINFER_PRODUCT(type)                                                                                     \
    asm volatile("{ .reg .pred add; setp.ne.b32 add, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." type      \
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "     \
                 "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, add, 1, " \
                 "1, %38; }"                                                                                        \
                 : NANOINFER_FOUR(c, 0), NANOINFER_FOUR(c, 1), NANOINFER_FOUR(c, 2), NANOINFER_FOUR(c, 3),          \
                   NANOINFER_FOUR(c, 4), NANOINFER_FOUR(c, 5), NANOINFER_FOUR(c, 6), NANOINFER_FOUR(c, 7)           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(kRowsAreK)))

// Starts c = a b, or c += a b: a 64 x 16 in the warpgroup's registers, b 16 x 64 described, c 64 x 64. A warp has 16
// rows of a and c, spread over its lanes as in multiply_add(). Rows in memory are b's rows (kRowsAreK) or its columns.
template <typename T, bool kRowsAreK>
__device__ void start_product(float (*c)[4], const uint32_t (&a)[4], uint64_t b, bool add) {
    if constexpr (std::is_same_v<T, __half>) {
        NANOINFER_PRODUCT("f16.f16");
    } else {
        NANOINFER_PRODUCT("bf16.bf16");
    }
}
#undef NANOINFER_PRODUCT
#undef NANOINFER_FOUR

#endif

}  // namespace nanoinfer::cuda
