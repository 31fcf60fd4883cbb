#include "activation.cuh"
#include "op.h"

namespace nanoinfer {
namespace {

Tensor silu_and_mul(const Tensor& x) {
    const char* op = "silu_and_mul";
    Want(op, "x", x).floating().shape({-1, -1}).dense(1);
    require(x.size(1) % 2 == 0, op, ": x must have an even number of columns (gates and ups), got ", x.size(1));
    Tensor out = empty({x.size(0), x.size(1) / 2}, x);
    const cuda::SiluAndMul params = {
        .x = x.data_ptr(),
        .out = out.data_ptr(),
        .rows = out.size(0),
        .dim = out.size(1),
        .x_stride = x.stride(0),
    };
    with_type(x, [&](auto number) { launch(op, x, cuda::silu_and_mul<decltype(number)>, params); });
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nanoinfer, CUDA, m) { m.impl("silu_and_mul", TORCH_BOX(&silu_and_mul)); }

}  // namespace nanoinfer
