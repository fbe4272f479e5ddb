// Floats as words of BF16, see products.h. For AVX-512 with BF16.

#pragma once

#include "attention/products.h"
#include "formats/tile.h"

namespace {

// 32 numbers side by side
V_INLINE vi words_of_row(vf a, vf b) { return (vi) _mm512_cvtne2ps_pbh(b, a); }

// 16 numbers of a row, and those below them
V_INLINE vi words_of_rows(vf a, vf b) {
    alignas(64) static constexpr uint16_t order[32] = {
        0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31,
    };
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), words_of_row(a, b));
}

void load_q_bf16(const float * Q, int64_t n_rows, int64_t ld, uint32_t * dst) {
    const int64_t n = n_rows*ld;
    for (int64_t i = 0; i < n; i += 2*V_LEN) {
        v_istore(dst + i/2, words_of_row(v_load(Q + i), v_load(Q + i + V_LEN)));
    }
    memset(dst + n/2, 0, (llama_kv_mixed_product_pad(n_rows)*ld - n)/2*sizeof(uint32_t));
}

// 16 rows of 16 words, turned round
V_INLINE void transpose16(vi x[16], uint32_t * dst, int64_t ld) {
    vi y[16];
KVM_UNROLL
    for (int i = 0; i < 16; i += 4) {
        const vi a = _mm512_unpacklo_epi32(x[i],     x[i + 1]);
        const vi b = _mm512_unpackhi_epi32(x[i],     x[i + 1]);
        const vi c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]);
        const vi d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
        // y[4g + w]: words w, w + 4, w + 8, w + 12 of rows 4g to 4g + 3
        y[i]     = _mm512_unpacklo_epi64(a, c);
        y[i + 1] = _mm512_unpackhi_epi64(a, c);
        y[i + 2] = _mm512_unpacklo_epi64(b, d);
        y[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
KVM_UNROLL
    for (int w = 0; w < 4; ++w) {
        const vi a = _mm512_shuffle_i32x4(y[w],     y[4  + w], 0x88); // quarters 0 and 2 of rows 0 to 7
        const vi b = _mm512_shuffle_i32x4(y[w],     y[4  + w], 0xDD); // 1 and 3
        const vi c = _mm512_shuffle_i32x4(y[8 + w], y[12 + w], 0x88);
        const vi d = _mm512_shuffle_i32x4(y[8 + w], y[12 + w], 0xDD);
        v_istore(dst + (w     )*ld, _mm512_shuffle_i32x4(a, c, 0x88));
        v_istore(dst + (w +  4)*ld, _mm512_shuffle_i32x4(b, d, 0x88));
        v_istore(dst + (w +  8)*ld, _mm512_shuffle_i32x4(a, c, 0xDD));
        v_istore(dst + (w + 12)*ld, _mm512_shuffle_i32x4(b, d, 0xDD));
    }
}

void load_k_bf16(const float * K, int j, int64_t ld, uint32_t * dst) {
    for (int64_t i = 0; i < ld; i += 32) {
        for (int k = 0; k < LLAMA_KV_MIXED_PRODUCT_CELLS; k += 16) {
            vi x[16];
KVM_UNROLL
            for (int r = 0; r < 16; ++r) {
                const float * row = K + (k + r)*ld + i;
                x[r] = words_of_row(v_load(row), v_load(row + V_LEN));
            }
            transpose16(x, dst + i/2*TILE + j + k, TILE);
        }
    }
}

void load_v_bf16(const float * V, int j, int64_t ld, uint32_t * dst) {
    dst += j/2*ld;
    for (int k = 0; k < LLAMA_KV_MIXED_PRODUCT_CELLS; k += 2, V += 2*ld, dst += ld) {
        for (int64_t i = 0; i < ld; i += V_LEN) {
            v_istore(dst + i, words_of_rows(v_load(V + i), v_load(V + ld + i)));
        }
    }
}

void load_p_bf16(float * P, int64_t n_rows) {
    float * dst = P;
    for (int64_t r = 0; r < n_rows; ++r, P += TILE, dst += TILE/2) {
        for (int i = 0; i < TILE; i += 2*V_LEN) {
            v_istore(dst + i/2, words_of_row(v_load(P + i), v_load(P + i + V_LEN)));
        }
    }
    memset(dst, 0, (llama_kv_mixed_product_pad(n_rows) - n_rows)*TILE/2*sizeof(float));
}

} // namespace
