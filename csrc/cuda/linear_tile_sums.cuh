#pragma once
// What linear_tile.cuh's kernel is told, and what becomes of its sums: straight to the result, or by way of the block
// that adds up a row's parts.

#include "linear_ring.cuh"
#include "vec.cuh"

namespace nanoinfer::cuda {

struct TileLinear {
    const void* x;       // [rows, dim], rows x_stride apart
    const void* weight;  // [weight_rows, dim], rows weight_stride apart; gated: the gates' rows, then as many for ups
    const void* bias;    // [weight_rows]; null: none. Not gated
    void* out;           // [rows, weight_rows], gated half as wide
    int rows;
    int64_t dim, weight_rows, x_stride, weight_stride;
    bool gated;
    int cols, tiles, split;  // how the work is cut
    int blocks;              // on an SM, 1 or 2: these share its memory
};

constexpr int kMaxTiles = 3;  // with more, a thread has too few registers for the sums of 160 columns
constexpr int kMaxParts = 8;  // blocks of a cluster, for which every GPU has room
constexpr int kMaxTileThreads = kMaxTiles * kGroup + kWarp;
constexpr int kMaxStages = 16;
constexpr int kTileShared[] = {0, 210 * 1024, 110 * 1024};  // bytes of a block where an SM has 1, or 2

// What the kernel gets, worked out by the launcher.
struct TileParams {
    CUtensorMap weight_map, x_map;
    const void* bias;
    void* out;
    int64_t out_dim;
    int rows, block_rows;  // of x: in all, of a block
    int chunks, split;
    int stages, x_rows;  // of the ring; of x in a stage
    int sums_at;         // bytes from the ring's begin to where other blocks send their sums
};

// Barriers of the ring, and of the sums that come from other blocks.
struct TileShared {
    uint64_t full[kMaxStages], empty[kMaxStages], sums;
};

// What a block has to do: `count` chunks from `begin` on of x's rows from `row` on.
struct TileWork {
    int part, tile, row, begin, count, stage_bytes;
};

// Rows of a block's, from `begin` to before `end`.
struct RowSpan {
    int begin, end;
};

// A row of float sums in shared memory: a warp stores 8 rows at once, that then lie in different banks.
template <int kCols>
constexpr int kSumsPitch = kCols + (kCols % 16 == 0 ? 8 : 0);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The rows that one of the blocks that share a tile adds up.
__device__ inline RowSpan rows_of(const TileParams& p, const TileWork& work, int part) {
    const int rows = min(p.rows - work.row, p.block_rows);
    return {rows * part / p.split, rows * (part + 1) / p.split};
}

// Has the biases of the block's columns, each 32 bytes of which a thread asks for, brought to the second cache.
template <int kCols>
__device__ inline void prefetch_bias(const TileParams& p, const TileWork& work) {
    const int64_t col = int64_t(work.tile) * kCols + threadIdx.x * 16;
    if (threadIdx.x * 16 >= kCols || col >= p.out_dim) return;
    asm volatile("prefetch.global.L2 [%0];" : : "l"(static_cast<const uint16_t*>(p.bias) + col));
}

__device__ inline float silu_times(float gate, float up) { return gate / (1.f + __expf(-gate)) * up; }

// Writes a warp's 16 rows by way of its own place in shared memory: neighbouring lanes then write neighbouring bytes.
template <typename T, int kCols, bool kGated>
__device__ inline void write_sums(const TileParams& p, const TileWork& work, unsigned char* ring,
                                  const float (&sums)[kCols / 8][4]) {
    constexpr int kWide = kGated ? kCols / 2 : kCols, kPitch = kSumsPitch<kWide>, kVecs = kWide / 8;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const int64_t first = int64_t(work.tile) * kWide;
    const int row = work.row + warp * 16;
    T* own = reinterpret_cast<T*>(ring) + warp * 16 * kPitch;
#pragma unroll
    for (int n = 0; n < kVecs; ++n) {
        const int64_t col = first + n * 8 + 2 * t;
        Vec<T, 2> bias = {};
        if (p.bias && col < p.out_dim) bias = load<T, 2>(static_cast<const T*>(p.bias) + col);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            Vec<T, 2> v;
            for (int j = 0; j < 2; ++j) {
                float sum = sums[n][2 * half + j] + to_float(bias.at[j]);
                if constexpr (kGated) sum = silu_times(sum, sums[n + kVecs][2 * half + j]);
                v.at[j] = from_float<T>(sum);
            }
            *reinterpret_cast<Vec<T, 2>*>(own + (g + 8 * half) * kPitch + n * 8 + 2 * t) = v;
        }
    }
    __syncwarp();
    for (int i = lane; i < 16 * kVecs; i += kWarp) {
        const int r = i / kVecs, col = i % kVecs * 8;
        if (row + r < p.rows && first + col < p.out_dim) {
            T* to = static_cast<T*>(p.out) + (row + r) * p.out_dim + first + col;
            store<T, 8>(to, load<T, 8>(own + r * kPitch + col));
        }
    }
}

// A warp's sums to its block's shared memory.
template <int kCols>
__device__ inline void keep_sums(unsigned char* ring, const float (&sums)[kCols / 8][4]) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    float* own = reinterpret_cast<float*>(ring) + (warp * 16 + g) * kSumsPitch<kCols> + 2 * t;
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n) {
        *reinterpret_cast<float2*>(own + n * 8) = {sums[n][0], sums[n][1]};
        *reinterpret_cast<float2*>(own + 8 * kSumsPitch<kCols> + n * 8) = {sums[n][2], sums[n][3]};
    }
}

// Thread i sends block i of the cluster this block's sums of the rows that it adds up, to come after those of the parts
// before this one, its own left out.
template <int kCols>
__device__ inline void send_sums(const TileParams& p, const TileWork& work, TileShared& all, uint32_t ring) {
    constexpr int kPitchBytes = kSumsPitch<kCols> * int(sizeof(float));
    const int to = threadIdx.x;
    if (to >= p.split || to == work.part) return;
    const RowSpan rows = rows_of(p, work, to);
    const int bytes = (rows.end - rows.begin) * kPitchBytes, place = work.part - (work.part > to);
    if (bytes == 0) return;
    copy_to_block(address_in(to, ring + p.sums_at + place * bytes), ring + rows.begin * kPitchBytes, bytes,
                  address_in(to, shared_address(&all.sums)));
}

// All parts' sums of 8 columns of a row, added in the order of k.
template <int kCols>
__device__ inline void add_parts(const TileParams& p, const TileWork& work, uint32_t ring, RowSpan own, int row,
                                 int col, Vec<float, 4> (&total)[2]) {
    const uint32_t at = ring + (row * kSumsPitch<kCols> + col) * sizeof(float);
    float4 parts[kMaxParts][2];
#pragma unroll
    for (int part = 0; part < kMaxParts; ++part) {
        if (part < p.split) {
            const int place = (part - (part > work.part)) * (own.end - own.begin) - own.begin;
            const int there = p.sums_at + place * kSumsPitch<kCols> * int(sizeof(float));
            const uint32_t from = at + (part == work.part ? 0 : there);
            parts[part][0] = load_four_shared(from), parts[part][1] = load_four_shared(from + 16);
        }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        float4 sum = parts[0][j];
#pragma unroll
        for (int part = 1; part < kMaxParts; ++part) {
            if (part < p.split) {
                const float4 more = parts[part][j];
                sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
            }
        }
        total[j] = {sum.x, sum.y, sum.z, sum.w};
    }
}

// Writes the rows that this block adds up, once all parts are there.
template <typename T, int kCols, bool kGated>
__device__ inline void write_own_rows(const TileParams& p, const TileWork& work, uint32_t ring, int threads) {
    constexpr int kWide = kGated ? kCols / 2 : kCols, kVecs = kWide / 8;
    const RowSpan own = rows_of(p, work, work.part);
    const int64_t first = int64_t(work.tile) * kWide;
    for (int i = threadIdx.x; i < (own.end - own.begin) * kVecs; i += threads) {
        const int row = own.begin + i / kVecs, col = i % kVecs * 8;
        if (first + col >= p.out_dim) continue;
        Vec<float, 4> sums[2], ups[2];
        add_parts<kCols>(p, work, ring, own, row, col, sums);
        if constexpr (kGated) add_parts<kCols>(p, work, ring, own, row, kWide + col, ups);
        Vec<T, 8> bias = {}, out;
        if (p.bias) bias = load<T, 8>(static_cast<const T*>(p.bias) + first + col);
        for (int j = 0; j < 8; ++j) {
            float sum = sums[j / 4].at[j % 4] + to_float(bias.at[j]);
            if constexpr (kGated) sum = silu_times(sum, ups[j / 4].at[j % 4]);
            out.at[j] = from_float<T>(sum);
        }
        store<T, 8>(static_cast<T*>(p.out) + (work.row + row) * p.out_dim + first + col, out);
    }
}
#endif

}  // namespace nanoinfer::cuda
