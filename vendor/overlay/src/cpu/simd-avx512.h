// Vectors of AVX-512 (F, BW, DQ, VL, VNNI, VBMI).

#pragma once

#include <immintrin.h>

namespace {

constexpr int V_LEN = 16;
constexpr int V_ROWS_DOT  = 4;
constexpr int V_ROWS_DOT8 = 8;
constexpr int V_ROWS_ACC  = 8;
constexpr int V_GEMM_ROWS = 6;
constexpr int V_GEMM_VECS = 4;
constexpr int V_ROWS_INT  = 5;
constexpr bool V_FAST_DOT  = true;
constexpr bool V_FAST_DOT8 = true;

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
// x, and -infinity where mask is that
V_INLINE uint32_t v_above(vf x, vf y) { return _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ); } // bit i: x[i] > y[i]
V_INLINE void v_compress(void * dst, const void * src, uint32_t bits) { _mm512_storeu_si512(dst, _mm512_maskz_compress_epi32((__mmask16) bits, _mm512_loadu_si512(src))); }
V_INLINE vf v_hide(vf x, vf mask) { return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(mask, _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ), mask); }
V_INLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
V_INLINE float v_hsum(vf x) { return _mm512_reduce_add_ps(x); }
V_INLINE float v_hmax(vf x) { return _mm512_reduce_max_ps(x); }
V_INLINE vf v_round(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x as n and what is above the whole number below it, 0 to 1; n: what v_ldexp() takes
V_INLINE vf v_split(vf x, vf & n) {
    n = x;
    return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); // 0 for infinities
}
// x*2^n for what v_split() gives, 0 where 2^n is below the smallest number
V_INLINE vf v_ldexp(vf x, vf n) { return _mm512_scalef_ps(x, n); } // n is rounded down there

V_INLINE void v_hsum4(float * dst, vf a, vf b, vf c, vf d) {
    const auto half = [](__m512 x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); };
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
    _mm_storeu_ps(dst, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

// the largest of each
V_INLINE void v_hmax4(float * dst, vf a, vf b, vf c, vf d) {
    const __m512 ab = _mm512_max_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    const __m512 cd = _mm512_max_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
    const __m512 s  = _mm512_max_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD)); // four of each
    const __m512 t  = _mm512_max_ps(s, _mm512_permute_ps(s, 0x4E));
    const __m512 u  = _mm512_max_ps(t, _mm512_permute_ps(t, 0xB1));
    _mm_storeu_ps(dst, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, u)));
}

V_INLINE vf v_load_f16(const uint8_t * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
V_INLINE vf v_load_bf16(const uint8_t * p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p)), 16));
}
V_INLINE vf v_load_i8(const uint8_t * p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p))); }

// V_LEN of 32 values of five bits: four bytes with their highest bits, then 16 with the nibbles below these
V_INLINE vf v_load_i5(const uint8_t * p, int i) {
    const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) (p + 4)));
    const __m512i low = i == 0 ? _mm512_and_si512(x, _mm512_set1_epi32(15)) : _mm512_srli_epi32(x, 4);
    return _mm512_cvtepi32_ps(_mm512_mask_or_epi32(low, load_u16(p + 2*i), low, _mm512_set1_epi32(16)));
}

// V_LEN values of 16 bytes that hold 32 nibbles, as the table has them
V_INLINE vf v_load_t4(const uint8_t * p, int i, const table16 & t) {
    const __m512  values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) t.v)));
    const __m512i x      = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) p));
    return _mm512_permutexvar_ps(i == 0 ? x : _mm512_srli_epi32(x, 4), values); // looks at the lower four bits only
}
// the same, less 8
constexpr table16 table_i4 = {{ -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7 }};
V_INLINE vf v_load_i4(const uint8_t * p, int i) { return v_load_t4(p, i, table_i4); }

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

// the upper half of every lane of a, below the lower half of that of b
V_INLINE vi v_join16(vi a, vi b) { return _mm512_or_si512(_mm512_srli_epi32(a, 16), _mm512_slli_epi32(b, 16)); }

// the four bytes of every lane of x, plus 16 where bits first to first + 3 of that of bits are set; first: from -2
V_INLINE vi v_fifth(vi x, vi bits, int first) {
    // eight bits for every byte, from that on which comes four before its own
    const __m512i bytes = _mm512_set4_epi32(0x23222120, 0x03020100, 0x23222120, 0x03020100);
    const __m512i from  = _mm512_add_epi8(bytes, _mm512_set1_epi8((char) (first - 4)));
    // x | (y & 16)
    return _mm512_ternarylogic_epi32(x, _mm512_multishift_epi64_epi8(from, bits), _mm512_set1_epi8(16), 0xF8);
}

// acc += the four unsigned bytes of every lane of u times the four signed ones of s
// V_DOT_SUMS: sums at a time, so that additions need not wait for each other; V_DOT_BITS: of a sum
constexpr int V_DOT_SUMS = 2;
constexpr int V_DOT_BITS = 32;
V_INLINE va v_dot_zero() { return _mm512_setzero_si512(); }
V_INLINE va v_dot(va acc, vi u, int32_t s) { return _mm512_dpbusd_epi32(acc, u, _mm512_set1_epi32(s)); }
V_INLINE vi v_dot_int(va acc) { return acc; }

// acc += the four bytes of every lane of x times the four of s; x: signed bytes with V_DOT8_BIAS added to each
constexpr int V_DOT8_BIAS = 128;
V_INLINE vi v_bias8(vi x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }
V_INLINE vi v_dot8(vi acc, vi x, int32_t s) { return _mm512_dpbusd_epi32(acc, x, _mm512_set1_epi32(s)); }

// what the table has for the low, the high nibble of every byte, with V_DOT8_BIAS added
V_INLINE vi v_table_lo(vi x, const table16 & t) {
    // looks at the lower six bits, so that every value is there four times
    return _mm512_permutexvar_epi8(x, v_bias8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) t.v))));
}
V_INLINE vi v_table_hi(vi x, const table16 & t) { return v_table_lo(_mm512_srli_epi32(x, 4), t); }

// 16 bytes of each of four rows: a lane per byte, which has those of rows 0, 2, 1, 3
V_INLINE vi load_rows4(const uint8_t * p, size_t nb) {
    const __m512i bytes = _mm512_set_epi8(
        63, 31, 47, 15, 62, 30, 46, 14, 61, 29, 45, 13, 60, 28, 44, 12, 59, 27, 43, 11, 58, 26, 42, 10, 57, 25, 41,  9, 56, 24, 40,  8,
        55, 23, 39,  7, 54, 22, 38,  6, 53, 21, 37,  5, 52, 20, 36,  4, 51, 19, 35,  3, 50, 18, 34,  2, 49, 17, 33,  1, 48, 16, 32,  0);
    __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *) p));
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *) (p +   nb)), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *) (p + 2*nb)), 2);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *) (p + 3*nb)), 3);
    return _mm512_permutexvar_epi8(bytes, x);
}

// 32 nibbles of each of four rows: a lane per element, 16 bits per row; V_BLOCK vectors of rows 0 and 1, then of 2 and 3
V_INLINE void v_load_i4_pairs(const uint8_t * p, size_t nb, vi * res) {
    const __m512i low = _mm512_set1_epi16(15);
    const __m512i x   = load_rows4(p, nb);
    res[0] = _mm512_and_si512(x, low);
    res[1] = _mm512_and_si512(_mm512_srli_epi16(x, 4), low);
    res[2] = _mm512_and_si512(_mm512_srli_epi16(x, 8), low);
    res[3] = _mm512_srli_epi16(x, 12);
}

// the same as the table has them
V_INLINE void v_load_t4_pairs(const uint8_t * p, size_t nb, vi * res, const table16 & t) {
    const __m256i half   = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *) t.v));
    const __m512i values = _mm512_broadcast_i64x4(half); // twice: what looks at the lower five bits
    const __m512i x      = load_rows4(p, nb);
    res[0] = _mm512_permutexvar_epi16(x, values);
    res[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(x,  4), values);
    res[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(x,  8), values);
    res[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(x, 12), values);
}

// 32 values of five bits of each of four rows, see v_load_i5()
V_INLINE void v_load_i5_pairs(const uint8_t * p, size_t nb, vi * res) {
    v_load_i4_pairs(p + 4, nb, res);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    // where eight bits begin whose fifth one is that of an element, of the first row and in the other half of a lane of the second
    const __m512i from = _mm512_add_epi8(_mm512_or_si512(lane, _mm512_slli_epi32(lane, 16)), _mm512_set1_epi32(0x001C00FC));
    for (int i = 0; i < 2; ++i) {
        const uint64_t rows = (uint32_t) load_i32(p + 2*i*nb) | (uint64_t) (uint32_t) load_i32(p + 2*i*nb + nb) << 32;
        const __m512i bits = _mm512_set1_epi64((int64_t) rows);
        for (int h = 0; h < 2; ++h) {
            const __m512i y = _mm512_multishift_epi64_epi8(_mm512_add_epi8(from, _mm512_set1_epi32(h*0x00100010)), bits);
            res[2*i + h] = _mm512_ternarylogic_epi32(res[2*i + h], y, _mm512_set1_epi16(16), 0xF8);
        }
    }
}

// 32 bytes of each of four rows, likewise
V_INLINE void v_load_i8_pairs(const uint8_t * p, size_t nb, vi * res) {
    // a lane has the values i and i + 16 of the first row, then those of the second
    const __m512i bytes = _mm512_set_epi8(
        63, 47, 31, 15, 62, 46, 30, 14, 61, 45, 29, 13, 60, 44, 28, 12, 59, 43, 27, 11, 58, 42, 26, 10, 57, 41, 25,  9, 56, 40, 24,  8,
        55, 39, 23,  7, 54, 38, 22,  6, 53, 37, 21,  5, 52, 36, 20,  4, 51, 35, 19,  3, 50, 34, 18,  2, 49, 33, 17,  1, 48, 32, 16,  0);
    for (int i = 0; i < 2; ++i) {
        __m512i x = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) (p + 2*i*nb)));
        x = _mm512_inserti64x4(x, _mm256_loadu_si256((const __m256i *) (p + 2*i*nb + nb)), 1);
        x = _mm512_permutexvar_epi8(bytes, x);
        res[2*i    ] = _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8);
        res[2*i + 1] = _mm512_srai_epi16(x, 8);
    }
}

// acc += the two 16-bit numbers of every lane of x times those of w
V_INLINE vi v_dot16(vi acc, vi x, int32_t w) { return _mm512_dpwssd_epi32(acc, x, _mm512_set1_epi32(w)); }
V_INLINE vi v_izero() { return _mm512_setzero_si512(); }
V_INLINE vi v_iset(int32_t x) { return _mm512_set1_epi32(x); }
V_INLINE vf v_from_int(vi x) { return _mm512_cvtepi32_ps(x); }
V_INLINE vi v_to_int(vf x) { return _mm512_cvtps_epi32(x); }
V_INLINE vi v_iadd(vi a, vi b) { return _mm512_add_epi32(a, b); }
V_INLINE int32_t v_ihsum(vi x) { return _mm512_reduce_add_epi32(x); }
// the larger ones of numbers that are not negative, whose bits are compared: what is not a number is above all others
V_INLINE vf v_max_bits(vf a, vf b) { return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b))); }
V_INLINE float v_hmax_bits(vf x) { return f32_from_bits((uint32_t) _mm512_reduce_max_epi32(_mm512_castps_si512(x))); }
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
V_INLINE uint16_t f16_from_f32(float x) { return (uint16_t) _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
V_INLINE vf v_round_f16(vf x) { return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
// towards 0
V_INLINE vi v_to_int_trunc(vf x) { return _mm512_cvttps_epi32(x); }

// 32 numbers from 0 to 15 as nibbles of 16 bytes
V_INLINE void v_store_i4(uint8_t * p, const vi * x) {
    _mm_storeu_si128((__m128i *) p, _mm512_cvtepi32_epi8(_mm512_or_si512(x[0], _mm512_slli_epi32(x[1], 4))));
}

// 32 numbers from 0 to 31, see v_load_i5()
V_INLINE void v_store_i5(uint8_t * p, const vi * x) {
    const __m512i bit = _mm512_set1_epi32(16);
    const uint32_t bits = _mm512_test_epi32_mask(x[0], bit) | (uint32_t) _mm512_test_epi32_mask(x[1], bit) << 16;
    memcpy(p, &bits, 4);
    const vi low[2] = { _mm512_and_si512(x[0], _mm512_set1_epi32(15)), _mm512_and_si512(x[1], _mm512_set1_epi32(15)) };
    v_store_i4(p + 4, low);
}

// What stands for the nearest of 16 values, for the larger one of two that are as near; |x| up to 140.
using nearest16 = ranges16;
V_INLINE vf v_nearest(vf x, const nearest16 & t) {
    // the range is in the last bits of this sum, of which look-ups use five
    const __m512i i = _mm512_castps_si512(_mm512_fmadd_ps(x, v_set(ranges16::factor), v_set(ranges16::first + 0x1p23f)));
    const __m512 mid = _mm512_permutex2var_ps(v_load(t.mid), i, v_load(t.mid + 16));
    const __m512 lo  = _mm512_permutex2var_ps(v_load(t.lo),  i, v_load(t.lo  + 16));
    const __m512 hi  = _mm512_permutex2var_ps(v_load(t.hi),  i, v_load(t.hi  + 16));
    return _mm512_mask_mov_ps(lo, _mm512_cmp_ps_mask(x, mid, _CMP_GE_OQ), hi);
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

} // namespace
