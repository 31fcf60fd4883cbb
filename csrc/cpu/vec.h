#pragma once
// Vectors of floats, as wide as the instruction set this file is compiled for (see isa.cpp); elsewhere the plain kind.
//
// Kernels are written once, for F32 with kLanes floats. Arithmetic (+ - * / < ?:) is the compiler's own vector
// extension; here is what it lacks: conversions, fused multiply-add, maximum, sums, exp. Half-precision numbers are
// rounded to the nearest, ties to even, exactly as torch rounds them, subnormal numbers included.

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef NANOINFER_ISA
#define NANOINFER_ISA plain
#endif

#define NANOINFER_INLINE static inline __attribute__((always_inline))

namespace nanoinfer {

// Storage only: loads give floats, stores take floats.
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

namespace NANOINFER_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2 and NEON; the compiler makes plain instructions of it where there is neither
#endif

typedef float F32 __attribute__((vector_size(kLanes * 4)));
typedef int32_t I32 __attribute__((vector_size(kLanes * 4)));
typedef uint32_t U32 __attribute__((vector_size(kLanes * 4)));
typedef uint16_t U16 __attribute__((vector_size(kLanes * 2)));

template <typename To, typename From>
NANOINFER_INLINE To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

NANOINFER_INLINE F32 broadcast(float x) { return x - F32{}; }

// a * b + c, rounded once where the machine can.
NANOINFER_INLINE F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// b where a or b is NaN.
NANOINFER_INLINE F32 max(F32 a, F32 b) { return a > b ? a : b; }
NANOINFER_INLINE F32 min(F32 a, F32 b) { return a < b ? a : b; }

// Folds upper half onto lower half until one lane is left: the order never depends on the data.
template <typename Vector, typename Fold>
NANOINFER_INLINE float reduce(Vector v, Fold fold) {
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) v[i] = fold(v[i], v[i + width]);
    }
    return v[0];
}
NANOINFER_INLINE float reduce_add(F32 v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(v);
#else
    return reduce(v, [](float a, float b) { return a + b; });
#endif
}
NANOINFER_INLINE float reduce_max(F32 v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(v);
#else
    return reduce(v, [](float a, float b) { return a > b ? a : b; });
#endif
}

NANOINFER_INLINE F32 widen(F32 v) { return v; }

// The compiler's own conversion takes four instructions for each of these.
NANOINFER_INLINE U32 widen_bits(U16 bits) {
#if defined(__AVX512F__)
    return bit_cast<U32>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(bits)));
#elif defined(__AVX2__)
    return bit_cast<U32>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)));
#else
    return __builtin_convertvector(bits, U32);
#endif
}
NANOINFER_INLINE U16 narrow_bits(U32 bits) {
#if defined(__AVX512F__)
    return bit_cast<U16>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(bits)));
#else
    return __builtin_convertvector(bits, U16);
#endif
}

// A bf16 is the upper half of a float.
NANOINFER_INLINE F32 widen_bf16(U16 bits) { return bit_cast<F32>(widen_bits(bits) << 16); }

NANOINFER_INLINE U16 narrow_bf16(F32 v) {
    // Not vcvtneps2bf16: it flushes subnormal numbers to zero.
    const U32 bits = bit_cast<U32>(v);
    const U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const U32 quiet_nan = (bits >> 16) | 0x40;  // rounding could carry a NaN's mantissa into infinity
    return narrow_bits(bit_cast<U32>(v == v ? bit_cast<I32>(rounded) : bit_cast<I32>(quiet_nan)));
}

NANOINFER_INLINE F32 widen_f16(U16 bits) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(bit_cast<__m256i>(bits));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(bit_cast<__m128i>(bits));
#else
    // Shift exponent and mantissa into a float's place; multiplying by 2^112 corrects the exponent's bias and makes
    // subnormal numbers normal. Infinity and NaN come out as 2^16 or more: give them the largest exponent.
    const U32 wide = __builtin_convertvector(bits, U32);
    const U32 sign = (wide & 0x8000) << 16;
    const F32 magnitude = bit_cast<F32>((wide & 0x7fff) << 13) * 0x1p112f;
    const I32 special = bit_cast<I32>(magnitude) | 0x7f800000;
    return bit_cast<F32>(bit_cast<U32>(magnitude >= 65536.f ? special : bit_cast<I32>(magnitude)) | sign);
#endif
}

NANOINFER_INLINE U16 narrow_f16(F32 v) {
#if defined(__AVX512F__)
    return bit_cast<U16>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
    return bit_cast<U16>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    const U32 sign = (bit_cast<U32>(v) >> 16) & 0x8000;
    const U32 bits = bit_cast<U32>(v) & 0x7fffffff;
    // Normal results: move the exponent's bias, round the 13 lowest bits away; too large ones become infinity.
    const U32 normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
    // Subnormal results (below 2^-14): adding 0.5, whose last bit is worth 2^-24, makes the machine round.
    const U32 subnormal = bit_cast<U32>(bit_cast<F32>(bits) + 0.5f) - bit_cast<U32>(broadcast(0.5f));
    I32 half = bit_cast<I32>(bits) < (113 << 23) ? bit_cast<I32>(subnormal) : bit_cast<I32>(normal);
    half = bit_cast<I32>(bits) >= ((127 + 16) << 23) ? I32{} + 0x7c00 : half;
    half = v == v ? half : bit_cast<I32>(((bits >> 13) & 0x3ff) | 0x7e00);
    return __builtin_convertvector(bit_cast<U32>(half) | sign, U16);
#endif
}

// kLanes numbers from p, which needs no alignment.
NANOINFER_INLINE F32 load(const float* p) {
    F32 v;
    memcpy(&v, p, sizeof(v));
    return v;
}
NANOINFER_INLINE F32 load(const bf16* p) {
    U16 bits;
    memcpy(&bits, p, sizeof(bits));
    return widen_bf16(bits);
}
NANOINFER_INLINE F32 load(const f16* p) {
    U16 bits;
    memcpy(&bits, p, sizeof(bits));
    return widen_f16(bits);
}

NANOINFER_INLINE void store(float* p, F32 v) { memcpy(p, &v, sizeof(v)); }
NANOINFER_INLINE void store(bf16* p, F32 v) {
    const U16 bits = narrow_bf16(v);
    memcpy(p, &bits, sizeof(bits));
}
NANOINFER_INLINE void store(f16* p, F32 v) {
    const U16 bits = narrow_f16(v);
    memcpy(p, &bits, sizeof(bits));
}

// How many numbers of a vector are meant: all of them, known when compiling, or the first few, at the end of a row.
struct Full {};
struct Part {
    int count;
};

template <typename T>
NANOINFER_INLINE F32 load(const T* p, Full) {
    return load(p);
}
template <typename T>
NANOINFER_INLINE void store(T* p, F32 v, Full) {
    store(p, v);
}
// The first numbers from p, then zeros; nothing behind them is read.
template <typename T>
NANOINFER_INLINE F32 load(const T* p, Part part) {
    T padded[kLanes] = {};
    for (int i = 0; i < part.count; ++i) padded[i] = p[i];
    return load(padded);
}
template <typename T>
NANOINFER_INLINE void store(T* p, F32 v, Part part) {
    T padded[kLanes];
    store(padded, v);
    for (int i = 0; i < part.count; ++i) p[i] = padded[i];
}

// body(i, Full or Part) for i = 0, kLanes, ... that together cover [0, n).
template <typename Body>
NANOINFER_INLINE void for_each_vector(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) body(i, Full{});
    if (i < n) body(i, Part{int(n - i)});
}

// e^x as power * 2^n, n the integer nearest to x / ln 2, so that power is between sqrt(1/2) and sqrt(2); |x| < 2^20.
struct Exponential {
    F32 power, n;
};
NANOINFER_INLINE Exponential split_exp(F32 x) {
    // Adding 1.5 * 2^23 leaves no bits below 1: the machine rounds to an integer.
    const F32 n = fma(x, broadcast(0x1.715476p+0f), broadcast(0x1.8p23f)) - 0x1.8p23f;
    // ln 2 in two parts, the first short enough that n times it is exact.
    const F32 r = fma(n, broadcast(-0x1.05c61p-29f), fma(n, broadcast(-0x1.62e43p-1f), x));
    // The polynomial of degree 6 whose largest relative error on |r| <= ln 2 / 2 is least: 2e-8, a third of a rounding.
    constexpr float kMinimax[] = {0x1.126d1ep-7f, 0x1.55589ap-5f, 0x1.55540ap-3f, 0x1.fffffap-2f, 1.f, 1.f};
    F32 sum = broadcast(0x1.6ab96ep-10f);
    for (const float c : kMinimax) sum = fma(sum, r, broadcast(c));
    return {sum, n};
}

// e^x within 2 ulp; 0 at -inf, inf at inf, NaN at NaN, subnormal results where they are due.
NANOINFER_INLINE F32 exp(F32 x) {
    // Beyond the clamps the result is 0 or inf.
    x = x < -104.f ? broadcast(-104.f) : x;  // false for NaN, which stays
    x = x > 89.f ? broadcast(89.f) : x;
    const Exponential e = split_exp(x);
#if defined(__AVX512F__)
    return _mm512_scalef_ps(e.power, e.n);
#else
    // 2^n in two factors: n itself may be beyond a float's exponents where the result is subnormal.
    const I32 whole = __builtin_convertvector(e.n, I32), half = whole >> 1;
    return e.power * bit_cast<F32>((half + 127) << 23) * bit_cast<F32>((whole - half + 127) << 23);
#endif
}

// A softmax's weight: e^x for x <= 0 within 2 ulp, but e^-87 for all below: a subnormal result takes the machine a
// hundred cycles.
NANOINFER_INLINE F32 exp_weight(F32 x) {
    x = x < -87.f ? broadcast(-87.f) : x;
    const Exponential e = split_exp(x);
#if defined(__AVX512F__)
    return _mm512_scalef_ps(e.power, e.n);
#else
    return e.power * bit_cast<F32>((__builtin_convertvector(e.n, I32) + 127) << 23);
#endif
}

// rows[i][j] becomes rows[j][i].
NANOINFER_INLINE void transpose(F32 (&rows)[kLanes]) {
#if defined(__AVX512F__)
    // Within each quarter of a vector, four rows at a time; then quarters change places.
    __m512d t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_castps_pd(_mm512_unpacklo_ps(rows[i], rows[i + 1]));
        t[i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(rows[i], rows[i + 1]));
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; ++j) {
            rows[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(t[i + j], t[i + j + 2]));
            rows[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(t[i + j], t[i + j + 2]));
        }
    }
    for (int j = 0; j < 4; ++j) {
        const F32 a = _mm512_shuffle_f32x4(rows[j], rows[j + 4], 0x88);
        const F32 b = _mm512_shuffle_f32x4(rows[j], rows[j + 4], 0xdd);
        const F32 c = _mm512_shuffle_f32x4(rows[j + 8], rows[j + 12], 0x88);
        const F32 d = _mm512_shuffle_f32x4(rows[j + 8], rows[j + 12], 0xdd);
        rows[j] = _mm512_shuffle_f32x4(a, c, 0x88);
        rows[j + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
        rows[j + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
        rows[j + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
#elif defined(__AVX2__)
    __m256d t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_castps_pd(_mm256_unpacklo_ps(rows[i], rows[i + 1]));
        t[i + 1] = _mm256_castps_pd(_mm256_unpackhi_ps(rows[i], rows[i + 1]));
    }
    F32 u[8];
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; ++j) {
            u[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(t[i + j], t[i + j + 2]));
            u[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(t[i + j], t[i + j + 2]));
        }
    }
    for (int j = 0; j < 4; ++j) {
        rows[j] = _mm256_permute2f128_ps(u[j], u[j + 4], 0x20);
        rows[j + 4] = _mm256_permute2f128_ps(u[j], u[j + 4], 0x31);
    }
#else
    for (int i = 0; i < kLanes; ++i) {
        for (int j = 0; j < i; ++j) {
            const float upper = rows[j][i];
            rows[j][i] = rows[i][j];
            rows[i][j] = upper;
        }
    }
#endif
}

}  // namespace NANOINFER_ISA
}  // namespace nanoinfer
