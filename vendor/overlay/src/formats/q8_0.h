// Q8_0: blocks of 32 values in 34 bytes, as ggml's: a scale (F16), then 32 bytes.

#pragma once

#include "formats/float.h"
#include "formats/int-acc.h"
#include "formats/int-dot.h"

namespace {

struct row_q8_0 {
    static constexpr bool scaled   = true;
    static constexpr bool has_min  = false;
    static constexpr int  size     = 34;
    static constexpr int  bias_acc = 0;

    static V_INLINE vf load(const uint8_t * row, int64_t b, int i) { return v_load_i8(row + b*size + 2 + i*V_LEN); }

    static V_INLINE void load_pairs(const uint8_t * p, size_t nb, vi * res) { v_load_i8_pairs(p + 2, nb, res); }

    struct query;
    template <int N> struct pair;
    static constexpr int n_pairs = 1;
};

//
// hot rows to these
//

// What ggml's vector code for x86 gives. Elsewhere a value in the middle of two steps may go to the other one.
V_INLINE void quantize_block_q8_0(const float * x, uint8_t * dst) {
    const block_f32 b(x);

    const float max = b.max([](vf y) { return v_abs(y); });
    const float id  = max != 0.0f ? 127.0f/max : 0.0f;

    store_scale(dst, max/127.0f);

KVM_UNROLL
    for (int i = 0; i < V_BLOCK; ++i) {
        v_store_i8((int8_t *) dst + 2 + i*V_LEN, v_to_int(v_mul(b.v[i], v_set(id))));
    }
}

void quantize_q8_0(const float * x, int64_t n, uint8_t * dst) {
    for (int64_t b = 0; b < n/BLOCK; ++b) {
        quantize_block_q8_0(x + b*BLOCK, dst + b*row_q8_0::size);
    }
}

//
// K: the query in 16 bits
//

// Values of a query's block are whole numbers up to 127*255 + 127 in size: 255 times one of 8 bits, and the rest, another one.
// (8 bits alone would add as much error as these rows have.)
//
// Two blocks are 68 bytes, 17 words: [d0 | 32 bytes | d1 | 32 bytes]. Word 8 has the end of the first block and the scale of
// the second.
struct row_q8_0::query {
    int32_t word[17][2]; // the larger parts, the smaller ones
    float   d  [2];      // scale of the query's block
    int32_t sum[2][2];   // what V_DOT8_BIAS makes of them, negative
};

void load_query_q8_0(const float * Q, int64_t n_embd, void * query, int64_t r, int64_t n_rows) {
    constexpr float most = 127*255 + 127;

    auto * dst = (row_q8_0::query *) query + r; // pair by pair, n_rows from one to the next

    for (int64_t i = 0; i < n_embd/(2*BLOCK); ++i, dst += n_rows) {
        int8_t byte[2][2*row_q8_0::size] = {};
        for (int b = 0; b < 2; ++b) {
            const block_f32 x(Q + (2*i + b)*BLOCK);
            const float amax = x.max([](vf y) { return v_abs(y); });

            const vf scale = v_set(amax > 0.0f ? most/amax : 0.0f);
            vi total[2] = { v_izero(), v_izero() };
KVM_UNROLL
            for (int j = 0; j < V_BLOCK; ++j) {
                const vf y    = v_round(v_mul(x.v[j], scale));
                const vi hi   = v_to_int(v_mul(y, v_set(1.0f/255)));
                const vi lo   = v_to_int(v_sub(y, v_mul(v_from_int(hi), v_set(255.0f))));
                const int pos = b*row_q8_0::size + 2 + j*V_LEN;
                v_store_i8(byte[0] + pos, hi);
                v_store_i8(byte[1] + pos, lo);
                total[0] = v_iadd(total[0], hi);
                total[1] = v_iadd(total[1], lo);
            }
            dst->d  [b]    = amax/most;
            dst->sum[b][0] = -V_DOT8_BIAS*v_ihsum(total[0]);
            dst->sum[b][1] = -V_DOT8_BIAS*v_ihsum(total[1]);
        }
        for (int w = 0; w < 17; ++w) {
            dst->word[w][0] = load_i32(byte[0] + 4*w);
            dst->word[w][1] = load_i32(byte[1] + 4*w);
        }
    }
}

template <int N>
struct row_q8_0::pair {
    vi s[2][2][N];
    vf d[2];

    V_INLINE void clear() {
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
            s[0][0][r] = s[0][1][r] = s[1][0][r] = s[1][1][r] = v_izero();
        }
    }

    V_INLINE void add(vi word, int w, const query * Q) {
        if (w == 0) {
            clear();
            d[0] = v_f16_lo(word);
        } else if (w == 8) {
            d[1] = v_f16_hi(word);
        }
        const vi biased = v_bias8(word);
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
KVM_UNROLL
            for (int i = 0; i < 2; ++i) {
                vi & sum = s[w/9][i][r];
                sum = v_dot8(sum, biased, Q[r].word[w][i]);
                KVM_KEEP(sum);
            }
        }
    }

    V_INLINE void add_to(vf acc[N], const query * Q) const {
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
KVM_UNROLL
            for (int b = 0; b < 2; ++b) {
                const vf hi = v_from_int(v_iadd(s[b][0][r], v_iset(Q[r].sum[b][0])));
                const vf lo = v_from_int(v_iadd(s[b][1][r], v_iset(Q[r].sum[b][1])));
                acc[r] = v_fma(v_fma(hi, v_set(255.0f), lo), v_mul(d[b], v_set(Q[r].d[b])), acc[r]);
            }
        }
    }
};

constexpr llama_kv_mixed_format format_q8_0 = {
    "q8_0", GGML_TYPE_Q8_0, nullptr, quantize_q8_0, expand_float<row_q8_0>, dot_int<row_q8_0>, acc_int<row_q8_0>,
    sizeof(row_q8_0::query), load_query_q8_0, nullptr, nullptr, false,
};

} // namespace
