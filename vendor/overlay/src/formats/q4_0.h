// Q4_0: blocks of 32 values in 18 bytes, as ggml's: a scale (F16), then 16 bytes; byte i has the values i (low nibble) and
// i + 16, with 8 added.

#pragma once

#include "formats/nibbles.h"

namespace {

struct row_q4_0 : row_nibbles<18, 2> {
    static constexpr int bias     = 8;
    static constexpr int bias_acc = 8;

    static V_INLINE vf load(const uint8_t * row, int64_t b, int i) { return v_load_i4(row + b*size + at, i); }

    static V_INLINE void load_pairs(const uint8_t * p, size_t nb, vi * res) { v_load_i4_pairs(p + at, nb, res); }

    using sum = sum_u8;
    static V_INLINE vi lo(vi word) { return v_nibble_lo(word); }
    static V_INLINE vi hi(vi word) { return v_nibble_hi(word); }

    template <int N> using pair = nibble_pair<row_q4_0, N>;
};

//
// hot rows to these
//

// Bit for bit what ggml's quantize_row_q4_0_ref() gives without fused multiplication and addition.
V_INLINE void quantize_block_q4_0(const float * x, uint8_t * dst) {
    const block_f32 b(x);

    const float d  = largest(x, b)/-8;
    const float id = d != 0.0f ? 1.0f/d : 0.0f;

    store_scale(dst, d);

    vi q[V_BLOCK];
KVM_UNROLL
    for (int i = 0; i < V_BLOCK; ++i) {
        q[i] = v_to_int_trunc(v_min(v_add(v_mul(b.v[i], v_set(id)), v_set(8.5f)), v_set(15.0f)));
    }
    v_store_i4(dst + 2, q);
}

void quantize_q4_0(const float * x, int64_t n, uint8_t * dst) {
    for (int64_t b = 0; b < n/BLOCK; ++b) {
        quantize_block_q4_0(x + b*BLOCK, dst + b*row_q4_0::size);
    }
}

constexpr auto format_q4_0 = make_nibble_format<row_q4_0>("q4_0", GGML_TYPE_Q4_0, quantize_q4_0);

} // namespace
