#include "logprobs.cuh"
#include "op.h"

namespace nanoinfer {
namespace {

Tensor tell_logprobs(const Tensor& logits, const std::optional<Tensor>& rows, const Tensor& tokens, int64_t vocab_size,
                     int64_t count) {
    const char* op = "tell_logprobs";
    Want(op, "logits", logits).dtype(ScalarType::Float).shape({-1, -1}).dense(1);
    Want(op, "tokens", tokens).dtype(ScalarType::Int).shape({rows ? -1 : logits.size(0)}).dense(0).same_device(logits);
    const int64_t places = tokens.size(0);
    if (rows) Want(op, "rows", *rows).dtype(ScalarType::Int).shape({places}).dense(0).same_device(logits);
    require(vocab_size >= 1 && vocab_size <= logits.size(1), op, ": vocab_size must be in [1, ", logits.size(1),
            "], the columns of logits, got ", vocab_size);
    require(vocab_size <= cuda::kMaxVocab, op, ": vocab_size must be at most ", cuda::kMaxVocab, " on CUDA, got ",
            vocab_size);
    require(count >= 0 && count <= vocab_size && count <= cuda::kMostTold, op, ": count must be in [0, ",
            vocab_size < cuda::kMostTold ? vocab_size : cuda::kMostTold, "], got ", count);
    require(logits.size(0) > 0 || places == 0, op, ": logits must have a row");
    Tensor told = empty({places, 3 + 2 * count}, logits, ScalarType::Int);
    const Tensor workspace = empty({cuda::tell_workspace(places, vocab_size, int(count))}, logits, ScalarType::Byte);
    const cuda::Tell params = {
        .logits = static_cast<const float*>(logits.data_ptr()),
        .rows = rows ? ints(*rows) : nullptr,
        .tokens = ints(tokens),
        .told = ints(told),
        .places = places,
        .vocab = vocab_size,
        .logits_stride = logits.stride(0),
        .num_rows = logits.size(0),
        .count = int(count),
        .workspace = workspace.data_ptr(),
    };
    launch(op, logits, cuda::tell, params);
    return told;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nanoinfer, CUDA, m) { m.impl("tell_logprobs", TORCH_BOX(&tell_logprobs)); }

}  // namespace nanoinfer
