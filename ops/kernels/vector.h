// A vector of 16 floats in GCC's vector extension: one AVX-512 register, or several smaller ones elsewhere.
// Loads and stores in float32 and float16, loads of int8 and NF4, fused multiply-add, sums over lanes in one fixed
// order, exp and SiLU.
#pragma once
#include <omp.h>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace gorgon {

typedef float vec __attribute__((vector_size(64)));
typedef float vec_u __attribute__((vector_size(64), aligned(4)));
typedef int32_t veci __attribute__((vector_size(64)));
constexpr int LANES = 16;

static inline vec splat(float x) { return x - (vec){}; }
static inline vec load(const float* p) { return *(const vec_u*)p; }
static inline void store(float* p, vec x) { *(vec_u*)p = x; }

#if defined(__AVX512F__)
static inline vec load(const uint16_t* p) { return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline vec load(const int8_t* p) {
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
static inline void store(uint16_t* p, vec x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline vec fma(vec a, vec b, vec c) { return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#else
static inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
    if (exponent == 31) bits = sign | 0x7f800000 | (mantissa << 13);
    else if (exponent) bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
    else {
        float tiny = mantissa * (1.0f / 16777216.0f);
        return sign ? -tiny : tiny;
    }
    float out;
    memcpy(&out, &bits, 4);
    return out;
#endif
}
static inline uint16_t float_to_half(float x) {
#if defined(__F16C__)
    return _cvtss_sh(x, 0);
#else
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t sign = (bits >> 16) & 0x8000;
    int32_t exponent = (int32_t)((bits >> 23) & 255) - 112;
    uint32_t mantissa = bits & 0x7fffff;
    if (exponent >= 31) return sign | 0x7c00;
    if (exponent <= 0) {
        if (exponent < -10) return sign;
        mantissa |= 0x800000;
        uint32_t shift = 14 - exponent, half = mantissa >> shift, rest = mantissa & ((1u << shift) - 1);
        uint32_t middle = 1u << (shift - 1);
        return sign | (half + (rest > middle || (rest == middle && (half & 1))));
    }
    uint32_t half = sign | (exponent << 10) | (mantissa >> 13), rest = mantissa & 0x1fff;
    return half + (rest > 0x1000 || (rest == 0x1000 && (half & 1)));
#endif
}
static inline vec load(const int8_t* p) {
    vec out;
    for (int i = 0; i < LANES; i++) out[i] = p[i];
    return out;
}
static inline vec load(const uint16_t* p) {
    vec out;
    for (int i = 0; i < LANES; i++) out[i] = half_to_float(p[i]);
    return out;
}
static inline void store(uint16_t* p, vec x) {
    for (int i = 0; i < LANES; i++) p[i] = float_to_half(x[i]);
}
static inline vec fma(vec a, vec b, vec c) {
    vec out;
    for (int i = 0; i < LANES; i++) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return out;
}
#endif

// NF4 (arXiv 2305.14314): 16 codes in eight bytes, two 32-bit words of eight codes each, the lowest bits first; that of
// lane i is number i / 2 of word i % 2, so that one broadcast and one shift move every code to the low bits of its
// lane. The table is NF4 of ops/packing/quantize.py.
static inline vec load(const uint8_t* p) {
    typedef int64_t words __attribute__((vector_size(64)));
    const vec table = {-1.0f,         -0.696192801f, -0.525072932f, -0.394917428f, -0.284441322f, -0.1847734f,
                       -0.0910499766f, 0.0f,          0.0795803145f, 0.160930142f,  0.246112257f,  0.337915123f,
                       0.44070974f,    0.562616885f,  0.722956657f,  1.0f};
    int64_t both;
    memcpy(&both, p, sizeof both);
    veci codes = (veci)(both - (words){}) >> (veci){0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28};
    return __builtin_shuffle(table, codes);  // takes the indices modulo 16
}

// Lanes added in one fixed order: halves onto each other.
static inline float sum_lanes(vec x) {
    float v[LANES];
    store(v, x);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) v[i] += v[i + width];
    return v[0];
}

// Lane j: the sum of v[j], added in the order of sum_lanes. v is used up.
static inline vec sums_of_lanes(vec* v) {
    typedef veci index;
    for (int i = 0; i < 8; i++)
        v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], (index){0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}) +
               __builtin_shuffle(v[2 * i], v[2 * i + 1], (index){8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
    for (int i = 0; i < 4; i++)
        v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], (index){0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}) +
               __builtin_shuffle(v[2 * i], v[2 * i + 1], (index){4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31});
    for (int i = 0; i < 2; i++)
        v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], (index){0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29}) +
               __builtin_shuffle(v[2 * i], v[2 * i + 1], (index){2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31});
    return __builtin_shuffle(v[0], v[1], (index){0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}) +
           __builtin_shuffle(v[0], v[1], (index){1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31});
}

// exp(x) for x <= 88: 2^n times a degree-6 Taylor polynomial on |r| <= ln(2)/2, within 3e-7 relative; below -87 it is
// 0.
static inline vec exp_vec(vec x) {
    veci small = x < splat(-87.0f);
    x = small ? splat(-87.0f) : x;
    veci high = x > splat(88.0f);
    x = high ? splat(88.0f) : x;
    vec scaled = x * splat(1.44269504f);
    vec shifted = scaled + (scaled < splat(0.0f) ? splat(-0.5f) : splat(0.5f));
    veci n = __builtin_convertvector(shifted, veci);
    vec nf = __builtin_convertvector(n, vec);
    vec r = fma(nf, splat(-0.693359375f), x);
    r = fma(nf, splat(2.12194440e-4f), r);
    vec p = splat(1.0f / 720);
    p = fma(p, r, splat(1.0f / 120));
    p = fma(p, r, splat(1.0f / 24));
    p = fma(p, r, splat(1.0f / 6));
    p = fma(p, r, splat(0.5f));
    p = fma(p, r, splat(1.0f));
    p = fma(p, r, splat(1.0f));
    vec power = (vec)((n + 127) << 23);
    vec out = p * power;
    return small ? splat(0.0f) : out;
}

static inline vec silu(vec x) { return x / (splat(1.0f) + exp_vec(-x)); }

}  // namespace gorgon
