#include "sampler.h"

#include <memory>

#include "op.h"

namespace nanoinfer {
namespace {

void check_filters(const char* op, const Sample& p, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
        const int32_t* state = p.row_state + int64_t(p.sample_rows[i]) * kRowStateWidth;
        const float temperature = plain::bit_cast<float>(state[kTemperature]);
        const float top_p = plain::bit_cast<float>(state[kTopP]), min_p = plain::bit_cast<float>(state[kMinP]);
        const bool sound = temperature >= 0 && top_p > 0 && top_p <= 1 && min_p >= 0 && min_p <= 1;
        require(sound || p.sample_rows[i] == p.num_rows - 1, op, ": row ", p.sample_rows[i],
                " of row_state must have temperature >= 0, 0 < top_p <= 1 and 0 <= min_p <= 1, got ", temperature, ", ",
                top_p, " and ", min_p);
    }
}

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
    check_range(op, "sample_rows", ints(sample_rows), rows, 0, row_state.size(0));
    Sample params = {
        .logits = static_cast<const float*>(logits.data_ptr()),
        .sample_rows = ints(sample_rows),
        .row_state = ints(row_state),
        .tokens = ints(tokens),
        .vocab = vocab_size,
        .logits_stride = logits.stride(0),
        .num_rows = row_state.size(0),
        .scratch = nullptr,
    };
    check_filters(op, params, rows);
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
        // Not filled with zeros: of this, a row that is filtered touches little.
        const std::unique_ptr<double[]> scratch(new double[sample_scratch(vocab_size)]);
        Sample own = params;
        own.scratch = scratch.get();
        kernels().sample(own, begin, end);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nanoinfer, CPU, m) { m.impl("sample", TORCH_BOX(&sample)); }

}  // namespace nanoinfer
