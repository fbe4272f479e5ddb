// Vectors of AVX2 with FMA and F16C, and the dot products of AVX-VNNI where the compiler may use them.

#pragma once

#include <immintrin.h>

namespace {

constexpr int V_LEN = 8;
constexpr int V_ROWS_DOT  = 4;
constexpr int V_ROWS_DOT8 = 4;
constexpr int V_ROWS_ACC  = 3;
constexpr int V_GEMM_ROWS = 6;
constexpr int V_GEMM_VECS = 2;
constexpr int V_ROWS_INT  = 3;
constexpr bool V_FAST_DOT  = true;
#if defined(__AVXVNNI__)
constexpr bool V_FAST_DOT8 = true;
#else
constexpr bool V_FAST_DOT8 = false;
#endif

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
V_INLINE uint32_t v_above(vf x, vf y) { return (uint32_t) _mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_GT_OQ)); }
V_INLINE vf v_hide(vf x, vf mask) { return _mm256_blendv_ps(x, mask, _mm256_cmp_ps(mask, _mm256_set1_ps(-INFINITY), _CMP_EQ_OQ)); }
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
V_INLINE vf v_split(vf x, vf & n) {
    x = _mm256_max_ps(_mm256_set1_ps(-127.0f), x);
    n = _mm256_floor_ps(x);
    return _mm256_sub_ps(x, n);
}
V_INLINE vf v_ldexp(vf x, vf n) {
    const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23); // -127: that of 0
    return _mm256_mul_ps(x, _mm256_castsi256_ps(e));
}

V_INLINE void v_hsum4(float * dst, vf a, vf b, vf c, vf d) {
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(dst, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

V_INLINE void v_hmax4(float * dst, vf a, vf b, vf c, vf d) {
    const __m256 ab = _mm256_max_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); // two of a, two of b in turn, in each half
    const __m256 cd = _mm256_max_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const __m256 s  = _mm256_max_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
    _mm_storeu_ps(dst, _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
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

V_INLINE vf v_load_i5(const uint8_t * p, int i) {
    const __m256i x    = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) (p + 4 + 8*(i & 1))));
    const __m256i low  = i < 2 ? _mm256_and_si256(x, _mm256_set1_epi32(15)) : _mm256_srli_epi32(x, 4);
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i bit  = _mm256_srlv_epi32(_mm256_set1_epi32(load_i32(p)), _mm256_add_epi32(lane, _mm256_set1_epi32(8*i)));
    return _mm256_cvtepi32_ps(_mm256_or_si256(low, _mm256_slli_epi32(_mm256_and_si256(bit, _mm256_set1_epi32(1)), 4)));
}

V_INLINE vf v_load_t4(const uint8_t * p, int i, const table16 & t) {
    const __m128i x = _mm_loadl_epi64((const __m128i *) (p + 8*(i & 1)));
    const __m128i u = _mm_and_si128(i < 2 ? x : _mm_srli_epi32(x, 4), _mm_set1_epi8(15));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_shuffle_epi8(_mm_loadu_si128((const __m128i *) t.v), u)));
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

V_INLINE vi v_join16(vi a, vi b) { return _mm256_or_si256(_mm256_srli_epi32(a, 16), _mm256_slli_epi32(b, 16)); }

V_INLINE vi v_fifth(vi x, vi bits, int first) {
    const __m256i y    = first < 0 ? _mm256_slli_epi32(bits, -first) : _mm256_srli_epi32(bits, first);
    const __m256i copy = _mm256_set_epi8(12, 12, 12, 12, 8, 8, 8, 8, 4, 4, 4, 4, 0, 0, 0, 0, 12, 12, 12, 12, 8, 8, 8, 8, 4, 4, 4, 4, 0, 0, 0, 0);
    const __m256i bit  = _mm256_set1_epi32(0x08040201);
    const __m256i set  = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(y, copy), bit), bit);
    return _mm256_or_si256(x, _mm256_and_si256(set, _mm256_set1_epi8(16)));
}

constexpr int V_DOT_SUMS = 1;
V_INLINE va v_dot_zero() { return _mm256_setzero_si256(); }

#if defined(__AVXVNNI__)

constexpr int V_DOT_BITS = 32;
V_INLINE va v_dot(va acc, vi u, int32_t s) { return _mm256_dpbusd_avx_epi32(acc, u, _mm256_set1_epi32(s)); }
V_INLINE vi v_dot_int(va acc) { return acc; }

constexpr int V_DOT8_BIAS = 128;
V_INLINE vi v_bias8(vi x) { return _mm256_xor_si256(x, _mm256_set1_epi8(-128)); }
V_INLINE vi v_dot8(vi acc, vi x, int32_t s) { return v_dot(acc, x, s); }

#else

// Sums of 16 bits: up to 16 products of [0, 15] and [-127, 127] each, |sum| <= 30480; 8 of [0, 31], |sum| <= 31496.
constexpr int V_DOT_BITS = 16;
V_INLINE va v_dot(va acc, vi u, int32_t s) { return _mm256_add_epi16(acc, _mm256_maddubs_epi16(u, _mm256_set1_epi32(s))); }
V_INLINE vi v_dot_int(va acc) { return _mm256_madd_epi16(acc, _mm256_set1_epi16(1)); }

// two products of bytes up to 128 and 127 in size fit in 16 bits, four do not
constexpr int V_DOT8_BIAS = 0;
V_INLINE vi v_bias8(vi x) { return x; }
V_INLINE vi v_dot8(vi acc, vi x, int32_t s) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(_mm256_set1_epi32(s), x));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#endif

V_INLINE vi load_table(const table16 & t) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) t.v)); }
V_INLINE vi v_table_lo(vi x, const table16 & t) { return _mm256_shuffle_epi8(v_bias8(load_table(t)), v_nibble_lo(x)); }
V_INLINE vi v_table_hi(vi x, const table16 & t) { return _mm256_shuffle_epi8(v_bias8(load_table(t)), v_nibble_hi(x)); }

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

V_INLINE void v_load_t4_pairs(const uint8_t * p, size_t nb, vi * res, const table16 & t) {
    for (int i = 0; i < 2; ++i) {
        const __m128i a = _mm_loadu_si128((const __m128i *) (p + 2*i*nb));
        const __m128i b = _mm_loadu_si128((const __m128i *) (p + 2*i*nb + nb));
        const __m256i x = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi8(a, b)), _mm_unpackhi_epi8(a, b), 1);
        const vi y[2] = { _mm256_shuffle_epi8(load_table(t), v_nibble_lo(x)), _mm256_shuffle_epi8(load_table(t), v_nibble_hi(x)) };
        for (int h = 0; h < 2; ++h) {
            res[4*i + 2*h    ] = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(y[h]));
            res[4*i + 2*h + 1] = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(y[h], 1));
        }
    }
}

// 16 signed bytes of each of two rows
V_INLINE void widen_pairs(__m128i a, __m128i b, vi * res) {
    res[0] = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b));
    res[1] = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b));
}

V_INLINE void v_load_i5_pairs(const uint8_t * p, size_t nb, vi * res) {
    const __m256i copy = _mm256_set_epi8(3, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m256i bit  = _mm256_set1_epi64x(0x8040201008040201);
    __m256i x[4];
    for (int i = 0; i < 4; ++i) {
        const __m128i y   = _mm_loadu_si128((const __m128i *) (p + i*nb + 4));
        const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(y), _mm_srli_epi16(y, 4), 1);
        const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(load_i32(p + i*nb)), copy), bit), bit);
        x[i] = _mm256_or_si256(v_nibble_lo(low), _mm256_and_si256(set, _mm256_set1_epi8(16)));
    }
    for (int i = 0; i < 2; ++i) {
        widen_pairs(_mm256_castsi256_si128(x[2*i]), _mm256_castsi256_si128(x[2*i + 1]), res + 4*i);
        widen_pairs(_mm256_extracti128_si256(x[2*i], 1), _mm256_extracti128_si256(x[2*i + 1], 1), res + 4*i + 2);
    }
}

V_INLINE void v_load_i8_pairs(const uint8_t * p, size_t nb, vi * res) {
    for (int i = 0; i < 4; ++i) {
        const uint8_t * x = p + 2*(i/2)*nb + 16*(i%2);
        widen_pairs(_mm_loadu_si128((const __m128i *) x), _mm_loadu_si128((const __m128i *) (x + nb)), res + 2*i);
    }
}

V_INLINE vi v_dot16(vi acc, vi x, int32_t w) {
#if defined(__AVXVNNI__)
    return _mm256_dpwssd_avx_epi32(acc, x, _mm256_set1_epi32(w));
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(x, _mm256_set1_epi32(w)));
#endif
}
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
V_INLINE vf v_max_bits(vf a, vf b) { return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b))); }
V_INLINE float v_hmax_bits(vf x) {
    const __m256i y = _mm256_castps_si256(x);
    __m128i s = _mm_max_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    return f32_from_bits((uint32_t) _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xB1))));
}
V_INLINE __m128i pack_i16(vi x) { return _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)); }
V_INLINE vi v_iload(const void * p) { return _mm256_loadu_si256((const __m256i *) p); }
V_INLINE void v_istore(void * p, vi x) { _mm256_storeu_si256((__m256i *) p, x); }
V_INLINE vi v_to_i16(vf a, vf b) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(v_to_int(a), v_to_int(b)), 0xD8); }
V_INLINE vi v_mulhrs16(vi a, vi b) { return _mm256_mulhrs_epi16(a, b); }
V_INLINE void v_store_i8(int8_t * p, vi x) { _mm_storel_epi64((__m128i *) p, _mm_packs_epi16(pack_i16(x), pack_i16(x))); }
V_INLINE vf v_abs(vf x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
V_INLINE uint16_t f16_from_f32(float x) { return (uint16_t) _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
V_INLINE vf v_round_f16(vf x) { return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
V_INLINE vi v_to_int_trunc(vf x) { return _mm256_cvttps_epi32(x); }

V_INLINE void v_store_i4(uint8_t * p, const vi * x) {
    const __m256i a = _mm256_or_si256(x[0], _mm256_slli_epi32(x[2], 4));
    const __m256i b = _mm256_or_si256(x[1], _mm256_slli_epi32(x[3], 4));
    const __m256i y = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8);
    _mm_storeu_si128((__m128i *) p, _mm_packus_epi16(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1)));
}

V_INLINE void v_store_i5(uint8_t * p, const vi * x) {
    uint32_t bits = 0;
    vi low[4];
    for (int i = 0; i < 4; ++i) {
        bits |= (uint32_t) _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_slli_epi32(x[i], 27))) << 8*i;
        low[i] = _mm256_and_si256(x[i], _mm256_set1_epi32(15));
    }
    memcpy(p, &bits, 4);
    v_store_i4(p + 4, low);
}

// a search by halves: where the nearest of all values, of a half of them, ... changes, and in the end to what
struct nearest16 {
    alignas(32) float mid[4][8];
    alignas(32) float lo [8];
    alignas(32) float hi [8];

    constexpr nearest16(const table16 & values, const table16 & result) : mid(), lo(), hi() {
        for (int level = 0; level < 4; ++level) {
            for (int i = 0; i < 1 << level; ++i) {
                const int k = (2*i + 1)*(8 >> level);
                mid[level][i] = (values.v[k - 1] + values.v[k])/2.0f;
            }
        }
        for (int i = 0; i < 8; ++i) {
            lo[i] = result.v[2*i];
            hi[i] = result.v[2*i + 1];
        }
    }
};

V_INLINE vf v_nearest(vf x, const nearest16 & t) {
    const auto above = [x](__m256 mid) { return _mm256_cmp_ps(x, mid, _CMP_GE_OQ); };
    __m256i i = _mm256_srli_epi32(_mm256_castps_si256(above(v_set(t.mid[0][0]))), 31);
    for (int level = 1; level < 3; ++level) {
        const __m256 y = above(_mm256_permutevar8x32_ps(v_load(t.mid[level]), i));
        i = _mm256_sub_epi32(_mm256_add_epi32(i, i), _mm256_castps_si256(y));
    }
    const __m256 y = above(_mm256_permutevar8x32_ps(v_load(t.mid[3]), i));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(v_load(t.lo), i), _mm256_permutevar8x32_ps(v_load(t.hi), i), y);
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

} // namespace
