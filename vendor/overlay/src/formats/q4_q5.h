// Q4_0, Q4_1, Q5_0, Q5_1: values in equal steps, see nibbles.h. Those of Q4_0 and Q5_0 have 8 or 16 added as they are stored,
// those of Q4_1 and Q5_1 are steps above the minimum.

#pragma once

#include "formats/nibbles.h"
#include "formats/search.h"

namespace {

constexpr table16 values_u4 = {{ 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 }};

template <int n_bits, bool has_min>
struct row_steps : row_nibbles<n_bits, has_min> {
    using base = row_nibbles<n_bits, has_min>;

    static constexpr int bias     = has_min ? 0 : 1 << (n_bits - 1);
    static constexpr int bias_acc = 1 << (n_bits - 1);

    static constexpr int first = n_bits == 5 ? base::at - 4 : base::at; // byte of all bits of the values

    static V_INLINE vf load(const uint8_t * row, int64_t b, int i) {
        const uint8_t * x = row + b*base::size + first;
        if constexpr (n_bits == 5) {
            return has_min ? v_load_i5(x, i) : v_sub(v_load_i5(x, i), v_set(bias));
        }
        return has_min ? v_load_t4(x, i, values_u4) : v_load_i4(x, i);
    }

    static V_INLINE void load_pairs(const uint8_t * p, size_t nb, vi * res) {
        n_bits == 5 ? v_load_i5_pairs(p + first, nb, res) : v_load_i4_pairs(p + first, nb, res);
    }

    using sum = sum_u8;
    static V_INLINE vi lo(vi word) { return v_nibble_lo(word); }
    static V_INLINE vi hi(vi word) { return v_nibble_hi(word); }

    template <int N> using pair = nibble_pair<row_steps, N>;
};

//
// hot rows to these: Q5_0 with a searched scale, the others bit for bit as ggml's quantize_row_*_ref() gives them without
// fused multiplication and addition
//

// see search_scale()
struct grid_q5_0 {
    alignas(64) static constexpr float ends[N_SCALES] = {
        -16, -16.85f, -16.6f, -16.4f, -16.2f, -15.85f, -15.65f, -15.25f, -15, -14.75f, -14.3f, -14.05f, -13.75f, -13.25f, -12.9f, -12.1f,
    };

    static V_INLINE vf nearest(vf x) {
        const vf y = v_min(v_max(v_add(x, v_set(16.5f)), v_zero()), v_set(31.0f));
        return v_sub(v_from_int(v_to_int_trunc(y)), v_set(16.0f));
    }
};

// the scale, and the minimum: what all values of a block are above
struct steps {
    float d;
    float min;
};

// the largest value in size is at the end, or near it where the scale is searched
template <int n_bits>
V_INLINE steps get_steps(const float * x, const block_f32 & b) {
    return { n_bits == 5 ? search_scale<grid_q5_0>(x, b) : largest(x, b)/-(1 << (n_bits - 1)), 0.0f };
}

// from the smallest to the largest one
template <int n_bits>
V_INLINE steps get_steps_above(const float * x, const block_f32 & b) {
    const float max =  b.max([](vf y) { return y; });
    float       min = -b.max([](vf y) { return v_sub(v_zero(), y); });
    const float d   = max == min ? 0.0f : (max - min)/((1 << n_bits) - 1);
    if (min == 0.0f) {
        // with the sign of the first zero
        for (int i = BLOCK - 1; i >= 0; --i) {
            min = x[i] == 0.0f ? x[i] : min;
        }
    }
    return { d, min };
}

template <int n_bits, bool has_min>
void quantize_steps(const float * x, int64_t n, uint8_t * dst) {
    using row = row_steps<n_bits, has_min>;

    for (int64_t i = 0; i < n/BLOCK; ++i, x += BLOCK, dst += row::size) {
        const block_f32 b(x);

        const steps s  = has_min ? get_steps_above<n_bits>(x, b) : get_steps<n_bits>(x, b);
        const float id = s.d != 0.0f ? 1.0f/s.d : 0.0f;

        store_scale(dst, s.d);
        if constexpr (has_min) {
            store_scale(dst + 2, s.min);
        }

        vi q[V_BLOCK];
KVM_UNROLL
        for (int j = 0; j < V_BLOCK; ++j) {
            const vf y = v_mul(has_min ? v_sub(b.v[j], v_set(s.min)) : b.v[j], v_set(id));
            q[j] = v_to_int_trunc(v_min(v_max(v_add(y, v_set(row::bias + 0.5f)), v_zero()), v_set((1 << n_bits) - 1)));
        }
        n_bits == 5 ? v_store_i5(dst + row::first, q) : v_store_i4(dst + row::first, q);
    }
}

constexpr auto format_q4_0 = make_nibble_format<row_steps<4, false>>("q4_0", GGML_TYPE_Q4_0, quantize_steps<4, false>);
constexpr auto format_q4_1 = make_nibble_format<row_steps<4, true >>("q4_1", GGML_TYPE_Q4_1, quantize_steps<4, true >);
constexpr auto format_q5_0 = make_nibble_format<row_steps<5, false>>("q5_0", GGML_TYPE_Q5_0, quantize_steps<5, false>);
constexpr auto format_q5_1 = make_nibble_format<row_steps<5, true >>("q5_1", GGML_TYPE_Q5_1, quantize_steps<5, true >);

} // namespace
