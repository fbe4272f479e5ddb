// Q4_0: blocks of 32 values in 18 bytes, as ggml's: a scale (F16), then 16 bytes; byte i has the values i (low nibble) and
// i + 16, with 8 added.

#pragma once

#include "formats/float.h"
#include "formats/int-acc.h"
#include "formats/int-query.h"

namespace {

struct row_q4_0 {
    static constexpr bool scaled = true;
    static constexpr int  size   = 18;
    static constexpr int  bias   = 8;

    static V_INLINE vf load(const uint8_t * row, int64_t b, int i) { return v_load_i4(row + b*size + 2, i); }

    static V_INLINE void load_pairs(const uint8_t * p, size_t nb, vi * res) { v_load_i4_pairs(p, nb, res); }
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
// K: the query in 8 bits, a lane per cell
//

// Two blocks are 36 bytes, nine words: [d0 | 16 bytes | d1 | 16 bytes]. The query is laid out likewise, with zeros where
// the scales are: words [0, 9) meet the low nibbles, [9, 18) the high ones. Word 4 has the end of the first block and
// the scale of the second.
struct query_q4_0 {
    int32_t word[18];
    float   d  [2]; // scale of the query's block
    int32_t sum[2]; // -8 times the sum of its values: nibbles are stored with 8 added
};

void load_query_q4_0(const float * Q, int64_t n_embd, void * query, int64_t r, int64_t n_rows) {
    query_q4_0 * dst = (query_q4_0 *) query + r; // pair by pair, n_rows from one to the next

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

// word w of every cell with that of N queries
// (sums of their own for low and high nibbles where registers allow it: the additions of one sum wait for each other)
template <int N>
V_INLINE void dot_word(va sum[V_DOT_SUMS][N], vi word, const query_q4_0 * Q, int w) {
    const vi lo = v_nibble_lo(word);
    const vi hi = v_nibble_hi(word);
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

// the dot products of one pair of blocks
template <int N>
struct pair_sums {
    va s[2][V_DOT_SUMS][N];

    V_INLINE void clear() {
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
KVM_UNROLL
            for (int i = 0; i < V_DOT_SUMS; ++i) {
                s[0][i][r] = v_dot_zero();
                s[1][i][r] = v_dot_zero();
            }
        }
    }

    // the first 8 of the 9 words of a pair that begins at x; d0, d1: the scales of its blocks
    V_INLINE void begin(const uint8_t * x, size_t nb, const query_q4_0 * Q, vf & d0, vf & d1) {
        vi word[8];
        v_transpose8(x, nb, word);
        d0 = v_f16_lo(word[0]);
        d1 = v_f16_hi(word[4]);
        clear();
KVM_UNROLL
        for (int w = 0; w < 8; ++w) {
            dot_word<N>(s[w/5], word[w], Q, w);
        }
    }

    V_INLINE void add_to(vf acc[N], vf d0, vf d1, const query_q4_0 * Q) {
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
            const query_q4_0 & q = Q[r];
            if constexpr (V_DOT_SUMS == 2) {
                s[0][0][r] = v_dot_add(s[0][0][r], s[0][1][r]);
                s[1][0][r] = v_dot_add(s[1][0][r], s[1][1][r]);
            }
            acc[r] = v_fma(v_dot_sum(s[0][0][r], q.sum[0]), v_mul(d0, v_set(q.d[0])), acc[r]);
            acc[r] = v_fma(v_dot_sum(s[1][0][r], q.sum[1]), v_mul(d1, v_set(q.d[1])), acc[r]);
        }
    }
};

// Q: pair by pair, n_rows from one to the next
template <int N>
void dot_rows_q4_0(const query_q4_0 * Q, int64_t n_rows, int64_t n_pair, const tile & k, float * S) {
    ahead next(k, n_pair);

    for (int j = 0; j < k.n; j += V_LEN) {
        vf acc[N];
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
            acc[r] = v_zero();
        }

        const uint8_t  * x = k.data + j*k.nb;
        const query_q4_0 * q = Q;

        pair_sums<N> sums;
        vf d0, d1;
        vi word[8];

        int64_t i = 0;

        // two pairs: 18 words, the last two as the end of four
        for (; i + 2 <= n_pair; i += 2, x += 4*row_q4_0::size, q += 2*n_rows) {
            next.visit(V_LEN/2);
            sums.begin(x, k.nb, q, d0, d1);
            next.visit(V_LEN/2);

            v_transpose8(x + 32, k.nb, word);
            dot_word<N>(sums.s[1], word[0], q, 8);
            sums.add_to(acc, d0, d1, q);

            sums.clear();
            d0 = v_f16_lo(word[1]);
            d1 = v_f16_hi(word[5]);
KVM_UNROLL
            for (int w = 0; w < 7; ++w) {
                dot_word<N>(sums.s[w/5], word[w + 1], q + n_rows, w);
            }
            next.visit(V_LEN/2);

            v_transpose4(x + 56, k.nb, word);
            next.visit(V_LEN/2);
            dot_word<N>(sums.s[1], word[2], q + n_rows, 7);
            dot_word<N>(sums.s[1], word[3], q + n_rows, 8);
            sums.add_to(acc, d0, d1, q + n_rows);
        }

        if (i < n_pair) {
            next.visit(V_LEN/2);
            sums.begin(x, k.nb, q, d0, d1);
            next.visit(V_LEN/2);

            v_transpose4(x + 20, k.nb, word);
            dot_word<N>(sums.s[1], word[3], q, 8);
            sums.add_to(acc, d0, d1, q);
        }

KVM_UNROLL
        for (int r = 0; r < N; ++r) {
            v_store(S + r*TILE + j, acc[r]);
        }
    }
}

template <int N>
void dot_rows_q4_0_n(int n, const query_q4_0 * Q, int64_t n_rows, int64_t n_pair, const tile & k, float * S) {
    if (n == N) {
        dot_rows_q4_0<N>(Q, n_rows, n_pair, k, S);
    } else if constexpr (N > 1) {
        dot_rows_q4_0_n<N - 1>(n, Q, n_rows, n_pair, k, S);
    }
}

void dot_q4_0(const llama_kv_mixed_dot & a) {
    if (a.n_embd % (2*BLOCK) != 0) {
        dot_float<row_q4_0>(a);
        return;
    }

    const tile k = whole_vectors(a.k, a.spare);

    const int size = group_size(a.n_rows, V_ROWS_DOT);
    for (int64_t r = 0; r < a.n_rows; r += size) {
        const int n = (int) (a.n_rows - r < size ? a.n_rows - r : size);
        dot_rows_q4_0_n<V_ROWS_DOT>(n, (const query_q4_0 *) a.query + r, a.n_rows, a.n_embd/(2*BLOCK), k, a.S + r*TILE);
    }
}

void acc_q4_0(const llama_kv_mixed_acc & a) {
    if (a.v.n % 4 != 0) {
        acc_float<row_q4_0>(a);
    } else {
        acc_int<row_q4_0>(a);
    }
}

constexpr llama_kv_mixed_format format_q4_0 = {
    "q4_0", GGML_TYPE_Q4_0, nullptr, quantize_q4_0, expand_float<row_q4_0>, dot_q4_0, acc_q4_0, sizeof(query_q4_0), load_query_q4_0,
};

} // namespace
