// IQ4_NL: blocks of 32 values in 18 bytes, as ggml's: a scale (F16), then 16 bytes; byte i has the values i (low nibble) and
// i + 16, which are numbers of a value of the table below.

#pragma once

#include "formats/nibbles.h"
#include "formats/search.h"

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
// hot rows to these
//

constexpr table16 codes_iq4_nl = {{ 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 }};

alignas(64) constexpr nearest16 nearest_value_iq4_nl(values_iq4_nl, values_iq4_nl);
alignas(64) constexpr nearest16 nearest_code_iq4_nl (values_iq4_nl, codes_iq4_nl);

// see search_scale()
struct grid_iq4_nl {
    alignas(64) static constexpr float ends[N_SCALES] = {
        -127, -140, -135, -131, -124.5f, -122, -119.5f, -112, -108, -103, 90, 108, 112, 116, 120, 125,
    };

    static V_INLINE vf nearest(vf x) { return v_nearest(x, nearest_value_iq4_nl); }
};

void quantize_iq4_nl(const float * x, int64_t n, uint8_t * dst) {
    for (int64_t i = 0; i < n/BLOCK; ++i, x += BLOCK, dst += row_iq4_nl::size) {
        const block_f32 b(x);

        const float d  = search_scale<grid_iq4_nl>(x, b);
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
