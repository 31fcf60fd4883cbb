#include "linear.h"

#include "op.h"

namespace nanoinfer {
namespace {

void check(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    Want("thin_linear", "x", x).floating().shape({-1, -1}).dense(1);
    require(x.size(0) <= kThinRows, "thin_linear: x must have at most ", kThinRows, " rows, got ", x.size(0));
    Want("thin_linear", "weight", weight).dtype(x.scalar_type()).shape({-1, x.size(1)}).dense(1).same_device(x);
    if (bias) Want("thin_linear", "bias", *bias).dtype(x.scalar_type()).shape({weight.size(0)}).dense(0).same_device(x);
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

Tensor empty_floats(std::initializer_list<int64_t> sizes, const Tensor& like) {
    return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, ScalarType::Float);
}

Tensor thin_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool float_out) {
    check(x, weight, bias);
    const int64_t rows = x.size(0), dim = x.size(1), out_dim = weight.size(0);
    const int64_t passes = round_up(rows, kTileMaxRows) / kTileMaxRows;
    const int64_t tile_rows = passes ? round_up(rows, passes) / passes : 0;
    const bool narrow = !float_out && x.scalar_type() != ScalarType::Float;
    const int64_t wide_stride = round_up(dim, kThinStep);
    Tensor sums = empty_floats({rows, out_dim}, x), wide = empty_floats({passes * tile_rows, wide_stride}, x);
    Tensor out = narrow ? empty({rows, out_dim}, x) : sums;
    const ThinLinear params = {
        .dtype = dtype_of(x),
        .x = x.data_ptr(),
        .weight = weight.data_ptr(),
        .bias = bias ? bias->data_ptr() : nullptr,
        .wide = static_cast<float*>(wide.data_ptr()),
        .sums = static_cast<float*>(sums.data_ptr()),
        .out = narrow ? out.data_ptr() : nullptr,
        .rows = rows,
        .dim = dim,
        .out_dim = out_dim,
        .x_stride = x.stride(0),
        .weight_stride = weight.stride(0),
        .wide_stride = wide_stride,
        .tile_rows = tile_rows,
        .passes = passes,
    };
    kernels().widen_input(params, 0, passes * tile_rows);
    if (rows > 0) run_rows(kernels().thin_linear, params, out_dim, dim);
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nanoinfer, CPU, m) { m.impl("thin_linear", TORCH_BOX(&thin_linear)); }

}  // namespace nanoinfer
