#pragma once
// SwiGLU: silu(gate) * up.

#include "kernels.h"
#include "vec.h"

namespace nanoinfer {

struct SiluAndMul {
    Dtype dtype;
    const void* x;  // [T, 2 dim], rows x_stride apart, the gates first
    void* out;      // [T, dim]
    int64_t dim, x_stride;
};

namespace NANOINFER_ISA {

template <typename T>
static void silu_and_mul(const SiluAndMul& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* gates = static_cast<const T*>(p.x) + row * p.x_stride;
        const T* ups = gates + p.dim;
        T* out = static_cast<T*>(p.out) + row * p.dim;
        for_each_vector(p.dim, [&](int64_t i, auto count) {
            const F32 gate = load(gates + i, count);
            store(out + i, gate / (1.f + exp(-gate)) * load(ups + i, count), count);
        });
    }
}

}  // namespace NANOINFER_ISA
}  // namespace nanoinfer
