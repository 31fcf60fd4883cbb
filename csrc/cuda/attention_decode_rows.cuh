#pragma once
// The arithmetic of attention_decode.cuh: how blocks and warps share the work, a warp's sums in registers, and how the
// warps of a block add theirs up.

#include "attention_tile.cuh"

namespace nanoinfer::cuda {

// Items of a chunk for one KV head: splits times tiles of rows (those of one split side by side: they read the same
// keys, from L2).
template <int kRows>
__device__ int decode_items(const PagedAttention& p, const Chunk& chunk) {
    if (chunk.q_len == 0 || chunk.q_len > p.decode_tokens) return 0;
    return ceil_div(chunk.q_len * p.group, kRows) * split_keys(p, chunk).count;
}

struct DecodeItem {
    Chunk chunk;
    int first_row;    // of this tile, among the chunk's q_len * group rows, token by token
    int first_token;  // the one of that row
    int split, splits;
    int low, begin, end;  // keys [begin, end), begin a multiple of 16; none of the rows sees those before low
};

template <int kRows>
__device__ DecodeItem decode_item(const PagedAttention& p, const Chunk& chunk, int local) {
    const int tiles = ceil_div(chunk.q_len * p.group, kRows), split = tiles == 1 ? local : local / tiles;
    const int first_row = (local - split * tiles) * kRows;
    const Splits splits = split_keys(p, chunk);
    const int begin = splits.first + split * splits.length;
    const int seen = chunk.position(chunk.token(first_row + kRows - 1, p.group)) + 1;
    return {.chunk = chunk,
            .first_row = first_row,
            .first_token = chunk.token(first_row, p.group),
            .split = split,
            .splits = splits.count,
            .low = Chunk::first_key(p, chunk.position(0)),
            .begin = begin,
            .end = smaller(begin + splits.length, seen)};
}

// Up to 32 items of a block, in shared memory.
constexpr int kListed = 32;
struct ItemList {
    DecodeItem items[kListed];
    int totals[32];  // items of 32 chunks each, a warp's
};

// Lists the block's items first, first + gridDim.y, ... in the order of all items of a KV head: those of chunk 0, then
// those of chunk 1, and so on. Returns how many of the kListed there are. Each thread looks at one chunk at a time, and
// lane i of the warp that has it, among its 32 chunks, finds item i.
template <int kRows>
__device__ int list_items(const PagedAttention& p, int first, ItemList& list) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, index = first + lane * gridDim.y;
    int seen = 0;  // items of the chunks that the block has looked at
    LoadedChunk loaded;
    load_chunk(p, threadIdx.x, loaded);
    for (int base = 0; base < p.chunks && seen <= first + (kListed - 1) * int(gridDim.y); base += blockDim.x) {
        const Chunk own = loaded.check(p, base + threadIdx.x);
        load_chunk(p, base + blockDim.x + threadIdx.x, loaded);  // of the next turn, on its way during this one
        const int count = decode_items<kRows>(p, own);
        int upto = count;  // items of the warp's chunks up to this lane's
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(kAllLanes, upto, step);
            if (lane >= step) upto += other;
        }
        if (lane == 31) list.totals[warp] = upto;
        __syncthreads();  // every warp's total is there
        int local = index - seen;
        for (int w = 0; w < int(blockDim.x) / 32; ++w) {
            if (w < warp) local -= list.totals[w];
            seen += list.totals[w];
        }
        int at = 0;  // the lane with the chunk that has item `local` of the warp's
        for (int step = 16; step > 0; step /= 2) {
            if (__shfl_sync(kAllLanes, upto, at + step - 1) <= local) at += step;
        }
        const Chunk chunk = own.of_lane(at);
        const int before = __shfl_sync(kAllLanes, upto - count, at);
        if (local >= 0 && local < list.totals[warp]) list.items[lane] = decode_item<kRows>(p, chunk, local - before);
        __syncthreads();  // the items are there, and the totals have been read
    }
    return clamp(ceil_div(seen - first, gridDim.y), 0, kListed);
}

template <int D, int kTiles>
struct DecodeShape {
    static constexpr int kDim = D, kRowTiles = kTiles, kRows = 8 * kTiles;  // of an item
    static constexpr int kKeys = 16;  // of a stage: the long side of a matrix instruction, within a block of the cache
    static constexpr int kStageBytes = 2 * kKeys * D * 2, kStages = 2, kRingBytes = kStages * kStageBytes;
    // Rings of 64 KiB a block, which fit the small GPUs' 99. A multiprocessor has to have 32 KiB on their way to it for
    // full bandwidth at a latency of 1 us, but latencies grow with the load.
    static constexpr int kWarps = D <= 64 ? 8 : D <= 128 ? 4 : 2, kThreads = 32 * kWarps;
    // Behind the rings: half the warps' sums, in rows 4 numbers longer than D so that writing a column takes all banks;
    // each warp's largest score and sum of weights for each row; the block's; its list of items.
    static constexpr int kPitch = D + 4, kSums = kWarps / 2 * kRows * kPitch;
    static constexpr int kSharedBytes = kWarps * kRingBytes + kSums * 4 + (kWarps + 1) * kRows * 8 + sizeof(ItemList);
    // On a Hopper multiprocessor, which has 228 KiB, of which each block costs one more; 16 warps leave each thread 128
    // registers, 12 leave it 168.
    static constexpr int kFitting = 228 * 1024 / (kSharedBytes + 1024), kMost = D <= 64 ? 2 : 3;
    static constexpr int kBlocks = kFitting < kMost ? kFitting : kMost;
};

// One warp's view of an item, all of it in registers: kTiles times 8 rows against 16 keys at a time, as columns of
// transposed products. Lane l holds the keys l / 4 and l / 4 + 8 (or value numbers, of every 16) of the rows
// 2 (l % 4) and the next, of each 8; the eight lanes of equal l % 4 share two rows.
template <typename T, int D, int kTiles>
struct DecodeRows {
    uint32_t queries[kTiles][D / 16][2];  // fragments of queries^T, of row l / 4
    int positions[kTiles][2];
    float out[kTiles][D / 16][4];  // sums of weight * value
    float sums[kTiles][4];         // sums of weights, as a value that is 1 would give them
    float top[kTiles][2];          // the largest score so far, up to the slack; all lanes of a row have it
    float scores[kTiles][4];       // or weights: 2^((score - top) * scale)

    // Straight from global memory (all warps read the same few KiB); nothing waits for them before their use.
    __device__ void load_queries(const PagedAttention& p, const DecodeItem& item) {
        const int lane = threadIdx.x % 32, last = item.chunk.q_len * p.group - 1;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            const int row = smaller(item.first_row + 8 * n + lane / 4, last), token = item.chunk.token(row, p.group);
            const T* q = static_cast<const T*>(p.q) + (item.chunk.begin + token) * p.q_stride +
                         (blockIdx.x * p.group + row - token * p.group) * D + lane % 4 * 2;
#pragma unroll
            for (int k = 0; k < D / 8; ++k) queries[n][k / 2][k % 2] = load_now(q + 8 * k);
        }
    }

    __device__ void clear(const PagedAttention& p, const DecodeItem& item) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
            for (int j = 0; j < D / 16; ++j) set_zero(out[n][j]);
            set_zero(sums[n]);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = item.first_row + 8 * n + threadIdx.x % 4 * 2 + i;
                positions[n][i] = item.chunk.position(item.chunk.token(row, p.group));
                top[n][i] = kNoScore;
            }
        }
    }

    // scores = keys queries^T, in two sums of half the numbers each, which wait for each other half as long.
    __device__ void multiply_keys(uint32_t keys) {
        const int lane = threadIdx.x % 32;
        keys += Tile<D>::offset(lane % 16, lane / 16);
        float others[kTiles][4];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            set_zero(scores[n]);
            set_zero(others[n]);
        }
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            uint32_t a[4];
            load_matrices(a, Tile<D>::move(keys, 2 * k));
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
                multiply_add<T>(k % 2 ? others[n] : scores[n], a, queries[n][k][0], queries[n][k][1]);
            }
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) scores[n][i] += others[n][i];
        }
    }

    // Removes the scores of what a row does not see; the first of the 16 keys is `key`.
    __device__ void hide(int key, int window) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int at = key + threadIdx.x % 32 / 4 + i / 2 * 8, last = positions[n][i % 2];
                if (at > last || (window > 0 && at <= last - window)) scores[n][i] = -INFINITY;
            }
        }
    }

    // scores -> weights; where a row's largest score has grown by more than the slack, what was summed up is rescaled.
    __device__ void weigh(float scale_log2, float slack) {
        float highest[kTiles][2];
        bool grown = false;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                highest[n][i] = fmaxf(scores[n][i], scores[n][i + 2]);
#pragma unroll
                for (int step = 4; step < 32; step *= 2) {
                    highest[n][i] = fmaxf(highest[n][i], __shfl_xor_sync(kAllLanes, highest[n][i], step));
                }
                grown |= highest[n][i] > top[n][i] + slack;
            }
        }
        if (__any_sync(kAllLanes, grown)) rescale(highest, slack, scale_log2);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                scores[n][i] = power_of_two(scores[n][i] * scale_log2 - top[n][i % 2] * scale_log2);
            }
        }
    }

    // A row that has not grown is multiplied by 1: its result does not depend on the other rows'.
    __device__ void rescale(const float (&highest)[kTiles][2], float slack, float scale_log2) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float new_top = highest[n][i] > top[n][i] + slack ? highest[n][i] : top[n][i];
                const float shrink = power_of_two((top[n][i] - new_top) * scale_log2);
                top[n][i] = new_top;
                sums[n][i] *= shrink;
#pragma unroll
                for (int j = 0; j < D / 16; ++j) {
                    out[n][j][i] *= shrink;
                    out[n][j][i + 2] *= shrink;
                }
            }
        }
    }

    // out += values^T weights^T, sums += weights: rounded weights in both, see QueryRows.
    __device__ void add_values(uint32_t values) {
        const int lane = threadIdx.x % 32;
        values += Tile<D>::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
        constexpr uint32_t ones[4] = {kOnes<T>, kOnes<T>, kOnes<T>, kOnes<T>};
        uint32_t weights[kTiles][2];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) weights[n][i] = transpose(pack<T>(scores[n][2 * i], scores[n][2 * i + 1]));
            multiply_add<T>(sums[n], ones, weights[n][0], weights[n][1]);
        }
#pragma unroll
        for (int j = 0; j < D / 16; ++j) {
            uint32_t a[4];
            load_transposed(a, Tile<D>::move(values, 2 * j));
#pragma unroll
            for (int n = 0; n < kTiles; ++n) multiply_add<T>(out[n][j], a, weights[n][0], weights[n][1]);
        }
    }
};

// Where the warps of a block add up their shares of an item, in shared memory.
template <typename Shape>
struct BlockSums {
    float sums[Shape::kWarps / 2][Shape::kRows][Shape::kPitch];
    float2 warps[Shape::kWarps][Shape::kRows];  // a warp's largest score of a row, and its sum of weights over that
    float2 block[Shape::kRows];                 // the block's
    ItemList list;
};

// What the warp's sums of a lane's two rows (of 8 n) are worth in the block's; the first warp records the block's.
template <typename Shape>
__device__ float2 warp_share(BlockSums<Shape>& all, int n, float scale_log2) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float share[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = 8 * n + lane % 4 * 2 + i;
        float top = kNoScore, total = 0;
#pragma unroll
        for (const auto& warp_rows : all.warps) top = fmaxf(top, warp_rows[row].x);
#pragma unroll
        for (const auto& warp_rows : all.warps) {
            total += warp_rows[row].y * power_of_two((warp_rows[row].x - top) * scale_log2);
        }
        share[i] = power_of_two((all.warps[warp][row].x - top) * scale_log2);
        if (warp == 0 && lane < 4) all.block[row] = {top, total};
    }
    return {share[0], share[1]};
}

// Adds the warps' shares of an item up, in an order that does not vary: warps 2 and 3 store theirs, 0 and 1 add to
// them, and the two sums meet when they are read. Needs no barrier at its end: what is read behind it, `sums` and
// `block`, is written anew only behind the first barrier of the next call, and `warps`, read before the second one,
// before that.
template <typename Shape, typename Rows>
__device__ void add_up(const PagedAttention& p, const Rows& rows, BlockSums<Shape>& all) {
    constexpr int D = Shape::kDim, kTiles = Shape::kRowTiles, kHalf = Shape::kWarps / 2;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
        if (lane >= 4) break;
        for (int i = 0; i < 2; ++i) all.warps[warp][8 * n + lane * 2 + i] = {rows.top[n][i], rows.sums[n][i]};
    }
    __syncthreads();  // every warp's totals are there
    float2 shares[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) shares[n] = warp_share(all, n, p.scale_log2);
    for (int turn = 1; turn >= 0; --turn) {
        if (warp / kHalf == turn) {
#pragma unroll
            for (int i = 0; i < kTiles * D / 4; ++i) {
                const int n = i / (D / 4), j = i / 4 % (D / 16), row = 8 * n + lane % 4 * 2 + i % 2;
                float& sum = all.sums[warp % kHalf][row][16 * j + lane / 4 + i / 2 % 2 * 8];
                const float own = rows.out[n][j][i % 4] * (i % 2 ? shares[n].y : shares[n].x);
                sum = turn ? own : sum + own;
            }
        }
        __syncthreads();  // these warps' sums are there
    }
}

}  // namespace nanoinfer::cuda
