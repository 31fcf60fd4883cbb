#pragma once
// What kernels of linear layers on Hopper share: a ring of stages in shared memory, each of 64 numbers along k of rows
// of both matrices, that bulk tensor copies fill and products of warpgroups read.

#include "linear_tile_ptx.cuh"

namespace nanoinfer::cuda {

constexpr int kGroup = 128;              // threads of a warpgroup
constexpr int kTileRows = 64;            // of the left matrix, in a warpgroup's product
constexpr int kChunk = 64;               // numbers along k in a stage
constexpr int kChunkBytes = kChunk * 2;  // of a row: what the swizzle spans
constexpr int kStageAlignment = 1024;    // of a stage: 8 swizzled rows

// A place in the ring, and which time round it is.
struct RingTurn {
    int stage = 0, parity = 0;

    __device__ void advance(int stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

// Describes a matrix of 2-byte numbers, copied in boxes of `box_rows` rows and kChunk columns. False where the driver
// cannot.
template <typename T>
bool describe_matrix(CUtensorMap& map, const void* from, int64_t rows, int64_t dim, int64_t stride, int box_rows) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        return reinterpret_cast<Encode>(found);
    }();
    const auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const cuuint64_t sizes[] = {cuuint64_t(dim), cuuint64_t(rows)}, strides[] = {cuuint64_t(stride) * 2};
    const cuuint32_t box[] = {kChunk, cuuint32_t(box_rows)}, steps[] = {1, 1};
    return encode && encode(&map, type, 2, const_cast<void*>(from), sizes, strides, box, steps,
                            CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace nanoinfer::cuda
