#pragma once
// What kernels of linear layers on Hopper share: a ring of stages in shared memory, each of 64 numbers along k of rows
// of both matrices, that bulk tensor copies fill and products of warpgroups read.

#include "linear_tile_ptx.cuh"
#include "tensor_map.cuh"

namespace nanoinfer::cuda {

constexpr int kGroup = 128;              // threads of a warpgroup
constexpr int kTileRows = 64;            // of the left matrix, in a warpgroup's product
constexpr int kChunk = 64;               // numbers along k in a stage, as in a box of describe_matrix()
constexpr int kChunkBytes = kChunk * 2;  // of a row: what the swizzle spans
constexpr int kStageAlignment = 1024;    // of a stage: 8 swizzled rows

// A place in the ring, and which time round it is.
struct RingTurn {
    int stage = 0, parity = 0;

    __device__ void advance(int stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

}  // namespace nanoinfer::cuda
