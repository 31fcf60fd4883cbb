// Repetition penalty: ids that a row already holds lose, each once.

#include <string.h>

#include <vector>

#include "../row_state.h"
#include "op.h"

namespace nanoinfer {
namespace {

struct Penalize {
    float* logits;                // [L, vocab], rows logits_stride apart
    const int32_t* sample_rows;   // [L] row of row_state
    const int32_t* row_state;     // [num_rows, kRowStateWidth]; the last row belongs to no request
    const int32_t* block_tables;  // [num_rows, max_blocks]
    const int32_t* slot_tokens;   // [num_slots]
    int64_t vocab, logits_stride, num_rows, max_blocks, num_slots, block_size;
};

// One row's penalty and where its ids are; length 0 where there is nothing to do.
struct Seen {
    const int32_t* blocks;
    int64_t length;
    float penalty;
};

Seen seen_by(const Penalize& p, int64_t i) {
    const int64_t row = p.sample_rows[i];
    const int32_t* state = p.row_state + row * kRowStateWidth;
    float penalty;
    memcpy(&penalty, state + kRepetitionPenalty, sizeof(penalty));
    const bool off = row == p.num_rows - 1 || penalty == 1;
    return {p.block_tables + row * p.max_blocks, off ? 0 : state[kLength], penalty};
}

// visit(position, slot) for each position of a row.
template <typename Visit>
void for_each_slot(const Penalize& p, const Seen& seen, Visit visit) {
    for (int64_t position = 0; position < seen.length; ++position) {
        visit(position, seen.blocks[position / p.block_size] * p.block_size + position % p.block_size);
    }
}

void check_row(const char* op, const Penalize& p, int64_t i) {
    const Seen seen = seen_by(p, i);
    const int32_t row = p.sample_rows[i];
    require(seen.length >= 0 && seen.length <= p.max_blocks * p.block_size, op, ": the length of row ", row,
            " must be in [0, ", p.max_blocks * p.block_size, "], got ", seen.length);
    for_each_slot(p, seen, [&](int64_t position, int64_t slot) {
        if (slot < 0 || slot >= p.num_slots) {
            require(false, op, ": position ", position, " of row ", row, " must be at a slot in [0, ", p.num_slots,
                    "), got ", slot);
        }
        const int32_t id = p.slot_tokens[slot];
        if (id < 0 || id >= p.vocab) {
            require(false, op, ": the token at position ", position, " of row ", row, " must be in [0, ", p.vocab,
                    "), got ", id);
        }
    });
}

// One bit an id remembers whether it has lost already; kept between rows, cleared by the way it was set.
void penalize_row(const Penalize& p, int64_t i, std::vector<bool>& done) {
    const Seen seen = seen_by(p, i);
    float* logits = p.logits + i * p.logits_stride;
    for_each_slot(p, seen, [&](int64_t, int64_t slot) {
        const int32_t id = p.slot_tokens[slot];
        if (done[id]) return;
        done[id] = true;
        logits[id] = logits[id] > 0 ? logits[id] / seen.penalty : logits[id] * seen.penalty;
    });
    for_each_slot(p, seen, [&](int64_t, int64_t slot) { done[p.slot_tokens[slot]] = false; });
}

void penalize(const Tensor& logits, const Tensor& sample_rows, const Tensor& row_state, const Tensor& block_tables,
              const Tensor& slot_tokens, int64_t block_size) {
    const char* op = "penalize";
    Want(op, "logits", logits).dtype(ScalarType::Float).shape({-1, -1}).dense(1);
    const int64_t rows = logits.size(0);
    Want(op, "sample_rows", sample_rows).dtype(ScalarType::Int).shape({rows}).dense(0).same_device(logits);
    Want(op, "row_state", row_state).dtype(ScalarType::Int).shape({-1, kRowStateWidth}).dense(0).same_device(logits);
    Want(op, "block_tables", block_tables)
        .dtype(ScalarType::Int)
        .shape({row_state.size(0), -1})
        .dense(0)
        .same_device(logits);
    Want(op, "slot_tokens", slot_tokens).dtype(ScalarType::Int).shape({-1}).dense(0).same_device(logits);
    require(block_size >= 1, op, ": block_size must be at least 1, got ", block_size);
    check_range(op, "sample_rows", ints(sample_rows), rows, 0, row_state.size(0));
    const Penalize params = {
        .logits = static_cast<float*>(logits.data_ptr()),
        .sample_rows = ints(sample_rows),
        .row_state = ints(row_state),
        .block_tables = ints(block_tables),
        .slot_tokens = ints(slot_tokens),
        .vocab = logits.size(1),
        .logits_stride = logits.stride(0),
        .num_rows = row_state.size(0),
        .max_blocks = block_tables.size(1),
        .num_slots = slot_tokens.size(0),
        .block_size = block_size,
    };
    for (int64_t i = 0; i < rows; ++i) check_row(op, params, i);
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
        std::vector<bool> done(params.vocab);
        for (int64_t i = begin; i < end; ++i) penalize_row(params, i, done);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nanoinfer, CPU, m) { m.impl("penalize", TORCH_BOX(&penalize)); }

}  // namespace nanoinfer
