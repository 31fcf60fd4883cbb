#include "op.h"
#include "penalize.cuh"

namespace nanoinfer {
namespace {

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
    const cuda::Penalize params = {
        .logits = static_cast<float*>(logits.data_ptr()),
        .sample_rows = ints(sample_rows),
        .row_state = ints(row_state),
        .block_tables = ints(block_tables),
        .slot_tokens = ints(slot_tokens),
        .rows = rows,
        .vocab = logits.size(1),
        .logits_stride = logits.stride(0),
        .num_rows = row_state.size(0),
        .max_blocks = block_tables.size(1),
        .num_slots = slot_tokens.size(0),
        .block_size = int(block_size),
    };
    launch(op, logits, cuda::penalize, params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nanoinfer, CUDA, m) { m.impl("penalize", TORCH_BOX(&penalize)); }

}  // namespace nanoinfer
