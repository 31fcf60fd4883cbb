#pragma once
// Linear layer for few rows of x, bound by reading the weights once.
//
// Halves go through the tensor cores (mma.m16n8k16): x is the left matrix, padded to 16 rows, the weights are the right
// one, 8 of their rows at a time. So 16 rows of x need no more multiplications than one, and a row's sums are the same
// whatever the others are. The tensor cores add up along k in any order we like, as long as both matrices agree. Hence
// a thread takes 16 bytes, 8 neighbours along k, of "its" row of each matrix, and calls the first four the numbers of
// one multiplication, the last four those of another: everything goes from memory to registers as it lies, 16 bytes a
// load.
//
// No kernel writes weights, so a lane's first loads of them are under way before the earlier kernels have ended: to ask
// for them to be brought to the second cache, and load them from there once x had come, took a step of 0.5B 5 % longer.
//
// Gated, a block multiplies 8 gate rows of the weights and their 8 up rows, and writes silu(gate) * up of the sums,
// both rounded before: bit for bit what thin_linear and silu_and_mul give one after the other. Likewise rotated: 8 rows
// of a head of queries, keys or values, and the 8 that these make pairs with.
//
// A Qwen2 layer's ops besides attention, one captured after the other, us a layer on an H200, bf16, with these products
// (tile_linear's where tiles.py says so) / with cuBLAS's, SiLU and rotation by themselves, in earlier code:
//   rows      0.5B           1.5B             7B
//      1   15.0 / 29.2    31.6 / 47.3    128.4 / 136.6
//      8   17.2 / 29.2    33.3 / 46.3    124.8 / 139.4
//     16   19.1 / 29.6    33.9 / 47.2    131.7 / 141.1
// The weights alone, at 4.25 TB/s: 7.0, 22.0 and 109.7.
//
// Floats, which only tests and reference runs use, take plain multiplications, a warp for each weight row.

#include "activation.cuh"
#include "launch.cuh"
#include "rotary.cuh"
#include "vec.cuh"

namespace nanoinfer::cuda {

// What becomes of a row's sums. kGated, kRotated: of pairs of them, and of halves alone, not of floats.
enum class ThinKind {
    kPlain,   // they are the results
    kGated,   // silu(gate) * up; weights are the gates' rows, then as many for ups; neither a bias nor float_out
    kRotated  // numbers of queries, keys and values, that go to rotary.q and rotary.kv; `out` is not used
};

struct ThinLinear {
    const void* x;       // [rows, dim], rows x_stride apart
    const void* weight;  // [out_dim, dim], rows weight_stride apart; twice as many where there are pairs
    const void* bias;    // for each of weight's rows; null: none
    void* out;           // [rows, out_dim], of x's dtype, or float where float_out
    int rows;            // at most kThinRows
    int64_t dim, out_dim, x_stride, weight_stride;  // out_dim: results of a row, or pairs that are rotated
    bool float_out;
    ThinKind kind;
    RotaryStoreKv rotary;  // where kRotated; all of a head is rotated, halves of it being pairs
};

constexpr int kThinRows = 16;  // rows of an mma's left matrix
constexpr int kTileCols = 8;   // weight rows of an mma's right matrix
constexpr int kSlice = 32;     // numbers along k that a warp's load covers: 4 lanes of 8
constexpr int kMaxSplit = 16;
constexpr int kMaxInputs = 1 << 30;       // places along k are ints, also those some steps past its end
constexpr int kMaxRotatedRows = 1 << 30;  // of weights for queries, keys and values: pairs are counted in 32 bits
// Loads of weights that a lane has under way at once. With 16 warps that is 64 KB an SM: what an SM's share of an
// H200's memory (4.25 TB/s, 800 ns) asks for is 26 KB.
constexpr int kLoads = 8;
// Loads under way wait in the first cache, which has what shared memory leaves of an SM's 256 KB. Unless a kernel asks
// for another cut, blocks that follow each other without a gap keep that of attention, which leaves 28 KB: a step of 7B
// takes 5.1 ms then in place of 4.0. Hence this share of a GPU's shared memory, percent: 100 KB of an H200's 228,
// though the blocks that fit need 25. With 32 KB steps take up to 3 % longer, with 132 up to 2 %, of 9 to 16 rows up to
// 4 %.
constexpr int kSharedPercent = 40;

// How a launch cuts the weights: a block has `cols` x 8 weight rows, of which its `split` warps take turns along k. The
// split decides the order of additions, and so depends on the weights' shape alone. More than 8 rows of x, and gated
// or rotated results, take 2 columns whatever the plan.
struct ThinPlan {
    int cols, split;
};

template <typename T>
__device__ inline void mma(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, __half>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// 16 bytes, or zeros unless `there`. Weights are read once, so they shall not displace x in the first cache. Volatile,
// or the compiler moves each load down to its use, and a lane has but one under way; and not with .nc, or it moves them
// behind the wait for earlier kernels.
__device__ inline uint4 load_weights(const uint16_t* p, bool there) {
    uint4 v = {};
    asm volatile(
        "{ .reg .pred there; setp.ne.b32 there, %5, 0;"
        "@there ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4]; }"
        : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
        : "l"(p), "r"(int(there)));
    return v;
}

// Numbers k to k + 8 of a row of 2-byte numbers, 0 past `dim`. kAligned: all of a row's 8 are there or none is, and
// their address is a multiple of 16.
template <bool kAligned, bool kWeights>
__device__ inline uint4 load_eight(const uint16_t* row, int k, int dim) {
    if constexpr (kAligned) {
        if constexpr (kWeights) return load_weights(row + k, k < dim);
        return k < dim ? *reinterpret_cast<const uint4*>(row + k) : uint4{};
    } else {
        const auto at = [&](int j) -> uint32_t { return k + j < dim ? row[k + j] : 0; };
        return {at(0) | at(1) << 16, at(2) | at(3) << 16, at(4) | at(5) << 16, at(6) | at(7) << 16};
    }
}

// The weight row that is number `i` of a block's: gated, the second 8 are the ups of the first; rotated, they are what
// these make pairs with. Rows that are not there are read as the last one that is: their sums go nowhere.
template <int kCols, ThinKind kKind>
__device__ inline int64_t weight_row(const ThinLinear& p, int i) {
    if constexpr (kKind == ThinKind::kGated) {
        return min(int64_t(blockIdx.x) * kTileCols + i % kTileCols, p.out_dim - 1) + i / kTileCols * p.out_dim;
    }
    if constexpr (kKind == ThinKind::kRotated) {
        const int pair = min(int(blockIdx.x) * kTileCols + i % kTileCols, int(p.out_dim) - 1);
        const int head_dim = p.rotary.head_dim, half = head_dim / 2;
        return int64_t(pair / half) * head_dim + pair % half + i / kTileCols * half;
    }
    return min(int64_t(blockIdx.x) * kCols * kTileCols + i, p.out_dim - 1);
}

// The sums of the block's kCols x 8 weight rows with all rows of x, along slices `slice`, slice + split, ... of k. The
// first weights are asked for before earlier kernels have ended.
// kBoth: x has more than 8 rows. Those that are not there are, again, read as the last one that is.
template <typename T, int kCols, bool kBoth, bool kAligned, ThinKind kKind>
__device__ inline void multiply(const ThinLinear& p, int slice, int split, float (&sums)[kCols][4]) {
    // In an mma's registers, lane 4 g + t holds numbers of x's rows g and g + 8 and of the weights' row g.
    constexpr int kAhead = kAligned ? kLoads / kCols : 1;  // slices at once
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4, last = p.rows - 1;
    const int dim = int(p.dim), step = split * kSlice;
    const uint16_t* low = static_cast<const uint16_t*>(p.x) + min(g, last) * p.x_stride;
    const uint16_t* high = static_cast<const uint16_t*>(p.x) + min(g + 8, last) * p.x_stride;
    const uint16_t* weight[kCols];
    for (int c = 0; c < kCols; ++c) {
        const int64_t row = weight_row<kCols, kKind>(p, c * kTileCols + g);
        weight[c] = static_cast<const uint16_t*>(p.weight) + row * p.weight_stride;
    }
    uint4 w[kAhead][kCols];
    const auto ask = [&](int k) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            for (int c = 0; c < kCols; ++c) w[i][c] = load_eight<kAligned, true>(weight[c], k + i * step, dim);
        }
    };
    const auto add = [&](int k) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const uint4 x = load_eight<kAligned, false>(low, k + i * step, dim);
            const uint4 y = kBoth ? load_eight<kAligned, false>(high, k + i * step, dim) : uint4{};
            for (int c = 0; c < kCols; ++c) {
                mma<T>(sums[c], {x.x, y.x, x.y, y.y}, w[i][c].x, w[i][c].y);
                mma<T>(sums[c], {x.z, y.z, x.w, y.w}, w[i][c].z, w[i][c].w);
            }
        }
    };
    int begin = slice * kSlice;
    ask(begin + t * 8);
    wait_for_earlier_kernels();
    add(begin + t * 8);
    // All lanes go on while one has numbers left, as an mma needs the whole warp.
    for (begin += kAhead * step; begin < dim; begin += kAhead * step) {
        ask(begin + t * 8);
        add(begin + t * 8);
    }
}

template <typename T>
__device__ inline void write_sum(const ThinLinear& p, int row, int64_t col, float sum) {
    if (p.bias) sum += to_float(static_cast<const T*>(p.bias)[col]);
    const int64_t at = row * p.out_dim + col;
    if (p.float_out) {
        static_cast<float*>(p.out)[at] = sum;
    } else {
        static_cast<T*>(p.out)[at] = from_float<T>(sum);
    }
}

// A result's parts from all warps, added in the order of k.
__device__ inline float add_parts(const float* parts, int apart, int split) {
    float sum = parts[0];
#pragma unroll  // so that all loads are on their way at once
    for (int part = 1; part < kMaxSplit; ++part) {
        if (part < split) sum += parts[part * apart];
    }
    return sum;
}

// A pair of a row's queries, keys or values: where it goes, and what happens to it on its way.
template <typename T>
struct Pair {
    T* to;  // null: nowhere
    float cos, sin;
    bool turned;
};

// What is added to the sums of pair number `index`, if there are so many; -0, which leaves a sum as it is, where there
// is no bias. Not as floats: nothing may wait for them before the weights are asked for.
template <typename T>
__device__ inline Vec<T, 2> pair_bias(const ThinLinear& p, int index) {
    if (!p.bias || index >= p.out_dim) return {from_float<T>(-0.f), from_float<T>(-0.f)};
    const int half = p.rotary.head_dim / 2;
    const T* first = static_cast<const T*>(p.bias) + int64_t(index / half) * p.rotary.head_dim + index % half;
    return {first[0], first[half]};
}

// Pair number `index` of a row, if there are so many: one of the first halves of heads, with that of the second.
template <typename T>
__device__ inline Pair<T> find_pair(const ThinLinear& p, int row, int index) {
    const RotaryStoreKv& r = p.rotary;
    Pair<T> pair = {};
    if (row >= p.rows || index >= p.out_dim) return pair;
    const int half = r.head_dim / 2, head = index / half, i = index % half, position = r.positions[row];
    const int slot = head < r.q_heads ? -1 : r.slots[row], value = head >= r.q_heads + r.kv_heads;
    const bool known = position >= 0 && position < r.num_positions;
    pair.turned = known && !value;
    if (pair.turned) {
        const float* angles = r.cos_sin + int64_t(position) * r.rotary_dim + i;
        pair.cos = angles[0], pair.sin = angles[half];
    }
    if (head < r.q_heads) {
        pair.to = static_cast<T*>(r.q) + row * r.q_stride + int64_t(head) * r.head_dim + i;
    } else if (known && slot >= 0 && slot < r.num_slots) {
        pair.to = slot_address<T>(r, slot, value, head - r.q_heads - value * r.kv_heads) + i;
    }
    return pair;
}

// Rounds a pair's sums, turns and writes it, as rotary_store_kv would.
template <typename T>
__device__ inline void write_pair(const ThinLinear& p, const Pair<T>& pair, float first, float second) {
    float a = to_float(from_float<T>(first)), b = to_float(from_float<T>(second));
    if (pair.turned) turn(a, b, pair.cos, pair.sin);
    if (!pair.to) return;
    pair.to[0] = from_float<T>(a);
    pair.to[p.rotary.head_dim / 2] = from_float<T>(b);
}

// kCols: times 8 weight rows, that a warp takes with one load of x. At most 128 registers a thread, as the largest
// block needs; or the compiler saves registers, and has fewer loads under way.
template <typename T, int kCols, bool kBoth, bool kAligned, ThinKind kKind>
__global__ void __launch_bounds__(kMaxSplit* kWarp, 1) thin_linear_kernel(const __grid_constant__ ThinLinear p) {
    constexpr bool kPlain = kKind == ThinKind::kPlain;
    constexpr int kTile = kCols * kTileCols, kWide = kPlain ? kTile : kTileCols;  // sums of a row, results or pairs
    extern __shared__ float partial[];                                            // [split, kThinRows, kTile]
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, split = blockDim.x / kWarp;
    let_next_kernel_start();
    int i = threadIdx.x;
    Vec<T, 2> bias = {};  // ahead of the wait, as weights are; of all the pairs that a thread has
    if constexpr (kKind == ThinKind::kRotated) bias = pair_bias<T>(p, blockIdx.x * kWide + i % kWide);
    float sums[kCols][4] = {};
    multiply<T, kCols, kBoth, kAligned, kKind>(p, warp, split, sums);
    Pair<T> pair = {};  // on its way while the block adds up
    if constexpr (kKind == ThinKind::kRotated) pair = find_pair<T>(p, i / kWide, blockIdx.x * kWide + i % kWide);
    for (int c = 0; c < kCols; ++c) {
        for (int j = 0; j < 4; ++j) {
            const int row = lane / 4 + j / 2 * 8, col = c * kTileCols + lane % 4 * 2 + j % 2;
            partial[(warp * kThinRows + row) * kTile + col] = sums[c][j];
        }
    }
    __syncthreads();  // the sums of all warps are there
    for (; i < p.rows * kWide; i += blockDim.x) {
        const int row = i / kWide;
        const int64_t col = int64_t(blockIdx.x) * kWide + i % kWide;
        if (col >= p.out_dim) continue;
        const float* parts = partial + row * kTile + i % kWide;
        const float sum = add_parts(parts, kThinRows * kTile, split);
        if constexpr (kPlain) {
            write_sum<T>(p, row, col, sum);
        } else {
            const float other = add_parts(parts + kTileCols, kThinRows * kTile, split);
            if constexpr (kKind == ThinKind::kGated) {
                write_sum<T>(p, row, col, swiglu(to_float(from_float<T>(sum)), to_float(from_float<T>(other))));
            } else {
                if (i != threadIdx.x) pair = find_pair<T>(p, row, int(col));  // of fewer than 16 x 8 threads
                write_pair<T>(p, pair, sum + to_float(bias.at[0]), other + to_float(bias.at[1]));
            }
        }
    }
}

// Numbers k to k + 4 of a row of floats, 0 past `dim`. kAligned: as in load_eight.
template <bool kAligned>
__device__ inline Vec<float, 4> load_four(const float* row, int64_t k, int64_t dim) {
    if constexpr (kAligned) {
        return load<float, 4>(row + k);
    } else {
        Vec<float, 4> v;
        for (int j = 0; j < 4; ++j) v.at[j] = k + j < dim ? row[k + j] : 0;
        return v;
    }
}

constexpr int kFloatsThreads = 256;
constexpr int kFloatsWarps = kFloatsThreads / kWarp;

// Floats: warp w of the grid has weight row w.
template <bool kAligned>
__global__ void __launch_bounds__(kFloatsThreads) thin_linear_floats_kernel(const __grid_constant__ ThinLinear p) {
    let_next_kernel_start();
    wait_for_earlier_kernels();
    const int64_t col = int64_t(blockIdx.x) * kFloatsWarps + threadIdx.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    if (col >= p.out_dim) return;
    const float *x = static_cast<const float*>(p.x),
                *weight = static_cast<const float*>(p.weight) + col * p.weight_stride;
    float sums[kThinRows] = {};
    for (int64_t k = lane * 4; k < p.dim; k += kWarp * 4) {
        const Vec<float, 4> w = load_four<kAligned>(weight, k, p.dim);
#pragma unroll  // or `sums` would not stay in registers
        for (int row = 0; row < kThinRows; ++row) {
            if (row >= p.rows) break;
            const Vec<float, 4> v = load_four<kAligned>(x + row * p.x_stride, k, p.dim);
            for (int j = 0; j < 4; ++j) sums[row] = fmaf(v.at[j], w.at[j], sums[row]);
        }
    }
#pragma unroll
    for (int row = 0; row < kThinRows; ++row) {
        if (row >= p.rows) break;
        const float sum = warp_reduce(sums[row], Add());
        if (lane == 0) write_sum<float>(p, row, col, sum);
    }
}

template <typename T, int kCols, bool kBoth, ThinKind kKind = ThinKind::kPlain>
cudaError_t launch_thin_linear(const ThinLinear& p, int split, cudaStream_t stream) {
    const bool aligned =
        p.dim % kFullVec<T> == 0 && fits_vectors<T>(p.x, p.x_stride) && fits_vectors<T>(p.weight, p.weight_stride);
    const auto kernel =
        aligned ? thin_linear_kernel<T, kCols, kBoth, true, kKind> : thin_linear_kernel<T, kCols, kBoth, false, kKind>;
    const size_t shared = split * kThinRows * kCols * kTileCols * sizeof(float);
    const int64_t blocks = ceil_div(p.out_dim, kKind == ThinKind::kPlain ? kCols * kTileCols : kTileCols);
    if (const cudaError_t error = cudaFuncSetAttribute(
            reinterpret_cast<const void*>(kernel), cudaFuncAttributePreferredSharedMemoryCarveout, kSharedPercent)) {
        return error;
    }
    return launch_kernel(kernel, dim3(blocks), split * kWarp, shared, stream, p);
}

template <typename T>
cudaError_t launch_thin_linear(const ThinLinear& p, const ThinPlan& plan, cudaStream_t stream) {
    if (p.kind == ThinKind::kGated) {
        return p.rows > 8 ? launch_thin_linear<T, 2, true, ThinKind::kGated>(p, plan.split, stream)
                          : launch_thin_linear<T, 2, false, ThinKind::kGated>(p, plan.split, stream);
    }
    if (p.kind == ThinKind::kRotated) {
        return p.rows > 8 ? launch_thin_linear<T, 2, true, ThinKind::kRotated>(p, plan.split, stream)
                          : launch_thin_linear<T, 2, false, ThinKind::kRotated>(p, plan.split, stream);
    }
    if (p.rows > 8) return launch_thin_linear<T, 2, true>(p, plan.split, stream);
    return plan.cols == 1 ? launch_thin_linear<T, 1, false>(p, plan.split, stream)
                          : launch_thin_linear<T, 2, false>(p, plan.split, stream);
}

// The best, or within 1.2 % of a step of it, of splits 2, 4, 6, 8, 12 and 16 and of 1 or 2 columns for each matrix of
// Qwen2.5 0.5B, 1.5B and 7B in a model's step on an H200 (132 SMs), 1 to 8 rows. The fewer tiles there are for an SM,
// the more warps have to share one to keep the memory busy; where there are many, small blocks even out what the SMs
// get.
inline ThinPlan plan_thin_linear(const ThinLinear& p) {
    const int64_t weight_rows = p.kind == ThinKind::kPlain ? p.out_dim : 2 * p.out_dim;
    const int64_t tiles = ceil_div(weight_rows, 2 * kTileCols);
    if (tiles > 4096) return {1, p.dim < 2048 ? 2 : 4};
    if (tiles > 528) return {2, 4};
    if (tiles > 132) return {2, p.dim < 8192 ? 6 : 8};
    return {tiles > 66 || p.dim < 1536 ? 2 : 1, p.dim < 2048 ? 12 : kMaxSplit};
}

template <typename T>
cudaError_t thin_linear(const ThinLinear& p, cudaStream_t stream) {
    if constexpr (sizeof(T) == 2) return launch_thin_linear<T>(p, plan_thin_linear(p), stream);
    const bool aligned =
        p.dim % 4 == 0 && fits_vectors<float>(p.x, p.x_stride) && fits_vectors<float>(p.weight, p.weight_stride);
    const auto kernel = aligned ? thin_linear_floats_kernel<true> : thin_linear_floats_kernel<false>;
    return launch_kernel(kernel, dim3(ceil_div(p.out_dim, kFloatsWarps)), kFloatsThreads, 0, stream, p);
}

// Any number of rows, kThinRows at a time; rotated, these at most.
template <typename T>
cudaError_t thin_linears(const ThinLinear& whole, cudaStream_t stream) {
    const int64_t out_size = whole.float_out ? sizeof(float) : sizeof(T);
    for (int row = 0; row < whole.rows && whole.out_dim > 0; row += kThinRows) {
        ThinLinear p = whole;
        p.rows = whole.rows - row < kThinRows ? whole.rows - row : kThinRows;
        p.x = static_cast<const T*>(whole.x) + row * whole.x_stride;
        p.out = static_cast<char*>(whole.out) + row * whole.out_dim * out_size;
        if (const cudaError_t error = thin_linear<T>(p, stream)) return error;
    }
    return cudaSuccess;
}

}  // namespace nanoinfer::cuda
