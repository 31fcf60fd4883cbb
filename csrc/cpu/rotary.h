#pragma once
// Rotary positions and the store to the paged KV cache, one token at a time: together or each alone.

#include "kernels.h"
#include "vec.h"

namespace nanoinfer {

struct RotaryStoreKv {
    Dtype dtype;
    void* q;        // [T, q_heads, head_dim], rotated in place, tokens q_stride apart; null: none
    const void* k;  // [T, kv_heads, head_dim], rotated on its way to kv, tokens k_stride apart; null: none
    const void* v;  // [T, kv_heads, head_dim], tokens v_stride apart
    void* kv;       // [blocks, 2, kv_heads, block_size, head_dim]
    int64_t q_heads, kv_heads, head_dim, block_size;
    int64_t q_stride, k_stride, v_stride;
    const int32_t* slots;      // [T], -1: not stored
    const int32_t* positions;  // [T]
    const float* cos_sin;      // [positions, rotary_dim], cosines first; null: k is stored as it is
    int64_t rotary_dim;        // the first numbers of a head that are rotated
    bool interleaved;          // pairs (2 i, 2 i + 1), not (i, i + rotary_dim / 2)
};

namespace NANOINFER_ISA {

NANOINFER_INLINE int lanes(Full) { return kLanes; }
NANOINFER_INLINE int lanes(Part part) { return part.count; }

template <typename T>
NANOINFER_INLINE void copy(const T* in, T* out, int64_t n) {
    memcpy(out, in, n * sizeof(T));
}

// out may be in: both numbers of a pair are read before either is written.
template <typename T>
NANOINFER_INLINE void rotate_halves(const T* in, T* out, const float* cos_sin, int64_t half) {
    for_each_vector(half, [&](int64_t i, auto count) {
        const F32 a = load(in + i, count), b = load(in + half + i, count);
        const F32 cos = load(cos_sin + i, count), sin = load(cos_sin + half + i, count);
        store(out + i, fma(a, cos, -(b * sin)), count);
        store(out + half + i, fma(b, cos, a * sin), count);
    });
}

template <typename T>
NANOINFER_INLINE void rotate_interleaved(const T* in, T* out, const float* cos_sin, int64_t half) {
    for_each_vector(2 * half, [&](int64_t i, auto count) {
        const F32 x = load(in + i, count);
        F32 other = {}, cos = {}, sin = {};  // of each number: its partner, its pair's angle
        for (int lane = 0; lane < lanes(count); ++lane) {
            const float* angle = cos_sin + (i + lane) / 2;
            other[lane] = x[lane ^ 1];
            cos[lane] = angle[0];
            sin[lane] = lane % 2 ? angle[half] : -angle[half];
        }
        store(out + i, fma(x, cos, other * sin), count);
    });
}

template <typename T>
NANOINFER_INLINE void rotate(const RotaryStoreKv& p, const T* in, T* out, const float* cos_sin) {
    if (p.interleaved) {
        rotate_interleaved(in, out, cos_sin, p.rotary_dim / 2);
    } else {
        rotate_halves(in, out, cos_sin, p.rotary_dim / 2);
    }
    if (out != in) copy(in + p.rotary_dim, out + p.rotary_dim, p.head_dim - p.rotary_dim);
}

template <typename T>
NANOINFER_INLINE void store_token(const RotaryStoreKv& p, int64_t token, const float* angles) {
    const int64_t block = p.slots[token] / p.block_size, offset = p.slots[token] % p.block_size;
    const int64_t tile = p.block_size * p.head_dim;  // one head's numbers of a block
    T* keys = static_cast<T*>(p.kv) + block * 2 * p.kv_heads * tile + offset * p.head_dim;
    T* values = keys + p.kv_heads * tile;
    const T* k = static_cast<const T*>(p.k) + token * p.k_stride;
    const T* v = static_cast<const T*>(p.v) + token * p.v_stride;
    for (int64_t head = 0; head < p.kv_heads; ++head) {
        const int64_t from = head * p.head_dim, to = head * tile;
        if (angles) {
            rotate(p, k + from, keys + to, angles);
        } else {
            copy(k + from, keys + to, p.head_dim);
        }
        copy(v + from, values + to, p.head_dim);
    }
}

template <typename T>
static void rotary_store_kv(const RotaryStoreKv& p, int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
        const float* angles = p.cos_sin ? p.cos_sin + p.positions[token] * p.rotary_dim : nullptr;
        if (p.q) {
            T* q = static_cast<T*>(p.q) + token * p.q_stride;
            for (int64_t head = 0; head < p.q_heads; ++head)
                rotate(p, q + head * p.head_dim, q + head * p.head_dim, angles);
        }
        if (p.k && p.slots[token] >= 0) store_token<T>(p, token, angles);
    }
}

}  // namespace NANOINFER_ISA
}  // namespace nanoinfer
