// Vectors of V_LEN floats for the instruction set that the including file is compiled for.
// Everything is file-local: the same names mean other things in other files.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(_MSC_VER)
#define V_INLINE __forceinline
#else
#define V_INLINE inline __attribute__((always_inline))
#endif

// an array of vectors lies in registers only when the loops over it are unrolled
#if defined(__GNUC__) && !defined(__clang__)
#define KVM_UNROLL _Pragma("GCC unroll 16")
#elif defined(__clang__)
#define KVM_UNROLL _Pragma("unroll")
#else
#define KVM_UNROLL
#endif

// Compilers reorder the additions to a sum of integers, and copy registers for it. This keeps a sum where it is.
#if defined(__GNUC__) && (defined(KVM_AVX512) || defined(KVM_AVX2))
#define KVM_KEEP(x) __asm__("" : "+v"(x))
#else
#define KVM_KEEP(x) (void) 0
#endif

// Compilers compute the addresses of many rows one by one, and run out of registers. This makes a pointer one to begin with.
#if defined(__GNUC__)
#define KVM_BASE(p) __asm__("" : "+r"(p))
#else
#define KVM_BASE(p) (void) 0
#endif

#if defined(KVM_AVX512) || defined(KVM_AVX2)
#include <immintrin.h>
#elif defined(KVM_NEON)
#include <arm_neon.h>
#endif

namespace {

V_INLINE uint16_t load_u16(const uint8_t * p) {
    uint16_t res;
    memcpy(&res, p, sizeof(res));
    return res;
}

V_INLINE int32_t load_i32(const void * p) {
    int32_t res;
    memcpy(&res, p, sizeof(res));
    return res;
}

V_INLINE float f32_from_bits(uint32_t bits) {
    float res;
    memcpy(&res, &bits, sizeof(res));
    return res;
}

//
// V_LEN:        lanes
// vf, vi:       floats, 32-bit integers
// va:           sums of products of small integers, see v_dot
// V_ROWS_DOT:   rows of Q that fit in registers for the dot product with four rows of K
// V_ROWS_ACC:   rows of the output that fit in registers, 32 elements of each
// V_GEMM_ROWS, V_GEMM_VECS: the same for a block of a matrix product
//

#if defined(KVM_AVX512)

constexpr int V_LEN = 16;
constexpr int V_ROWS_DOT  = 4;
constexpr int V_ROWS_ACC  = 8;
constexpr int V_GEMM_ROWS = 6;
constexpr int V_GEMM_VECS = 4;

using vf = __m512;
using vi = __m512i;
using va = __m512i;

V_INLINE vf v_zero() { return _mm512_setzero_ps(); }
V_INLINE vf v_set(float x) { return _mm512_set1_ps(x); }
V_INLINE vf v_load(const float * p) { return _mm512_loadu_ps(p); }
V_INLINE void v_store(float * p, vf x) { _mm512_storeu_ps(p, x); }
V_INLINE vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
V_INLINE vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
V_INLINE vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
V_INLINE vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
V_INLINE vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
V_INLINE vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
V_INLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
V_INLINE float v_hsum(vf x) { return _mm512_reduce_add_ps(x); }
V_INLINE float v_hmax(vf x) { return _mm512_reduce_max_ps(x); }
V_INLINE vf v_round(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^n for whole n, 0 where that is below the smallest number
V_INLINE vf v_ldexp(vf x, vf n) { return _mm512_scalef_ps(x, n); }

V_INLINE void v_hsum4(float * dst, vf a, vf b, vf c, vf d) {
    const auto half = [](__m512 x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); };
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
    _mm_storeu_ps(dst, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

V_INLINE vf v_load_f16(const uint8_t * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
V_INLINE vf v_load_bf16(const uint8_t * p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p)), 16));
}
V_INLINE vf v_load_i8(const uint8_t * p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p))); }

// V_LEN values of 16 bytes that hold 32 nibbles, less 8
V_INLINE vf v_load_i4(const uint8_t * p, int i) {
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) p));
    return _mm512_permutexvar_ps(i == 0 ? x : _mm512_srli_epi32(x, 4), values); // looks at the lower four bits only
}

// 16 bytes of each of V_LEN rows: res[i] has the i-th four of them, a lane per row
V_INLINE void v_transpose4(const uint8_t * p, size_t nb, vi res[4]) {
    const uint8_t * base[4] = { p, p + 4*nb, p + 8*nb, p + 12*nb };
    for (auto & b : base) {
        KVM_BASE(b);
    }
    __m512i r[4];
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *) (base[0] + i*nb)));
        r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const __m128i *) (base[1] + i*nb)), 1);
        r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const __m128i *) (base[2] + i*nb)), 2);
        r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const __m128i *) (base[3] + i*nb)), 3);
    }
    const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]);
    const __m512i b = _mm512_unpackhi_epi32(r[0], r[1]);
    const __m512i c = _mm512_unpacklo_epi32(r[2], r[3]);
    const __m512i d = _mm512_unpackhi_epi32(r[2], r[3]);
    res[0] = _mm512_unpacklo_epi64(a, c);
    res[1] = _mm512_unpackhi_epi64(a, c);
    res[2] = _mm512_unpacklo_epi64(b, d);
    res[3] = _mm512_unpackhi_epi64(b, d);
}

// 32 bytes of each of V_LEN rows, likewise
V_INLINE void v_transpose8(const uint8_t * p, size_t nb, vi res[8]) {
    const uint8_t * base[4] = { p, p + 4*nb, p + 8*nb, p + 12*nb };
    for (auto & b : base) {
        KVM_BASE(b);
    }
    __m512i x[2][4];
    for (int i = 0; i < 2; ++i) {
        __m512i r[4];
        for (int j = 0; j < 4; ++j) {
            r[j] = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) (base[2*i] + j*nb)));
            r[j] = _mm512_inserti64x4(r[j], _mm256_loadu_si256((const __m256i *) (base[2*i + 1] + j*nb)), 1);
        }
        const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]);
        const __m512i b = _mm512_unpackhi_epi32(r[0], r[1]);
        const __m512i c = _mm512_unpacklo_epi32(r[2], r[3]);
        const __m512i d = _mm512_unpackhi_epi32(r[2], r[3]);
        // four rows, four others: words w and w + 4 of each
        x[i][0] = _mm512_unpacklo_epi64(a, c);
        x[i][1] = _mm512_unpackhi_epi64(a, c);
        x[i][2] = _mm512_unpacklo_epi64(b, d);
        x[i][3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int w = 0; w < 4; ++w) {
        res[w]     = _mm512_shuffle_i32x4(x[0][w], x[1][w], 0x88);
        res[w + 4] = _mm512_shuffle_i32x4(x[0][w], x[1][w], 0xDD);
    }
}

V_INLINE vf v_from_bits(vi x) { return _mm512_castsi512_ps(x); }
V_INLINE vf v_f16_lo(vi x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }
V_INLINE vf v_f16_hi(vi x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16))); }
V_INLINE vi v_nibble_lo(vi x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
V_INLINE vi v_nibble_hi(vi x) { return _mm512_and_si512(_mm512_srli_epi32(x, 4), _mm512_set1_epi8(15)); }

// acc += the four unsigned bytes of every lane of u times the four signed ones of s
constexpr int V_DOT_SUMS = 2;
V_INLINE va v_dot_zero() { return _mm512_setzero_si512(); }
V_INLINE va v_dot_add(va a, va b) { return _mm512_add_epi32(a, b); }
V_INLINE va v_dot(va acc, vi u, int32_t s) { return _mm512_dpbusd_epi32(acc, u, _mm512_set1_epi32(s)); }
V_INLINE vf v_dot_sum(va acc, int32_t x) { return _mm512_cvtepi32_ps(_mm512_add_epi32(acc, _mm512_set1_epi32(x))); }

// 32 nibbles of each of four rows: a lane per element, 16 bits per row; V_BLOCK vectors of rows 0 and 1, then of 2 and 3
V_INLINE void v_load_i4_pairs(const uint8_t * p, size_t nb, vi * res) {
    const __m512i bytes = _mm512_set_epi8(
        63, 31, 47, 15, 62, 30, 46, 14, 61, 29, 45, 13, 60, 28, 44, 12, 59, 27, 43, 11, 58, 26, 42, 10, 57, 25, 41,  9, 56, 24, 40,  8,
        55, 23, 39,  7, 54, 22, 38,  6, 53, 21, 37,  5, 52, 20, 36,  4, 51, 19, 35,  3, 50, 18, 34,  2, 49, 17, 33,  1, 48, 16, 32,  0);
    const __m512i low = _mm512_set1_epi16(15);
    __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *) p));
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *) (p +   nb)), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *) (p + 2*nb)), 2);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *) (p + 3*nb)), 3);
    x = _mm512_permutexvar_epi8(bytes, x);
    res[0] = _mm512_and_si512(x, low);
    res[1] = _mm512_and_si512(_mm512_srli_epi16(x, 4), low);
    res[2] = _mm512_and_si512(_mm512_srli_epi16(x, 8), low);
    res[3] = _mm512_srli_epi16(x, 12);
}

// acc += the two 16-bit numbers of every lane of x times those of w
V_INLINE vi v_dot16(vi acc, vi x, int32_t w) { return _mm512_dpwssd_epi32(acc, x, _mm512_set1_epi32(w)); }
V_INLINE vi v_izero() { return _mm512_setzero_si512(); }
V_INLINE vi v_iset(int32_t x) { return _mm512_set1_epi32(x); }
V_INLINE vf v_from_int(vi x) { return _mm512_cvtepi32_ps(x); }
V_INLINE vi v_to_int(vf x) { return _mm512_cvtps_epi32(x); }
V_INLINE vi v_iadd(vi a, vi b) { return _mm512_add_epi32(a, b); }
V_INLINE int32_t v_ihsum(vi x) { return _mm512_reduce_add_epi32(x); }
V_INLINE vi v_iload(const void * p) { return _mm512_loadu_si512(p); }
V_INLINE void v_istore(void * p, vi x) { _mm512_storeu_si512(p, x); }
// rounded to 16 bits: V_LEN numbers, then V_LEN others
V_INLINE vi v_to_i16(vf a, vf b) {
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), _mm512_packs_epi32(v_to_int(a), v_to_int(b)));
}
// a b/2^15 of 16-bit numbers, rounded
V_INLINE vi v_mulhrs16(vi a, vi b) { return _mm512_mulhrs_epi16(a, b); }
V_INLINE void v_store_i8(int8_t * p, vi x) { _mm_storeu_si128((__m128i *) p, _mm512_cvtepi32_epi8(x)); }
V_INLINE vf v_abs(vf x) { return _mm512_abs_ps(x); }
// towards 0
V_INLINE vi v_to_int_trunc(vf x) { return _mm512_cvttps_epi32(x); }

// 32 numbers from 0 to 15 as nibbles of 16 bytes
V_INLINE void v_store_i4(uint8_t * p, const vi * x) {
    _mm_storeu_si128((__m128i *) p, _mm512_cvtepi32_epi8(_mm512_or_si512(x[0], _mm512_slli_epi32(x[1], 4))));
}

// the fast Walsh-Hadamard transform of V_LEN values: sums and differences of neighbours, of pairs of them, ...
V_INLINE vf v_hadamard(vf x) {
    const auto pass = [](vf a, vf b, __mmask16 minus) { return _mm512_mask_sub_ps(_mm512_add_ps(a, b), minus, a, b); };
    x = pass(_mm512_moveldup_ps(x),             _mm512_movehdup_ps(x),             0xAAAA);
    x = pass(_mm512_permute_ps(x, 0x44),        _mm512_permute_ps(x, 0xEE),        0xCCCC);
    x = pass(_mm512_shuffle_f32x4(x, x, 0xA0),  _mm512_shuffle_f32x4(x, x, 0xF5),  0xF0F0);
    x = pass(_mm512_shuffle_f32x4(x, x, 0x44),  _mm512_shuffle_f32x4(x, x, 0xEE),  0xFF00);
    return x;
}

#elif defined(KVM_AVX2)

constexpr int V_LEN = 8;
constexpr int V_ROWS_DOT  = 3;
constexpr int V_ROWS_ACC  = 3;
constexpr int V_GEMM_ROWS = 6;
constexpr int V_GEMM_VECS = 2;

using vf = __m256;
using vi = __m256i;
using va = __m256i;

V_INLINE vf v_zero() { return _mm256_setzero_ps(); }
V_INLINE vf v_set(float x) { return _mm256_set1_ps(x); }
V_INLINE vf v_load(const float * p) { return _mm256_loadu_ps(p); }
V_INLINE void v_store(float * p, vf x) { _mm256_storeu_ps(p, x); }
V_INLINE vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
V_INLINE vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
V_INLINE vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
V_INLINE vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
V_INLINE vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
V_INLINE vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
V_INLINE vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
V_INLINE float v_hsum(vf x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
V_INLINE float v_hmax(vf x) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
V_INLINE vf v_round(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
V_INLINE vf v_ldexp(vf x, vf n) {
    const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(_mm256_mul_ps(x, _mm256_castsi256_ps(e)), _mm256_cmp_ps(n, _mm256_set1_ps(-126.0f), _CMP_GE_OQ));
}

V_INLINE void v_hsum4(float * dst, vf a, vf b, vf c, vf d) {
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(dst, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

V_INLINE vf v_load_f16(const uint8_t * p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }
V_INLINE vf v_load_bf16(const uint8_t * p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p)), 16));
}
V_INLINE vf v_load_i8(const uint8_t * p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) p))); }

V_INLINE vf v_load_i4(const uint8_t * p, int i) {
    const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) (p + 8*(i & 1))));
    const __m256i u = i < 2 ? _mm256_and_si256(x, _mm256_set1_epi32(15)) : _mm256_srli_epi32(x, 4);
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(u, _mm256_set1_epi32(8)));
}

V_INLINE void v_transpose4(const uint8_t * p, size_t nb, vi res[4]) {
    __m256i r[4];
    for (int i = 0; i < 4; ++i) {
        const uint8_t * row = p + i*nb;
        r[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(
            _mm_loadu_si128((const __m128i *) row)), _mm_loadu_si128((const __m128i *) (row + 4*nb)), 1);
    }
    const __m256i a = _mm256_unpacklo_epi32(r[0], r[1]);
    const __m256i b = _mm256_unpackhi_epi32(r[0], r[1]);
    const __m256i c = _mm256_unpacklo_epi32(r[2], r[3]);
    const __m256i d = _mm256_unpackhi_epi32(r[2], r[3]);
    res[0] = _mm256_unpacklo_epi64(a, c);
    res[1] = _mm256_unpackhi_epi64(a, c);
    res[2] = _mm256_unpacklo_epi64(b, d);
    res[3] = _mm256_unpackhi_epi64(b, d);
}

V_INLINE vf v_from_bits(vi x) { return _mm256_castsi256_ps(x); }
V_INLINE vf v_f16_lo(vi x) {
    x = _mm256_and_si256(x, _mm256_set1_epi32(0xFFFF));
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
V_INLINE vf v_f16_hi(vi x) { return v_f16_lo(_mm256_srli_epi32(x, 16)); }
V_INLINE vi v_nibble_lo(vi x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
V_INLINE vi v_nibble_hi(vi x) { return _mm256_and_si256(_mm256_srli_epi32(x, 4), _mm256_set1_epi8(15)); }

// Sums of 16 bits: up to 16 products of [0, 15] and [-127, 127] each, |sum| <= 30480.
constexpr int V_DOT_SUMS = 1;
V_INLINE va v_dot_zero() { return _mm256_setzero_si256(); }
V_INLINE va v_dot_add(va a, va b) { return _mm256_add_epi16(a, b); }
V_INLINE va v_dot(va acc, vi u, int32_t s) { return _mm256_add_epi16(acc, _mm256_maddubs_epi16(u, _mm256_set1_epi32(s))); }
V_INLINE vf v_dot_sum(va acc, int32_t x) {
    return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(acc, _mm256_set1_epi16(1)), _mm256_set1_epi32(x)));
}

V_INLINE void v_load_i4_pairs(const uint8_t * p, size_t nb, vi * res) {
    const __m256i low = _mm256_set1_epi16(15);
    for (int i = 0; i < 2; ++i) {
        const __m128i a = _mm_loadu_si128((const __m128i *) (p + 2*i*nb));
        const __m128i b = _mm_loadu_si128((const __m128i *) (p + 2*i*nb + nb));
        const __m256i lo = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b));
        const __m256i hi = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b));
        res[4*i + 0] = _mm256_and_si256(lo, low);
        res[4*i + 1] = _mm256_and_si256(hi, low);
        res[4*i + 2] = _mm256_srli_epi16(lo, 4);
        res[4*i + 3] = _mm256_srli_epi16(hi, 4);
    }
}

V_INLINE vi v_dot16(vi acc, vi x, int32_t w) { return _mm256_add_epi32(acc, _mm256_madd_epi16(x, _mm256_set1_epi32(w))); }
V_INLINE vi v_izero() { return _mm256_setzero_si256(); }
V_INLINE vi v_iset(int32_t x) { return _mm256_set1_epi32(x); }
V_INLINE vf v_from_int(vi x) { return _mm256_cvtepi32_ps(x); }
V_INLINE vi v_to_int(vf x) { return _mm256_cvtps_epi32(x); }
V_INLINE vi v_iadd(vi a, vi b) { return _mm256_add_epi32(a, b); }
V_INLINE int32_t v_ihsum(vi x) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}
V_INLINE __m128i pack_i16(vi x) { return _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)); }
V_INLINE vi v_iload(const void * p) { return _mm256_loadu_si256((const __m256i *) p); }
V_INLINE void v_istore(void * p, vi x) { _mm256_storeu_si256((__m256i *) p, x); }
V_INLINE vi v_to_i16(vf a, vf b) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(v_to_int(a), v_to_int(b)), 0xD8); }
V_INLINE vi v_mulhrs16(vi a, vi b) { return _mm256_mulhrs_epi16(a, b); }
V_INLINE void v_store_i8(int8_t * p, vi x) { _mm_storel_epi64((__m128i *) p, _mm_packs_epi16(pack_i16(x), pack_i16(x))); }
V_INLINE vf v_abs(vf x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
V_INLINE vi v_to_int_trunc(vf x) { return _mm256_cvttps_epi32(x); }

V_INLINE void v_store_i4(uint8_t * p, const vi * x) {
    const __m256i a = _mm256_or_si256(x[0], _mm256_slli_epi32(x[2], 4));
    const __m256i b = _mm256_or_si256(x[1], _mm256_slli_epi32(x[3], 4));
    const __m256i y = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8);
    _mm_storeu_si128((__m128i *) p, _mm_packus_epi16(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1)));
}

V_INLINE vf v_hadamard(vf x) {
    vf a = _mm256_moveldup_ps(x);
    vf b = _mm256_movehdup_ps(x);
    x = _mm256_blend_ps(_mm256_add_ps(a, b), _mm256_sub_ps(a, b), 0xAA);
    a = _mm256_permute_ps(x, 0x44);
    b = _mm256_permute_ps(x, 0xEE);
    x = _mm256_blend_ps(_mm256_add_ps(a, b), _mm256_sub_ps(a, b), 0xCC);
    a = _mm256_permute2f128_ps(x, x, 0x00);
    b = _mm256_permute2f128_ps(x, x, 0x11);
    return _mm256_blend_ps(_mm256_add_ps(a, b), _mm256_sub_ps(a, b), 0xF0);
}

#elif defined(KVM_NEON)

constexpr int V_LEN = 4;
constexpr int V_ROWS_DOT  = 4;
constexpr int V_ROWS_ACC  = 3;
constexpr int V_GEMM_ROWS = 6;
constexpr int V_GEMM_VECS = 4;

using vf = float32x4_t;
using vi = uint8x16_t;
using va = int32x4_t;

V_INLINE vf v_zero() { return vdupq_n_f32(0.0f); }
V_INLINE vf v_set(float x) { return vdupq_n_f32(x); }
V_INLINE vf v_load(const float * p) { return vld1q_f32(p); }
V_INLINE void v_store(float * p, vf x) { vst1q_f32(p, x); }
V_INLINE vf v_add(vf a, vf b) { return vaddq_f32(a, b); }
V_INLINE vf v_sub(vf a, vf b) { return vsubq_f32(a, b); }
V_INLINE vf v_mul(vf a, vf b) { return vmulq_f32(a, b); }
V_INLINE vf v_div(vf a, vf b) { return vdivq_f32(a, b); }
V_INLINE vf v_min(vf a, vf b) { return vminq_f32(a, b); }
V_INLINE vf v_max(vf a, vf b) { return vmaxq_f32(a, b); }
V_INLINE vf v_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
V_INLINE float v_hsum(vf x) { return vaddvq_f32(x); }
V_INLINE float v_hmax(vf x) { return vmaxvq_f32(x); }
V_INLINE vf v_round(vf x) { return vrndnq_f32(x); }
V_INLINE vf v_ldexp(vf x, vf n) {
    const int32x4_t e = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
    const float32x4_t res = vmulq_f32(x, vreinterpretq_f32_s32(e));
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(res), vcgeq_f32(n, vdupq_n_f32(-126.0f))));
}

V_INLINE void v_hsum4(float * dst, vf a, vf b, vf c, vf d) {
    vst1q_f32(dst, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}

V_INLINE vf v_load_f16(const uint8_t * p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
V_INLINE vf v_load_bf16(const uint8_t * p) { return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16)); }
V_INLINE vf v_load_i8(const uint8_t * p) {
    const int32_t x = load_i32(p);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(x))))));
}

V_INLINE vf v_load_i4(const uint8_t * p, int i) {
    const uint8x8_t x = vreinterpret_u8_s32(vdup_n_s32(load_i32(p + 4*(i & 3))));
    const uint8x8_t u = i < 4 ? vand_u8(x, vdup_n_u8(15)) : vshr_n_u8(x, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vsub_s8(vreinterpret_s8_u8(u), vdup_n_s8(8))))));
}

V_INLINE void v_transpose4(const uint8_t * p, size_t nb, vi res[4]) {
    const uint32x4_t r0 = vreinterpretq_u32_u8(vld1q_u8(p));
    const uint32x4_t r1 = vreinterpretq_u32_u8(vld1q_u8(p +   nb));
    const uint32x4_t r2 = vreinterpretq_u32_u8(vld1q_u8(p + 2*nb));
    const uint32x4_t r3 = vreinterpretq_u32_u8(vld1q_u8(p + 3*nb));
    const uint64x2_t a = vreinterpretq_u64_u32(vtrn1q_u32(r0, r1));
    const uint64x2_t b = vreinterpretq_u64_u32(vtrn2q_u32(r0, r1));
    const uint64x2_t c = vreinterpretq_u64_u32(vtrn1q_u32(r2, r3));
    const uint64x2_t d = vreinterpretq_u64_u32(vtrn2q_u32(r2, r3));
    res[0] = vreinterpretq_u8_u64(vtrn1q_u64(a, c));
    res[1] = vreinterpretq_u8_u64(vtrn1q_u64(b, d));
    res[2] = vreinterpretq_u8_u64(vtrn2q_u64(a, c));
    res[3] = vreinterpretq_u8_u64(vtrn2q_u64(b, d));
}

V_INLINE vf v_from_bits(vi x) { return vreinterpretq_f32_u8(x); }
V_INLINE vf v_f16_lo(vi x) { return vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(vreinterpretq_u32_u8(x)))); }
V_INLINE vf v_f16_hi(vi x) { return vcvt_f32_f16(vreinterpret_f16_u16(vshrn_n_u32(vreinterpretq_u32_u8(x), 16))); }
V_INLINE vi v_nibble_lo(vi x) { return vandq_u8(x, vdupq_n_u8(15)); }
V_INLINE vi v_nibble_hi(vi x) { return vshrq_n_u8(x, 4); }

constexpr int V_DOT_SUMS = 2;
V_INLINE va v_dot_zero() { return vdupq_n_s32(0); }
V_INLINE va v_dot_add(va a, va b) { return vaddq_s32(a, b); }
V_INLINE va v_dot(va acc, vi u, int32_t s) {
    const int8x16_t a = vreinterpretq_s8_u8(u);
    const int8x16_t b = vreinterpretq_s8_s32(vdupq_n_s32(s));
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(acc, a, b);
#else
    const int16x8_t lo = vmull_s8(vget_low_s8 (a), vget_low_s8 (b));
    const int16x8_t hi = vmull_s8(vget_high_s8(a), vget_high_s8(b));
    return vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(lo), vpaddlq_s16(hi)));
#endif
}
V_INLINE vf v_dot_sum(va acc, int32_t x) { return vcvtq_f32_s32(vaddq_s32(acc, vdupq_n_s32(x))); }

// four lanes of the first row, then four of the second: what v_dot16 multiplies
V_INLINE void v_load_i4_pairs(const uint8_t * p, size_t nb, vi * res) {
    for (int i = 0; i < 2; ++i) {
        const uint8x16_t x[2] = { vld1q_u8(p + 2*i*nb), vld1q_u8(p + 2*i*nb + nb) };
        for (int h = 0; h < 2; ++h) {
            const uint8x16_t a = h == 0 ? vandq_u8(x[0], vdupq_n_u8(15)) : vshrq_n_u8(x[0], 4);
            const uint8x16_t b = h == 0 ? vandq_u8(x[1], vdupq_n_u8(15)) : vshrq_n_u8(x[1], 4);
            const uint64x2_t a0 = vreinterpretq_u64_u16(vmovl_u8(vget_low_u8(a))), a1 = vreinterpretq_u64_u16(vmovl_u8(vget_high_u8(a)));
            const uint64x2_t b0 = vreinterpretq_u64_u16(vmovl_u8(vget_low_u8(b))), b1 = vreinterpretq_u64_u16(vmovl_u8(vget_high_u8(b)));
            vi * dst = res + 8*i + 4*h;
            dst[0] = vreinterpretq_u8_u64(vtrn1q_u64(a0, b0));
            dst[1] = vreinterpretq_u8_u64(vtrn2q_u64(a0, b0));
            dst[2] = vreinterpretq_u8_u64(vtrn1q_u64(a1, b1));
            dst[3] = vreinterpretq_u8_u64(vtrn2q_u64(a1, b1));
        }
    }
}

V_INLINE vi v_dot16(vi acc, vi x, int32_t w) {
    const int16x8_t y = vreinterpretq_s16_u8(x);
    int32x4_t res = vreinterpretq_s32_u8(acc);
    res = vmlal_n_s16     (res, vget_low_s16(y), (int16_t) (w & 0xFFFF));
    res = vmlal_high_n_s16(res, y,               (int16_t) (w >> 16));
    return vreinterpretq_u8_s32(res);
}
V_INLINE vi v_izero() { return vdupq_n_u8(0); }
V_INLINE vi v_iset(int32_t x) { return vreinterpretq_u8_s32(vdupq_n_s32(x)); }
V_INLINE vf v_from_int(vi x) { return vcvtq_f32_s32(vreinterpretq_s32_u8(x)); }
V_INLINE vi v_to_int(vf x) { return vreinterpretq_u8_s32(vcvtnq_s32_f32(x)); }
V_INLINE vi v_iadd(vi a, vi b) { return vreinterpretq_u8_s32(vaddq_s32(vreinterpretq_s32_u8(a), vreinterpretq_s32_u8(b))); }
V_INLINE int32_t v_ihsum(vi x) { return vaddvq_s32(vreinterpretq_s32_u8(x)); }
V_INLINE vi v_iload(const void * p) { return vld1q_u8((const uint8_t *) p); }
V_INLINE void v_istore(void * p, vi x) { vst1q_u8((uint8_t *) p, x); }
V_INLINE vi v_to_i16(vf a, vf b) {
    return vreinterpretq_u8_s16(vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(a)), vqmovn_s32(vcvtnq_s32_f32(b))));
}
V_INLINE vi v_mulhrs16(vi a, vi b) { return vreinterpretq_u8_s16(vqrdmulhq_s16(vreinterpretq_s16_u8(a), vreinterpretq_s16_u8(b))); }
V_INLINE void v_store_i8(int8_t * p, vi x) {
    const int16x4_t y = vmovn_s32(vreinterpretq_s32_u8(x));
    const int32_t z = vget_lane_s32(vreinterpret_s32_s8(vmovn_s16(vcombine_s16(y, y))), 0);
    memcpy(p, &z, sizeof(z));
}
V_INLINE vf v_abs(vf x) { return vabsq_f32(x); }
V_INLINE vi v_to_int_trunc(vf x) { return vreinterpretq_u8_s32(vcvtq_s32_f32(x)); }

V_INLINE void v_store_i4(uint8_t * p, const vi * x) {
    uint16x4_t y[4];
    for (int i = 0; i < 4; ++i) {
        y[i] = vmovn_u32(vorrq_u32(vreinterpretq_u32_u8(x[i]), vshlq_n_u32(vreinterpretq_u32_u8(x[i + 4]), 4)));
    }
    vst1q_u8(p, vcombine_u8(vmovn_u16(vcombine_u16(y[0], y[1])), vmovn_u16(vcombine_u16(y[2], y[3]))));
}

V_INLINE vf v_hadamard(vf x) {
    vf a = vtrn1q_f32(x, x);
    vf b = vtrn2q_f32(x, x);
    x = vtrn1q_f32(vaddq_f32(a, b), vsubq_f32(a, b));
    a = vcombine_f32(vget_low_f32 (x), vget_low_f32 (x));
    b = vcombine_f32(vget_high_f32(x), vget_high_f32(x));
    return vcombine_f32(vget_low_f32(vaddq_f32(a, b)), vget_low_f32(vsubq_f32(a, b)));
}

#else // portable

constexpr int V_LEN = 8;
constexpr int V_ROWS_DOT  = 2;
constexpr int V_ROWS_ACC  = 2;
constexpr int V_GEMM_ROWS = 4;
constexpr int V_GEMM_VECS = 2;

struct vf { float   v[V_LEN]; };
struct vi { uint8_t v[V_LEN][4]; };
struct va { int32_t v[V_LEN]; };

#define KVM_EACH(expr) vf res; for (int i = 0; i < V_LEN; ++i) { res.v[i] = (expr); } return res

V_INLINE vf v_set(float x) { KVM_EACH(x); }
V_INLINE vf v_zero() { return v_set(0.0f); }
V_INLINE vf v_load(const float * p) { KVM_EACH(p[i]); }
V_INLINE void v_store(float * p, vf x) { memcpy(p, x.v, sizeof(x.v)); }
V_INLINE vf v_add(vf a, vf b) { KVM_EACH(a.v[i] + b.v[i]); }
V_INLINE vf v_sub(vf a, vf b) { KVM_EACH(a.v[i] - b.v[i]); }
V_INLINE vf v_mul(vf a, vf b) { KVM_EACH(a.v[i] * b.v[i]); }
V_INLINE vf v_div(vf a, vf b) { KVM_EACH(a.v[i] / b.v[i]); }
V_INLINE vf v_min(vf a, vf b) { KVM_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
V_INLINE vf v_max(vf a, vf b) { KVM_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
V_INLINE vf v_fma(vf a, vf b, vf c) { KVM_EACH(a.v[i]*b.v[i] + c.v[i]); }
V_INLINE float v_hsum(vf x) { float res = 0.0f; for (float y : x.v) { res += y; } return res; }
V_INLINE float v_hmax(vf x) { float res = x.v[0]; for (float y : x.v) { res = y > res ? y : res; } return res; }
V_INLINE vf v_round(vf x) { KVM_EACH(std::nearbyint(x.v[i])); }
V_INLINE vf v_ldexp(vf x, vf n) {
    KVM_EACH(n.v[i] < -126.0f ? 0.0f : x.v[i]*f32_from_bits((uint32_t) ((int32_t) n.v[i] + 127) << 23));
}

V_INLINE void v_hsum4(float * dst, vf a, vf b, vf c, vf d) {
    dst[0] = v_hsum(a); dst[1] = v_hsum(b); dst[2] = v_hsum(c); dst[3] = v_hsum(d);
}

V_INLINE float f32_from_f16(uint16_t h) {
    const uint32_t sign = (uint32_t) (h & 0x8000) << 16;
    const uint32_t rest = (uint32_t) (h & 0x7FFF) << 13;
    if (rest >= 0x0F800000) { // infinity, not a number
        return f32_from_bits(sign | 0x70000000 | rest | 0x0F800000);
    }
    const float res = f32_from_bits(rest)*0x1p112f; // puts the exponent right, of subnormals too
    return sign ? -res : res;
}

V_INLINE vf v_load_f16(const uint8_t * p) { KVM_EACH(f32_from_f16(load_u16(p + 2*i))); }
V_INLINE vf v_load_bf16(const uint8_t * p) { KVM_EACH(f32_from_bits((uint32_t) load_u16(p + 2*i) << 16)); }
V_INLINE vf v_load_i8(const uint8_t * p) { KVM_EACH((float) (int8_t) p[i]); }
V_INLINE vf v_load_i4(const uint8_t * p, int k) {
    p += V_LEN*(k & 1);
    KVM_EACH((float) ((k < 2 ? p[i] & 15 : p[i] >> 4) - 8));
}

V_INLINE void v_transpose4(const uint8_t * p, size_t nb, vi res[4]) {
    for (int i = 0; i < V_LEN; ++i) {
        for (int j = 0; j < 4; ++j) {
            memcpy(res[j].v[i], p + i*nb + 4*j, 4);
        }
    }
}

V_INLINE vf v_from_bits(vi x) { vf res; memcpy(res.v, x.v, sizeof(res.v)); return res; }
V_INLINE vf v_f16_lo(vi x) { KVM_EACH(f32_from_f16(load_u16(x.v[i]))); }
V_INLINE vf v_f16_hi(vi x) { KVM_EACH(f32_from_f16(load_u16(x.v[i] + 2))); }
V_INLINE vi v_nibble_lo(vi x) { for (auto & y : x.v) { for (uint8_t & z : y) { z &= 15; } } return x; }
V_INLINE vi v_nibble_hi(vi x) { for (auto & y : x.v) { for (uint8_t & z : y) { z >>= 4; } } return x; }

constexpr int V_DOT_SUMS = 1;
V_INLINE va v_dot_zero() { return {}; }
V_INLINE va v_dot_add(va a, va /*b*/) { return a; }
V_INLINE va v_dot(va acc, vi u, int32_t s) {
    int8_t b[4];
    memcpy(b, &s, 4);
    for (int i = 0; i < V_LEN; ++i) {
        for (int j = 0; j < 4; ++j) {
            acc.v[i] += u.v[i][j]*b[j];
        }
    }
    return acc;
}
V_INLINE vf v_dot_sum(va acc, int32_t x) { KVM_EACH((float) (acc.v[i] + x)); }

V_INLINE void v_load_i4_pairs(const uint8_t * p, size_t nb, vi * res) {
    for (int i = 0; i < 2; ++i) {
        for (int k = 0; k < 32; ++k) {
            const uint8_t a = p[2*i*nb + k%16];
            const uint8_t b = p[2*i*nb + nb + k%16];
            uint8_t * dst = res[i*32/V_LEN + k/V_LEN].v[k%V_LEN];
            const uint16_t pair[2] = { (uint16_t) (k < 16 ? a & 15 : a >> 4), (uint16_t) (k < 16 ? b & 15 : b >> 4) };
            memcpy(dst, pair, 4);
        }
    }
}

V_INLINE vi v_dot16(vi acc, vi x, int32_t w) {
    int16_t b[2];
    memcpy(b, &w, 4);
    for (int i = 0; i < V_LEN; ++i) {
        int16_t a[2];
        memcpy(a, x.v[i], 4);
        const int32_t sum = load_i32(acc.v[i]) + a[0]*b[0] + a[1]*b[1];
        memcpy(acc.v[i], &sum, 4);
    }
    return acc;
}
V_INLINE vi v_izero() { return {}; }
V_INLINE vi v_iset(int32_t x) { vi res; for (auto & y : res.v) { memcpy(y, &x, 4); } return res; }
V_INLINE vf v_from_int(vi x) { KVM_EACH((float) load_i32(x.v[i])); }
V_INLINE vi v_to_int(vf x) {
    vi res;
    for (int i = 0; i < V_LEN; ++i) {
        const int32_t y = (int32_t) std::nearbyint(x.v[i]);
        memcpy(res.v[i], &y, 4);
    }
    return res;
}
V_INLINE vi v_iadd(vi a, vi b) {
    for (int i = 0; i < V_LEN; ++i) {
        const int32_t sum = load_i32(a.v[i]) + load_i32(b.v[i]);
        memcpy(a.v[i], &sum, 4);
    }
    return a;
}
V_INLINE int32_t v_ihsum(vi x) { int32_t res = 0; for (const auto & y : x.v) { res += load_i32(y); } return res; }
V_INLINE vi v_iload(const void * p) { vi res; memcpy(res.v, p, sizeof(res.v)); return res; }
V_INLINE void v_istore(void * p, vi x) { memcpy(p, x.v, sizeof(x.v)); }
V_INLINE vi v_to_i16(vf a, vf b) {
    int16_t res[2*V_LEN];
    for (int i = 0; i < V_LEN; ++i) {
        res[i]         = (int16_t) std::nearbyint(a.v[i]);
        res[i + V_LEN] = (int16_t) std::nearbyint(b.v[i]);
    }
    return v_iload(res);
}
V_INLINE vi v_mulhrs16(vi a, vi b) {
    int16_t x[2*V_LEN];
    int16_t y[2*V_LEN];
    v_istore(x, a);
    v_istore(y, b);
    for (int i = 0; i < 2*V_LEN; ++i) {
        x[i] = (int16_t) ((x[i]*y[i] + (1 << 14)) >> 15);
    }
    return v_iload(x);
}
V_INLINE void v_store_i8(int8_t * p, vi x) { for (int i = 0; i < V_LEN; ++i) { p[i] = (int8_t) load_i32(x.v[i]); } }
V_INLINE vf v_abs(vf x) { KVM_EACH(std::fabs(x.v[i])); }
V_INLINE vi v_to_int_trunc(vf x) {
    vi res;
    for (int i = 0; i < V_LEN; ++i) {
        const int32_t y = (int32_t) x.v[i];
        memcpy(res.v[i], &y, 4);
    }
    return res;
}

V_INLINE void v_store_i4(uint8_t * p, const vi * x) {
    for (int i = 0; i < 16; ++i) {
        p[i] = (uint8_t) (load_i32(x[i/V_LEN].v[i%V_LEN]) | load_i32(x[i/V_LEN + 16/V_LEN].v[i%V_LEN]) << 4);
    }
}

V_INLINE vf v_hadamard(vf x) {
    for (int h = 1; h < V_LEN; h *= 2) {
        for (int i = 0; i < V_LEN; ++i) {
            if ((i & h) == 0) {
                const float a = x.v[i];
                const float b = x.v[i + h];
                x.v[i]     = a + b;
                x.v[i + h] = a - b;
            }
        }
    }
    return x;
}

#undef KVM_EACH

#endif

#if !defined(KVM_AVX512)
V_INLINE void v_transpose8(const uint8_t * p, size_t nb, vi res[8]) {
    v_transpose4(p,      nb, res);
    v_transpose4(p + 16, nb, res + 4);
}
#endif

// e^x, relative error below 4e-7 + |x|/2^24; 0 where x < -87
V_INLINE vf v_exp(vf x) {
    x = v_mul(v_max(x, v_set(-110.0f)), v_set(1.44269504f));
    const vf n = v_round(x);
    const vf f = v_mul(v_sub(x, n), v_set(0.693147181f)); // 2^f = e^(f ln 2), |f ln 2| <= 0.35: Taylor's series

    vf p = v_set(1.0f/720);
    p = v_fma(p, f, v_set(1.0f/120));
    p = v_fma(p, f, v_set(1.0f/24));
    p = v_fma(p, f, v_set(1.0f/6));
    p = v_fma(p, f, v_set(0.5f));
    p = v_fma(p, f, v_set(1.0f));
    p = v_fma(p, f, v_set(1.0f));

    return v_ldexp(p, n);
}

V_INLINE vf v_tanh(vf x) {
    const vf y = v_exp(v_mul(v_set(2.0f), v_min(v_max(x, v_set(-15.0f)), v_set(15.0f))));
    return v_div(v_sub(y, v_set(1.0f)), v_add(y, v_set(1.0f)));
}

V_INLINE float exp_1(float x) {
    float res[V_LEN];
    v_store(res, v_exp(v_set(x)));
    return res[0];
}

// the power of 2 that is 2^x or the next above; x <= 0; at least 2^-100, so that its inverse is no infinity
V_INLINE float pow2_above(float x) {
    const int n = x < -100.0f ? -100 : (int) x; // towards 0
    return f32_from_bits((uint32_t) (n + 127) << 23);
}

V_INLINE void prefetch(const uint8_t * p) {
#if defined(__GNUC__)
    __builtin_prefetch(p, 0, 2); // into the second level: the first has no room for two tiles
#else
    (void) p;
#endif
}

} // namespace
