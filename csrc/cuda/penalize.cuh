#pragma once
// Repetition penalty: ids that a row already holds lose, each once. One block a row.

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
// Ids that one pass covers, a bit each in shared memory: 32 KB, with which an SM still holds the blocks of 4 rows.
// Vocabularies that are larger take more passes over the row's tokens.
constexpr int kWindow = 1 << 18;
constexpr int kWordBits = 32;

// The id at a position of a row, or -1 where the table or the cache holds something out of range.
__device__ inline int id_at(const Penalize& p, const int32_t* blocks, int position) {
    const int64_t slot = int64_t(blocks[position / p.block_size]) * p.block_size + position % p.block_size;
    return slot >= 0 && slot < p.num_slots ? p.slot_tokens[slot] : -1;
}

// Row of logits: blockIdx.x. Dynamic shared memory: a bit for each id of a window, set once the id has lost.
__global__ void __launch_bounds__(kPenalizeThreads) penalize_kernel(const __grid_constant__ Penalize p) {
    extern __shared__ uint32_t done[];
    let_next_kernel_start();
    wait_for_earlier_kernels();
    const int64_t row = p.sample_rows[blockIdx.x];
    if (row < 0 || row >= p.num_rows - 1) return;
    const int32_t* state = p.row_state + row * kRowStateWidth;
    const float penalty = __int_as_float(state[kRepetitionPenalty]);
    if (penalty == 1) return;
    const int32_t* blocks = p.block_tables + row * p.max_blocks;
    float* logits = p.logits + blockIdx.x * p.logits_stride;
    const int length = int(min(int64_t(state[kLength]), p.max_blocks * p.block_size));
    for (int64_t begin = 0; begin < p.vocab; begin += kWindow) {
        const int ids = int(min(p.vocab - begin, int64_t(kWindow)));
        for (int i = threadIdx.x; i < (ids + kWordBits - 1) / kWordBits; i += kPenalizeThreads) done[i] = 0;
        __syncthreads();  // no bit is set before all are cleared
        for (int position = threadIdx.x; position < length; position += kPenalizeThreads) {
            const int64_t id = id_at(p, blocks, position) - begin;
            if (id < 0 || id >= ids) continue;
            const uint32_t bit = 1u << id % kWordBits;
            if (atomicOr(done + id / kWordBits, bit) & bit) continue;  // another position's thread has done it
            float& logit = logits[begin + id];
            logit = logit > 0 ? logit / penalty : logit * penalty;
        }
        __syncthreads();  // all bits have served before the next window clears them
    }
}

inline cudaError_t penalize(const Penalize& p, cudaStream_t stream) {
    if (p.rows * p.vocab == 0) return cudaSuccess;
    const int64_t ids = p.vocab < kWindow ? p.vocab : kWindow;
    const size_t shared = ceil_div(ids, kWordBits) * sizeof(uint32_t);
    return launch_kernel(penalize_kernel, dim3(p.rows), kPenalizeThreads, shared, stream, p);
}

}  // namespace nanoinfer::cuda
