#pragma once
// One step's message applied to the table of requests, and the Batch written: all that a step knows comes from here.
//
// A few thousand integers at most, so one block does it all: its barriers order what has an order (new rows, then
// edits, then chunks), and nothing else has to be launched. What is out of range is left out, so that no memory outside
// the arrays is touched; the host, which builds the message, never sends such a thing.

#include "../row_state.h"
#include "launch.cuh"
#include "vec.cuh"

namespace nanoinfer::cuda {

struct PrepareBatch {
    const int32_t* header;                               // [4] numbers of new rows, edits, chunks and tokens
    const int32_t* new_rows;                             // [max_new, 1 + kRowStateWidth] row, its initial state
    const int32_t* edits;                                // [max_edits, 3] row, index, block
    const int32_t* chunks;                               // [max_chunks, 4] row, start, end, flags
    const int32_t* new_tokens;                           // [max_tokens], -1: the row's last token
    int64_t max_new, max_edits, max_chunks, max_tokens;  // both the message and the Batch have room for the last two

    int32_t* row_state;     // [num_rows, kRowStateWidth]; the last row belongs to no request
    int32_t* block_tables;  // [num_rows, max_blocks]
    int32_t* slot_tokens;   // [num_slots]
    int64_t num_rows, max_blocks, num_slots;
    int block_size;

    int32_t *tokens, *positions, *slots;  // [token_room]
    int32_t *q_starts, *kv_lens, *rows;   // [chunk_room + 1], [chunk_room], [chunk_room]
    int32_t *logit_rows, *sample_rows;    // [logit_room]
    int64_t token_room, chunk_room, logit_room;
};

// Chunks are taken a thread each, so in a decode step of up to 1024 rows there is one round of everything.
constexpr int kPrepareThreads = 1024;

struct Chunk {
    int row, start, end, flags;
};

// Begin among the step's tokens, and among its logits, of what is counted.
struct Counts {
    int tokens, logits;
};

__device__ inline int clamp_count(int count, int64_t limit) { return int(max(int64_t(0), min(int64_t(count), limit))); }

__device__ inline void apply_new_rows(const PrepareBatch& p, int count) {
    for (int i = threadIdx.x; i < count * kRowStateWidth; i += kPrepareThreads) {
        const int32_t* entry = p.new_rows + i / kRowStateWidth * (1 + kRowStateWidth);
        const int64_t row = entry[0];
        if (row < 0 || row >= p.num_rows - 1) continue;
        p.row_state[row * kRowStateWidth + i % kRowStateWidth] = entry[1 + i % kRowStateWidth];
    }
}

__device__ inline void apply_edits(const PrepareBatch& p, int count) {
    for (int i = threadIdx.x; i < count; i += kPrepareThreads) {
        const int64_t row = p.edits[3 * i], index = p.edits[3 * i + 1];
        if (row < 0 || row >= p.num_rows - 1 || index < 0 || index >= p.max_blocks) continue;
        p.block_tables[row * p.max_blocks + index] = p.edits[3 * i + 2];
    }
}

// Chunk i of the message, if it has room for so many.
__device__ inline Chunk read_chunk(const PrepareBatch& p, int i) {
    if (i >= p.max_chunks) return {};
    const int32_t* c = p.chunks + 4 * int64_t(i);
    return {c[0], c[1], c[2], c[3]};
}

// The chunk; one of length 0, of the scratch row, where the message has none or it is out of range.
__device__ inline Chunk sound_chunk(const PrepareBatch& p, const Chunk& c, bool there, int num_tokens) {
    const bool sound = there && c.row >= 0 && c.row < p.num_rows - 1 && c.start >= 0 && c.end > c.start &&
                       c.end <= p.max_blocks * p.block_size && c.end - c.start <= num_tokens;
    return sound ? c : Chunk{int(p.num_rows - 1), 0, 0, 0};
}

// Sums of all threads' counts before this one's; `total` becomes the sum of all. `scratch`: a value a warp.
__device__ inline Counts sum_before(Counts own, Counts& total, Counts* scratch) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    Counts sum = own;  // of the warp's lanes up to this one
    for (int apart = 1; apart < kWarp; apart *= 2) {
        const int tokens = __shfl_up_sync(~0u, sum.tokens, apart), logits = __shfl_up_sync(~0u, sum.logits, apart);
        if (lane >= apart) sum = {sum.tokens + tokens, sum.logits + logits};
    }
    __syncthreads();  // scratch is free again
    if (lane == kWarp - 1) scratch[warp] = sum;
    __syncthreads();
    Counts before = {0, 0};
    total = {0, 0};
#pragma unroll 4
    for (int w = 0; w < kPrepareThreads / kWarp; ++w) {
        if (w == warp) before = total;
        total = {total.tokens + scratch[w].tokens, total.logits + scratch[w].logits};
    }
    return {before.tokens + sum.tokens - own.tokens, before.logits + sum.logits - own.logits};
}

// A chunk's own entries: its tokens begin at begin.tokens, its logits at begin.logits.
__device__ inline void write_chunk(const PrepareBatch& p, int i, const Chunk& c, const Counts& begin) {
    p.q_starts[i] = begin.tokens;
    p.kv_lens[i] = c.end;
    p.rows[i] = c.row;
    if (c.end == 0) return;
    p.row_state[c.row * int64_t(kRowStateWidth) + kLength] = c.end;
    if ((c.flags & kFlagSample) && begin.logits < p.logit_room) {
        p.logit_rows[begin.logits] = begin.tokens + c.end - c.start - 1;
        p.sample_rows[begin.logits] = c.row;
    }
}

// Token i of the step, the `offset`-th of its chunk.
__device__ inline void write_token(const PrepareBatch& p, int i, const Chunk& c, int offset) {
    const int position = c.start + offset;
    // Asked for at once, though not all are used: each takes the second cache's latency.
    const int given = p.new_tokens[i], last = p.row_state[c.row * int64_t(kRowStateWidth) + kLastToken];
    const int64_t block = p.block_tables[c.row * p.max_blocks + position / p.block_size];
    const int token = given < 0 ? last : given;
    int64_t slot = block * p.block_size + position % p.block_size;
    if (!(c.flags & kFlagStore) || slot < 0 || slot >= p.num_slots) slot = -1;
    p.tokens[i] = token;
    p.positions[i] = position;
    p.slots[i] = int(slot);
    if (slot >= 0) p.slot_tokens[slot] = token;
}

// The last of `count` begins, which never fall, that is at most i.
__device__ inline int find_chunk(const int* begins, int count, int i) {
    int low = 0, high = count;  // begins[low] <= i < begins[high]
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (begins[middle] <= i ? low : high) = middle;
    }
    return low;
}

__device__ inline void fill(int32_t* out, int begin, int64_t end, int value) {
#pragma unroll 1  // the code of eight of these, unrolled, takes registers from the rest
    for (int64_t i = begin + threadIdx.x; i < end; i += kPrepareThreads) out[i] = value;
}

__device__ inline void pad(const PrepareBatch& p, int num_tokens, int num_chunks, int num_logits) {
    const int scratch_row = int(p.num_rows - 1);
    fill(p.tokens, num_tokens, p.token_room, 0);
    fill(p.positions, num_tokens, p.token_room, 0);
    fill(p.slots, num_tokens, p.token_room, -1);
    fill(p.q_starts, num_chunks, p.chunk_room + 1, num_tokens);
    fill(p.kv_lens, num_chunks, p.chunk_room, 0);
    fill(p.rows, num_chunks, p.chunk_room, scratch_row);
    fill(p.logit_rows, num_logits, p.logit_room, 0);
    fill(p.sample_rows, num_logits, p.logit_room, scratch_row);
}

__global__ void __launch_bounds__(kPrepareThreads) prepare_batch_kernel(const __grid_constant__ PrepareBatch p) {
    __shared__ Counts scratch[kPrepareThreads / kWarp];
    __shared__ Chunk chunks[kPrepareThreads];  // of this round
    __shared__ int begins[kPrepareThreads];
    let_next_kernel_start();
    wait_for_earlier_kernels();
    Chunk read = read_chunk(p, threadIdx.x);  // on its way with the header
    const int num_new = clamp_count(p.header[0], p.max_new), num_edits = clamp_count(p.header[1], p.max_edits);
    const int num_chunks = clamp_count(p.header[2], min(p.max_chunks, p.chunk_room));
    const int num_tokens = clamp_count(p.header[3], min(p.max_tokens, p.token_room));
    apply_new_rows(p, num_new);
    apply_edits(p, num_edits);
    __syncthreads();       // chunks see the table as it is after both
    Counts done = {0, 0};  // in earlier rounds
    for (int first = 0; first < num_chunks; first += kPrepareThreads) {
        const int i = first + threadIdx.x, round = min(kPrepareThreads, num_chunks - first);
        const Chunk c = sound_chunk(p, read, i < num_chunks, num_tokens);
        read = read_chunk(p, i + kPrepareThreads);
        Counts total, begin = sum_before({c.end - c.start, (c.flags & kFlagSample) != 0}, total, scratch);
        begin = {begin.tokens + done.tokens, begin.logits + done.logits};
        chunks[threadIdx.x] = c;
        begins[threadIdx.x] = begin.tokens;
        if (i < num_chunks) write_chunk(p, i, c, begin);
        __syncthreads();  // all chunks of the round are there
        const int end = min(done.tokens + total.tokens, num_tokens);
        for (int token = done.tokens + threadIdx.x; token < end; token += kPrepareThreads) {
            const int chunk = find_chunk(begins, round, token);
            write_token(p, token, chunks[chunk], token - begins[chunk]);
        }
        done = {end, done.logits + total.logits};
        __syncthreads();  // nobody reads the round's chunks any more
    }
    pad(p, done.tokens, num_chunks, int(min(int64_t(done.logits), p.logit_room)));
}

inline cudaError_t prepare_batch(const PrepareBatch& p, cudaStream_t stream) {
    return launch_kernel(prepare_batch_kernel, dim3(1), kPrepareThreads, 0, stream, p);
}

}  // namespace nanoinfer::cuda
