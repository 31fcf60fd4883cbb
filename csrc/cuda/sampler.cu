#include "op.h"
#include "sampler.cuh"

namespace nanoinfer {
namespace {

void sample(const Tensor& logits, const Tensor& sample_rows, const Tensor& row_state, const Tensor& tokens,
            int64_t vocab_size) {
    const char* op = "sample";
    Want(op, "logits", logits).dtype(ScalarType::Float).shape({-1, -1}).dense(1);
    const int64_t rows = logits.size(0);
    Want(op, "sample_rows", sample_rows).dtype(ScalarType::Int).shape({rows}).dense(0).same_device(logits);
    Want(op, "row_state", row_state).dtype(ScalarType::Int).shape({-1, kRowStateWidth}).dense(0).same_device(logits);
    Want(op, "tokens", tokens).dtype(ScalarType::Int).shape({rows}).dense(0).same_device(logits);
    require(vocab_size >= 1 && vocab_size <= logits.size(1), op, ": vocab_size must be in [1, ", logits.size(1),
            "], the columns of logits, got ", vocab_size);
    require(vocab_size <= cuda::kMaxVocab, op, ": vocab_size must be at most ", cuda::kMaxVocab, " on CUDA, got ",
            vocab_size);
    const Tensor workspace = empty({cuda::sample_workspace(rows, vocab_size)}, logits, ScalarType::Byte);
    const cuda::Sample params = {
        .logits = static_cast<const float*>(logits.data_ptr()),
        .sample_rows = ints(sample_rows),
        .row_state = ints(row_state),
        .tokens = ints(tokens),
        .rows = rows,
        .vocab = vocab_size,
        .logits_stride = logits.stride(0),
        .num_rows = row_state.size(0),
        .workspace = workspace.data_ptr(),
    };
    launch(op, logits, cuda::sample, params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nanoinfer, CUDA, m) { m.impl("sample", TORCH_BOX(&sample)); }

}  // namespace nanoinfer
