#pragma once
// Linear layer for some ten to 256 rows of x on Hopper (sm_90a): its asynchronous matrix products (wgmma) and bulk
// tensor copies.
//
// A block has `tiles` x 64 rows of x and `cols` of the result's columns, that is rows of the weights. One thread copies
// chunks of both, 64 numbers along k, to a ring of stages in shared memory; for each 64 rows of x a warpgroup
// multiplies them from there. x is the left matrix, so that the number of columns may be any multiple of 8: what an
// H200's 132 SMs share evenly is seldom a multiple of 64.
//
// No kernel writes weights, so their first chunks, as many as the ring holds, are asked for before the earlier kernels
// have ended, while the memory would idle.
//
// A small matrix has too few tiles for all SMs. So `split` blocks share a tile, each with its own part of k. They are a
// cluster: each sends its sums of a part of the rows to the block that adds up these, from shared memory to shared
// memory. There is one order of additions, which the weights' shape and the number of rows alone decide: a row's result
// depends neither on what the other rows hold nor on which block came first.
//
// Gated, weights are those of gates and of ups, and a tile has as many columns of each: a lane then holds both numbers
// of a result, silu(gate) * up, and no other kernel needs to read them again.
//
// A Qwen2 layer's ops besides attention, captured one after the other, us a layer on an H200, bf16, with these products
// / with cuBLAS's and a kernel for silu:
//   rows      0.5B          1.5B            7B
//     32   23.8 / 30.1   39.2 / 48.6   132.9 / 143.0
//     64   25.0 / 32.0   43.9 / 49.7   134.7 / 148.5
//    128   27.5 / 33.7
//    256   35.7 / 39.9
// Where no number stands cuBLAS is about as fast. Where a thread that multiplies starts copies as well, in place of a
// warp for these alone, 0.5B's 32 rows take 34.7.

#include "launch.cuh"
#include "linear_tile_sums.cuh"

namespace nanoinfer::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ inline TileWork work_of(const TileParams& p, int cols) {
    const int part = cluster_rank(), some = p.chunks / p.split, more = p.chunks % p.split;
    TileWork work;
    work.part = part;
    work.tile = cluster_index();
    work.row = blockIdx.y * p.block_rows;
    work.begin = some * part + min(part, more);
    work.count = some + (part < more);
    work.stage_bytes = (p.x_rows + cols) * kChunkBytes;
    return work;
}

// Starts to copy a chunk's weights; its barrier is to expect x as well.
template <int kCols, bool kGated>
__device__ inline void copy_weights(const TileParams& p, const TileWork& work, TileShared& all, uint32_t ring, int i,
                                    int stage) {
    const int column = (work.begin + i) * kChunk;
    const uint32_t full = shared_address(&all.full[stage]);
    const uint32_t to = ring + stage * work.stage_bytes + p.x_rows * kChunkBytes;
    arrive_expecting(full, work.stage_bytes);
    if constexpr (kGated) {
        const int row = work.tile * (kCols / 2);
        copy_box(to, p.weight_map, column, row, full);
        copy_box(to + kCols / 2 * kChunkBytes, p.weight_map, column, int(p.out_dim) + row, full);
    } else {
        copy_box(to, p.weight_map, column, work.tile * kCols, full);
    }
}

__device__ inline void copy_x(const TileParams& p, const TileWork& work, TileShared& all, uint32_t ring, int i,
                              int stage) {
    const int column = (work.begin + i) * kChunk;
    copy_box(ring + stage * work.stage_bytes, p.x_map, column, work.row, shared_address(&all.full[stage]));
}

// One thread: makes the barriers, and starts to copy the weights of the first `ahead` chunks.
template <int kCols, bool kGated>
__device__ inline void begin_copies(const TileParams& p, const TileWork& work, TileShared& all, uint32_t ring,
                                    int consumers, int ahead) {
    init_barrier(shared_address(&all.sums), 1);
    for (int i = 0; i < p.stages; ++i) {
        init_barrier(shared_address(&all.full[i]), 1);                   // the copying thread's arrival, and bytes
        init_barrier(shared_address(&all.empty[i]), consumers / kWarp);  // the other warps
    }
    fence_barriers();
    for (int i = 0; i < ahead; ++i) copy_weights<kCols, kGated>(p, work, all, ring, i, i);
    prefetch_map(p.x_map);
    if (p.split > 1) {
        const RowSpan own = rows_of(p, work, work.part);
        const int bytes = (own.end - own.begin) * kSumsPitch<kCols> * int(sizeof(float));
        arrive_expecting(shared_address(&all.sums), bytes * (p.split - 1));
    }
}

// The same thread, once x is there: all other copies.
template <int kCols, bool kGated>
__device__ inline void copy_chunks(const TileParams& p, const TileWork& work, TileShared& all, uint32_t ring,
                                   int ahead) {
    for (int i = 0; i < ahead; ++i) copy_x(p, work, all, ring, i, i);
    RingTurn turn;
    for (int i = ahead; i < work.count; ++i, turn.advance(p.stages)) {
        wait_barrier(shared_address(&all.empty[turn.stage]), turn.parity);
        copy_weights<kCols, kGated>(p, work, all, ring, i, turn.stage);
        copy_x(p, work, all, ring, i, turn.stage);
    }
}

// A warpgroup: the sums of its 64 rows of x with the block's weights. For rows that are not there it reads what lies
// behind x in shared memory, and their sums go nowhere.
template <typename T, int kCols>
__device__ inline void multiply_chunks(const TileParams& p, const TileWork& work, TileShared& all, uint32_t ring,
                                       float (&sums)[kCols / 8][4]) {
    // From one lane, so that the compiler knows it for all.
    const int lane = threadIdx.x % kWarp, group = __shfl_sync(~0u, threadIdx.x / kGroup, 0);
    RingTurn turn;
    int last = 0;
    settle(sums);
    for (int i = 0; i < work.count; ++i) {
        const uint32_t at = ring + turn.stage * work.stage_bytes;
        const uint64_t x = describe(at + group * kTileRows * kChunkBytes);
        const uint64_t weights = describe(at + p.x_rows * kChunkBytes);
        wait_barrier(shared_address(&all.full[turn.stage]), turn.parity);
        fence_products();
#pragma unroll
        for (int step = 0; step < kChunk / 16; ++step) start_product<T>(sums, x + step * 2, weights + step * 2);
        commit_products();
        wait_products<1>();  // the chunk before is no longer read
        if (i > 0 && lane == 0) arrive(shared_address(&all.empty[last]));
        last = turn.stage;
        turn.advance(p.stages);
    }
    wait_products<0>();
    settle(sums);
}

#endif

// Cluster c has tile c of the weights, blockIdx.y x's rows; the last warp copies, the warpgroups before it multiply.
// kCols: weight rows of a tile; where kGated half of them are gates', half ups'.
template <typename T, int kCols, bool kGated>
__global__ void __launch_bounds__(kMaxTileThreads, 1) tile_linear_kernel(const __grid_constant__ TileParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ uint4 shared[];  // the ring, which later has this block's sums; then the sums that others send
    __shared__ TileShared all;
    unsigned char* ring = reinterpret_cast<unsigned char*>(shared) + (-shared_address(shared) & (kStageAlignment - 1));
    const uint32_t ring_at = shared_address(ring);
    const TileWork work = work_of(p, kCols);
    const int consumers = blockDim.x - kWarp, ahead = min(work.count, p.stages);
    let_next_kernel_start();
    if (threadIdx.x == consumers) begin_copies<kCols, kGated>(p, work, all, ring_at, consumers, ahead);
    if (p.bias) prefetch_bias<kCols>(p, work);
    __syncwarp();
    if (p.split > 1) {
        meet_cluster();  // all blocks' barriers are there
    } else {
        __syncthreads();
    }
    wait_for_earlier_kernels();
    if (threadIdx.x >= consumers) {
        if (threadIdx.x == consumers) copy_chunks<kCols, kGated>(p, work, all, ring_at, ahead);
        __syncwarp();
    } else {
        float sums[kCols / 8][4] = {};
        multiply_chunks<T, kCols>(p, work, all, ring_at, sums);
        sync_first(consumers);  // nobody reads the ring any more
        if (p.split == 1) {
            write_sums<T, kCols, kGated>(p, work, ring, sums);
        } else {
            keep_sums<kCols>(ring, sums);
            fence_writes();
            sync_first(consumers);  // all of the block's sums are there
            send_sums<kCols>(p, work, all, ring_at);
            wait_barrier(shared_address(&all.sums), 0);
            write_own_rows<T, kCols, kGated>(p, work, ring_at, consumers);
        }
    }
    if (p.split > 1) meet_cluster();  // what this block sent has been copied
#endif
}

// Cuts a block's shared memory into stages and sums; returns its bytes.
template <int kCols>
int plan_shared(const TileLinear& a, TileParams& p) {
    const int pitch = kSumsPitch<kCols> * int(sizeof(float)), stage = (p.x_rows + kCols) * kChunkBytes;
    const int rows = a.rows < p.block_rows ? a.rows : p.block_rows;
    const int received = int(ceil_div(rows, a.split)) * (a.split - 1) * pitch, own = p.block_rows * pitch;
    p.stages = (kTileShared[a.blocks] - kStageAlignment - received) / stage;
    if (p.stages > kMaxStages) p.stages = kMaxStages;
    if (p.stages > ceil_div(p.chunks, a.split)) p.stages = int(ceil_div(p.chunks, a.split));
    const int read = (p.stages - 1) * stage + p.block_rows * kChunkBytes;  // rows that are not there are read too
    int bytes = p.stages * stage;
    if (bytes < own) bytes = own;
    if (bytes < read) bytes = read;
    p.sums_at = int(ceil_div(bytes, kVectorBytes)) * kVectorBytes;
    return p.sums_at + received + kStageAlignment;
}

template <typename T, int kCols, bool kGated>
cudaError_t launch_tiles(const TileLinear& a, cudaStream_t stream) {
    TileParams p = {};
    p.bias = a.bias;
    p.out = a.out;
    p.out_dim = kGated ? a.weight_rows / 2 : a.weight_rows;
    p.rows = a.rows;
    p.block_rows = a.tiles * kTileRows;
    p.chunks = int(ceil_div(a.dim, kChunk));
    p.split = a.split;
    p.x_rows = int(ceil_div(a.rows < p.block_rows ? a.rows : p.block_rows, 8)) * 8;
    const int bytes = plan_shared<kCols>(a, p), box_rows = kGated ? kCols / 2 : kCols;
    if (p.stages < (p.chunks > p.split ? 2 : 1)) return cudaErrorInvalidConfiguration;  // one is read, one comes in
    if (!describe_matrix<T>(p.weight_map, a.weight, a.weight_rows, a.dim, a.weight_stride, box_rows) ||
        !describe_matrix<T>(p.x_map, a.x, a.rows, a.dim, a.x_stride, p.x_rows)) {
        return cudaErrorNotSupported;
    }
    const auto kernel = tile_linear_kernel<T, kCols, kGated>;
    if (const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) {
        return error;
    }
    const dim3 grid(unsigned(ceil_div(p.out_dim, box_rows) * a.split), unsigned(ceil_div(a.rows, p.block_rows)));
    return launch_kernel(kernel, grid, a.tiles * kGroup + kWarp, bytes, stream, p, a.split);
}

// Whether the kernel is there: compiled for a GPU other than Hopper it is empty, and has no barriers in shared memory.
inline bool has_tiles() {
    cudaFuncAttributes compiled;
    const auto kernel = reinterpret_cast<const void*>(tile_linear_kernel<__nv_bfloat16, 64, false>);
    return cudaFuncGetAttributes(&compiled, kernel) == cudaSuccess && compiled.sharedSizeBytes > 0;
}

// Rows of all matrices begin at multiples of 16 bytes and do not overlap, as copies want it, and 32 bits count them.
inline bool tiles_fit(const TileLinear& a) {
    constexpr int64_t kMost = 1 << 30;
    return a.dim > 0 && a.dim < kMost && a.weight_rows < kMost && a.weight_rows % (a.gated ? 16 : 8) == 0 &&
           a.x_stride >= a.dim && fits_vectors<__half>(a.x, a.x_stride) && a.weight_stride >= a.dim &&
           fits_vectors<__half>(a.weight, a.weight_stride) && fits_vectors<__half>(a.bias);
}

// Of `cols` the values that the op lets through.
template <typename T>
cudaError_t tile_linear(const TileLinear& a, cudaStream_t stream) {
    if (a.rows * a.weight_rows == 0) return cudaSuccess;
    if (a.gated) {
        if (a.cols == 80) return launch_tiles<T, 80, true>(a, stream);
        if (a.cols == 144) return launch_tiles<T, 144, true>(a, stream);
        return launch_tiles<T, 160, true>(a, stream);
    }
    if (a.cols == 40) return launch_tiles<T, 40, false>(a, stream);
    if (a.cols == 48) return launch_tiles<T, 48, false>(a, stream);
    if (a.cols == 56) return launch_tiles<T, 56, false>(a, stream);
    if (a.cols == 64) return launch_tiles<T, 64, false>(a, stream);
    return launch_tiles<T, 96, false>(a, stream);
}

}  // namespace nanoinfer::cuda
