// Q8_0: blocks of 32 values in 34 bytes, as ggml's: a scale (F16), then 32 bytes.

#pragma once

#include "formats/float.h"
#include "formats/int-acc.h"
#include "formats/int-query.h"

namespace {

struct row_q8_0 {
    static constexpr bool scaled = true;
    static constexpr int  size   = 34;
    static constexpr int  bias   = 0;

    static V_INLINE vf load(const uint8_t * row, int64_t b, int i) { return v_load_i8(row + b*size + 2 + i*V_LEN); }

    static V_INLINE void load_pairs(const uint8_t * p, size_t nb, vi * res) { v_load_i8_pairs(p, nb, res); }
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
// K: the query in 16 bits, a lane per cell
//

// Values of a query's block are whole numbers up to 127*255 + 127 in size: 255 times one of 8 bits, and the rest, another one.
// (8 bits alone would add as much error as these rows have.)
//
// Two blocks are 68 bytes, 17 words: [d0 | 32 bytes | d1 | 32 bytes]. The query is laid out likewise, with zeros where the
// scales are. Word 8 has the end of the first block and the scale of the second.
struct query_q8_0 {
    int32_t word[17][2]; // the larger parts, the smaller ones
    float   d  [2];      // scale of the query's block
    int32_t sum[2][2];   // what the bias of v_dot8() makes of them, negative
};

void load_query_q8_0(const float * Q, int64_t n_embd, void * query, int64_t r, int64_t n_rows) {
    constexpr float most = 127*255 + 127;

    query_q8_0 * dst = (query_q8_0 *) query + r; // pair by pair, n_rows from one to the next

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

// the dot products of a pair of blocks with N queries
template <int N>
struct pair_sums_q8_0 {
    vi s[2][2][N];

    V_INLINE pair_sums_q8_0() {
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
            s[0][0][r] = s[0][1][r] = s[1][0][r] = s[1][1][r] = v_izero();
        }
    }

    // word w of every cell with that of the queries
    V_INLINE void add(vi word, const query_q8_0 * Q, int w) {
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
KVM_UNROLL
            for (int i = 0; i < 2; ++i) {
                vi & sum = s[w/9][i][r];
                sum = v_dot8(sum, word, Q[r].word[w][i]);
                KVM_KEEP(sum);
            }
        }
    }

    V_INLINE void add_to(vf acc[N], vf d0, vf d1, const query_q8_0 * Q) const {
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
KVM_UNROLL
            for (int b = 0; b < 2; ++b) {
                const vf hi = v_from_int(v_iadd(s[b][0][r], v_iset(Q[r].sum[b][0])));
                const vf lo = v_from_int(v_iadd(s[b][1][r], v_iset(Q[r].sum[b][1])));
                acc[r] = v_fma(v_fma(hi, v_set(255.0f), lo), v_mul(b == 0 ? d0 : d1, v_set(Q[r].d[b])), acc[r]);
            }
        }
    }
};

// Q: pair by pair, n_rows from one to the next
template <int N>
void dot_rows_q8_0(const query_q8_0 * Q, int64_t n_rows, int64_t n_pair, const tile & k, float * S) {
    ahead next(k, n_pair);

    for (int j = 0; j < k.n; j += V_LEN) {
        vf acc[N];
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
            acc[r] = v_zero();
        }

        const uint8_t    * x = k.data + j*k.nb;
        const query_q8_0 * q = Q;

        for (int64_t i = 0; i < n_pair; ++i, x += 2*row_q8_0::size, q += n_rows) {
            pair_sums_q8_0<N> sums;
            vi word[8];

            next.visit(V_LEN/2);
            v_transpose8(x, k.nb, word);
            const vf d0 = v_f16_lo(word[0]);
KVM_UNROLL
            for (int w = 0; w < 8; ++w) {
                sums.add(word[w], q, w);
            }

            next.visit(V_LEN/2);
            v_transpose8(x + 32, k.nb, word);
            const vf d1 = v_f16_hi(word[0]);
KVM_UNROLL
            for (int w = 0; w < 8; ++w) {
                sums.add(word[w], q, 8 + w);
            }

            v_transpose4(x + 52, k.nb, word); // the last word is the end of these four
            sums.add(word[3], q, 16);

            sums.add_to(acc, d0, d1, q);
        }

KVM_UNROLL
        for (int r = 0; r < N; ++r) {
            v_store(S + r*TILE + j, acc[r]);
        }
    }
}

template <int N>
void dot_rows_q8_0_n(int n, const query_q8_0 * Q, int64_t n_rows, int64_t n_pair, const tile & k, float * S) {
    if (n == N) {
        dot_rows_q8_0<N>(Q, n_rows, n_pair, k, S);
    } else if constexpr (N > 1) {
        dot_rows_q8_0_n<N - 1>(n, Q, n_rows, n_pair, k, S);
    }
}

void dot_q8_0(const llama_kv_mixed_dot & a) {
    if (a.n_embd % (2*BLOCK) != 0) {
        dot_float<row_q8_0>(a);
        return;
    }

    const tile k = whole_vectors(a.k, a.spare);

    const int size = group_size(a.n_rows, V_ROWS_DOT);
    for (int64_t r = 0; r < a.n_rows; r += size) {
        const int n = (int) (a.n_rows - r < size ? a.n_rows - r : size);
        dot_rows_q8_0_n<V_ROWS_DOT>(n, (const query_q8_0 *) a.query + r, a.n_rows, a.n_embd/(2*BLOCK), k, a.S + r*TILE);
    }
}

void acc_q8_0(const llama_kv_mixed_acc & a) {
    if (a.v.n % 4 != 0) {
        acc_float<row_q8_0>(a);
    } else {
        acc_int<row_q8_0>(a);
    }
}

constexpr llama_kv_mixed_format format_q8_0 = {
    "q8_0", GGML_TYPE_Q8_0, nullptr, quantize_q8_0, expand_float<row_q8_0>, dot_q8_0, acc_q8_0, sizeof(query_q8_0), load_query_q8_0,
};

} // namespace
