// Vectors of NEON, with the dot products of Armv8.2 where the compiler may use them.

#pragma once

#include <arm_neon.h>

namespace {

constexpr int V_LEN = 4;
constexpr int V_ROWS_DOT  = 4;
constexpr int V_ROWS_DOT8 = 4;
constexpr int V_ROWS_ACC  = 3;
constexpr int V_GEMM_ROWS = 6;
constexpr int V_GEMM_VECS = 4;
constexpr int V_ROWS_INT  = 4;
#if defined(__ARM_FEATURE_DOTPROD)
constexpr bool V_FAST_DOT  = true;
#else
constexpr bool V_FAST_DOT  = false;
#endif
constexpr bool V_FAST_DOT8 = V_FAST_DOT;

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
V_INLINE uint32_t v_above(vf x, vf y) { const uint32x4_t bit = { 1, 2, 4, 8 }; return vaddvq_u32(vandq_u32(vcgtq_f32(x, y), bit)); }
V_INLINE vf v_hide(vf x, vf mask) { return vbslq_f32(vceqq_f32(mask, vdupq_n_f32(-INFINITY)), mask, x); }
V_INLINE vf v_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
V_INLINE float v_hsum(vf x) { return vaddvq_f32(x); }
V_INLINE float v_hmax(vf x) { return vmaxvq_f32(x); }
V_INLINE vf v_round(vf x) { return vrndnq_f32(x); }
V_INLINE vf v_split(vf x, vf & n) {
    x = vmaxq_f32(vdupq_n_f32(-127.0f), x);
    n = vrndmq_f32(x);
    return vsubq_f32(x, n);
}
V_INLINE vf v_ldexp(vf x, vf n) {
    const int32x4_t e = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23); // -127: that of 0
    return vmulq_f32(x, vreinterpretq_f32_s32(e));
}

V_INLINE void v_hsum4(float * dst, vf a, vf b, vf c, vf d) {
    vst1q_f32(dst, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}

V_INLINE void v_hmax4(float * dst, vf a, vf b, vf c, vf d) {
    vst1q_f32(dst, vpmaxq_f32(vpmaxq_f32(a, b), vpmaxq_f32(c, d)));
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

V_INLINE vf v_load_i5(const uint8_t * p, int i) {
    const uint8x8_t  x    = vreinterpret_u8_s32(vdup_n_s32(load_i32(p + 4 + 4*(i & 3))));
    const uint8x8_t  low  = i < 4 ? vand_u8(x, vdup_n_u8(15)) : vshr_n_u8(x, 4);
    const uint32_t   at[4] = { 1u << 4*i, 2u << 4*i, 4u << 4*i, 8u << 4*i };
    const uint32x4_t high = vandq_u32(vtstq_u32(vdupq_n_u32((uint32_t) load_i32(p)), vld1q_u32(at)), vdupq_n_u32(16));
    return vcvtq_f32_u32(vorrq_u32(vmovl_u16(vget_low_u16(vmovl_u8(low))), high));
}

V_INLINE vf v_load_t4(const uint8_t * p, int i, const table16 & t) {
    const uint8x8_t x = vreinterpret_u8_s32(vdup_n_s32(load_i32(p + 4*(i & 3))));
    const uint8x8_t u = i < 4 ? vand_u8(x, vdup_n_u8(15)) : vshr_n_u8(x, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vqtbl1_s8(vld1q_s8(t.v), u)))));
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

V_INLINE vi v_join16(vi a, vi b) {
    return vreinterpretq_u8_u32(vsliq_n_u32(vshrq_n_u32(vreinterpretq_u32_u8(a), 16), vreinterpretq_u32_u8(b), 16));
}

V_INLINE vi v_fifth(vi x, vi bits, int first) {
    const uint32x4_t y    = vshlq_u32(vreinterpretq_u32_u8(bits), vdupq_n_s32(-first));
    const uint8x16_t copy = vreinterpretq_u8_u32(vmulq_n_u32(vandq_u32(y, vdupq_n_u32(15)), 0x01010101));
    return vorrq_u8(x, vandq_u8(vtstq_u8(copy, vreinterpretq_u8_u32(vdupq_n_u32(0x08040201))), vdupq_n_u8(16)));
}

constexpr int V_DOT_SUMS = 2;
constexpr int V_DOT_BITS = 32;
V_INLINE va v_dot_zero() { return vdupq_n_s32(0); }
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
V_INLINE vi v_dot_int(va acc) { return vreinterpretq_u8_s32(acc); }

constexpr int V_DOT8_BIAS = 0;
V_INLINE vi v_bias8(vi x) { return x; }
V_INLINE vi v_dot8(vi acc, vi x, int32_t s) { return vreinterpretq_u8_s32(v_dot(vreinterpretq_s32_u8(acc), x, s)); }

V_INLINE vi v_table_lo(vi x, const table16 & t) { return vqtbl1q_u8(vreinterpretq_u8_s8(vld1q_s8(t.v)), v_nibble_lo(x)); }
V_INLINE vi v_table_hi(vi x, const table16 & t) { return vqtbl1q_u8(vreinterpretq_u8_s8(vld1q_s8(t.v)), v_nibble_hi(x)); }

// 16 signed bytes of each of two rows: four lanes of the first row, then four of the second, which is what v_dot16 multiplies
V_INLINE void widen_pairs(vi x, vi y, vi * res) {
    const int8x16_t a = vreinterpretq_s8_u8(x);
    const int8x16_t b = vreinterpretq_s8_u8(y);
    const uint64x2_t a0 = vreinterpretq_u64_s16(vmovl_s8(vget_low_s8(a))), a1 = vreinterpretq_u64_s16(vmovl_s8(vget_high_s8(a)));
    const uint64x2_t b0 = vreinterpretq_u64_s16(vmovl_s8(vget_low_s8(b))), b1 = vreinterpretq_u64_s16(vmovl_s8(vget_high_s8(b)));
    res[0] = vreinterpretq_u8_u64(vtrn1q_u64(a0, b0));
    res[1] = vreinterpretq_u8_u64(vtrn2q_u64(a0, b0));
    res[2] = vreinterpretq_u8_u64(vtrn1q_u64(a1, b1));
    res[3] = vreinterpretq_u8_u64(vtrn2q_u64(a1, b1));
}

V_INLINE void v_load_i4_pairs(const uint8_t * p, size_t nb, vi * res) {
    for (int i = 0; i < 2; ++i) {
        const vi a = vld1q_u8(p + 2*i*nb);
        const vi b = vld1q_u8(p + 2*i*nb + nb);
        widen_pairs(v_nibble_lo(a), v_nibble_lo(b), res + 8*i);
        widen_pairs(v_nibble_hi(a), v_nibble_hi(b), res + 8*i + 4);
    }
}

V_INLINE void v_load_t4_pairs(const uint8_t * p, size_t nb, vi * res, const table16 & t) {
    for (int i = 0; i < 2; ++i) {
        const vi a = vld1q_u8(p + 2*i*nb);
        const vi b = vld1q_u8(p + 2*i*nb + nb);
        widen_pairs(v_table_lo(a, t), v_table_lo(b, t), res + 8*i);
        widen_pairs(v_table_hi(a, t), v_table_hi(b, t), res + 8*i + 4);
    }
}

V_INLINE void v_load_i5_pairs(const uint8_t * p, size_t nb, vi * res) {
    const auto fifth = [](vi x, const uint8_t * bits) {
        const uint8x16_t copy = vcombine_u8(vdup_n_u8(bits[0]), vdup_n_u8(bits[1]));
        const uint8x16_t bit  = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
        return vorrq_u8(x, vandq_u8(vtstq_u8(copy, bit), vdupq_n_u8(16)));
    };
    for (int i = 0; i < 2; ++i) {
        const uint8_t * a = p + 2*i*nb;
        const uint8_t * b = a + nb;
        const vi x = vld1q_u8(a + 4);
        const vi y = vld1q_u8(b + 4);
        widen_pairs(fifth(v_nibble_lo(x), a),     fifth(v_nibble_lo(y), b),     res + 8*i);
        widen_pairs(fifth(v_nibble_hi(x), a + 2), fifth(v_nibble_hi(y), b + 2), res + 8*i + 4);
    }
}

V_INLINE void v_load_i8_pairs(const uint8_t * p, size_t nb, vi * res) {
    for (int i = 0; i < 4; ++i) {
        const uint8_t * x = p + 2*(i/2)*nb + 16*(i%2);
        widen_pairs(vld1q_u8(x), vld1q_u8(x + nb), res + 4*i);
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
V_INLINE vf v_max_bits(vf a, vf b) { return vreinterpretq_f32_s32(vmaxq_s32(vreinterpretq_s32_f32(a), vreinterpretq_s32_f32(b))); }
V_INLINE float v_hmax_bits(vf x) { return f32_from_bits((uint32_t) vmaxvq_s32(vreinterpretq_s32_f32(x))); }
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
V_INLINE uint16_t f16_from_f32(float x) { return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0); }
V_INLINE vf v_round_f16(vf x) { return vcvt_f32_f16(vcvt_f16_f32(x)); }
V_INLINE vi v_to_int_trunc(vf x) { return vreinterpretq_u8_s32(vcvtq_s32_f32(x)); }

V_INLINE void v_store_i4(uint8_t * p, const vi * x) {
    uint16x4_t y[4];
    for (int i = 0; i < 4; ++i) {
        y[i] = vmovn_u32(vorrq_u32(vreinterpretq_u32_u8(x[i]), vshlq_n_u32(vreinterpretq_u32_u8(x[i + 4]), 4)));
    }
    vst1q_u8(p, vcombine_u8(vmovn_u16(vcombine_u16(y[0], y[1])), vmovn_u16(vcombine_u16(y[2], y[3]))));
}

V_INLINE void v_store_i5(uint8_t * p, const vi * x) {
    const uint32x4_t at = { 1, 2, 4, 8 };
    uint32_t bits = 0;
    vi low[8];
    for (int i = 0; i < 8; ++i) {
        const uint32x4_t y = vreinterpretq_u32_u8(x[i]);
        bits |= vaddvq_u32(vandq_u32(vtstq_u32(y, vdupq_n_u32(16)), at)) << 4*i;
        low[i] = vreinterpretq_u8_u32(vandq_u32(y, vdupq_n_u32(15)));
    }
    memcpy(p, &bits, 4);
    v_store_i4(p + 4, low);
}

// in ranges of 8 that begin at -128: how many half steps into it the nearest value changes (16: not), and to the how manieth
struct nearest16 {
    uint8_t at   [32];
    uint8_t first[32];
    int8_t  value[16];

    constexpr nearest16(const table16 & values, const table16 & result) : at(), first(), value() {
        for (int i = 0; i < 32; ++i) {
            const int begin = 2*(8*i - 128);
            int k = 0;
            while (k < 15 && values.v[k] + values.v[k + 1] < begin) {
                k++;
            }
            const int step = k < 15 ? values.v[k] + values.v[k + 1] - begin : 16;
            at   [i] = (uint8_t) (step < 16 ? step : 16);
            first[i] = (uint8_t) k;
        }
        for (int i = 0; i < 16; ++i) {
            value[i] = result.v[i];
        }
    }
};

V_INLINE vf v_nearest(vf x, const nearest16 & t) {
    // borders are whole numbers of half steps, so that whole ones of x can be compared with them
    int32x4_t n = vcvtmq_s32_f32(vaddq_f32(x, x));
    n = vminq_s32(vmaxq_s32(n, vdupq_n_s32(-256)), vdupq_n_s32(255));
    // look-ups in the lowest byte of a lane; what is no index gives 0
    const uint32x4_t none  = vdupq_n_u32(0xFFFFFF00);
    const uint8x16_t range = vreinterpretq_u8_u32(vorrq_u32(vreinterpretq_u32_s32(vaddq_s32(vshrq_n_s32(n, 4), vdupq_n_s32(16))), none));
    const uint32x4_t at    = vreinterpretq_u32_u8(vqtbl2q_u8(vld1q_u8_x2(t.at),    range));
    const uint32x4_t first = vreinterpretq_u32_u8(vqtbl2q_u8(vld1q_u8_x2(t.first), range));
    const uint32x4_t above = vcgeq_u32(vandq_u32(vreinterpretq_u32_s32(n), vdupq_n_u32(15)), at);
    const uint8x16_t k     = vreinterpretq_u8_u32(vorrq_u32(vsubq_u32(first, above), none));
    const int32x4_t  value = vreinterpretq_s32_s8(vqtbl1q_s8(vld1q_s8(t.value), k));
    return vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(value, 24), 24));
}

V_INLINE vf v_hadamard(vf x) {
    vf a = vtrn1q_f32(x, x);
    vf b = vtrn2q_f32(x, x);
    x = vtrn1q_f32(vaddq_f32(a, b), vsubq_f32(a, b));
    a = vcombine_f32(vget_low_f32 (x), vget_low_f32 (x));
    b = vcombine_f32(vget_high_f32(x), vget_high_f32(x));
    return vcombine_f32(vget_low_f32(vaddq_f32(a, b)), vget_low_f32(vsubq_f32(a, b)));
}

} // namespace
