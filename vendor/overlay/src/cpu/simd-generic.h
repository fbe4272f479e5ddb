// Vectors in portable C++, which compilers turn into whatever they can.

#pragma once

namespace {

constexpr int V_LEN = 8;
constexpr int V_ROWS_DOT  = 2;
constexpr int V_ROWS_DOT8 = 2;
constexpr int V_ROWS_ACC  = 2;
constexpr int V_GEMM_ROWS = 4;
constexpr int V_GEMM_VECS = 2;
constexpr int V_ROWS_INT  = 1;
constexpr bool V_FAST_DOT  = false;
constexpr bool V_FAST_DOT8 = false;

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
V_INLINE vf v_max_bits(vf a, vf b) { KVM_EACH(b.v[i] <= a.v[i] || std::isnan(a.v[i]) ? a.v[i] : b.v[i]); }
V_INLINE float v_hmax_bits(vf x) { float res = x.v[0]; for (float y : x.v) { res = y <= res || std::isnan(res) ? res : y; } return res; }
V_INLINE uint32_t v_above(vf x, vf y) { uint32_t res = 0; for (int i = 0; i < V_LEN; ++i) { res |= (uint32_t) (x.v[i] > y.v[i]) << i; } return res; }
V_INLINE vf v_hide(vf x, vf mask) { KVM_EACH(mask.v[i] == -INFINITY ? mask.v[i] : x.v[i]); }
V_INLINE vf v_fma(vf a, vf b, vf c) { KVM_EACH(a.v[i]*b.v[i] + c.v[i]); }
V_INLINE float v_hsum(vf x) { float res = 0.0f; for (float y : x.v) { res += y; } return res; }
V_INLINE float v_hmax(vf x) { float res = x.v[0]; for (float y : x.v) { res = y > res ? y : res; } return res; }
V_INLINE vf v_round(vf x) { KVM_EACH(std::nearbyint(x.v[i])); }
V_INLINE vf v_split(vf x, vf & n) {
    // adding 1.5*2^23 rounds, and leaves the whole number in the last bits
    const vf whole = v_set(12582912.0f);
    x = v_max(v_set(-126.5f), x);
    n = v_add(v_sub(x, v_set(0.5f)), whole);
    return v_sub(x, v_sub(n, whole));
}
V_INLINE vf v_ldexp(vf x, vf n) {
    uint32_t bits[V_LEN];
    memcpy(bits, n.v, sizeof(bits));
    for (int i = 0; i < V_LEN; ++i) {
        bits[i] = (bits[i] + 127) << 23; // -127: that of 0
    }
    vf y;
    memcpy(y.v, bits, sizeof(bits));
    return v_mul(x, y);
}

V_INLINE void v_hsum4(float * dst, vf a, vf b, vf c, vf d) {
    dst[0] = v_hsum(a); dst[1] = v_hsum(b); dst[2] = v_hsum(c); dst[3] = v_hsum(d);
}

V_INLINE void v_hmax4(float * dst, vf a, vf b, vf c, vf d) {
    dst[0] = v_hmax(a); dst[1] = v_hmax(b); dst[2] = v_hmax(c); dst[3] = v_hmax(d);
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
V_INLINE int load_nibble(const uint8_t * p, int k) { return k < 16 ? p[k] & 15 : p[k - 16] >> 4; }
V_INLINE int load_five(const uint8_t * p, int k) { return load_nibble(p + 4, k) | (p[k/8] >> k%8 & 1) << 4; }

V_INLINE vf v_load_i5(const uint8_t * p, int k) { KVM_EACH((float) load_five(p, V_LEN*k + i)); }
V_INLINE vf v_load_i4(const uint8_t * p, int k) {
    KVM_EACH((float) (load_nibble(p, V_LEN*k + i) - 8));
}
V_INLINE vf v_load_t4(const uint8_t * p, int k, const table16 & t) {
    KVM_EACH((float) t.v[load_nibble(p, V_LEN*k + i)]);
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

V_INLINE vi v_join16(vi a, vi b) {
    for (int i = 0; i < V_LEN; ++i) {
        memcpy(a.v[i],     a.v[i] + 2, 2);
        memcpy(a.v[i] + 2, b.v[i],     2);
    }
    return a;
}
V_INLINE vi v_fifth(vi x, vi bits, int first) {
    for (int i = 0; i < V_LEN; ++i) {
        for (int j = 0; j < 4; ++j) {
            const int k = first + j;
            x.v[i][j] |= k >= 0 && k < 32 ? (bits.v[i][k/8] >> k%8 & 1) << 4 : 0;
        }
    }
    return x;
}

constexpr int V_DOT_SUMS = 1;
constexpr int V_DOT_BITS = 32;
V_INLINE va v_dot_zero() { return {}; }
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
V_INLINE vi v_dot_int(va acc) { vi res; memcpy(res.v, acc.v, sizeof(res.v)); return res; }

constexpr int V_DOT8_BIAS = 0;
V_INLINE vi v_bias8(vi x) { return x; }
V_INLINE vi v_dot8(vi acc, vi x, int32_t s) {
    int8_t b[4];
    memcpy(b, &s, 4);
    for (int i = 0; i < V_LEN; ++i) {
        int32_t sum;
        memcpy(&sum, acc.v[i], 4);
        for (int j = 0; j < 4; ++j) {
            sum += (int8_t) x.v[i][j]*b[j];
        }
        memcpy(acc.v[i], &sum, 4);
    }
    return acc;
}

V_INLINE vi v_table_lo(vi x, const table16 & t) { for (auto & y : x.v) { for (uint8_t & z : y) { z = (uint8_t) t.v[z & 15]; } } return x; }
V_INLINE vi v_table_hi(vi x, const table16 & t) { for (auto & y : x.v) { for (uint8_t & z : y) { z = (uint8_t) t.v[z >> 4]; } } return x; }

// value(row, k): value k of a block in this row
template <class F>
V_INLINE void load_pairs(vi * res, const F & value) {
    for (int i = 0; i < 2; ++i) {
        for (int k = 0; k < 32; ++k) {
            const int16_t pair[2] = { (int16_t) value(2*i, k), (int16_t) value(2*i + 1, k) };
            memcpy(res[i*32/V_LEN + k/V_LEN].v[k%V_LEN], pair, 4);
        }
    }
}

V_INLINE void v_load_i4_pairs(const uint8_t * p, size_t nb, vi * res) {
    load_pairs(res, [&](int row, int k) { return load_nibble(p + row*nb, k); });
}

V_INLINE void v_load_t4_pairs(const uint8_t * p, size_t nb, vi * res, const table16 & t) {
    load_pairs(res, [&](int row, int k) { return t.v[load_nibble(p + row*nb, k)]; });
}

V_INLINE void v_load_i5_pairs(const uint8_t * p, size_t nb, vi * res) {
    load_pairs(res, [&](int row, int k) { return load_five(p + row*nb, k); });
}

V_INLINE void v_load_i8_pairs(const uint8_t * p, size_t nb, vi * res) {
    load_pairs(res, [&](int row, int k) { return (int8_t) p[row*nb + k]; });
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
V_INLINE uint16_t f16_from_f32(float x) { return ggml_fp32_to_fp16(x); }
V_INLINE vf v_round_f16(vf x) { KVM_EACH(f32_from_f16(f16_from_f32(x.v[i]))); }
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

V_INLINE void v_store_i5(uint8_t * p, const vi * x) {
    for (int i = 0; i < 4; ++i) {
        p[i] = 0;
    }
    for (int i = 0; i < 16; ++i) {
        const int32_t a = load_i32(x[i/V_LEN].v[i%V_LEN]);
        const int32_t b = load_i32(x[i/V_LEN + 16/V_LEN].v[i%V_LEN]);
        p[4 + i] = (uint8_t) ((a & 15) | (b & 15) << 4);
        p[    i/8] |= (uint8_t) (a >> 4 << i%8);
        p[2 + i/8] |= (uint8_t) (b >> 4 << i%8);
    }
}

using nearest16 = ranges16;
V_INLINE vf v_nearest(vf x, const nearest16 & t) {
    vf res;
    for (int i = 0; i < V_LEN; ++i) {
        const float y = x.v[i]*ranges16::factor + (ranges16::first + 0.5f);
        const int   k = y > 0.0f && y < 32.0f ? (int) y : 0; // what is not a number, too
        res.v[i] = x.v[i] >= t.mid[k] ? t.hi[k] : t.lo[k];
    }
    return res;
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

} // namespace
