#pragma once
// What the kernels of paged_attention are given, and how they find their work in it: lengths are known to the device
// alone, so a launch has room for the most work that the tensors' shapes allow, and each block looks up its share.

#include <cuda_runtime.h>
#include <stdint.h>

#include "attention_ptx.cuh"

namespace nanoinfer::cuda {

struct PagedAttention {
    const void* q;                // [tokens, q_heads, D], tokens q_stride numbers apart
    const void* kv;               // [blocks, 2, kv_heads, block_size, D]
    const int32_t* q_starts;      // [chunks + 1]
    const int32_t* kv_lens;       // [chunks]
    const int32_t* rows;          // [chunks]
    const int32_t* block_tables;  // [table_rows, table_width], rows table_stride numbers apart
    void* out;                    // [tokens, q_heads, D]
    float* partial_out;           // [chunks, max_parts, q_heads, D]: of a chunk's splits and tokens, see `part`
    float2* partial_sums;         // [chunks, max_parts, q_heads]: log2 of the largest weight, sum over that weight
    int* next_item;               // counts the items of long chunks that blocks have taken
    int64_t q_stride, table_stride;
    int tokens, chunks, q_heads, kv_heads, blocks, table_rows, table_width;
    int group;          // q_heads / kv_heads
    int block_bits;     // log2 of block_size
    int window;         // keys that a query sees, 0: all up to its own
    int max_parts;      // of one chunk
    int decode_tokens;  // chunks of up to this many tokens are the decode kernel's, longer ones the prefill kernel's
    float scale;        // of scores before the softmax
    float scale_log2;   // scale * log2(e): in half precision, weights are powers of two
    bool tables_ready;  // may q_starts, kv_lens, rows and block_tables be read before earlier kernels have ended
    float4* parts;      // sums of parts of long chunks' items, see attention_hopper_parts.cuh; null: items stay whole
};

constexpr unsigned kAllLanes = 0xffffffffu;  // of a warp take part in a shuffle or a vote

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ inline int smaller(int a, int b) { return a < b ? a : b; }
__host__ __device__ inline int larger(int a, int b) { return a > b ? a : b; }
__device__ inline int clamp(int value, int low, int high) { return larger(low, smaller(value, high)); }

// One chunk: q_len tokens from token `begin` on, the last of kv_len positions of the sequence in row `row`. Numbers
// out of range are clamped, so that a wrong message gives wrong results but touches nothing outside the tensors.
struct Chunk {
    int index, begin, q_len, kv_len, row;

    __device__ int position(int token) const { return kv_len - q_len + token; }
    // The token of one of the chunk's rows, which are its query heads of one KV head, `group` a token; of rows behind
    // the last one, the last token. Most chunks have one token, and a division takes as long as 100 multiplications.
    __device__ int token(int row, int group) const { return q_len == 1 ? 0 : smaller(row / group, q_len - 1); }
    // The chunk of a lane of the warp.
    __device__ Chunk of_lane(int lane) const {
        return {.index = __shfl_sync(kAllLanes, index, lane),
                .begin = __shfl_sync(kAllLanes, begin, lane),
                .q_len = __shfl_sync(kAllLanes, q_len, lane),
                .kv_len = __shfl_sync(kAllLanes, kv_len, lane),
                .row = __shfl_sync(kAllLanes, row, lane)};
    }
    // The first key that the query at `position` sees.
    __device__ static int first_key(const PagedAttention& p, int position) {
        return p.window > 0 ? larger(0, position - p.window + 1) : 0;
    }
};

// A chunk's numbers as they are in memory: separate, so that they can be on their way while others are in use.
struct LoadedChunk {
    int from, to, kv_len, row;

    __device__ Chunk check(const PagedAttention& p, int index) const {
        const int begin = clamp(from, 0, p.tokens), end = clamp(to, begin, p.tokens);
        return {.index = index,
                .begin = begin,
                .q_len = end - begin,
                .kv_len = clamp(kv_len, 0, p.table_width << p.block_bits),
                .row = clamp(row, 0, p.table_rows - 1)};
    }
};

// An empty chunk where there is none of that index. Loads into place: see load_now().
__device__ inline void load_chunk(const PagedAttention& p, int index, LoadedChunk& to) {
    const bool exists = index < p.chunks;
    const int at = exists ? index : 0;
    to = {0, 0, 0, 0};
    load_now(to.from, p.q_starts + at, exists);
    load_now(to.to, p.q_starts + at + 1, exists);
    load_now(to.kv_len, p.kv_lens + at, exists);
    load_now(to.row, p.rows + at, exists);
}

// Where the table has its entry for position `position` of the sequence in row `row`.
__device__ inline const int32_t* table_entry(const PagedAttention& p, int row, int position) {
    return p.block_tables + row * p.table_stride + (position >> p.block_bits);
}

// Where key `key` of KV head `head` is in the cache, counted in rows of D numbers, if `entry` is the table's for it.
// Its value is kv_heads << block_bits rows further.
__device__ inline int64_t key_row(const PagedAttention& p, int entry, int head, int key) {
    const int64_t tile = int64_t(clamp(entry, 0, p.blocks - 1)) * 2 * p.kv_heads + head;
    return (tile << p.block_bits) + (key & ((1 << p.block_bits) - 1));
}

// How the decode kernel cuts the keys of a chunk: `count` splits of `length` keys from key `first` on. This depends on
// the chunk alone, so a request gets the same sums whatever else is in the step.
struct Splits {
    int first, length, count;
};

// Keys of a split, unless the chunk is too long for that. Shorter splits would save a single sequence time, longer ones
// a batch: 256 keys give one of 1k 10%, and take 6% from 256 of them.
constexpr int kMinSplit = 512;
// Splits of one sequence, over all KV heads: about one for each multiprocessor of a large GPU.
constexpr int kMaxItems = 128;

__device__ inline Splits split_keys(const PagedAttention& p, const Chunk& chunk) {
    // Splits begin at multiples of 16, as the groups do that kernels load.
    const int first = Chunk::first_key(p, chunk.position(0)) & ~15;
    const int keys = larger(chunk.kv_len - first, 1);
    const int most = chunk.q_len == 1 ? p.max_parts : larger(p.max_parts / chunk.q_len, 1);
    if (keys <= kMinSplit * most) return {first, kMinSplit, ceil_div(keys, kMinSplit)};
    const int length = ceil_div(ceil_div(keys, most), 64) * 64;
    return {first, length, ceil_div(keys, length)};
}

// Where a chunk's token keeps the partial result of one split: index into the first two dimensions of partial_out.
__device__ inline int64_t part(const PagedAttention& p, const Chunk& chunk, int split, int token) {
    return int64_t(chunk.index) * p.max_parts + split * chunk.q_len + token;
}

// Numbers all work items of a call: those of chunk 0 first, then those of chunk 1, and so on; items(p, chunk) says how
// many a chunk has. Each warp keeps its own finder and walks it through ascending indices, 32 chunks at a time, one a
// lane, while the next 32 are being loaded: behind the copies of a busy kernel a load takes microseconds.
template <int items(const PagedAttention&, const Chunk&)>
class Finder {
  public:
    __device__ explicit Finder(const PagedAttention& p) : p_(p) { load_chunk(p, threadIdx.x % 32, next_); }

    // The chunk that holds item `index`, and the item's number in it; false where there are not that many items.
    __device__ bool find(int index, Chunk& chunk, int& local) {
        while (index >= before_ + total_) {
            if (base_ + 32 >= p_.chunks) return false;
            advance();
        }
        int upto = count_;  // items of the chunks in view up to this lane's
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(kAllLanes, upto, step);
            if (int(threadIdx.x % 32) >= step) upto += other;
        }
        const int lane = __ffs(__ballot_sync(kAllLanes, before_ + upto > index)) - 1;
        local = index - before_ - __shfl_sync(kAllLanes, upto - count_, lane);
        chunk = {.index = base_ + lane,
                 .begin = __shfl_sync(kAllLanes, mine_.begin, lane),
                 .q_len = __shfl_sync(kAllLanes, mine_.q_len, lane),
                 .kv_len = __shfl_sync(kAllLanes, mine_.kv_len, lane),
                 .row = __shfl_sync(kAllLanes, mine_.row, lane)};
        return true;
    }

  private:
    __device__ void advance() {
        const int lane = threadIdx.x % 32;
        before_ += total_;
        base_ += 32;
        mine_ = next_.check(p_, base_ + lane);
        load_chunk(p_, base_ + 32 + lane, next_);
        count_ = items(p_, mine_);
        total_ = __reduce_add_sync(kAllLanes, count_);
    }

    const PagedAttention& p_;
    int base_ = -32;             // the first of the 32 chunks in view
    int before_ = 0;             // items of the chunks before them
    int count_ = 0, total_ = 0;  // items of this lane's chunk, and of all chunks in view
    Chunk mine_ = {0, 0, 0, 0, 0};
    LoadedChunk next_;  // this lane's of the 32 chunks to come
};

}  // namespace nanoinfer::cuda
