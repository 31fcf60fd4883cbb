#include "activation.h"

#include "op.h"

namespace nanoinfer {
namespace {

Tensor silu_and_mul(const Tensor& x) {
    const char* op = "silu_and_mul";
    Want(op, "x", x).floating().shape({-1, -1}).dense(1);
    require(x.size(1) % 2 == 0, op, ": x must have an even number of columns (gates and ups), got ", x.size(1));
    Tensor out = empty({x.size(0), x.size(1) / 2}, x);
    const SiluAndMul params = {
        .dtype = dtype_of(x),
        .x = x.data_ptr(),
        .out = out.data_ptr(),
        .dim = out.size(1),
        .x_stride = x.stride(0),
    };
    run_rows(kernels().silu_and_mul, params, out.size(0), out.size(1));
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nanoinfer, CPU, m) { m.impl("silu_and_mul", TORCH_BOX(&silu_and_mul)); }

}  // namespace nanoinfer
