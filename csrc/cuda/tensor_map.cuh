#pragma once
// How bulk tensor copies of Hopper are told what a matrix in memory looks like.

#include <cuda.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <type_traits>

namespace nanoinfer::cuda {

// The driver's function, which is found at run time: linked, it would want a driver to be there. Null without one.
inline auto tensor_map_encoder() {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        return reinterpret_cast<Encode>(found);
    }();
    return encode;
}

// Describes rows of `dim` 2-byte numbers, `stride` numbers apart, copied in boxes of `box_rows` rows and 64 columns,
// swizzled: 128 bytes a row. False where the driver cannot.
template <typename T>
bool describe_matrix(CUtensorMap& map, const void* from, int64_t rows, int64_t dim, int64_t stride, int box_rows) {
    const auto encode = tensor_map_encoder();
    const auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const cuuint64_t sizes[] = {cuuint64_t(dim), cuuint64_t(rows)}, strides[] = {cuuint64_t(stride) * 2};
    const cuuint32_t box[] = {64, cuuint32_t(box_rows)}, steps[] = {1, 1};
    return encode && encode(&map, type, 2, const_cast<void*>(from), sizes, strides, box, steps,
                            CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace nanoinfer::cuda
