#include "norm.cuh"
#include "op.h"

namespace nanoinfer {
namespace {

Tensor normalise(const char* op, const Tensor& x, const Tensor* residual, const Tensor& weight, double eps) {
    Want(op, "x", x).floating().shape({-1, -1}).dense(1);
    require(x.size(1) <= cuda::kMaxNormDim, op, ": x must have at most ", cuda::kMaxNormDim, " columns, got ",
            x.size(1));
    Want(op, "weight", weight).dtype(x.scalar_type()).shape({x.size(1)}).dense(0).same_device(x);
    if (residual) {
        Want(op, "residual", *residual).dtype(x.scalar_type()).shape({x.size(0), x.size(1)}).dense(1).same_device(x);
    }
    Tensor out = empty({x.size(0), x.size(1)}, x);
    const cuda::RmsNorm params = {
        .x = x.data_ptr(),
        .residual = residual ? residual->data_ptr() : nullptr,
        .weight = weight.data_ptr(),
        .out = out.data_ptr(),
        .rows = x.size(0),
        .x_stride = x.stride(0),
        .residual_stride = residual ? residual->stride(0) : 0,
        .dim = int(x.size(1)),
        .eps = float(eps),
    };
    with_type(x, [&](auto number) { launch(op, x, cuda::rms_norm<decltype(number)>, params); });
    return out;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
    return normalise("rms_norm", x, nullptr, weight, eps);
}

Tensor add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
    return normalise("add_rms_norm", x, &residual, weight, eps);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nanoinfer, CUDA, m) {
    m.impl("rms_norm", TORCH_BOX(&rms_norm));
    m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
}

}  // namespace nanoinfer
