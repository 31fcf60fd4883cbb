#pragma once
// Linear layer for few rows of x, bound by reading the weights once.
//
// A thread's weight rows are cut into as many equal streams as a tile has columns; a tile takes one row of each, so
// every stream is read from its beginning to its end. That suits the memory's own prefetching: on one core of a Xeon
// whose plain reading loop reaches 16.2 GB/s, the tile reaches 15.5 this way and 13 on neighbouring rows.
//
// Each of a tile's sums is one vector, filled along `dim` in one order and folded at the end. Hence a row's result
// depends neither on the other rows of x nor on how threads split the weights.
//
// The halves are widened to floats. The instruction that multiplies bf16 (vdpbf16ps) does 16 products a cycle on that
// machine, floats reach 32; the conversion hides behind the memory.

#include "kernels.h"
#include "vec.h"

namespace nanoinfer {

struct ThinLinear {
    Dtype dtype;
    const void* x;       // [rows, dim], rows x_stride apart
    const void* weight;  // [out_dim, dim], rows weight_stride apart
    const void* bias;    // [out_dim]; null: none
    float* wide;         // [passes * tile_rows, wide_stride], 64-byte aligned: widen_input fills it with x, then zeros
    float* sums;         // [rows, out_dim]: the result as floats
    void* out;           // [rows, out_dim]: the result in dtype; null where sums is wanted
    int64_t rows, dim, out_dim, x_stride, weight_stride, wide_stride;
    int64_t tile_rows, passes;  // rows are taken in `passes` tiles of tile_rows each
};

constexpr int64_t kThinRows = 16;    // most rows of x: beyond, the library's matrix product is as fast
constexpr int64_t kTileMaxRows = 4;  // with more, rows of x and weights no longer stay in the first cache together
constexpr int64_t kThinStep = 32;    // wide_stride is a multiple: the most numbers that a tile takes at a time

namespace NANOINFER_ISA {

// Sums of a tile. There are 32 registers with AVX-512 and 16 elsewhere; 8 sums hide the latency of fma.
constexpr int kTileSums = kLanes == 16 ? 16 : 12;
constexpr int kTileMaxCols = 8;
constexpr int kTileStep = 2 * kLanes;
static_assert(kThinStep % kTileStep == 0);

constexpr int tile_cols(int rows) { return kTileSums / rows < kTileMaxCols ? kTileSums / rows : kTileMaxCols; }

struct F32x2 {
    F32 first, second;
};

// kTileStep numbers. In which order they come does not matter, as x and the weights are both read by this function.
template <typename T>
NANOINFER_INLINE F32x2 load_two(const T* p) {
    return {load(p), load(p + kLanes)};
}
// The even ones, then the odd ones: that takes one instruction for each vector.
NANOINFER_INLINE F32x2 load_two(const bf16* p) {
    U32 bits;
    memcpy(&bits, p, sizeof(bits));
    return {bit_cast<F32>(bits << 16), bit_cast<F32>(bits & 0xffff0000u)};
}
// The same of `count` numbers and zeros.
template <typename T>
NANOINFER_INLINE F32x2 load_two(const T* p, int count) {
    T padded[kTileStep] = {};
    memcpy(padded, p, count * sizeof(T));
    return load_two(padded);
}

// Rows [begin, end) of p.wide.
template <typename T>
static void widen_input(const ThinLinear& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
        float* wide = p.wide + row * p.wide_stride;
        for (int64_t k = 0; k < p.dim; k += kTileStep) {
            const int64_t count = row < p.rows ? p.dim - k : 0;
            const F32x2 v = count >= kTileStep ? load_two(x + k) : load_two(x + k, int(count));
            store(wide + k, v.first);
            store(wide + k + kLanes, v.second);
        }
    }
}

// Adds the products of kTileStep numbers to a tile's sums: w[n] of column n's weights, x rows wide_stride apart.
template <int kRows, int kCols>
NANOINFER_INLINE void add_products(const float* x, int64_t x_stride, const F32x2 (&w)[kCols],
                                   F32 (&sums)[kRows][kCols]) {
    for (int m = 0; m < kRows; ++m) {
        const F32 first = load(x + m * x_stride), second = load(x + m * x_stride + kLanes);
        for (int n = 0; n < kCols; ++n) sums[m][n] = fma(w[n].first, first, sums[m][n]);
        for (int n = 0; n < kCols; ++n) sums[m][n] = fma(w[n].second, second, sums[m][n]);
    }
}

// Sums of rows [row, row + kRows) and weight rows col, col + apart, ... (kCols of them).
template <int kRows, int kCols, typename T>
NANOINFER_INLINE void tile(const ThinLinear& p, int64_t row, int64_t col, int64_t apart) {
    constexpr int64_t kAhead = 1024 / sizeof(T);  // prefetch distance: of 512 to 4096 bytes the best
    const float* x = p.wide + row * p.wide_stride;
    const T* weight = static_cast<const T*>(p.weight) + col * p.weight_stride;
    const int64_t stream = apart * p.weight_stride;
    F32 sums[kRows][kCols] = {};
    F32x2 w[kCols];
    int64_t k = 0;
    for (; k + kTileStep <= p.dim; k += kTileStep) {
        for (int n = 0; n < kCols; ++n) __builtin_prefetch(weight + n * stream + k + kAhead);
        for (int n = 0; n < kCols; ++n) w[n] = load_two(weight + n * stream + k);
        add_products(x + k, p.wide_stride, w, sums);
    }
    if (k < p.dim) {
        for (int n = 0; n < kCols; ++n) w[n] = load_two(weight + n * stream + k, int(p.dim - k));
        add_products(x + k, p.wide_stride, w, sums);
    }
    for (int m = 0; m < kRows && row + m < p.rows; ++m) {
        for (int n = 0; n < kCols; ++n) p.sums[(row + m) * p.out_dim + col + n * apart] = reduce_add(sums[m][n]);
    }
}

// All rows of x, kRows at a time, with weight rows [begin, end).
template <int kRows, typename T>
static void thin_product(const ThinLinear& p, int64_t begin, int64_t end) {
    constexpr int kCols = tile_cols(kRows);
    const int64_t apart = (end - begin) / kCols;
    for (int64_t col = begin; col < begin + apart; ++col) {
        for (int64_t row = 0; row < p.rows; row += kRows) tile<kRows, kCols, T>(p, row, col, apart);
    }
    for (int64_t col = begin + apart * kCols; col < end; ++col) {
        for (int64_t row = 0; row < p.rows; row += kRows) tile<kRows, 1, T>(p, row, col, 0);
    }
}

template <typename T>
static void finish(const ThinLinear& p, int64_t begin, int64_t end) {
    for (int64_t row = 0; row < p.rows; ++row) {
        float* sums = p.sums + row * p.out_dim + begin;
        for_each_vector(end - begin, [&](int64_t i, auto count) {
            F32 v = load(sums + i, count);
            if (p.bias) v += load(static_cast<const T*>(p.bias) + begin + i, count);
            if (p.out)
                store(static_cast<T*>(p.out) + row * p.out_dim + begin + i, v, count);
            else
                store(sums + i, v, count);
        });
    }
}

// Columns [begin, end) of the result.
template <typename T>
static void thin_linear(const ThinLinear& p, int64_t begin, int64_t end) {
    switch (p.tile_rows) {
        case 1:
            thin_product<1, T>(p, begin, end);
            break;
        case 2:
            thin_product<2, T>(p, begin, end);
            break;
        case 3:
            thin_product<3, T>(p, begin, end);
            break;
        default:
            thin_product<4, T>(p, begin, end);
    }
    finish<T>(p, begin, end);
}

}  // namespace NANOINFER_ISA
}  // namespace nanoinfer
