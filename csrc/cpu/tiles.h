#pragma once
// The two small matrix products of attention, q k^T and weights v, with the packing of their operands.
//
// Fma<T> packs floats and multiplies with fused multiply-adds. Amx packs bf16 and multiplies in the tile registers of
// Intel's AMX: 512 products a cycle against 32, which leaves the softmax to take most of the time. In both, the sum of
// an element of the product runs over the depth in one order, whatever the other rows and columns are.

#include "kernels.h"
#include "vec.h"

namespace nanoinfer {

constexpr int64_t kKeyTile = 64;   // keys of one tile: their scores of one query are four vectors of AVX-512
constexpr int64_t kRowsStep = 16;  // memory for rows of a product comes in multiples of this: the rows of an AMX tile
constexpr int64_t kColsStep = 32;  // its columns, and the depth of the first product, are a multiple of this

namespace NANOINFER_ISA {

// Part of a row-major matrix in memory: rows are `stride` numbers apart.
template <typename T>
struct Matrix {
    T* at;
    int64_t stride;
};

template <typename T>
struct Fma {
    using Packed = float;
    // Rows of a register block, which is two vectors wide: 24 sums and 3 operands with 32 registers, 12 and 3 with 16.
    static constexpr int kBlockRows = kLanes == 16 ? 12 : 6;
    static constexpr int kBlockCols = 2 * kLanes;
    // So many products are summed up before they join c, since long sums of floats lose digits: with 16 the error is
    // 0.8 times that of plain torch, with 64 it is 1.4 times and an eighth of the time is saved. Halves round more than
    // that.
    static constexpr int kBlockDepth = sizeof(T) == sizeof(float) ? 16 : 64;
    static_assert(kColsStep % kBlockCols == 0);

    static void start() {}
    static void stop() {}

    static void pack_query(const T* q, int64_t dim, float* out) {
        for (int64_t d = 0; d < dim; d += kLanes) store(out + d, load(q + d));
    }

    // Keys [count][dim], each where keys[i] points, to columns: out [dim][kKeyTile].
    static void pack_keys(const T* const* keys, int64_t count, int64_t dim, float* out) {
        for (int64_t i = 0; i < count; i += kLanes) {
            for (int64_t d = 0; d < dim; d += kLanes) {
                F32 block[kLanes];
                for (int j = 0; j < kLanes; ++j) block[j] = load(keys[i + j] + d);
                transpose(block);
                for (int j = 0; j < kLanes; ++j) store(out + (d + j) * kKeyTile + i, block[j]);
            }
        }
    }

    // Values to rows: out [count][dim].
    static void pack_values(const T* const* values, int64_t count, int64_t dim, float* out) {
        for (int64_t i = 0; i < count; ++i) pack_query(values[i], dim, out + i * dim);
    }

    static void pack_weights(const F32 (&weights)[kKeyTile / kLanes], float* out) {
        for (int64_t i = 0; i < kKeyTile / kLanes; ++i) store(out + i * kLanes, weights[i]);
    }

    template <int kRows>
    NANOINFER_INLINE void block(int64_t depth, Matrix<const float> a, Matrix<const float> b, Matrix<float> c,
                                bool add) {
        F32 sums[kRows][2] = {};
        for (int64_t k = 0; k < depth; ++k) {
            const F32 left = load(b.at + k * b.stride), right = load(b.at + k * b.stride + kLanes);
            for (int i = 0; i < kRows; ++i) {
                const F32 factor = broadcast(a.at[i * a.stride + k]);
                sums[i][0] = fma(factor, left, sums[i][0]);
                sums[i][1] = fma(factor, right, sums[i][1]);
            }
        }
        for (int i = 0; i < kRows; ++i) {
            float* out = c.at + i * c.stride;
            store(out, add ? load(out) + sums[i][0] : sums[i][0]);
            store(out + kLanes, add ? load(out + kLanes) + sums[i][1] : sums[i][1]);
        }
    }

    // As many rows as the caller says, up to kRows, which the compiler must know.
    template <int kRows>
    static void blocks(int64_t rows, int64_t depth, int64_t cols, Matrix<const float> a, Matrix<const float> b,
                       Matrix<float> c, bool add) {
        if constexpr (kRows > 1) {
            if (rows < kRows) return blocks<kRows - 1>(rows, depth, cols, a, b, c, add);
        }
        for (int64_t n = 0; n < cols; n += kBlockCols) {
            for (int64_t k = 0; k < depth; k += kBlockDepth) {
                block<kRows>(depth - k < kBlockDepth ? depth - k : kBlockDepth, {a.at + k, a.stride},
                             {b.at + k * b.stride + n, b.stride}, {c.at + n, c.stride}, add || k > 0);
            }
        }
    }

    // c = a b, or c += a b. a [rows][depth], b [depth][cols], c [rows][cols].
    static void multiply(int64_t rows, int64_t depth, int64_t cols, Matrix<const float> a, Matrix<const float> b,
                         Matrix<float> c, bool add) {
        // Rows in equal parts: 7 are 4 + 3 where at most 6 fit, as a block of one row would wait for its sums.
        for (int64_t parts = (rows + kBlockRows - 1) / kBlockRows; parts > 0; --parts) {
            const int64_t part = (rows + parts - 1) / parts;
            blocks<kBlockRows>(part, depth, cols, a, b, c, add);
            a.at += part * a.stride;
            c.at += part * c.stride;
            rows -= part;
        }
    }
};

template <typename T>
struct Tiles : Fma<T> {};

#if defined(__AMX_BF16__)
// An AMX tile is 16 rows of 64 bytes. tdpbf16ps adds the product of a tile of 16 rows by 32 bf16 and one of 16 pairs of
// rows by 16 columns, where the two numbers of a pair lie side by side, to a tile of 16 by 16 floats.
template <>
struct Tiles<bf16> {
    using Packed = bf16;
    static constexpr int64_t kSide = 16, kTileDepth = 32;

    static void start() {
        struct alignas(64) Config {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16};
        };
        const Config config;
        _tile_loadconfig(&config);
    }
    static void stop() { _tile_release(); }

    static void pack_query(const bf16* q, int64_t dim, bf16* out) { memcpy(out, q, dim * sizeof(bf16)); }

    // out: [dim / 2] rows of kKeyTile pairs. A pair is moved as one float, whose value does not matter.
    static void pack_keys(const bf16* const* keys, int64_t count, int64_t dim, bf16* out) {
        for (int64_t i = 0; i < count; i += kSide) {
            for (int64_t d = 0; d < dim; d += kTileDepth) {
                F32 block[kSide];
                for (int j = 0; j < kSide; ++j) memcpy(&block[j], keys[i + j] + d, sizeof(F32));
                transpose(block);
                for (int j = 0; j < kSide; ++j)
                    memcpy(out + (d / 2 + j) * 2 * kKeyTile + 2 * i, &block[j], sizeof(F32));
            }
        }
    }

    // out: [count / 2] rows of dim pairs.
    static void pack_values(const bf16* const* values, int64_t count, int64_t dim, bf16* out) {
        // The instructions that pair numbers do it within quarters of a vector: order those beforehand.
        const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
        for (int64_t i = 0; i < count; i += 2) {
            for (int64_t d = 0; d < dim; d += kTileDepth) {
                const __m512i even = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(values[i] + d));
                const __m512i odd = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(values[i + 1] + d));
                _mm512_storeu_si512(out + i * dim + 2 * d, _mm512_unpacklo_epi16(even, odd));
                _mm512_storeu_si512(out + i * dim + 2 * d + kTileDepth, _mm512_unpackhi_epi16(even, odd));
            }
        }
    }

    static void pack_weights(const F32 (&weights)[kKeyTile / kLanes], bf16* out) {
        for (int64_t i = 0; i < kKeyTile / kLanes; i += 2) {
            const __m512bh pair = _mm512_cvtne2ps_pbh(weights[i + 1], weights[i]);
            memcpy(out + i * kLanes, &pair, sizeof(pair));
        }
    }

    // 16 rows and kWide ? 64 : 32 columns. Tile registers: 0 to 3 sums, 4 a, 5 and 6 b. The intrinsics are statements
    // that want literals.
    template <bool kWide>
    NANOINFER_INLINE void block(int64_t depth, Matrix<const bf16> a, Matrix<const bf16> b, Matrix<float> c, bool add) {
        const int64_t a_bytes = a.stride * 2, b_bytes = b.stride * 4, c_bytes = c.stride * 4;
        load_sums<kWide>(c.at, c_bytes, add);
        for (int64_t k = 0; k < depth; k += kTileDepth) {
            const bf16* pairs = b.at + k * b.stride;
            _tile_loadd(4, a.at + k, a_bytes);
            _tile_loadd(5, pairs, b_bytes);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, pairs + 32, b_bytes);
            _tile_dpbf16ps(1, 4, 6);
            if constexpr (kWide) {
                _tile_loadd(5, pairs + 64, b_bytes);
                _tile_dpbf16ps(2, 4, 5);
                _tile_loadd(6, pairs + 96, b_bytes);
                _tile_dpbf16ps(3, 4, 6);
            }
        }
        _tile_stored(0, c.at, c_bytes);
        _tile_stored(1, c.at + 16, c_bytes);
        if constexpr (kWide) {
            _tile_stored(2, c.at + 32, c_bytes);
            _tile_stored(3, c.at + 48, c_bytes);
        }
    }

    template <bool kWide>
    NANOINFER_INLINE void load_sums(const float* c, int64_t c_bytes, bool add) {
        if (add) {
            _tile_loadd(0, c, c_bytes);
            _tile_loadd(1, c + 16, c_bytes);
            if constexpr (kWide) {
                _tile_loadd(2, c + 32, c_bytes);
                _tile_loadd(3, c + 48, c_bytes);
            }
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
    }

    // As Fma's, with b [depth / 2] rows of cols pairs. Rows up to the next multiple of 16 are read and written too.
    static void multiply(int64_t rows, int64_t depth, int64_t cols, Matrix<const bf16> a, Matrix<const bf16> b,
                         Matrix<float> c, bool add) {
        for (int64_t m = 0; m < rows; m += kSide) {
            const Matrix<const bf16> a_rows = {a.at + m * a.stride, a.stride};
            int64_t n = 0;
            for (; n + 4 * kSide <= cols; n += 4 * kSide) {
                block<true>(depth, a_rows, {b.at + 2 * n, b.stride}, {c.at + m * c.stride + n, c.stride}, add);
            }
            for (; n < cols; n += 2 * kSide) {
                block<false>(depth, a_rows, {b.at + 2 * n, b.stride}, {c.at + m * c.stride + n, c.stride}, add);
            }
        }
    }
};
#endif

}  // namespace NANOINFER_ISA
}  // namespace nanoinfer
