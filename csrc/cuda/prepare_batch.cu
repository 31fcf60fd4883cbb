#include "op.h"
#include "prepare_batch.cuh"

namespace nanoinfer {
namespace {

constexpr const char* kOp = "prepare_batch";

// Data of an argument, once its dtype, shape and memory are as they should be.
int32_t* checked(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape, const Tensor& header) {
    Want(kOp, name, tensor).dtype(ScalarType::Int).shape(shape).dense(0).same_device(header);
    return ints(tensor);
}

void prepare_batch(const Tensor& header, const Tensor& new_rows, const Tensor& edits, const Tensor& chunks,
                   const Tensor& new_tokens, const Tensor& row_state, const Tensor& block_tables,
                   const Tensor& slot_tokens, const Tensor& tokens, const Tensor& positions, const Tensor& slots,
                   const Tensor& q_starts, const Tensor& kv_lens, const Tensor& rows, const Tensor& logit_rows,
                   const Tensor& sample_rows, int64_t block_size) {
    const cuda::PrepareBatch params = {
        .header = checked("header", header, {4}, header),
        .new_rows = checked("new_rows", new_rows, {-1, 1 + kRowStateWidth}, header),
        .edits = checked("edits", edits, {-1, 3}, header),
        .chunks = checked("chunks", chunks, {-1, 4}, header),
        .new_tokens = checked("new_tokens", new_tokens, {-1}, header),
        .max_new = new_rows.size(0),
        .max_edits = edits.size(0),
        .max_chunks = chunks.size(0),
        .max_tokens = new_tokens.size(0),
        .row_state = checked("row_state", row_state, {-1, kRowStateWidth}, header),
        .block_tables = checked("block_tables", block_tables, {row_state.size(0), -1}, header),
        .slot_tokens = checked("slot_tokens", slot_tokens, {-1}, header),
        .num_rows = row_state.size(0),
        .max_blocks = block_tables.size(1),
        .num_slots = slot_tokens.size(0),
        .block_size = int(block_size),
        .tokens = checked("tokens", tokens, {-1}, header),
        .positions = checked("positions", positions, {tokens.size(0)}, header),
        .slots = checked("slots", slots, {tokens.size(0)}, header),
        .q_starts = checked("q_starts", q_starts, {rows.size(0) + 1}, header),
        .kv_lens = checked("kv_lens", kv_lens, {rows.size(0)}, header),
        .rows = checked("rows", rows, {-1}, header),
        .logit_rows = checked("logit_rows", logit_rows, {-1}, header),
        .sample_rows = checked("sample_rows", sample_rows, {logit_rows.size(0)}, header),
        .token_room = tokens.size(0),
        .chunk_room = rows.size(0),
        .logit_room = logit_rows.size(0),
    };
    require(block_size >= 1, kOp, ": block_size must be at least 1, got ", block_size);
    require(params.num_rows >= 1, kOp, ": row_state must have a last row for padding, got 0 rows");
    launch(kOp, header, cuda::prepare_batch, params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nanoinfer, CUDA, m) { m.impl("prepare_batch", TORCH_BOX(&prepare_batch)); }

}  // namespace nanoinfer
