#include "linear.cuh"
#include "op.h"

namespace nanoinfer {
namespace {

void check(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    Want("thin_linear", "x", x).floating().shape({-1, -1}).dense(1);
    require(x.size(0) <= cuda::kThinRows, "thin_linear: x must have at most ", cuda::kThinRows, " rows, got ",
            x.size(0));
    Want("thin_linear", "weight", weight).dtype(x.scalar_type()).shape({-1, x.size(1)}).dense(1).same_device(x);
    if (bias) Want("thin_linear", "bias", *bias).dtype(x.scalar_type()).shape({weight.size(0)}).dense(0).same_device(x);
}

Tensor thin_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool float_out) {
    check(x, weight, bias);
    Tensor out = empty({x.size(0), weight.size(0)}, x, float_out ? ScalarType::Float : x.scalar_type());
    const cuda::ThinLinear params = {
        .x = x.data_ptr(),
        .weight = weight.data_ptr(),
        .bias = bias ? bias->data_ptr() : nullptr,
        .out = out.data_ptr(),
        .rows = int(x.size(0)),
        .dim = x.size(1),
        .out_dim = weight.size(0),
        .x_stride = x.stride(0),
        .weight_stride = weight.stride(0),
        .float_out = float_out,
    };
    with_type(x, [&](auto number) { launch("thin_linear", x, cuda::thin_linear<decltype(number)>, params); });
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nanoinfer, CUDA, m) { m.impl("thin_linear", TORCH_BOX(&thin_linear)); }

}  // namespace nanoinfer
