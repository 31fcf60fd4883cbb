#pragma once
// Rotary positions and the store to the paged KV cache: together or each alone. One block a token; its threads share
// the work of all heads, kVec pairs or 2 kVec numbers at a time, so the angles are read from memory once.

#include "launch.cuh"
#include "vec.cuh"

namespace nanoinfer::cuda {

struct RotaryStoreKv {
    void* q;        // [tokens, q_heads, head_dim], rotated in place, tokens q_stride apart; null: none
    const void* k;  // [tokens, kv_heads, head_dim], rotated on its way to kv, tokens k_stride apart; null: none
    const void* v;  // [tokens, kv_heads, head_dim], tokens v_stride apart
    void* kv;       // [num_slots / block_size, 2, kv_heads, block_size, head_dim]
    int64_t tokens;
    int q_heads, kv_heads, head_dim, block_size;
    int64_t q_stride, k_stride, v_stride, num_slots;
    const int32_t* slots;      // [tokens]; outside [0, num_slots): not stored
    const int32_t* positions;  // [tokens]; outside [0, num_positions): the token is left out altogether
    const float* cos_sin;      // [num_positions, rotary_dim], cosines first; null: k is stored as it is
    int64_t num_positions;
    int rotary_dim;    // the first numbers of a head that are rotated
    bool interleaved;  // pairs (2 i, 2 i + 1), not (i, i + rotary_dim / 2)
};

constexpr int kRotaryMaxThreads = 256;  // more work than this is done in turns; 1.5B's 14 heads of 128 take 176 threads

// Angles i to i + kVec of a row of cos_sin.
template <int kVec>
__device__ inline void load_angles(const float* p, float (&out)[kVec]) {
    constexpr int kStep = kVec < kFullVec<float> ? kVec : kFullVec<float>;
    for (int j = 0; j < kVec; j += kStep) {
        const Vec<float, kStep> part = load<float, kStep>(p + j);
        for (int n = 0; n < kStep; ++n) out[j + n] = part.at[n];
    }
}

// Turns a pair by an angle.
__device__ inline void turn(float& first, float& second, float cos, float sin) {
    const float a = first, b = second;
    first = fmaf(a, cos, -(b * sin));
    second = fmaf(b, cos, a * sin);
}

// Where a slot has the numbers of head `head`'s key; of its value where `part` is 1, not 0.
template <typename T>
__device__ inline T* slot_address(const RotaryStoreKv& p, int slot, int part, int head) {
    const int64_t tile = (int64_t(slot / p.block_size) * 2 + part) * p.kv_heads + head;  // a head's numbers of a block
    return static_cast<T*>(p.kv) + (tile * p.block_size + slot % p.block_size) * p.head_dim;
}

// kVec pairs of a head, those of the angles i to i + kVec. `out` may be `in`: all is read before anything is written.
template <typename T, int kVec, bool kInterleaved>
__device__ inline void rotate(const T* in, T* out, const float* cos_sin, int half, int i) {
    // Where the pairs' numbers lie: in two vectors side by side, or in one of each half.
    const int at = kInterleaved ? 2 * i : i, apart = kInterleaved ? kVec : half;
    Vec<T, kVec> x[2] = {load<T, kVec>(in + at), load<T, kVec>(in + at + apart)};
    float cos[kVec], sin[kVec];
    load_angles<kVec>(cos_sin + i, cos);
    load_angles<kVec>(cos_sin + half + i, sin);
    for (int j = 0; j < kVec; ++j) {
        T& first = kInterleaved ? x[2 * j / kVec].at[2 * j % kVec] : x[0].at[j];
        T& second = kInterleaved ? x[(2 * j + 1) / kVec].at[(2 * j + 1) % kVec] : x[1].at[j];
        float a = to_float(first), b = to_float(second);
        turn(a, b, cos[j], sin[j]);
        first = from_float<T>(a);
        second = from_float<T>(b);
    }
    store(out + at, x[0]);
    store(out + at + apart, x[1]);
}

// Token: blockIdx.x. kVec: numbers in a vector; kInterleaved: which numbers make a pair.
template <typename T, int kVec, bool kInterleaved>
__global__ void __launch_bounds__(kRotaryMaxThreads) rotary_store_kv_kernel(const __grid_constant__ RotaryStoreKv p) {
    let_next_kernel_start();
    wait_for_earlier_kernels();
    const int64_t token = blockIdx.x;
    const int position = p.cos_sin ? p.positions[token] : 0, slot = p.k ? p.slots[token] : -1;
    if (p.cos_sin && (position < 0 || position >= p.num_positions)) return;
    const float* angles = p.cos_sin ? p.cos_sin + int64_t(position) * p.rotary_dim : nullptr;
    const bool stored = slot >= 0 && slot < p.num_slots;
    T* q = static_cast<T*>(p.q) + token * p.q_stride;
    const T* k = static_cast<const T*>(p.k) + token * p.k_stride;
    const T* v = static_cast<const T*>(p.v) + token * p.v_stride;
    const int64_t tile = int64_t(p.block_size) * p.head_dim;  // from a head of a slot to the next
    T* keys = stored ? slot_address<T>(p, slot, 0, 0) : nullptr;
    T* values = stored ? keys + p.kv_heads * tile : nullptr;
    // A head's vectors: pairs that are rotated, then numbers that are copied.
    const int half = p.rotary_dim / 2, pairs = half / kVec, rest = (p.head_dim - p.rotary_dim) / kVec;
    const int whole = p.head_dim / kVec, all = p.q_heads * pairs + (stored ? p.kv_heads * (pairs + rest + whole) : 0);
    for (int i = threadIdx.x; i < all; i += blockDim.x) {
        int n = i;
        if (n < p.q_heads * pairs) {
            T* head = q + n / pairs * p.head_dim;
            rotate<T, kVec, kInterleaved>(head, head, angles, half, n % pairs * kVec);
            continue;
        }
        n -= p.q_heads * pairs;
        if (n < p.kv_heads * pairs) {
            const int head = n / pairs;
            rotate<T, kVec, kInterleaved>(k + head * p.head_dim, keys + head * tile, angles, half, n % pairs * kVec);
            continue;
        }
        n -= p.kv_heads * pairs;
        const bool value = n >= p.kv_heads * rest;
        if (value) n -= p.kv_heads * rest;
        const int length = value ? whole : rest, head = n / length;
        const int at = (value ? 0 : p.rotary_dim) + n % length * kVec;
        store((value ? values : keys) + head * tile + at, load<T, kVec>((value ? v : k) + head * p.head_dim + at));
    }
}

template <typename T, int kVec>
cudaError_t launch_rotary_store_kv(const RotaryStoreKv& p, cudaStream_t stream) {
    const int64_t work =
        (int64_t(p.q_heads) * p.rotary_dim / 2 + p.kv_heads * (2 * p.head_dim - p.rotary_dim / 2)) / kVec;
    const int64_t warps = ceil_div(work, kWarp), most = kRotaryMaxThreads / kWarp;
    if (work == 0) return cudaSuccess;
    const int threads = int(warps < most ? warps : most) * kWarp;
    const auto kernel = p.interleaved ? rotary_store_kv_kernel<T, kVec, true> : rotary_store_kv_kernel<T, kVec, false>;
    return launch_kernel(kernel, dim3(p.tokens), threads, 0, stream, p);
}

template <typename T>
cudaError_t rotary_store_kv(const RotaryStoreKv& p, cudaStream_t stream) {
    if (p.tokens == 0) return cudaSuccess;
    constexpr int kVec = kFullVec<T>;
    const bool vectors = p.head_dim % kVec == 0 && p.rotary_dim % (2 * kVec) == 0 && fits_vectors<T>(p.q, p.q_stride) &&
                         fits_vectors<T>(p.k, p.k_stride) && fits_vectors<T>(p.v, p.v_stride) &&
                         fits_vectors<T>(p.kv) && fits_vectors<float>(p.cos_sin);
    return vectors ? launch_rotary_store_kv<T, kVec>(p, stream) : launch_rotary_store_kv<T, 1>(p, stream);
}

}  // namespace nanoinfer::cuda
