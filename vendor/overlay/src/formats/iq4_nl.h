// IQ4_NL: blocks of 32 values in 18 bytes, as ggml's: a scale (F16), then 16 bytes; byte i has the values i (low nibble) and
// i + 16, which are numbers of a value of the table below.

#pragma once

#include "formats/nibbles.h"

namespace {

constexpr table16 values_iq4_nl = {{ -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 }};

struct row_iq4_nl : row_nibbles<4, false> {
    static constexpr int bias     = V_DOT8_BIAS;
    static constexpr int bias_acc = 0;

    static V_INLINE vf load(const uint8_t * row, int64_t b, int i) { return v_load_t4(row + b*size + at, i, values_iq4_nl); }

    static V_INLINE void load_pairs(const uint8_t * p, size_t nb, vi * res) { v_load_t4_pairs(p + at, nb, res, values_iq4_nl); }

    using sum = sum_i8;
    static V_INLINE vi lo(vi word) { return v_table_lo(word, values_iq4_nl); }
    static V_INLINE vi hi(vi word) { return v_table_hi(word, values_iq4_nl); }

    template <int N> using pair = nibble_pair<row_iq4_nl, N>;
};

//
// hot rows to these, with a searched scale
//

// Of 16 scales the one is taken that leaves the least squared error. Each gives every value of a block the nearest one of the
// table; for these the best scale is that of least squares, rounded to F16. The first of the 16 is ggml's
// (quantize_row_iq4_nl_ref()): the largest value goes to the end of the table. The others bring it a bit beyond either end, or
// not quite there. They are those that do best together on values with a normal and a Laplace distribution: their error is
// within 0.3 % of what can be had at all, ggml's is 10 to 20 % above.
// Sums are taken value by value, for all scales side by side: every instruction set gives the same bits.

constexpr int N_SCALES = 16;

// where the largest value of a block goes
alignas(64) constexpr float ends_iq4_nl[N_SCALES] = {
    -127, -140, -135, -131, -124.5f, -122, -119.5f, -112, -108, -103, 90, 108, 112, 116, 120, 125,
};

constexpr table16 codes_iq4_nl = {{ 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 }};

alignas(64) constexpr nearest16 nearest_value_iq4_nl(values_iq4_nl, values_iq4_nl);
alignas(64) constexpr nearest16 nearest_code_iq4_nl (values_iq4_nl, codes_iq4_nl);

// The scale of a block. Its error is not above that with ggml's: others must be better by more than F32 may be wrong. A gain
// (see below) is off by 2^-18 of the sum of squares at most, as it is twice a sum of 32 rounded products, and by another 2^-19
// without its last four bits; the two that are compared differ from each other by less than 2^-16 for nothing.
V_INLINE float search_scale_iq4_nl(const float * x, const block_f32 & b) {
    constexpr int N_VEC = N_SCALES/V_LEN;

    const float max = largest(x, b);
    if (fabsf(max) < 1e-15f) { // as ggml has it: the scale would be 0 in F16
        return 0.0f;
    }

    alignas(64) float factor[N_SCALES]; // inverse scales
    alignas(64) float d     [N_SCALES];
    alignas(64) float gain  [N_SCALES]; // by how much the squared error is below that of zeros

    for (int c = 0; c < N_SCALES; c += V_LEN) {
        v_store(factor + c, v_div(v_load(ends_iq4_nl + c), v_set(max)));
    }
    factor[0] = 1.0f/(max/values_iq4_nl.v[0]); // with ggml's roundings

    vf sum_qx[N_VEC];
    vf sum_qq[N_VEC];
KVM_UNROLL
    for (int c = 0; c < N_VEC; ++c) {
        sum_qx[c] = sum_qq[c] = v_zero();
    }
    for (int i = 0; i < BLOCK; ++i) {
        const vf y = v_set(x[i]);
KVM_UNROLL
        for (int c = 0; c < N_VEC; ++c) {
            const vf q = v_nearest(v_mul(y, v_load(factor + c*V_LEN)), nearest_value_iq4_nl);
            sum_qx[c] = v_add(sum_qx[c], v_mul(q, y));
            sum_qq[c] = v_fma(q, q, sum_qq[c]); // whole numbers
        }
    }
KVM_UNROLL
    for (int c = 0; c < N_VEC; ++c) {
        const vf y = v_round_f16(v_div(sum_qx[c], sum_qq[c]));
        v_store(d + c*V_LEN, y);
        v_store(gain + c*V_LEN, v_mul(y, v_sub(v_add(sum_qx[c], sum_qx[c]), v_mul(y, sum_qq[c]))));
    }

    // the number of a scale takes the place of the last four bits of its gain: the largest one is found without branches
    gain[0] *= 1.0f + 0x1p-16f;
    int32_t most = 0;
    for (int c = 0; c < N_SCALES; ++c) {
        const int32_t y = (load_i32(gain + c) & ~15) | c;
        most = y > most ? y : most;
    }
    return d[most & 15];
}

void quantize_iq4_nl(const float * x, int64_t n, uint8_t * dst) {
    for (int64_t i = 0; i < n/BLOCK; ++i, x += BLOCK, dst += row_iq4_nl::size) {
        const block_f32 b(x);

        const float d  = search_scale_iq4_nl(x, b);
        const float id = d != 0.0f ? 1.0f/d : 0.0f;

        store_scale(dst, d);

        vi q[V_BLOCK];
KVM_UNROLL
        for (int j = 0; j < V_BLOCK; ++j) {
            const vf y = v_min(v_max(v_mul(b.v[j], v_set(id)), v_set(-127.0f)), v_set(113.0f));
            q[j] = v_to_int(v_nearest(y, nearest_code_iq4_nl));
        }
        v_store_i4(dst + row_iq4_nl::at, q);
    }
}

constexpr auto format_iq4_nl = make_nibble_format<row_iq4_nl>("iq4_nl", GGML_TYPE_IQ4_NL, quantize_iq4_nl);

} // namespace
