#pragma once
// The instructions of Hopper (sm_90a) that linear_tile.cuh needs beside attention's: clusters, products of two matrices
// in shared memory.

#include "attention_hopper_ptx.cuh"

namespace nanoinfer::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// This block's cluster among those of its grid row, and its own place there.
__device__ inline int cluster_index() {
    int index;
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
    return index;
}
__device__ inline int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of a cluster's blocks meet. What they wrote before is not ordered: only barriers and their fences are.
__device__ inline void meet_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Barriers that this thread has made are there for the cluster and for copies that it starts.
__device__ inline void fence_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// What this thread has written to shared memory is seen by copies that start after the next barrier.
__device__ inline void fence_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Where block `rank` of the cluster has what lies at `address` in this one's shared memory.
__device__ inline uint32_t address_in(int rank, uint32_t address) {
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
    return address;
}

// Starts to copy shared memory to another block's, where `barrier` counts the bytes.
__device__ inline void copy_to_block(uint32_t to, uint32_t from, int bytes, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
        "r"(from), "r"(bytes), "r"(barrier)
        : "memory");
}

__device__ inline float4 load_four_shared(uint32_t address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

// The driver's description of a tensor is on its way to where copies look for it.
__device__ inline void prefetch_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Threads 0 to `threads` meet.
__device__ inline void sync_first(int threads) { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }

// The operands of a product of 8 n columns: its 4 n sums, by number and by name.
#define NANOINFER_20 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19"
#define NANOINFER_24 NANOINFER_20 ", %20, %21, %22, %23"
#define NANOINFER_28 NANOINFER_24 ", %24, %25, %26, %27"
#define NANOINFER_32 NANOINFER_28 ", %28, %29, %30, %31"
#define NANOINFER_40 NANOINFER_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define NANOINFER_48 NANOINFER_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define NANOINFER_64 NANOINFER_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NANOINFER_72 NANOINFER_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define NANOINFER_80 NANOINFER_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define NANOINFER_SUM(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define NANOINFER_SUMS_20 NANOINFER_SUM(0), NANOINFER_SUM(1), NANOINFER_SUM(2), NANOINFER_SUM(3), NANOINFER_SUM(4)
#define NANOINFER_SUMS_24 NANOINFER_SUMS_20, NANOINFER_SUM(5)
#define NANOINFER_SUMS_28 NANOINFER_SUMS_24, NANOINFER_SUM(6)
#define NANOINFER_SUMS_32 NANOINFER_SUMS_28, NANOINFER_SUM(7)
#define NANOINFER_SUMS_40 NANOINFER_SUMS_32, NANOINFER_SUM(8), NANOINFER_SUM(9)
#define NANOINFER_SUMS_48 NANOINFER_SUMS_40, NANOINFER_SUM(10), NANOINFER_SUM(11)
#define NANOINFER_SUMS_64 NANOINFER_SUMS_48, NANOINFER_SUM(12), NANOINFER_SUM(13), NANOINFER_SUM(14), NANOINFER_SUM(15)
#define NANOINFER_SUMS_72 NANOINFER_SUMS_64, NANOINFER_SUM(16), NANOINFER_SUM(17)
#define NANOINFER_SUMS_80 NANOINFER_SUMS_72, NANOINFER_SUM(18), NANOINFER_SUM(19)
// Last: the numbers of the operands that describe a and b, which come after the sums.
#define NANOINFER_PRODUCT(type, columns, sums, a_number, b_number)                                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type " {" NANOINFER_##sums \
                 "}, %" #a_number ", %" #b_number ", 1, 1, 1, 0, 0;"                                \
                 : NANOINFER_SUMS_##sums                                                            \
                 : "l"(a), "l"(b))
#define NANOINFER_EITHER(columns, sums, a_number, b_number)                \
    if constexpr (std::is_same_v<T, __half>) {                             \
        NANOINFER_PRODUCT("f16.f16", columns, sums, a_number, b_number);   \
    } else {                                                               \
        NANOINFER_PRODUCT("bf16.bf16", columns, sums, a_number, b_number); \
    }

// Starts c += a b^T: a [64, 16] and b [8 n, 16] described, c [64, 8 n]. Warp w of the warpgroup has c's rows from 16 w
// on; of each 8 columns a lane has the numbers that multiply_add() leaves it.
template <typename T, int n>
__device__ inline void start_product(float (&c)[n][4], uint64_t a, uint64_t b) {
    static_assert(n == 5 || n == 6 || n == 7 || n == 8 || n == 10 || n == 12 || n == 18 || n == 20);
    if constexpr (n == 5) {
        NANOINFER_EITHER(40, 20, 20, 21)
    } else if constexpr (n == 6) {
        NANOINFER_EITHER(48, 24, 24, 25)
    } else if constexpr (n == 7) {
        NANOINFER_EITHER(56, 28, 28, 29)
    } else if constexpr (n == 8) {
        NANOINFER_EITHER(64, 32, 32, 33)
    } else if constexpr (n == 10) {
        NANOINFER_EITHER(80, 40, 40, 41)
    } else if constexpr (n == 12) {
        NANOINFER_EITHER(96, 48, 48, 49)
    } else if constexpr (n == 18) {
        NANOINFER_EITHER(144, 72, 72, 73)
    } else {
        NANOINFER_EITHER(160, 80, 80, 81)
    }
}
#undef NANOINFER_EITHER
#undef NANOINFER_PRODUCT
#undef NANOINFER_SUM
#undef NANOINFER_SUMS_20
#undef NANOINFER_SUMS_24
#undef NANOINFER_SUMS_28
#undef NANOINFER_SUMS_32
#undef NANOINFER_SUMS_40
#undef NANOINFER_SUMS_48
#undef NANOINFER_SUMS_64
#undef NANOINFER_SUMS_72
#undef NANOINFER_SUMS_80
#undef NANOINFER_20
#undef NANOINFER_24
#undef NANOINFER_28
#undef NANOINFER_32
#undef NANOINFER_40
#undef NANOINFER_48
#undef NANOINFER_64
#undef NANOINFER_72
#undef NANOINFER_80

#endif

}  // namespace nanoinfer::cuda
