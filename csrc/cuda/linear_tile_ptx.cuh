#pragma once
// The instructions of Hopper (sm_90a) that linear layers need beside attention's: clusters, products of two matrices in
// shared memory.

#include "attention_hopper_ptx.cuh"

namespace nanoinfer::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// This block's cluster among those of its grid row, how many these are, and its own place there.
__device__ inline int cluster_index() {
    int index;
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
    return index;
}
__device__ inline int cluster_count() {
    int count;
    asm("mov.u32 %0, %%nclusterid.x;" : "=r"(count));
    return count;
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

// Arrives at a barrier of a block of the cluster, by its address there.
__device__ inline void arrive_in(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Starts to copy a box to this place in several blocks of the cluster, whose bits are set; each one's own barrier at
// this address counts the bytes.
__device__ inline void copy_box_to_blocks(uint32_t to, const CUtensorMap& map, int column, int row, uint32_t barrier,
                                          int blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(uint16_t(blocks))
        : "memory");
}

// Threads 0 to `threads` meet.
__device__ inline void sync_first(int threads) { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }

// A warpgroup's threads go on with so many registers each: fewer than the launch gave them, or more, from what others
// have given back.
template <int count>
__device__ inline void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// 1 / x, relative error below 2^-22; of infinity 0.
__device__ inline float inverse(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

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
#define NANOINFER_96 NANOINFER_80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NANOINFER_112 \
    NANOINFER_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define NANOINFER_128 \
    NANOINFER_112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
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
#define NANOINFER_SUMS_96 NANOINFER_SUMS_80, NANOINFER_SUM(20), NANOINFER_SUM(21), NANOINFER_SUM(22), NANOINFER_SUM(23)
#define NANOINFER_SUMS_112 NANOINFER_SUMS_96, NANOINFER_SUM(24), NANOINFER_SUM(25), NANOINFER_SUM(26), NANOINFER_SUM(27)
#define NANOINFER_SUMS_128 \
    NANOINFER_SUMS_112, NANOINFER_SUM(28), NANOINFER_SUM(29), NANOINFER_SUM(30), NANOINFER_SUM(31)
// Last: the numbers of the operands after the sums, which describe a and b, and say whether to add.
#define NANOINFER_PRODUCT(type, columns, sums, a_number, b_number, add_number)                      \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type " {" NANOINFER_##sums \
                 "}, %" #a_number ", %" #b_number ", %" #add_number ", 1, 1, 0, 0;"                 \
                 : NANOINFER_SUMS_##sums                                                            \
                 : "l"(a), "l"(b), "n"(int(kAdd)))
#define NANOINFER_EITHER(columns, sums, a_number, b_number, add_number)                \
    if constexpr (std::is_same_v<T, __half>) {                                         \
        NANOINFER_PRODUCT("f16.f16", columns, sums, a_number, b_number, add_number);   \
    } else {                                                                           \
        NANOINFER_PRODUCT("bf16.bf16", columns, sums, a_number, b_number, add_number); \
    }

// Starts c += a b^T, or c = a b^T: a [64, 16] and b [8 n, 16] described, c [64, 8 n]. Warp w of the warpgroup has c's
// rows from 16 w on; of each 8 columns a lane has the numbers that multiply_add() leaves it.
template <typename T, bool kAdd = true, int n>
__device__ inline void start_product(float (&c)[n][4], uint64_t a, uint64_t b) {
    static_assert(n == 5 || n == 6 || n == 7 || n == 8 || n == 10 || n == 12 || n == 16 || n == 18 || n == 20 ||
                  n == 24 || n == 28 || n == 32);
    if constexpr (n == 5) {
        NANOINFER_EITHER(40, 20, 20, 21, 22)
    } else if constexpr (n == 6) {
        NANOINFER_EITHER(48, 24, 24, 25, 26)
    } else if constexpr (n == 7) {
        NANOINFER_EITHER(56, 28, 28, 29, 30)
    } else if constexpr (n == 8) {
        NANOINFER_EITHER(64, 32, 32, 33, 34)
    } else if constexpr (n == 10) {
        NANOINFER_EITHER(80, 40, 40, 41, 42)
    } else if constexpr (n == 12) {
        NANOINFER_EITHER(96, 48, 48, 49, 50)
    } else if constexpr (n == 16) {
        NANOINFER_EITHER(128, 64, 64, 65, 66)
    } else if constexpr (n == 18) {
        NANOINFER_EITHER(144, 72, 72, 73, 74)
    } else if constexpr (n == 20) {
        NANOINFER_EITHER(160, 80, 80, 81, 82)
    } else if constexpr (n == 24) {
        NANOINFER_EITHER(192, 96, 96, 97, 98)
    } else if constexpr (n == 28) {
        NANOINFER_EITHER(224, 112, 112, 113, 114)
    } else {
        NANOINFER_EITHER(256, 128, 128, 129, 130)
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
#undef NANOINFER_SUMS_96
#undef NANOINFER_SUMS_112
#undef NANOINFER_SUMS_128
#undef NANOINFER_20
#undef NANOINFER_24
#undef NANOINFER_28
#undef NANOINFER_32
#undef NANOINFER_40
#undef NANOINFER_48
#undef NANOINFER_64
#undef NANOINFER_72
#undef NANOINFER_80
#undef NANOINFER_96
#undef NANOINFER_112
#undef NANOINFER_128

#endif

}  // namespace nanoinfer::cuda
