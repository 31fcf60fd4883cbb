#include "norm.h"

#include "op.h"

namespace nanoinfer {
namespace {

Tensor normalise(const char* op, const Tensor& x, const Tensor* residual, const Tensor& weight, double eps) {
    Want(op, "x", x).floating().shape({-1, -1}).dense(1);
    Want(op, "weight", weight).dtype(x.scalar_type()).shape({x.size(1)}).dense(0).same_device(x);
    if (residual) {
        Want(op, "residual", *residual).dtype(x.scalar_type()).shape({x.size(0), x.size(1)}).dense(1).same_device(x);
    }
    Tensor out = empty({x.size(0), x.size(1)}, x);
    const RmsNorm params = {
        .dtype = dtype_of(x),
        .x = x.data_ptr(),
        .residual = residual ? residual->data_ptr() : nullptr,
        .weight = weight.data_ptr(),
        .out = out.data_ptr(),
        .dim = x.size(1),
        .x_stride = x.stride(0),
        .residual_stride = residual ? residual->stride(0) : 0,
        .eps = float(eps),
    };
    run_rows(kernels().rms_norm, params, x.size(0), x.size(1));
    return out;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
    return normalise("rms_norm", x, nullptr, weight, eps);
}

Tensor add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
    return normalise("add_rms_norm", x, &residual, weight, eps);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nanoinfer, CPU, m) {
    m.impl("rms_norm", TORCH_BOX(&rms_norm));
    m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
}

}  // namespace nanoinfer
