#pragma once
// What every CPU op's file needs: checks, the kernels' table, outputs, threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../check.h"
#include "kernels.h"

namespace nanoinfer {

inline Dtype dtype_of(const Tensor& t) {
    const ScalarType type = t.scalar_type();
    return type == ScalarType::Float ? Dtype::f32 : type == ScalarType::BFloat16 ? Dtype::bf16 : Dtype::f16;
}

// A contiguous tensor of uninitialised memory with the dtype and device of `like`.
inline Tensor empty(std::initializer_list<int64_t> sizes, const Tensor& like) {
    return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()));
}

inline int32_t* ints(const Tensor& t) { return static_cast<int32_t*>(t.data_ptr()); }

// All of values[0..n) lie in [low, high).
inline void check_range(const char* op, const char* name, const int32_t* values, int64_t n, int64_t low, int64_t high) {
    for (int64_t i = 0; i < n; ++i) {
        if (values[i] < low || values[i] >= high) {
            require(false, op, ": ", name, "[", i, "] must be in [", low, ", ", high, "), got ", values[i]);
        }
    }
}

// kernel(params, begin, end) on ranges of [0, rows), split over torch's threads once there are 16k numbers for each of
// them: starting a thread costs a few microseconds, in which one does about that much.
template <typename Params>
void run_rows(void (*kernel)(const Params&, int64_t, int64_t), const Params& params, int64_t rows, int64_t row_size) {
    const int64_t grain = 1 + 16384 / (row_size + 1);
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

}  // namespace nanoinfer
