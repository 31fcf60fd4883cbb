#pragma once
// Attention of long chunks: limited by arithmetic (FlashAttention-2, Dao, 2023, on mma.sync).
//
// A block takes kRows rows of one chunk and KV head; a row is one query head of one token, the heads of a token next to
// each other, so that a tile of keys serves all of them and few tokens share the causal edge. Each warp owns 16 or 32
// of the rows, sums and softmax included, and goes through all keys that they see. Shared memory holds the block's
// queries and two stages of keys and values: one is used while the next is copied.

#include "attention_tile.cuh"

namespace nanoinfer::cuda {

template <int D>
struct PrefillShape {
    static constexpr int kWarps = 4, kThreads = 32 * kWarps;
    // 32 rows a warp halve the loads of K and V from shared memory, which 16 would wait for; their sums take D
    // registers of each thread, so heads of more than 128 make do with 16.
    static constexpr int kRowTiles = D > 128 ? 1 : 2;
    static constexpr int kRows = kWarps * kRowTiles * 16;
    // Keys of a stage: as many as registers (scores) and 96 KiB of shared memory allow.
    static constexpr int kKeys = D > 128 ? 32 : 64;
    static constexpr int kTileBytes = kKeys * D * 2;
    static constexpr int kQueryBytes = kRows * D * 2;
    static constexpr int kSharedBytes = kQueryBytes + 2 * 2 * kTileBytes;
    static constexpr int kBlocks = 2;  // on one multiprocessor, so that one's softmax overlaps the other's products
    static constexpr bool kQueriesInRegisters = D <= 64;  // where there is room for them
};

template <int kRows>
__device__ int prefill_items(const PagedAttention& p, const Chunk& chunk) {
    return chunk.q_len > p.decode_tokens ? ceil_div(chunk.q_len * p.group, kRows) * p.kv_heads : 0;
}

struct PrefillItem {
    Chunk chunk;
    int head;         // KV head
    int first_row;    // of this tile, among the chunk's q_len * group rows, token by token
    int rows;         // of this tile; there may be room for more
    int first_token;  // the one of its first row
    int first, last;  // positions of its first and last token
    int low, end;     // its rows see keys in [low, end) only
};

template <int kRows>
__device__ PrefillItem prefill_item(const PagedAttention& p, const Chunk& chunk, int local) {
    const int group = p.group, num_rows = chunk.q_len * group, tiles = ceil_div(num_rows, kRows);
    // The last tile has the most keys and comes first, so that the longest blocks do not start last.
    const int first_row = (tiles - 1 - local / p.kv_heads) * kRows;
    const int first_token = first_row / group, first = chunk.position(first_token);
    const int last = chunk.position(chunk.token(first_row + kRows - 1, group));
    return {.chunk = chunk,
            .head = local % p.kv_heads,
            .first_row = first_row,
            .rows = smaller(kRows, num_rows - first_row),
            .first_token = first_token,
            .first = first,
            .last = last,
            .low = Chunk::first_key(p, first),
            .end = last + 1};
}

// The token of the chunk, and its query head of the KV head, of the item's row `row`; past the last row, the last's.
struct ItemRow {
    int token, head;
};
__device__ inline ItemRow item_row(const PagedAttention& p, const PrefillItem& item, int row) {
    const int heads = item.first_row - item.first_token * p.group + smaller(row, item.rows - 1);
    // With some 100 rows and heads a float's quotient is precise enough, and takes a tenth of an integer's time.
    const int tokens = int(__fdividef(heads + 0.5f, float(p.group)));
    return {item.first_token + tokens, heads - tokens * p.group};
}

// Pointer to the item's row `row` in q or out, which have their tokens `stride` numbers apart.
template <typename T, int D>
__device__ T* row_address(const PagedAttention& p, const PrefillItem& item, void* base, int64_t stride, int row) {
    const auto [token, head] = item_row(p, item, row);
    return static_cast<T*>(base) + (item.chunk.begin + token) * stride + (item.head * p.group + head) * D;
}

// Thread `thread` of `threads` starts to copy its share of the queries of `count` of the item's rows.
template <typename T, int D>
__device__ void copy_queries(const PagedAttention& p, const PrefillItem& item, int count, int thread, int threads,
                             uint32_t queries) {
    constexpr int kPieces = D / 8;
    for (int i = thread; i < count * kPieces; i += threads) {
        const int row = i / kPieces, piece = i % kPieces;
        const T* from = row_address<T, D>(p, item, const_cast<void*>(p.q), p.q_stride, row);
        copy_async<0>(queries + Tile<D>::offset(row, piece), from + 8 * piece);
    }
}

// Copies the tiles of keys and values of an item, in order, the work shared out to warps in groups of 16 keys.
template <int D>
class TileFeed {
    using Shape = PrefillShape<D>;

  public:
    __device__ TileFeed(const PagedAttention& p, const PrefillItem& item, uint32_t stages)
        : p_(p), item_(item), stages_(stages), key_(item.low / Shape::kKeys * Shape::kKeys) {
        look_up();
    }

    // The first key of the next tile that push() copies.
    __device__ int key() const { return key_; }

    // Starts to copy the next tile, if there is one, to stage `stage`; its keys, then its values.
    __device__ void push(int stage) {
        if (key_ < item_.end) {
            const uint32_t tile = stages_ + stage * 2 * Shape::kTileBytes;
#pragma unroll
            for (int i = 0; i < kUnits; ++i) {
                const int unit = threadIdx.x / 32 + i * Shape::kWarps, group = unit % kGroups, values = unit / kGroups;
                const int entry = __shfl_sync(kAllLanes, entries_, (turn_ * kGroups + group) % 32),
                          key = key_ + 16 * group;
                const char* from = keys_address<D>(p_, entry, item_.head, key) + values * value_offset<D>(p_);
                copy_keys<D>(tile + values * Shape::kTileBytes + group * 16 * D * 2, from);
            }
            key_ += Shape::kKeys;
            if (++turn_ * kGroups % 32 == 0) look_up();
        }
        commit_copies();
    }

    // Waits for this thread's part of the tile that was pushed last, whose first key is `key`.
    __device__ void wait(int stage, int key) {
        wait_copies<0>();
        if (key >= item_.low && key + Shape::kKeys <= item_.end) return;
        const uint32_t values = stages_ + (2 * stage + 1) * Shape::kTileBytes;
        for (int i = 0; i < kUnits; ++i) {
            const int unit = threadIdx.x / 32 + i * Shape::kWarps, group = unit % kGroups;
            if (unit >= kGroups) zero_outside<D>(values + group * 16 * D * 2, key + 16 * group, item_.low, item_.end);
        }
    }

  private:
    // Groups of 16 keys in a tile, and what each warp copies of those and of as many groups of values.
    static constexpr int kGroups = Shape::kKeys / 16, kUnits = 2 * kGroups / Shape::kWarps;

    // Lane i takes the table's entry for the i-th group of 16 keys from key_ on, the last one's behind the end; nothing
    // waits for it before its use.
    __device__ void look_up() {
        const int position = smaller(key_ + int(threadIdx.x % 32) * 16, item_.end - 1);
        load_now(entries_, table_entry(p_, item_.chunk.row, larger(position, 0)), position >= 0);
    }

    const PagedAttention& p_;
    const PrefillItem& item_;
    const uint32_t stages_;
    int key_, turn_ = 0, entries_ = 0;
};

// Fragments of the warp's queries: kept in registers, or loaded again from shared memory for each tile of keys.
template <int D>
struct PrefillQueries {
    using Shape = PrefillShape<D>;
    static constexpr int kKept = Shape::kQueriesInRegisters ? D / 16 : 0;

    uint32_t rows;                                  // shared address of the warp's rows
    uint32_t kept[kKept + 1][Shape::kRowTiles][4];  // one more: no array is empty

    __device__ explicit PrefillQueries(uint32_t address) : rows(address) {}

    __device__ void load(int k, uint32_t (&a)[Shape::kRowTiles][4]) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < Shape::kRowTiles; ++m) {
            load_matrices(a[m], Tile<D>::move(rows + Tile<D>::offset(lane % 16, lane / 16), 2 * k) + m * 16 * D * 2);
        }
    }
    __device__ void keep() {
#pragma unroll
        for (int k = 0; k < kKept; ++k) load(k, kept[k]);
    }
    __device__ void operator()(int k, uint32_t (&a)[Shape::kRowTiles][4]) const {
        if constexpr (Shape::kQueriesInRegisters) {
#pragma unroll
            for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
                for (int i = 0; i < 4; ++i) a[m][i] = kept[k][m][i];
            }
        } else {
            load(k, a);
        }
    }
};

// The warp's rows, from the item's row `own` on, normalised, go through shared memory (where its queries were,
// which only it read) so that they are stored to global memory 16 bytes a lane.
template <typename T, int D, int kRowTiles, typename Rows>
__device__ void store_rows(const PagedAttention& p, const PrefillItem& item, const Rows& rows, int own,
                           unsigned char* tile) {
    const int lane = threadIdx.x % 32;
    __syncwarp();  // all lanes have read the queries
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float total = rows.sums[m][2 * h], norm = total == 0 ? 0.f : 1 / total;
            const int row = 16 * m + 8 * h + lane / 4;
#pragma unroll
            for (int j = 0; j < D / 8; ++j) {
                *reinterpret_cast<uint32_t*>(tile + Tile<D>::offset(row, j) + lane % 4 * 4) =
                    pack<T>(rows.out[m][j][2 * h] * norm, rows.out[m][j][2 * h + 1] * norm);
            }
        }
    }
    __syncwarp();  // all rows are there
    constexpr int kPieces = D / 8;
    for (int i = lane; i < kRowTiles * 16 * kPieces; i += 32) {
        const int row = own + i / kPieces, piece = i % kPieces;
        if (row >= item.rows) break;
        T* to = row_address<T, D>(p, item, p.out, int64_t(p.q_heads) * D, row) + 8 * piece;
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(tile + Tile<D>::offset(i / kPieces, piece));
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(PrefillShape<D>::kThreads, PrefillShape<D>::kBlocks)
    prefill_kernel(const __grid_constant__ PagedAttention p) {
    using Shape = PrefillShape<D>;
    extern __shared__ __align__(128) unsigned char shared[];
    Chunk chunk;
    int local;
    if (!Finder<prefill_items<Shape::kRows>>(p).find(blockIdx.x, chunk, local)) return;
    const PrefillItem item = prefill_item<Shape::kRows>(p, chunk, local);

    const int own_rows = threadIdx.x / 32 * Shape::kRowTiles * 16;
    unsigned char* own_tile = shared + own_rows * D * 2;
    const uint32_t stages = shared_address(shared) + Shape::kQueryBytes;
    TileFeed<D> feed(p, item, stages);
    copy_queries<T, D>(p, item, Shape::kRows, threadIdx.x, Shape::kThreads, shared_address(shared));
    int key = feed.key();
    feed.push(0);

    PrefillQueries<D> queries(shared_address(own_tile));
    QueryRows<T, D, Shape::kRowTiles, Shape::kKeys> rows;
    const float slack = kSlack / p.scale_log2;
    rows.clear();
    feed.wait(0, key);
    __syncthreads();  // queries and the first stage are there
    queries.keep();
    for (int stage = 0; key < item.end; key += Shape::kKeys, stage ^= 1) {
        feed.push(stage ^ 1);
        const uint32_t keys = stages + stage * 2 * Shape::kTileBytes;
        rows.multiply_keys(queries, keys);
        // Some row does not see the tile's last key, or, with a window, no longer sees its first.
        const bool cut = key + Shape::kKeys > item.first + 1 || (p.window > 0 && key <= item.last - p.window);
        if (cut) {
            int positions[Shape::kRowTiles][2];
#pragma unroll
            for (int i = 0; i < 2 * Shape::kRowTiles; ++i) {
                const int row = own_rows + threadIdx.x % 32 / 4 + 8 * i;
                positions[i / 2][i % 2] = chunk.position(item_row(p, item, row).token);
            }
            rows.hide(positions, key, p.window);
        }
        rows.weigh(p.scale_log2, slack);
        rows.add_values(keys + Shape::kTileBytes);
        feed.wait(stage ^ 1, key + Shape::kKeys);
        __syncthreads();  // the next stage is there, and all warps have read this one, which is copied to next
    }
    store_rows<T, D, Shape::kRowTiles>(p, item, rows, own_rows, own_tile);
}

// The most tiles of `rows` rows that the long chunks of a step can have. Each of them has at most one that is not full,
// and there are at most so many of them.
inline int64_t prefill_tiles(const PagedAttention& p, int rows) {
    const int64_t chunks = p.tokens / (p.decode_tokens + 1);
    return int64_t(p.tokens) * p.group / rows + (chunks < p.chunks ? chunks : p.chunks);
}

template <typename T, int D>
cudaError_t attend_long(const PagedAttention& p, cudaStream_t stream) {
    using Shape = PrefillShape<D>;
    const auto kernel = prefill_kernel<T, D>;
    if (const cudaError_t error = cudaFuncSetAttribute(
            reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes)) {
        return error;
    }
    const int64_t tiles = prefill_tiles(p, Shape::kRows);
    if (tiles == 0) return cudaSuccess;
    prefill_kernel<T, D><<<unsigned(tiles * p.kv_heads), Shape::kThreads, Shape::kSharedBytes, stream>>>(p);
    return cudaGetLastError();
}

}  // namespace nanoinfer::cuda
