#pragma once
// What decode and prefill on tensor cores share: tiles of keys and values in shared memory, and, for prefill, a warp's
// query rows against such a tile, with the softmax kept up to date as tiles go by (online softmax, Milakov and
// Gimelshein, 2018; FlashAttention-2, Dao, 2023).

#include <math.h>

#include "attention_work.cuh"

namespace nanoinfer::cuda {

// A tile in shared memory is rows of D two-byte numbers, in pieces of 16 bytes. A matrix load reads the same piece of 8
// consecutive rows; pieces change places within groups of kTurns in their row, by exclusive or with turn(row), so that
// these 8 lie in 8 different groups of banks. Tiles start at multiples of 128 bytes.
template <int D>
struct Tile {
    static constexpr int kPieces = D / 8;
    // A row is a multiple of 128 bytes, all banks; or (D = 32, 96) two rows are.
    static constexpr int kTurns = D % 64 == 0 ? 8 : 4;

    __device__ static constexpr int turn(int row) { return kTurns == 8 ? row % 8 : row / 2 % 4; }
    __device__ static int offset(int row, int piece) { return row * D * 2 + ((piece ^ turn(row)) << 4); }
    // From the address of a row's piece 0 or 1 to that of the piece `pieces` (even) further.
    __device__ static uint32_t move(uint32_t address, int pieces) {
        return (address ^ (pieces % kTurns << 4)) + pieces / kTurns * kTurns * 16;
    }
};

// f is called with 0 to n - 1 as numbers that the compiler knows: in f(i), i() is a constant.
template <int n>
struct Number {
    __device__ constexpr int operator()() const { return n; }
};

template <int n, int i = 0, typename F>
__device__ void unroll(const F& f) {
    if constexpr (i < n) {
        f(Number<i>());
        unroll<n, i + 1>(f);
    }
}

// Where in a tile the lane's 16 bytes of turn i go, less 512 i, when a warp copies 512 bytes a turn.
template <int D, int i>
__device__ int copy_offset(int lane) {
    constexpr int kPieces = Tile<D>::kPieces;
    // Where 32 lanes copy whole rows, the lane's part and i's part of a row's number have no bit in common.
    if constexpr (32 % kPieces == 0) {
        return Tile<D>::offset(lane / kPieces, lane % kPieces) ^ Tile<D>::turn(32 / kPieces * i) << 4;
    } else {
        return Tile<D>::offset((32 * i + lane) / kPieces, (32 * i + lane) % kPieces) - 512 * i;
    }
}

// A warp starts to copy 16 keys (or values), contiguous in memory, to a tile.
template <int D>
__device__ void copy_keys(uint32_t tile, const char* from) {
    const int lane = threadIdx.x % 32;
    unroll<D / 16>([&](auto i) { copy_async<512 * i()>(tile + copy_offset<D, i()>(lane), from + 16 * lane); });
}

// Once they have arrived, replaces values outside [low, high) by zeros; the tile's first one is that of key `key`.
// Their memory may hold anything, and a weight of zero would not silence a NaN. Each lane replaces what it has copied
// itself, so that this needs no barrier.
template <int D>
__device__ void zero_outside(uint32_t tile, int key, int low, int high) {
    const int lane = threadIdx.x % 32;
    unroll<D / 16>([&](auto i) {
        const int at = key + (32 * i() + lane) / Tile<D>::kPieces;
        if (at < low || at >= high) store_zeros(tile + copy_offset<D, i()>(lane) + 512 * i());
    });
}

// Address of 16 keys of KV head `head`, of which `key` is the first and `entry` the table's entry: `key_row` for blocks
// of at least 16 keys, in 32 bits.
template <int D>
__device__ const char* keys_address(const PagedAttention& p, int entry, int head, int key) {
    const int tile = clamp(entry, 0, p.blocks - 1) * 2 * p.kv_heads + head, bits = p.block_bits - 4;
    const int group = (tile << bits) + (key >> 4 & ((1 << bits) - 1));
    return static_cast<const char*>(p.kv) + int64_t(group) * (16 * D * 2);
}

// From a key to its value, in bytes.
template <int D>
__device__ int64_t value_offset(const PagedAttention& p) {
    return int64_t(p.kv_heads << p.block_bits) * (D * 2);
}

// Sums are rescaled to a row's largest score only when that has grown by this power of two since the last time: until
// then weights, up to 2^8, lose nothing as two-byte numbers, and most tiles save the rescaling.
constexpr float kSlack = 8;

__device__ inline void set_zero(float (&values)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = 0;
}

// The largest score of a row that has seen no key. Not infinite: the distance of two such rows must be a number.
constexpr float kNoScore = -1e30f;

// A column of ones as a fragment of b.
template <typename T>
constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00 : 0x3f803f80;

// Rows of queries of one warp, all of it in registers: kRowTiles times 16 rows against kKeys keys at a time. Lane l
// holds the rows l / 4 and l / 4 + 8 of each 16; four lanes share a row.
template <typename T, int D, int kRowTiles, int kKeys>
struct QueryRows {
    float out[kRowTiles][D / 8][4];         // sums of weight * value, columns 8 j + 2 (l % 4) and the next
    float sums[kRowTiles][4];               // sums of weights, as a column of values that are 1 would give them
    float top[kRowTiles][2];                // the largest score so far, up to the slack; all four lanes have it
    float scores[kRowTiles][kKeys / 8][4];  // or weights: 2^((score - top) * scale)

    __device__ void clear() {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
            for (int j = 0; j < D / 8; ++j) set_zero(out[m][j]);
            set_zero(sums[m]);
            top[m][0] = top[m][1] = kNoScore;
        }
    }

    // scores = queries keys^T. queries(k, a) gives the fragments of numbers 16 k to 16 k + 15 of all row tiles.
    template <typename Queries>
    __device__ void multiply_keys(const Queries& queries, uint32_t keys) {
        const int lane = threadIdx.x % 32;
        // Matrices 0 and 1: keys 0 to 7, the two halves of 16 numbers; 2 and 3: keys 8 to 15.
        keys += Tile<D>::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n) set_zero(scores[m][n]);
        }
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            uint32_t a[kRowTiles][4];
            queries(k, a);
            const uint32_t at = Tile<D>::move(keys, 2 * k);
#pragma unroll
            for (int n = 0; n < kKeys / 16; ++n) {
                uint32_t b[4];
                load_matrices(b, at + n * 16 * D * 2);
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m) {
                    multiply_add<T>(scores[m][2 * n], a[m], b[0], b[1]);
                    multiply_add<T>(scores[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }
    }

    // Removes the scores of what a row does not see; the tile's first key is `key`, positions[m][i] are the rows'.
    __device__ void hide(const int (&positions)[kRowTiles][2], int key, int window) {
        const int column = key + threadIdx.x % 4 * 2;
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int last = positions[m][i / 2], before = window > 0 ? last - window : -1;
#pragma unroll
                for (int n = 0; n < kKeys / 8; ++n) {
                    const int at = column + 8 * n + i % 2;
                    if (at > last || at <= before) scores[m][n][i] = -INFINITY;
                }
            }
        }
    }

    // The largest score of row h of row tile m in this tile of keys.
    __device__ float highest_score(int m, int h) const {
        float highest = fmaxf(scores[m][0][2 * h], scores[m][0][2 * h + 1]);
#pragma unroll
        for (int n = 1; n < kKeys / 8; ++n) {
            highest = fmaxf(highest, fmaxf(scores[m][n][2 * h], scores[m][n][2 * h + 1]));
        }
        highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 1));
        return fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 2));
    }

    // scores -> weights; where a row's largest score has grown by more than the slack, what was summed up is rescaled.
    __device__ void weigh(float scale_log2, float slack) {
        float highest[kRowTiles][2];
        bool grown = false;
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                highest[m][h] = highest_score(m, h);
                grown |= highest[m][h] > top[m][h] + slack;
            }
        }
        if (__any_sync(kAllLanes, grown)) rescale(highest, slack, scale_log2);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float offset = top[m][i / 2] * scale_log2;
#pragma unroll
                for (int n = 0; n < kKeys / 8; ++n) {
                    scores[m][n][i] = power_of_two(scores[m][n][i] * scale_log2 - offset);
                }
            }
        }
    }

    // A row that has not grown is multiplied by 1: its result does not depend on the other rows'.
    __device__ void rescale(const float (&highest)[kRowTiles][2], float slack, float scale_log2) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float new_top = highest[m][h] > top[m][h] + slack ? highest[m][h] : top[m][h];
                const float shrink = power_of_two((top[m][h] - new_top) * scale_log2);
                top[m][h] = new_top;
#pragma unroll
                for (int i = 2 * h; i < 2 * h + 2; ++i) {
                    sums[m][i] *= shrink;
#pragma unroll
                    for (int j = 0; j < D / 8; ++j) out[m][j][i] *= shrink;
                }
            }
        }
    }

    // out += weights values, sums += weights: rounded weights in both, so that rounding changes how much each key
    // counts but not that they add up to 1. Two neighbouring score tiles, rounded, are just the fragment of a 16 x 16
    // matrix.
    __device__ void add_values(uint32_t values) {
        const int lane = threadIdx.x % 32;
        // Matrices 0 and 1: keys 0 to 7 and 8 to 15 of 8 columns; 2 and 3: of the next 8.
        values += Tile<D>::offset(lane % 16, lane / 16);
#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k) {
            uint32_t a[kRowTiles][4];
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* pair = &scores[m][2 * k + i / 2][i % 2 * 2];
                    a[m][i] = pack<T>(pair[0], pair[1]);
                }
                multiply_add<T>(sums[m], a[m], kOnes<T>, kOnes<T>);
            }
#pragma unroll
            for (int j = 0; j < D / 16; ++j) {
                uint32_t b[4];
                load_transposed(b, Tile<D>::move(values, 2 * j) + k * 16 * D * 2);
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m) {
                    multiply_add<T>(out[m][2 * j], a[m], b[0], b[1]);
                    multiply_add<T>(out[m][2 * j + 1], a[m], b[2], b[3]);
                }
            }
        }
    }
};

}  // namespace nanoinfer::cuda
