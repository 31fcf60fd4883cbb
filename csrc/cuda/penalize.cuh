#pragma once
// Penalties: ids that a row already holds lose, each once; those of its output as often as it holds them. One block a
// row. Which thread serves an id is left to chance, but what the id loses depends on its count alone.

#include "../row_state.h"
#include "launch.cuh"
#include "vec.cuh"

namespace nanoinfer::cuda {

struct Penalize {
    float* logits;                // [rows, vocab], rows logits_stride apart
    const int32_t* sample_rows;   // [rows] row of row_state
    const int32_t* row_state;     // [num_rows, kRowStateWidth]; the last row belongs to no request
    const int32_t* block_tables;  // [num_rows, max_blocks]
    const int32_t* slot_tokens;   // [num_slots]
    int64_t rows, vocab, logits_stride, num_rows, max_blocks, num_slots;
    int block_size;
};

constexpr int kPenalizeThreads = 512;
// Ids that one window covers, a bit each in shared memory: 32 KB at most. Vocabularies that are larger take more
// windows, each with its passes over the row's tokens.
constexpr int kWindow = 1 << 18;
constexpr int kWordBits = 32;
// Entries of the table of counts, 16 KB: together with the bits what a block may have without asking, and of Qwen2's
// vocabulary an SM holds the blocks of 4 rows. More ids than that take more passes over the row's output.
constexpr int kLogEntries = 11;
constexpr int kEntries = 1 << kLogEntries;
// Entries that an id may have, one after the other: 1024 random ids nearly always find theirs, 2000 leave 95 over.
constexpr int kProbes = 32;
constexpr int kNobody = -1;
constexpr uint32_t kGolden = 0x9E3779B1;  // 2^32 over the golden ratio: spreads neighbours (Knuth, vol. 3, 6.4)

// One row: its ids are those of `length` positions, of which the first `prompt_length` are not output.
struct History {
    const int32_t* blocks;
    float* logits;  // [vocab]
    int prompt_length, length;
    float repetition, presence, frequency;
};

// Ids from `begin` on, `ids` of them, and a bit for each in shared memory, set once the id has lost.
struct Window {
    int64_t begin;
    int ids;
    uint32_t* done;
};

struct CountTable {
    int ids[kEntries];  // of the window, or kNobody
    int counts[kEntries];
};

// The id at a position of a row, or -1 where the table or the cache holds something out of range.
__device__ inline int id_at(const Penalize& p, const int32_t* blocks, int position) {
    const int64_t slot = int64_t(blocks[position / p.block_size]) * p.block_size + position % p.block_size;
    return slot >= 0 && slot < p.num_slots ? p.slot_tokens[slot] : -1;
}

// The id at a position as the window counts it, or -1 where it lies outside.
__device__ inline int id_in(const Window& w, const Penalize& p, const History& h, int position) {
    const int64_t id = id_at(p, h.blocks, position) - w.begin;
    return id >= 0 && id < w.ids ? int(id) : -1;
}

__device__ inline void clear(const Window& w) {
    for (int i = threadIdx.x; i < (w.ids + kWordBits - 1) / kWordBits; i += kPenalizeThreads) w.done[i] = 0;
    __syncthreads();  // no bit is set before all are cleared
}

// Sets an id's bit; what it was before. Of all threads that do so at once, one alone hears false.
__device__ inline bool set_done(const Window& w, int id) {
    const uint32_t bit = 1u << id % kWordBits;
    return atomicOr(w.done + id / kWordBits, bit) & bit;
}

__device__ inline void penalize_repeated(const Penalize& p, const History& h, const Window& w) {
    clear(w);
    for (int position = threadIdx.x; position < h.length; position += kPenalizeThreads) {
        const int id = id_in(w, p, h, position);
        if (id < 0 || set_done(w, id)) continue;
        float& logit = h.logits[w.begin + id];
        logit = logit > 0 ? logit / h.repetition : logit * h.repetition;
    }
    __syncthreads();  // all bits have served before anyone clears them, and all logits are there
}

// The entry of an id, taken for it if need be; kNobody where all that it may have are others'. An entry is never given
// back within a pass, so all threads that bring an id get the same answer, whoever comes first.
__device__ inline int entry_of(CountTable& table, int id) {
    const uint32_t first = uint32_t(id) * kGolden >> (32 - kLogEntries);
    for (int probe = 0; probe < kProbes; ++probe) {
        const int entry = (first + probe) % kEntries;
        int owner = *static_cast<volatile int*>(table.ids + entry);  // cheaper than an exchange where many bring one id
        if (owner == kNobody) owner = atomicCAS(table.ids + entry, kNobody, id);
        if (owner == kNobody || owner == id) return entry;
    }
    return kNobody;
}

// Counts the output's ids that are not done and find an entry, and lets them lose; true if others are left over.
__device__ inline bool penalize_counted_pass(const Penalize& p, const History& h, const Window& w, CountTable& table) {
    for (int i = threadIdx.x; i < kEntries; i += kPenalizeThreads) {
        table.ids[i] = kNobody;
        table.counts[i] = 0;
    }
    __syncthreads();  // entries are free before the first is taken
    bool left_over = false;
    for (int position = h.prompt_length + threadIdx.x; position < h.length; position += kPenalizeThreads) {
        const int id = id_in(w, p, h, position);
        if (id < 0 || w.done[id / kWordBits] >> id % kWordBits & 1) continue;
        const int entry = entry_of(table, id);
        left_over |= entry == kNobody;
        if (entry != kNobody) atomicAdd(table.counts + entry, 1);
    }
    __syncthreads();  // all counts are whole, and no bit is read any more
    for (int i = threadIdx.x; i < kEntries; i += kPenalizeThreads) {
        const int id = table.ids[i];
        if (id == kNobody) continue;
        set_done(w, id);
        float& logit = h.logits[w.begin + id];
        // Each operation rounded, as on the CPU, where the compiler would make one of two.
        logit = __fsub_rn(logit, __fadd_rn(__fmul_rn(h.frequency, float(table.counts[i])), h.presence));
    }
    return __syncthreads_or(left_over);  // and the table has served
}

__device__ inline History history_of(const Penalize& p, int64_t row, float* logits) {
    const int32_t* state = p.row_state + row * kRowStateWidth;
    return {
        .blocks = p.block_tables + row * p.max_blocks,
        .logits = logits,
        .prompt_length = max(state[kPromptLength], 0),
        .length = int(min(int64_t(state[kLength]), p.max_blocks * p.block_size)),
        .repetition = __int_as_float(state[kRepetitionPenalty]),
        .presence = __int_as_float(state[kPresencePenalty]),
        .frequency = __int_as_float(state[kFrequencyPenalty]),
    };
}

// Row of logits: blockIdx.x. Dynamic shared memory: the table of counts, then the bits of a window.
__global__ void __launch_bounds__(kPenalizeThreads) penalize_kernel(const __grid_constant__ Penalize p) {
    extern __shared__ int shared[];
    let_next_kernel_start();
    wait_for_earlier_kernels();
    const int64_t row = p.sample_rows[blockIdx.x];
    if (row < 0 || row >= p.num_rows - 1) return;
    const History h = history_of(p, row, p.logits + blockIdx.x * p.logits_stride);
    const bool repeated = h.repetition != 1, counted = h.presence != 0 || h.frequency != 0;
    if (!repeated && !counted) return;
    CountTable& table = *reinterpret_cast<CountTable*>(shared);
    Window w = {0, 0, reinterpret_cast<uint32_t*>(&table + 1)};
    for (; w.begin < p.vocab; w.begin += kWindow) {
        w.ids = int(min(p.vocab - w.begin, int64_t(kWindow)));
        if (repeated) penalize_repeated(p, h, w);
        if (!counted) continue;
        clear(w);
        while (penalize_counted_pass(p, h, w, table)) continue;
    }
}

inline cudaError_t penalize(const Penalize& p, cudaStream_t stream) {
    if (p.rows * p.vocab == 0) return cudaSuccess;
    const int64_t ids = p.vocab < kWindow ? p.vocab : kWindow;
    const size_t shared = sizeof(CountTable) + ceil_div(ids, kWordBits) * sizeof(uint32_t);
    return launch_kernel(penalize_kernel, dim3(p.rows), kPenalizeThreads, shared, stream, p);
}

}  // namespace nanoinfer::cuda
