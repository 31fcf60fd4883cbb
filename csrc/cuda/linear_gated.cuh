#pragma once
// gate_up and SiLU as one kernel for many rows of x on Hopper (sm_90a): out = silu(x gates^T) * (x ups^T).
//
// A block stays on its multiprocessor and takes tiles in turn: 128 rows of x by kCols weight rows, half of them gates',
// half the ups' beside them. One thread copies chunks of both matrices, 64 numbers along k, to a ring of stages in
// shared memory; two warpgroups multiply 64 rows each from there. It copies on over the end of a tile. A lane holds a
// gate and its up: nobody has to exchange them.
//
// An exponential and a division per result take a seventh of the time of 896 multiply-adds for its gate and as many for
// its up. So they run beside the products: a tile's sums are rounded to T in registers, as a matrix product by itself
// would have written them, and while the tensor cores work on each of the next tile's first chunks the threads finish
// a part of these results.
//
// 64 numbers along k of a tile of 256 weight rows are 1024 clocks of products and 48 KB, but a multiprocessor has been
// seen to get no more than some 36 bytes a clock from the second cache. So two blocks can be a cluster, whose tiles
// share weights (one above the other) or x (side by side): each copies half of what is shared, to both. Tiles follow
// each other down a band of rows and then across, so that what all blocks read at a time is in that cache. Wide tiles
// are the faster ones: their copies and products take all that shared memory gives, 128 bytes a clock, and narrower
// ones need more of it per product.
//
// Every cut adds up a result in the same order: a row's results depend on that row and the weights alone.

#include "launch.cuh"
#include "linear_ring.cuh"
#include "vec.cuh"

namespace nanoinfer::cuda {

struct GatedLinear {
    const void* x;       // [rows, dim], rows x_stride apart
    const void* weight;  // [2 out_dim, dim], rows weight_stride apart: the gates' rows, then the ups'
    void* out;           // [rows, out_dim]
    int rows;
    int64_t dim, out_dim, x_stride, weight_stride;
    int cols;          // weight rows of a tile
    int down, across;  // blocks of a cluster: 1, 1 or 2, 1 or 1, 2
    int band;          // rows of clusters' tiles, before the next column's
};

constexpr int kGatedGroups = 2;  // warpgroups that multiply; one before them copies
constexpr int kGatedThreads = (1 + kGatedGroups) * kGroup;
constexpr int kGatedRows = kGatedGroups * kTileRows;
// Registers of a thread, set at run time: the sums and the last tile's rounded ones take 192 where kCols is 256.
constexpr int kCopyRegisters = 24, kMultiplyRegisters = 240;
constexpr int kGatedShared = 226 * 1024;  // bytes of a block's ring; barriers beside it

template <int kCols>
struct GatedShape {
    static constexpr int kWide = kCols / 2;    // columns of the result
    static constexpr int kParts = kCols / 32;  // in which these are finished
    static constexpr int kXBytes = kGatedRows * kChunkBytes, kHalfBytes = kWide * kChunkBytes;  // of a stage
    static constexpr int kStageBytes = kXBytes + 2 * kHalfBytes;
    static constexpr int kStages = (kGatedShared - kStageAlignment) / kStageBytes;
    static_assert(kCols % 32 == 0 && kHalfBytes % kStageAlignment == 0);
};

// What the kernel gets, worked out by the launcher.
struct GatedParams {
    CUtensorMap weight_map, x_map;
    void* out;
    int rows, out_dim, chunks;
    int down, across, band;
    int tile_rows, tiles;  // of clusters' tiles: one below the other, in all
};

template <int kCols>
struct GatedBarriers {
    uint64_t full[GatedShape<kCols>::kStages], empty[GatedShape<kCols>::kStages];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A tile's first row of x and first column of the result.
struct GatedTile {
    int row, col;
};

// This block's part of a cluster's tile.
template <int kCols>
__device__ inline GatedTile gated_tile(const GatedParams& p, int index) {
    const int columns = p.tiles / p.tile_rows, band = index / (p.band * columns), in = index % (p.band * columns);
    const int first = band * p.band, height = min(p.band, p.tile_rows - first), rank = cluster_rank();
    const int row = (first + in % height) * p.down + (p.down > 1 ? rank : 0);
    const int col = in / height * p.across + (p.across > 1 ? rank : 0);
    return {row * kGatedRows, col * GatedShape<kCols>::kWide};
}

// Starts to copy a chunk, from `column` of x and weights on.
template <int kCols>
__device__ inline void copy_chunk(const GatedParams& p, GatedTile tile, int column, uint32_t to, uint32_t full) {
    using Shape = GatedShape<kCols>;
    constexpr int kBoth = 3;  // blocks
    const uint32_t weights = to + Shape::kXBytes;
    const int rank = cluster_rank();
    arrive_expecting(full, Shape::kStageBytes);
    if (p.across > 1) {
        copy_box_to_blocks(to + rank * (Shape::kXBytes / 2), p.x_map, column, tile.row + rank * (kGatedRows / 2), full,
                           kBoth);
    } else {
        copy_box(to, p.x_map, column, tile.row, full);
    }
    if (p.down > 1) {
        copy_box_to_blocks(weights + rank * Shape::kHalfBytes, p.weight_map, column, tile.col + rank * p.out_dim, full,
                           kBoth);
    } else {
        copy_box(weights, p.weight_map, column, tile.col, full);
        copy_box(weights + Shape::kHalfBytes, p.weight_map, column, tile.col + p.out_dim, full);
    }
}

// One thread: copies all chunks of all the block's tiles.
template <int kCols>
__device__ inline void copy_tiles(const GatedParams& p, GatedBarriers<kCols>& barriers, uint32_t ring) {
    using Shape = GatedShape<kCols>;
    RingTurn turn;
    for (int i = cluster_index(); i < p.tiles; i += cluster_count()) {
        const GatedTile tile = gated_tile<kCols>(p, i);
        for (int chunk = 0; chunk < p.chunks; ++chunk, turn.advance(Shape::kStages)) {
            wait_barrier(shared_address(&barriers.empty[turn.stage]), turn.parity ^ 1);
            copy_chunk<kCols>(p, tile, chunk * kChunk, ring + turn.stage * Shape::kStageBytes,
                              shared_address(&barriers.full[turn.stage]));
        }
    }
}

// A warpgroup's place in the ring, and how its warps say that they are through with a stage: to all blocks that copy
// to it, for lane i to block i.
template <int kCols>
struct GatedRing {
    uint32_t stages, full, empty;
    bool tells;
    RingTurn turn = {};
    int last = 0;

    __device__ void release() const {
        if (tells) arrive_in(empty + last * sizeof(uint64_t));
    }
    __device__ void advance() {
        last = turn.stage;
        turn.advance(GatedShape<kCols>::kStages);
    }
};

// Starts to add up a chunk's products, or a tile's first ones; waits for those before.
template <typename T, int kCols, bool kFirst>
__device__ inline void multiply_chunk(GatedRing<kCols>& ring, int group, float (&sums)[kCols / 8][4]) {
    const uint32_t at = ring.stages + ring.turn.stage * GatedShape<kCols>::kStageBytes;
    const uint64_t x = describe(at + group * kTileRows * kChunkBytes);
    const uint64_t weights = describe(at + GatedShape<kCols>::kXBytes);
    wait_barrier(ring.full + ring.turn.stage * sizeof(uint64_t), ring.turn.parity);
    fence_products();
    start_product<T, !kFirst>(sums, x, weights);
#pragma unroll
    for (int step = 1; step < kChunk / 16; ++step) start_product<T>(sums, x + step * 2, weights + step * 2);
    commit_products();
    if constexpr (!kFirst) {
        wait_products<1>();
        ring.release();
    }
    ring.advance();
}

template <typename T>
__device__ inline uint32_t silu_words(uint32_t gates, uint32_t ups) {
    constexpr float kLog2E = 1.44269504f;
    Vec<T, 2> gate, up;
    memcpy(&gate, &gates, sizeof(gate));
    memcpy(&up, &ups, sizeof(up));
    float out[2];
    for (int i = 0; i < 2; ++i) {
        const float g = to_float(gate.at[i]);
        out[i] = g * inverse(1.f + power_of_two(-kLog2E * g)) * to_float(up.at[i]);
    }
    return pack<T>(out[0], out[1]);
}

// Of four neighbouring lanes, lane i gets every one's word i.
__device__ inline void transpose_words(uint32_t (&words)[4]) {
#pragma unroll
    for (int apart = 1; apart <= 2; ++apart) {
        const bool upper = threadIdx.x & apart;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & apart) continue;
            uint32_t &low = words[i], &high = words[i + apart];
            const uint32_t got = __shfl_xor_sync(~0u, upper ? low : high, apart);
            low = upper ? got : low;
            high = upper ? high : got;
        }
    }
}

// A part of a tile's results, for a warp: words of 8 columns `n` times 8 on, in its rows 0 to 7 or 8 to 15 (half 1). Of
// each word lane 4 g + t has columns 2 t and 2 t + 1 of row g. Four words beside each other, that is 64 bytes of a row,
// or, where only two are left, these of both halves.
struct GatedWord {
    int n, half;
};
template <int kCols>
__device__ constexpr GatedWord gated_word(int part, int i) {
    const int first = part / 2 * 4;
    return first + 4 <= kCols / 16 ? GatedWord{first + i, part % 2} : GatedWord{first + i % 2, i / 2};
}

// Finishes a part and writes it: lane 4 g + t word t's row g.
template <typename T, int kCols>
__device__ inline void finish_part(const GatedParams& p, int part, const uint32_t (&kept)[kCols / 8][2],
                                   GatedTile tile) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const GatedWord word = gated_word<kCols>(part, i);
        words[i] = silu_words<T>(kept[word.n][word.half], kept[word.n + kCols / 16][word.half]);
    }
    transpose_words(words);
    const int thread = threadIdx.x - kGroup, warp = thread / kWarp, lane = thread % kWarp;
    const GatedWord own = gated_word<kCols>(part, lane % 4);
    const int row = tile.row + warp * 16 + lane / 4 + own.half * 8, col = tile.col + own.n * 8;
    if (row < p.rows && col < p.out_dim) {
        Vec<T, 8> v;
        memcpy(&v, words, sizeof(v));
        store<T, 8>(static_cast<T*>(p.out) + int64_t(row) * p.out_dim + col, v);
    }
}

// A warpgroup: 64 rows of all the block's tiles. What finishes a part stands behind a branch, so that the compiler does
// not move it in between the products before, where it would hold up the tensor cores.
template <typename T, int kCols>
__device__ inline void multiply_tiles(const GatedParams& p, GatedRing<kCols> ring) {
    constexpr int kParts = GatedShape<kCols>::kParts;
    // From one lane, so that the compiler knows it for all.
    const int group = __shfl_sync(~0u, threadIdx.x / kGroup, 0) - 1;
    float sums[kCols / 8][4] = {};
    uint32_t kept[kCols / 8][2] = {};
    GatedTile tile = {};  // that is kept
    int last = -1;        // its number; none yet
    for (int i = cluster_index(); i < p.tiles; i += cluster_count()) {
        settle(sums);
        multiply_chunk<T, kCols, true>(ring, group, sums);
        if (last >= 0) {
            tile = gated_tile<kCols>(p, last);
            finish_part<T, kCols>(p, 0, kept, tile);
        }
#pragma unroll
        for (int part = 1; part < kParts; ++part) {
            multiply_chunk<T, kCols, false>(ring, group, sums);
            if (last >= 0) finish_part<T, kCols>(p, part, kept, tile);
        }
        for (int chunk = kParts; chunk < p.chunks; ++chunk) multiply_chunk<T, kCols, false>(ring, group, sums);
        wait_products<0>();
        settle(sums);
        ring.release();
#pragma unroll
        for (int n = 0; n < kCols / 8; ++n) {
            for (int half = 0; half < 2; ++half) kept[n][half] = pack<T>(sums[n][2 * half], sums[n][2 * half + 1]);
        }
        last = i;
    }
    tile = gated_tile<kCols>(p, last);
#pragma unroll
    for (int part = 0; part < kParts; ++part) finish_part<T, kCols>(p, part, kept, tile);
}

#endif

template <typename T, int kCols>
__global__ void __launch_bounds__(kGatedThreads, 1) gated_linear_kernel(const __grid_constant__ GatedParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Shape = GatedShape<kCols>;
    extern __shared__ uint4 shared[];
    __shared__ GatedBarriers<kCols> barriers;
    const int blocks = p.down * p.across;
    const uint32_t ring = (shared_address(shared) + kStageAlignment - 1) & ~uint32_t(kStageAlignment - 1);
    let_next_kernel_start();
    if (threadIdx.x == 0) {
        for (int i = 0; i < Shape::kStages; ++i) {
            init_barrier(shared_address(&barriers.full[i]), 1);  // the copying thread's arrival, and bytes
            init_barrier(shared_address(&barriers.empty[i]), kGatedGroups * (kGroup / kWarp) * blocks);
        }
        fence_barriers();
    }
    __syncwarp();
    meet_cluster();  // all blocks' barriers are there
    wait_for_earlier_kernels();
    if (threadIdx.x < kGroup) {
        give_registers<kCopyRegisters>();
        if (threadIdx.x == 0) copy_tiles<kCols>(p, barriers, ring);
        __syncwarp();
    } else {
        take_registers<kMultiplyRegisters>();
        const int lane = threadIdx.x % kWarp;
        const bool tells = lane < blocks;
        multiply_tiles<T, kCols>(p, {.stages = ring,
                                     .full = shared_address(&barriers.full[0]),
                                     .empty = address_in(tells ? lane : 0, shared_address(&barriers.empty[0])),
                                     .tells = tells});
    }
    meet_cluster();  // nobody copies to this block or arrives at its barriers any more
#endif
}

template <typename T, int kCols>
cudaError_t launch_gated(const GatedLinear& a, cudaStream_t stream) {
    using Shape = GatedShape<kCols>;
    GatedParams p = {};
    p.out = a.out;
    p.rows = a.rows;
    p.out_dim = int(a.out_dim);
    p.chunks = int(ceil_div(a.dim, kChunk));
    if (p.chunks < Shape::kParts) p.chunks = Shape::kParts;  // behind the end copies find zeros
    p.down = a.down, p.across = a.across;
    p.tile_rows = int(ceil_div(a.rows, kGatedRows * a.down));
    p.band = a.band < p.tile_rows ? a.band : p.tile_rows;
    p.tiles = p.tile_rows * int(ceil_div(a.out_dim, Shape::kWide * a.across));
    if (!describe_matrix<T>(p.weight_map, a.weight, 2 * a.out_dim, a.dim, a.weight_stride, Shape::kWide) ||
        !describe_matrix<T>(p.x_map, a.x, a.rows, a.dim, a.x_stride, kGatedRows / a.across)) {
        return cudaErrorNotSupported;
    }
    const auto kernel = gated_linear_kernel<T, kCols>;
    constexpr int kBytes = Shape::kStages * Shape::kStageBytes + kStageAlignment;
    if (const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes)) {
        return error;
    }
    int device, processors;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) {
        return error;
    }
    const int blocks = a.down * a.across, clusters = p.tiles < processors / blocks ? p.tiles : processors / blocks;
    return launch_kernel(kernel, dim3(unsigned(clusters * blocks)), kGatedThreads, kBytes, stream, p, blocks);
}

// Rows of both matrices begin at multiples of 16 bytes, as copies want it, and all is counted in 32 bits.
inline bool gated_fits(const GatedLinear& a) {
    constexpr int64_t kMost = 1 << 30;
    return a.dim > 0 && a.dim < kMost && a.out_dim < kMost / 2 && a.out_dim % 8 == 0 &&
           fits_vectors<__half>(a.x, a.x_stride) && fits_vectors<__half>(a.weight, a.weight_stride);
}

// Of `cols` the values that the op lets through.
template <typename T>
cudaError_t gated_linear(const GatedLinear& a, cudaStream_t stream) {
    if (a.rows * a.out_dim == 0) return cudaSuccess;
    if (a.cols == 128) return launch_gated<T, 128>(a, stream);
    if (a.cols == 160) return launch_gated<T, 160>(a, stream);
    if (a.cols == 192) return launch_gated<T, 192>(a, stream);
    if (a.cols == 224) return launch_gated<T, 224>(a, stream);
    return launch_gated<T, 256>(a, stream);
}

}  // namespace nanoinfer::cuda
