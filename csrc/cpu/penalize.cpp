// Penalties: ids that a row already holds lose, each once; those of its output as often as it holds them.

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

// One row's penalties and where the ids are that they look at: those of positions from `begin` on.
struct History {
    const int32_t* blocks;
    float repetition, presence, frequency;
    bool counted;  // presence or frequency asks for something
    int64_t begin, prompt_length, length;
};

History history_of(const Penalize& p, int64_t i) {
    const int64_t row = p.sample_rows[i];
    const int32_t* state = p.row_state + row * kRowStateWidth;
    History h;
    h.blocks = p.block_tables + row * p.max_blocks;
    memcpy(&h.repetition, state + kRepetitionPenalty, sizeof(float));
    memcpy(&h.presence, state + kPresencePenalty, sizeof(float));
    memcpy(&h.frequency, state + kFrequencyPenalty, sizeof(float));
    h.counted = h.presence != 0 || h.frequency != 0;
    h.prompt_length = h.counted ? state[kPromptLength] : 0;
    const bool off = row == p.num_rows - 1 || (h.repetition == 1 && !h.counted);
    h.length = off ? 0 : state[kLength];
    h.begin = h.repetition == 1 ? h.prompt_length : 0;
    return h;
}

// visit(position, slot) for each position of a row from `begin` on.
template <typename Visit>
void for_each_slot(const Penalize& p, const History& h, int64_t begin, Visit visit) {
    for (int64_t position = begin; position < h.length; ++position) {
        visit(position, h.blocks[position / p.block_size] * p.block_size + position % p.block_size);
    }
}

void check_row(const char* op, const Penalize& p, int64_t i) {
    const History h = history_of(p, i);
    if (h.length == 0) return;
    const int32_t row = p.sample_rows[i];
    require(h.length >= 0 && h.length <= p.max_blocks * p.block_size, op, ": the length of row ", row,
            " must be in [0, ", p.max_blocks * p.block_size, "], got ", h.length);
    require(h.prompt_length >= 0 && h.prompt_length <= h.length, op, ": the prompt length of row ", row,
            " must be in [0, ", h.length, "], got ", h.prompt_length);
    for_each_slot(p, h, h.begin, [&](int64_t position, int64_t slot) {
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

void penalize_repeated(const Penalize& p, const History& h, float* logits, int32_t* counts) {
    for_each_slot(p, h, 0, [&](int64_t, int64_t slot) {
        const int32_t id = p.slot_tokens[slot];
        if (counts[id]++) return;
        logits[id] = logits[id] > 0 ? logits[id] / h.repetition : logits[id] * h.repetition;
    });
    for_each_slot(p, h, 0, [&](int64_t, int64_t slot) { counts[p.slot_tokens[slot]] = 0; });
}

void penalize_counted(const Penalize& p, const History& h, float* logits, int32_t* counts) {
    for_each_slot(p, h, h.prompt_length, [&](int64_t, int64_t slot) { ++counts[p.slot_tokens[slot]]; });
    for_each_slot(p, h, h.prompt_length, [&](int64_t, int64_t slot) {
        const int32_t id = p.slot_tokens[slot];
        if (counts[id] == 0) return;  // an earlier position's visit has used it up
        logits[id] -= h.frequency * float(counts[id]) + h.presence;
        counts[id] = 0;
    });
}

// counts: [vocab] zeros, and zeros again at the end: what set them clears them. Made by the first row that needs them.
void penalize_row(const Penalize& p, int64_t i, std::vector<int32_t>& counts) {
    const History h = history_of(p, i);
    if (h.length == 0) return;
    counts.resize(p.vocab);
    float* logits = p.logits + i * p.logits_stride;
    if (h.repetition != 1) penalize_repeated(p, h, logits, counts.data());
    if (h.counted) penalize_counted(p, h, logits, counts.data());
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
        std::vector<int32_t> counts;
        for (int64_t i = begin; i < end; ++i) penalize_row(params, i, counts);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nanoinfer, CPU, m) { m.impl("penalize", TORCH_BOX(&penalize)); }

}  // namespace nanoinfer
