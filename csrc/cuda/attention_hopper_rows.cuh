#pragma once
// The arithmetic of attention_hopper.cuh: a warpgroup's 64 rows against a tile of keys, then of values. Products are
// started here, and waited for there.

#include "attention_hopper_ptx.cuh"
#include "attention_prefill.cuh"

namespace nanoinfer::cuda {

template <int D>
struct HopperShape {
    static constexpr int kGroups = 2, kThreads = 128 * (1 + kGroups), kRows = 64 * kGroups;
    static constexpr int kQueryThreads = 96;  // that find items and copy queries
    static constexpr int kKeys = 128;         // of a tile: scores take 64 registers of each thread
    // Columns are in panels of 64: rows of 128 bytes, whose pieces of 16 change places by exclusive or with row % 8, as
    // bulk copies and matrix products agree on.
    static constexpr int kPanels = D / 64, kPanelBytes = kKeys * 128, kTileBytes = kPanels * kPanelBytes;
    static constexpr int kSlots = D == 64 ? 8 : 5;  // as many as fit
    static constexpr int kQueryBytes = kRows * D * 2;
    static constexpr int kSharedBytes = 1024 + kSlots * kTileBytes + 2 * kQueryBytes;  // slots at multiples of 1024
    // Registers of a thread, set at run time: the rows of heads of 128 need what copying can do without.
    static constexpr int kCopyRegisters = D == 64 ? 56 : 40, kMathRegisters = D == 64 ? 224 : 232;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <int D>
__device__ void load_queries(uint32_t (&queries)[D / 16][4], uint32_t rows) {
    rows += Tile<D>::offset(threadIdx.x % 16, threadIdx.x % 32 / 16);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) load_matrices(queries[k], Tile<D>::move(rows, 2 * k));
}

// Starts scores = queries keys^T, of the slot's tile of keys.
template <typename T, int D, typename Rows>
__device__ void start_scores(Rows& rows, const uint32_t (&queries)[D / 16][4], uint32_t keys) {
    settle(rows.scores[0]);
    fence_products();
#pragma unroll
    for (int half = 0; half < HopperShape<D>::kKeys / 64; ++half) {
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            const uint32_t at = keys + k / 4 * HopperShape<D>::kPanelBytes + half * 64 * 128 + k % 4 * 32;
            start_product<T, false>(&rows.scores[0][8 * half], queries[k], describe(at), k > 0);
        }
    }
    commit_products();
}

// Starts out += weights values.
template <typename T, int D, typename Rows, int kSteps>
__device__ void start_values(Rows& rows, const uint32_t (&weights)[kSteps][4], uint32_t values) {
    settle(rows.out[0]);
    fence_products();
#pragma unroll
    for (int panel = 0; panel < D / 64; ++panel) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            const uint32_t at = values + panel * HopperShape<D>::kPanelBytes + k * 16 * 128;
            start_product<T, true>(&rows.out[0][8 * panel], weights[k], describe(at), true);
        }
    }
    commit_products();
}

// scores -> weights, and their sums, of this lane's columns; returns how much out has to shrink, true if at all.
template <typename Rows>
__device__ bool weigh_scores(Rows& rows, float (&shrink)[2], float scale_log2, float slack) {
    bool grown = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float highest = rows.highest_score(0, h), top = rows.top[0][h];
        const float new_top = highest > top + slack ? highest : top, offset = new_top * scale_log2;
        shrink[h] = power_of_two((top - new_top) * scale_log2);
        grown |= new_top != top;
        rows.top[0][h] = new_top;
        float sum = rows.sums[0][2 * h] * shrink[h];
#pragma unroll
        for (auto& tile : rows.scores[0]) {
#pragma unroll
            for (int i = 2 * h; i < 2 * h + 2; ++i) {
                tile[i] = power_of_two(tile[i] * scale_log2 - offset);
                sum += tile[i];
            }
        }
        rows.sums[0][2 * h] = sum;
    }
    return __any_sync(kAllLanes, grown);
}

// A row's sum, of its four lanes' columns.
template <typename Rows>
__device__ void add_lanes(Rows& rows) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float& sum = rows.sums[0][2 * h];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
    }
}

template <typename T, int D, typename Rows, int kSteps>
__device__ void round_weights(const Rows& rows, uint32_t (&weights)[kSteps][4]) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* pair = &rows.scores[0][2 * k + i / 2][i % 2 * 2];
            weights[k][i] = pack<T>(pair[0], pair[1]);
        }
    }
}

// Replaces values of keys outside [low, high) by zeros, in a tile that starts with `key`; see zero_outside(). Both
// warpgroups do, so that neither waits for the other.
template <int D>
__device__ void zero_rows(uint32_t values, int key, int low, int high) {
    using Shape = HopperShape<D>;
    for (int i = threadIdx.x % 128; i < Shape::kTileBytes / 16; i += 128) {
        const int at = key + i / 8 % Shape::kKeys;
        if (at < low || at >= high) store_zeros(values + 16 * i);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // products read what was stored
    sync_threads<128>(threadIdx.x / 128);                         // by all threads
}

template <typename Rows>
__device__ void shrink_sums(Rows& rows, const float (&shrink)[2]) {
#pragma unroll
    for (auto& column : rows.out[0]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) column[i] *= shrink[i / 2];
    }
}

#endif

}  // namespace nanoinfer::cuda
