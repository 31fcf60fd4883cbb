#pragma once
// Root mean square normalisation, with or without adding to the residual stream first.

#include "kernels.h"
#include "vec.h"

namespace nanoinfer {

struct RmsNorm {
    Dtype dtype;
    const void* x;       // [T, dim], rows x_stride apart
    void* residual;      // [T, dim], rows residual_stride apart; null: none
    const void* weight;  // [dim]
    void* out;           // [T, dim]
    int64_t dim, x_stride, residual_stride;
    float eps;
};

namespace NANOINFER_ISA {

// Four sums side by side, because an addition takes four cycles; then one.
template <typename T>
static float sum_of_squares(const T* x, int64_t n) {
    F32 sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
        for (int j = 0; j < 4; ++j) {
            const F32 v = load(x + i + j * kLanes);
            sums[j] = fma(v, v, sums[j]);
        }
    }
    for_each_vector(n - i, [&](int64_t j, auto count) {
        const F32 v = load(x + i + j, count);
        sums[0] = fma(v, v, sums[0]);
    });
    return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename T>
static void rms_norm(const RmsNorm& p, int64_t begin, int64_t end) {
    const T* weight = static_cast<const T*>(p.weight);
    for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
        T* out = static_cast<T*>(p.out) + row * p.dim;
        if (p.residual) {
            T* sum = static_cast<T*>(p.residual) + row * p.residual_stride;
            for_each_vector(p.dim, [&](int64_t i, auto count) {
                store(sum + i, load(sum + i, count) + load(x + i, count), count);
            });
            x = sum;  // as stored, so that the norm is that of what the next layer reads
        }
        const F32 scale = broadcast(1.f / sqrtf(sum_of_squares(x, p.dim) / float(p.dim) + p.eps));
        for_each_vector(p.dim, [&](int64_t i, auto count) {
            store(out + i, load(x + i, count) * scale * load(weight + i, count), count);
        });
    }
}

}  // namespace NANOINFER_ISA
}  // namespace nanoinfer
