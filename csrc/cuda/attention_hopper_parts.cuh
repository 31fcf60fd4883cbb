#pragma once
// Items that attention_hopper.cuh's blocks have shared out (attention_hopper_items.cuh): each leaves the sums of its
// part in memory, and a kernel that follows adds an item's parts up, in the order of their keys.

#include "attention_hopper_items.cuh"
#include "launch.cuh"

namespace nanoinfer::cuda {

// A part in memory is what the 256 threads that multiply have of it, as float4s: D / 8 times two columns of a thread's
// two rows, then both rows' largest scores and its columns' sums of weights. Those of all threads lie side by side.
constexpr int kPartThreads = 256;
constexpr int part_float4s(int head_dim) { return (head_dim / 8 + 1) * kPartThreads; }
// A block has at most two: of the item that its share begins in the middle of, and of the one in which it ends.
constexpr int kBlockParts = 2;

// A block of add_parts_kernel takes 32 columns of an item, and loads so many parts of these before it adds them.
constexpr int kSliceColumns = 32, kPartsAtOnce = 4;

// Capacities of a table, in keys, with which there may be shares: with fewer they pay little, more are not worth the
// wider numbers.
constexpr int kLeastKeys = 128 * (kLeastGain + kLeastShare), kMostKeys = 1 << 20;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Part `part` of the call's: thread `thread` has every kPartThreads-th float4 from here on.
template <int D>
__device__ float4* part_address(const PagedAttention& p, int64_t part, int thread) {
    return p.parts + part * part_float4s(D) + thread;
}

// Is this less than all that the item's rows see? (Steps with a window have no parts.)
template <typename Shape>
__device__ bool is_part(const HopperItem& next) {
    return next.first > 0 || next.tiles < ceil_div(next.item.end, Shape::kKeys);
}

// In the order of their keys: a share begins with the later part of an item, and ends with the earlier one of another.
template <int D, typename Rows>
__device__ void store_part(const PagedAttention& p, const HopperItem& next, const Rows& rows) {
    const int part = kBlockParts * blockIdx.x + (next.first == 0);
    float4* to = part_address<D>(p, part, threadIdx.x - 128);
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
        const auto& out = rows.out[0][j];
        to[j * kPartThreads] = {out[0], out[1], out[2], out[3]};
    }
    to[D / 8 * kPartThreads] = {rows.top[0][0], rows.top[0][1], rows.sums[0][0], rows.sums[0][2]};
}

// An item that has been shared out to `parts` blocks, the first of them `block`.
struct SharedItem {
    PrefillItem item;
    int block, parts;

    __device__ int part(int i) const { return kBlockParts * (block + i) + (i == 0); }
};

// The item in which share `block` ends and the next one begins, unless the share lies in its middle; else no parts.
template <typename Shape>
__device__ SharedItem find_shared(const PagedAttention& p, int block) {
    const Shares shares = share_out<Shape>(p);
    const int at = (block + 1) * shares.size;
    Chunk chunk;
    int local;
    if (shares.size == 0 || at >= shares.total) return {};
    if (!Finder<line_tiles<Shape::kKeys>>(p).find(at, chunk, local)) return {};
    const LinePlace place = ChunkLine<Shape::kKeys>(p, chunk).find(local);
    const int tile = place.tile - kItemTiles;
    if (tile <= 0 || tile > shares.size) return {};
    const int later = ceil_div(place.tiles - place.tile, shares.size);
    return {prefill_item<Shape::kRows>(p, chunk, place.item), block, 1 + later};
}

// A thread's sums of columns of two rows.
struct PartSums {
    static constexpr int kWide = kSliceColumns / 8;
    float4 columns[kWide] = {};
    float tops[2] = {kNoScore, kNoScore}, totals[2] = {0, 0};

    __device__ void grow_to(const float (&new_tops)[2], float scale_log2) {
        float shrink[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            shrink[h] = power_of_two((tops[h] - new_tops[h]) * scale_log2);
            tops[h] = new_tops[h];
            totals[h] *= shrink[h];
        }
        for (float4& sum : columns) {
            sum = {sum.x * shrink[0], sum.y * shrink[0], sum.z * shrink[1], sum.w * shrink[1]};
        }
    }
    // `last` is what lies behind a part's columns. Its scores are at most `tops`.
    __device__ void add(const float4 (&part)[kWide], const float4& last, float scale_log2) {
        const float first = power_of_two((last.x - tops[0]) * scale_log2);
        const float second = power_of_two((last.y - tops[1]) * scale_log2);
        totals[0] += last.z * first;
        totals[1] += last.w * second;
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
            columns[j].x += part[j].x * first;
            columns[j].y += part[j].y * first;
            columns[j].z += part[j].z * second;
            columns[j].w += part[j].w * second;
        }
    }
};

// The thread's sums over all parts, of the columns of slice `slice`.
template <int D>
__device__ PartSums add_parts(const PagedAttention& p, const SharedItem& shared, int slice) {
    constexpr int kWide = PartSums::kWide;
    PartSums sums;
    for (int begin = 0; begin < shared.parts; begin += kPartsAtOnce) {
        float4 columns[kPartsAtOnce][kWide] = {}, lasts[kPartsAtOnce];
        float tops[2] = {sums.tops[0], sums.tops[1]};
#pragma unroll
        for (int i = 0; i < kPartsAtOnce; ++i) {
            lasts[i] = {kNoScore, kNoScore, 0, 0};
            if (begin + i >= shared.parts) continue;
            const float4* from = part_address<D>(p, shared.part(begin + i), threadIdx.x);
            lasts[i] = from[D / 8 * kPartThreads];
#pragma unroll
            for (int j = 0; j < kWide; ++j) columns[i][j] = from[(slice * kWide + j) * kPartThreads];
        }
#pragma unroll
        for (int i = 0; i < kPartsAtOnce; ++i) {
            tops[0] = fmaxf(tops[0], lasts[i].x), tops[1] = fmaxf(tops[1], lasts[i].y);
        }
        sums.grow_to(tops, p.scale_log2);
#pragma unroll
        for (int i = 0; i < kPartsAtOnce; ++i) sums.add(columns[i], lasts[i], p.scale_log2);
    }
    return sums;
}

// Stores the rows of a thread, normalised: four lanes share a row, as in QueryRows.
template <typename T, int D>
__device__ void store_sums(const PagedAttention& p, const PrefillItem& item, const PartSums& sums, int slice) {
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float total = sums.totals[h];
        total += __shfl_xor_sync(kAllLanes, total, 1);
        total += __shfl_xor_sync(kAllLanes, total, 2);
        const float norm = total == 0 ? 0.f : 1 / total;
        const int row = first + 8 * h;
        if (row >= item.rows) continue;
        T* to = row_address<T, D>(p, item, p.out, int64_t(p.q_heads) * D, row) + slice * kSliceColumns + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < PartSums::kWide; ++j) {
            const float4& from = sums.columns[j];
            *reinterpret_cast<uint32_t*>(to + 8 * j) =
                h == 0 ? pack<T>(from.x * norm, from.y * norm) : pack<T>(from.z * norm, from.w * norm);
        }
    }
}

#endif

// One block for each block of shares_kernel and slice of columns.
template <typename T, int D>
__global__ void __launch_bounds__(kPartThreads) add_parts_kernel(const __grid_constant__ PagedAttention p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    // Lengths may be read at once: shares_kernel, which let this one start, began when all earlier kernels had ended.
    const SharedItem shared = find_shared<HopperShape<D>>(p, blockIdx.x);
    wait_for_earlier_kernels();
    let_next_kernel_start();
    if (shared.parts == 0) return;
    const PartSums sums = add_parts<D>(p, shared, blockIdx.y);
    store_sums<T, D>(p, shared.item, sums, blockIdx.y);
#endif
}

// Multiprocessors of the current GPU where it is a Hopper, else 0.
inline int hopper_processors() {
    int device, major, count;
    const bool known = cudaGetDevice(&device) == cudaSuccess &&
                       cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                       cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
    return known && major == 9 ? count : 0;
}

// Could blocks with whole items leave multiprocessors idle for long? Of one chunk the number of items is known. Of
// several, it is not, nor how unequal they are: then lengths decide on the GPU, but not where there are many items.
inline bool shares_may_pay(const PagedAttention& p, int processors) {
    const int64_t items = int64_t(ceil_div(p.tokens * p.group, HopperShape<64>::kRows)) * p.kv_heads;
    const int64_t rounds = (items + processors - 1) / processors, room = rounds * processors;
    return p.chunks == 1 ? (room - items) * 10 > room : rounds <= 4;
}

// The parts for which a call needs room, from shapes alone; 0: it takes whole items, by the kernel made for these.
inline int most_parts(const PagedAttention& p, int head_dim) {
    const int64_t keys = int64_t(p.table_width) << p.block_bits;
    const bool fits = (head_dim == 64 || head_dim == 128) && keys >= kLeastKeys && keys <= kMostKeys;
    if (!fits || p.window > 0 || p.tokens <= p.decode_tokens) return 0;
    const int processors = hopper_processors();
    return processors > 0 && shares_may_pay(p, processors) ? kBlockParts * processors : 0;
}

}  // namespace nanoinfer::cuda
