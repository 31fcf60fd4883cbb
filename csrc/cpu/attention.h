#pragma once
// Causal attention to a paged KV cache, any mix of chunk lengths in one call (FlashAttention-2, Dao, 2023, for CPUs).
//
// The query heads that share a KV head are rows of one tile, token after token, so that its keys and values are read
// once for all of them. A tile goes through the keys kKeyTile at a time: scores, their softmax relative to the largest
// so far (Milakov and Gimelshein, 2018), weighted values; all sums are floats. Every kSplitKeys keys it starts afresh,
// and the parts are merged in order. Short chunks, which have no second tile, give their splits to several threads
// instead.
//
// A query's result depends on its own keys alone, bit for bit: tiles of keys and splits begin at fixed positions, its
// row shares no sum with others, and a key it does not see has the weight 0. So neither the batch, the threads, nor the
// chunks that a prompt came in change it.
//
// Keys and values past the end are read as zeros, never from the cache: there may be NaN, which 0 does not silence.

#include "kernels.h"
#include "tiles.h"
#include "vec.h"

namespace nanoinfer {

// One tile's work: query tokens [first, first + tokens) of a chunk, for one KV head, keys of splits [begin, end).
struct AttentionTask {
    int64_t chunk, kv_head, first, tokens, begin, end;
    int64_t partial = -1;  // where in `partials` its state goes, for merge_splits; -1: it writes the result
};

struct PagedAttention {
    Dtype dtype;
    const void* q;                  // [T, heads, head_dim], tokens q_stride apart
    const void* kv;                 // [blocks, 2, kv_heads, block_size, head_dim], blocks block_stride apart
    void* out;                      // [T, heads, head_dim]
    const int32_t* q_starts;        // [R + 1]
    const int32_t *kv_lens, *rows;  // [R]
    const int32_t* block_tables;    // [table rows, ...], table_stride apart
    int64_t heads, kv_heads, head_dim, block_size, q_stride, block_stride, table_stride;
    int64_t window;  // keys that a query sees at most
    float scale;     // > 0
    const AttentionTask* tasks = nullptr;
    int64_t num_tasks = 0;
    int64_t* next_task = nullptr;           // shared by the workers: the first task that nobody has taken
    const AttentionTask* merges = nullptr;  // short chunks' tiles with all their splits; partial is the first split's
    float* partials = nullptr;              // states, each state_size(rows of the tile, head_dim)
    float* scratch = nullptr;               // a worker's is scratch_size(tile_rows, head_dim), 64-byte aligned
    int64_t tile_rows = 0;                  // the most rows of a tile, a multiple of kRowsStep
};

constexpr int64_t kSplitKeys = 512;   // a thread's share of a long sequence when a single token attends to it
constexpr int64_t kTileRows = 128;    // rows to aim at: packing keys is then 5% of the work
constexpr int64_t kMaxHeadDim = 256;  // and a multiple of kColsStep
static_assert(kSplitKeys % kKeyTile == 0 && kKeyTile % kColsStep == 0);

// Rows that memory is set aside for.
static constexpr int64_t padded_rows(int64_t rows) { return (rows + kRowsStep - 1) / kRowsStep * kRowsStep; }

// Floats of a softmax's state: each row's largest score (times scale), sum of weights, and weighted values.
static constexpr int64_t state_size(int64_t rows, int64_t dim) { return padded_rows(rows) * (dim + 2); }

// Query, keys, values, weights, scores; the states of a split and of all splits so far. Rows are padded already.
static constexpr int64_t scratch_size(int64_t rows, int64_t dim) {
    return rows * dim + 2 * kKeyTile * dim + 2 * rows * kKeyTile + 2 * state_size(rows, dim);
}

namespace NANOINFER_ISA {

struct State {
    float *max, *sum, *values;

    State(float* memory, int64_t rows) : max(memory), sum(max + padded_rows(rows)), values(sum + padded_rows(rows)) {}
};

NANOINFER_INLINE void copy(const State& from, const State& to, int64_t rows, int64_t dim) {
    memcpy(to.max, from.max, rows * sizeof(float));
    memcpy(to.sum, from.sum, rows * sizeof(float));
    memcpy(to.values, from.values, rows * dim * sizeof(float));
}

NANOINFER_INLINE void clear(const State& state, int64_t rows, int64_t dim) {
    for (int64_t row = 0; row < rows; ++row) {
        state.max[row] = -INFINITY;
        state.sum[row] = 0;
    }
    memset(state.values, 0, rows * dim * sizeof(float));
}

// e^(from - to), the factor that makes weights relative to `from` relative to `to`; 0 where there were none yet.
NANOINFER_INLINE F32 rescaling(float from, float to) {
    return from == -INFINITY ? F32{} : exp_weight(broadcast(from - to));
}

// total += part.
static void merge(const State& total, const State& part, int64_t rows, int64_t dim) {
    for (int64_t row = 0; row < rows; ++row) {
        const float max = total.max[row] > part.max[row] ? total.max[row] : part.max[row];
        const F32 old = rescaling(total.max[row], max), added = rescaling(part.max[row], max);
        total.max[row] = max;
        total.sum[row] = total.sum[row] * old[0] + part.sum[row] * added[0];
        float* values = total.values + row * dim;
        for (int64_t d = 0; d < dim; d += kLanes) {
            store(values + d, fma(load(part.values + row * dim + d), added, load(values + d) * old));
        }
    }
}

NANOINFER_INLINE I32 lane_numbers() {
    I32 numbers;
    for (int i = 0; i < kLanes; ++i) numbers[i] = i;
    return numbers;
}

// Turns one row's scores of a tile into weights, and brings the row's state up to them. Where kMask, keys before
// `begin` and from `end` on are not seen.
template <typename Math, bool kMask>
NANOINFER_INLINE void softmax(const float* scores, int begin, int end, float scale, typename Math::Packed* weights,
                              const State& state, int64_t row, int64_t dim) {
    constexpr int kVectors = kKeyTile / kLanes;
    F32 v[kVectors], highest = broadcast(-INFINITY), sum = {};
    for (int i = 0; i < kVectors; ++i) {
        v[i] = load(scores + i * kLanes);
        if (kMask) {
            const I32 key = lane_numbers() + i * kLanes;
            v[i] = (key >= begin) & (key < end) ? v[i] : broadcast(-INFINITY);
        }
        highest = max(v[i], highest);  // skips NaN, which comes out of exp_weight
    }
    const float before = state.max[row], here = reduce_max(highest) * scale, now = here > before ? here : before;
    for (int i = 0; i < kVectors; ++i) {
        const F32 weight = exp_weight(fma(v[i], broadcast(scale), broadcast(-now)));
        v[i] = v[i] == -INFINITY ? F32{} : weight;
        sum += v[i];
    }
    Math::pack_weights(v, weights);
    if (now > before) {
        const F32 factor = rescaling(before, now);
        float* values = state.values + row * dim;
        for (int64_t d = 0; d < dim; d += kLanes) store(values + d, load(values + d) * factor);
        state.sum[row] *= factor[0];
        state.max[row] = now;
    }
    state.sum[row] += reduce_add(sum);
}

// What a task is about. Its rows are the heads of its first token, then those of the second.
struct Tile {
    const PagedAttention& p;
    const AttentionTask& task;
    const int32_t* table;  // blocks of the chunk's sequence
    int64_t group, rows;   // query heads of the KV head; times tokens
    int64_t token, head;   // the first ones
    int64_t position;      // of the first token

    Tile(const PagedAttention& p, const AttentionTask& task)
        : p(p),
          task(task),
          table(p.block_tables + p.rows[task.chunk] * p.table_stride),
          group(p.heads / p.kv_heads),
          rows(group * task.tokens),
          token(p.q_starts[task.chunk] + task.first),
          head(task.kv_head * group),
          position(p.kv_lens[task.chunk] - p.q_starts[task.chunk + 1] + token) {}
};

template <typename Packed>
struct Scratch {
    Packed *query, *keys, *values, *weights;
    float* scores;
    State part, total;

    Scratch(float* at, int64_t rows, int64_t dim)
        : query(reinterpret_cast<Packed*>(at)),
          keys(reinterpret_cast<Packed*>(at += rows * dim)),
          values(reinterpret_cast<Packed*>(at += kKeyTile * dim)),
          weights(reinterpret_cast<Packed*>(at += kKeyTile * dim)),
          scores(at += rows * kKeyTile),
          part(at += rows * kKeyTile, rows),
          total(at + state_size(rows, dim), rows) {}
};

template <typename T>
static void write(const Tile& tile, const State& state) {
    const int64_t dim = tile.p.head_dim;
    for (int64_t row = 0; row < tile.rows; ++row) {
        const int64_t token = tile.token + row / tile.group, head = tile.head + row % tile.group;
        T* out = static_cast<T*>(tile.p.out) + (token * tile.p.heads + head) * dim;
        const F32 sum = broadcast(state.sum[row]);
        for (int64_t d = 0; d < dim; d += kLanes) store(out + d, load(state.values + row * dim + d) / sum);
    }
}

alignas(64) static const float kZeros[kMaxHeadDim] = {};

// Where the keys and values of `count` positions from `begin` on lie; zeros for the rest of a tile.
template <typename T>
static void find_keys(const Tile& tile, int64_t begin, int64_t count, const T** keys, const T** values) {
    const PagedAttention& p = tile.p;
    const int64_t head_size = p.block_size * p.head_dim;
    int64_t i = 0;
    while (i < count) {
        const int64_t block = (begin + i) / p.block_size, offset = (begin + i) % p.block_size;
        const T* key = static_cast<const T*>(p.kv) + tile.table[block] * p.block_stride +
                       tile.task.kv_head * head_size + offset * p.head_dim;
        for (int64_t left = p.block_size - offset; left > 0 && i < count; --left, ++i, key += p.head_dim) {
            keys[i] = key;
            values[i] = key + p.kv_heads * head_size;
        }
    }
    for (; i < kKeyTile; ++i) keys[i] = values[i] = reinterpret_cast<const T*>(kZeros);
}

NANOINFER_INLINE int clamp_to_tile(int64_t key) { return int(key < 0 ? 0 : key > kKeyTile ? kKeyTile : key); }

// Weights of a tile's keys from its scores; the first key is at position `begin`.
template <typename Math>
static void softmax_rows(const Tile& tile, const Scratch<typename Math::Packed>& s, int64_t begin) {
    for (int64_t token = 0, row = 0; token < tile.task.tokens; ++token) {
        const int64_t next = tile.position + token + 1 - begin;  // the first key that comes after the query
        const int first = clamp_to_tile(next - tile.p.window), end = clamp_to_tile(next);
        const auto softmax_row = first == 0 && end == kKeyTile ? softmax<Math, false> : softmax<Math, true>;
        for (int64_t head = 0; head < tile.group; ++head, ++row) {
            softmax_row(s.scores + row * kKeyTile, first, end, tile.p.scale, s.weights + row * kKeyTile, s.part, row,
                        tile.p.head_dim);
        }
    }
}

// Adds `count` keys from position `begin` on to s.part.
template <typename T, typename Math = Tiles<T>>
static void add_keys(const Tile& tile, const Scratch<typename Math::Packed>& s, int64_t begin, int64_t count) {
    const int64_t dim = tile.p.head_dim, cols = (count + kColsStep - 1) / kColsStep * kColsStep;
    const T *keys[kKeyTile], *values[kKeyTile];
    find_keys(tile, begin, count, keys, values);
    Math::pack_keys(keys, cols, dim, s.keys);
    Math::multiply(tile.rows, dim, cols, {s.query, dim}, {s.keys, kKeyTile}, {s.scores, kKeyTile}, false);
    softmax_rows<Math>(tile, s, begin);
    Math::pack_values(values, cols, dim, s.values);
    Math::multiply(tile.rows, cols, dim, {s.weights, kKeyTile}, {s.values, dim}, {s.part.values, dim}, true);
}

template <typename T, typename Math = Tiles<T>>
static void pack_queries(const Tile& tile, typename Math::Packed* out) {
    const int64_t dim = tile.p.head_dim;
    for (int64_t row = 0; row < tile.rows; ++row) {
        const int64_t token = tile.token + row / tile.group, head = tile.head + row % tile.group;
        Math::pack_query(static_cast<const T*>(tile.p.q) + token * tile.p.q_stride + head * dim, dim, out + row * dim);
    }
}

// s.total = the task's splits.
template <typename T, typename Math = Tiles<T>>
static void attend(const Tile& tile, const Scratch<typename Math::Packed>& s) {
    const int64_t dim = tile.p.head_dim, end = tile.position + tile.task.tokens;
    const int64_t first = tile.position + 1 - tile.p.window;  // no query of the tile sees a key before
    pack_queries<T>(tile, s.query);
    clear(s.total, tile.rows, dim);
    for (int64_t split = tile.task.begin; split < tile.task.end; ++split) {
        clear(s.part, tile.rows, dim);
        const int64_t split_end = (split + 1) * kSplitKeys < end ? (split + 1) * kSplitKeys : end;
        for (int64_t begin = split * kSplitKeys; begin < split_end; begin += kKeyTile) {
            const int64_t count = split_end - begin < kKeyTile ? split_end - begin : kKeyTile;
            if (begin + count > first) add_keys<T>(tile, s, begin, count);
        }
        merge(s.total, s.part, tile.rows, dim);
    }
}

// Workers [begin, end), each with scratch memory of its own, take tasks until there are none.
template <typename T>
static void paged_attention(const PagedAttention& p, int64_t begin, int64_t end) {
    Tiles<T>::start();
    for (int64_t worker = begin; worker < end; ++worker) {
        float* memory = p.scratch + worker * scratch_size(p.tile_rows, p.head_dim);
        const Scratch<typename Tiles<T>::Packed> scratch(memory, p.tile_rows, p.head_dim);
        int64_t i;
        while ((i = __atomic_fetch_add(p.next_task, 1, __ATOMIC_RELAXED)) < p.num_tasks) {
            const Tile tile(p, p.tasks[i]);
            attend<T>(tile, scratch);
            if (tile.task.partial < 0)
                write<T>(tile, scratch.total);
            else
                copy(scratch.total, State(p.partials + tile.task.partial, tile.rows), tile.rows, p.head_dim);
        }
    }
    Tiles<T>::stop();
}

// Short chunks' tiles [begin, end): their splits in order, then the result.
template <typename T>
static void merge_splits(const PagedAttention& p, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const Tile tile(p, p.merges[i]);
        const int64_t size = state_size(tile.rows, p.head_dim);
        float* memory = p.partials + tile.task.partial;
        const State total(memory, tile.rows);
        for (int64_t split = tile.task.begin + 1; split < tile.task.end; ++split) {
            memory += size;
            merge(total, State(memory, tile.rows), tile.rows, p.head_dim);
        }
        write<T>(tile, total);
    }
}

}  // namespace NANOINFER_ISA
}  // namespace nanoinfer
