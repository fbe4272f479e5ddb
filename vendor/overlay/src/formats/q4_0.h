// Q4_0: blocks of 32 values in 18 bytes, as ggml's: a scale (F16), then 16 bytes; byte i has the values i (low nibble) and
// i + 16, with 8 added.

#pragma once

#include "formats/float.h"
#include "formats/int-acc.h"
#include "formats/int-dot.h"

namespace {

struct row_q4_0 {
    static constexpr bool scaled = true;
    static constexpr int  size   = 18;
    static constexpr int  bias   = 8;

    static V_INLINE vf load(const uint8_t * row, int64_t b, int i) { return v_load_i4(row + b*size + 2, i); }

    static V_INLINE void load_pairs(const uint8_t * p, size_t nb, vi * res) { v_load_i4_pairs(p, nb, res); }

    struct query;
    template <int N> struct pair;
    static constexpr int n_pairs = 2;
};

//
// hot rows to these
//

// Bit for bit what ggml's quantize_row_q4_0_ref() gives without fused multiplication and addition.
V_INLINE void quantize_block_q4_0(const float * x, uint8_t * dst) {
    const block_f32 b(x);

    const float hi =  b.max([](vf y) { return y; });
    const float lo = -b.max([](vf y) { return v_sub(v_zero(), y); });

    // the value that is largest in size, with its sign; the first one where there are two
    float max = hi > -lo ? hi : lo;
    if (hi == -lo) {
        max = 0.0f;
        for (int i = 0; i < BLOCK && max == 0.0f; ++i) {
            max = x[i] == hi || x[i] == lo ? x[i] : 0.0f;
        }
        max = max == 0.0f ? 0.0f : max; // no negative zero
    }

    const float d  = max/-8;
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

//
// K: the query in 8 bits
//

// Two blocks are 36 bytes, nine words: [d0 | 16 bytes | d1 | 16 bytes]. Word 4 has the end of the first block and the scale
// of the second.
struct row_q4_0::query {
    int32_t word[18]; // [0, 9) meet the low nibbles, [9, 18) the high ones
    float   d  [2];   // scale of the query's block
    int32_t sum[2];   // -8 times the sum of its values: nibbles are stored with 8 added
};

void load_query_q4_0(const float * Q, int64_t n_embd, void * query, int64_t r, int64_t n_rows) {
    auto * dst = (row_q4_0::query *) query + r; // pair by pair, n_rows from one to the next

    for (int64_t i = 0; i < n_embd/(2*BLOCK); ++i, dst += n_rows) {
        int8_t byte[2][36] = {};
        for (int b = 0; b < 2; ++b) {
            int32_t sum;
            dst->d  [b] = quantize_query(Q + (2*i + b)*BLOCK, byte[0] + 18*b + 2, byte[1] + 18*b + 2, sum);
            dst->sum[b] = -row_q4_0::bias*sum;
        }
        memcpy(dst->word, byte, sizeof(byte));
    }
}

template <int N>
struct row_q4_0::pair {
    // of their own for low and high nibbles where registers allow it: the additions of one sum wait for each other
    va s[2][V_DOT_SUMS][N];
    vf d[2];

    V_INLINE void clear() {
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
KVM_UNROLL
            for (int i = 0; i < V_DOT_SUMS; ++i) {
                s[0][i][r] = s[1][i][r] = v_dot_zero();
            }
        }
    }

    V_INLINE void add(vi word, int w, const query * Q) {
        if (w == 0) {
            clear();
            d[0] = v_f16_lo(word);
        } else if (w == 4) {
            d[1] = v_f16_hi(word);
        }
        const vi lo = v_nibble_lo(word);
        const vi hi = v_nibble_hi(word);
        auto & sum = s[w/5];
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
            sum[0][r] = v_dot(sum[0][r], lo, Q[r].word[w]);
        }
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
            sum[V_DOT_SUMS - 1][r] = v_dot(sum[V_DOT_SUMS - 1][r], hi, Q[r].word[w + 9]);
            KVM_KEEP(sum[V_DOT_SUMS - 1][r]);
        }
    }

    V_INLINE void add_to(vf acc[N], const query * Q) const {
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
KVM_UNROLL
            for (int b = 0; b < 2; ++b) {
                const va sum = V_DOT_SUMS == 2 ? v_dot_add(s[b][0][r], s[b][1][r]) : s[b][0][r];
                acc[r] = v_fma(v_dot_sum(sum, Q[r].sum[b]), v_mul(d[b], v_set(Q[r].d[b])), acc[r]);
            }
        }
    }
};

constexpr llama_kv_mixed_format format_q4_0 = {
    "q4_0", GGML_TYPE_Q4_0, nullptr, quantize_q4_0, expand_float<row_q4_0>, dot_int<row_q4_0>, acc_int<row_q4_0>,
    sizeof(row_q4_0::query), load_query_q4_0,
};

} // namespace
