// Rows whose values have four or five bits, as ggml has them. A block of 32 values is
// - a scale (F16),
// - a minimum (F16), where it has one,
// - the fifth bits, where there are some: 32 bits, bit i is that of value i,
// - 16 bytes: byte i has the other bits of the values i (low nibble) and i + 16.
// Few query rows meet K with queries in 8 bits, as in ggml's own dot products. For rows that are rounded to five bits they add
// an eighth of the error that these have, 1.6 % of its square: a value is off by half of a 16th of the largest one at most, and
// one of the query by half of a 127th. For four bits it is half of that.

#pragma once

#include "formats/float.h"
#include "formats/int-acc.h"
#include "formats/int-dot.h"
#include "formats/int-gemm.h"

namespace {

// sums of products of bytes with those of a query
struct sum_u8 { // see v_dot()
    static constexpr bool fast = V_FAST_DOT;
    va s;
    V_INLINE void clear()                  { s = v_dot_zero(); }
    V_INLINE void add(vi x, int32_t query) { s = v_dot(s, x, query); }
    V_INLINE vi   value() const            { return v_dot_int(s); }
};
struct sum_i8 { // of any, to which V_DOT8_BIAS has been added
    static constexpr bool fast = V_FAST_DOT8;
    vi s;
    V_INLINE void clear()                  { s = v_izero(); }
    V_INLINE void add(vi x, int32_t query) { s = v_dot8(s, x, query); }
    V_INLINE vi   value() const            { return s; }
};

// what rows of nibbles have in common; derived from it: a struct with
//   bias:       what is added to the values as they meet queries
//   sum:        sums of lo() and hi() times queries
//   lo(), hi(): values of four bytes of every cell, as bytes
//   pair<N>:    nibble_pair of itself
// and what dot_float() and acc_int() want
template <int bits, bool with_min>
struct row_nibbles {
    static constexpr bool scaled  = true;
    static constexpr bool has_min = with_min;
    static constexpr int  n_bits  = bits;
    static constexpr int  at      = (has_min ? 4 : 2) + (n_bits == 5 ? 4 : 0); // where the nibbles of a block begin
    static constexpr int  size    = at + 16;                                   // bytes of a block
    static constexpr int  n_words = size/2;                                    // of two blocks
    static constexpr int  n_pairs = (2*n_words + 3)/4 < 2*((n_words + 3)/4) ? 2 : 1;
    static constexpr int  n_sums  = n_bits == 5 ? 2 : V_DOT_SUMS;

    struct query {
        int32_t word[2][n_words]; // those that meet the low nibbles, and the high ones
        float   d  [2];           // scale of the query's block
        int32_t sum[2];           // of its values, where rows have minima; else what the bias makes of it, negative
    };
};

// A block of values with the largest at 127, as ggml's Q8_0: the first 16 to lo, the others to hi. Returns the scale.
V_INLINE float quantize_query(const float * x, int8_t * lo, int8_t * hi, int32_t & sum) {
    const block_f32 b(x);
    const float amax = b.max([](vf y) { return v_abs(y); });

    const vf scale = v_set(amax > 0.0f ? 127.0f/amax : 0.0f);
    vi total = v_izero();
KVM_UNROLL
    for (int j = 0; j < V_BLOCK; ++j) {
        const vi y = v_to_int(v_mul(b.v[j], scale));
        v_store_i8((j*V_LEN < 16 ? lo : hi) + j*V_LEN%16, y);
        total = v_iadd(total, y);
    }
    sum = v_ihsum(total);
    return amax/127.0f;
}

// all of a task's queries, for products of many
void load_query_int(const float * Q, int64_t n_rows, int64_t n_embd, const int_query & dst) {
    for (int64_t i = 0; i < n_rows*n_embd/BLOCK; ++i) {
        int8_t * y = (int8_t *) dst.words + i*BLOCK;
        dst.d[i] = quantize_query(Q + i*BLOCK, y, y + BLOCK/2, dst.sum[i]);
    }
}

// see llama_kv_mixed_format
template <class row>
void load_query_nibbles(const float * Q, int64_t n_embd, void * query, int64_t r, int64_t n_rows) {
    auto * dst = (typename row::query *) query + r; // pair by pair, n_rows from one to the next

    for (int64_t i = 0; i < n_embd/(2*BLOCK); ++i, dst += n_rows) {
        int8_t byte[2][2*row::size] = {};
        for (int b = 0; b < 2; ++b) {
            const int at = b*row::size + row::at;
            int32_t sum;
            dst->d  [b] = quantize_query(Q + (2*i + b)*BLOCK, byte[0] + at, byte[1] + at, sum);
            dst->sum[b] = row::has_min ? sum : -row::bias*sum;
        }
        memcpy(dst->word, byte, sizeof(byte));
    }
}

// see dot_rows_int()
template <class row, int N>
struct nibble_pair {
    using query = typename row::query;

    // of their own for low and high nibbles where registers allow it (the additions of one sum wait for each other), or where
    // one sum has no room for both
    typename row::sum s[2][row::n_sums][N];
    vf d  [2];
    vf min[2];
    vi fifth; // the bits of the block whose values come next

    V_INLINE void clear() {
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
KVM_UNROLL
            for (int i = 0; i < row::n_sums; ++i) {
                s[0][i][r].clear();
                s[1][i][r].clear();
            }
        }
    }

    V_INLINE void add(vi word, int w, const query * Q) {
        if (w == 0) {
            clear();
        }
KVM_UNROLL
        for (int i = 0; i < 2; ++i) {
            load_head(i, i*row::size, word, w);
        }

        const int b     = w > (row::size - 1)/4;
        const int first = 4*w - b*row::size - row::at; // the number of the value in the first byte
        if (first <= -4) {
            return; // there are none
        }

        vi lo = row::lo(word);
        vi hi = row::hi(word);
        if constexpr (row::n_bits == 5) {
            lo = v_fifth(lo, fifth, first);
            hi = v_fifth(hi, fifth, first + 16);
        }
        auto & sum = s[b];
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
            sum[0][r].add(lo, Q[r].word[0][w]);
        }
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
            sum[row::n_sums - 1][r].add(hi, Q[r].word[1][w]);
            KVM_KEEP(sum[row::n_sums - 1][r].s);
        }
    }

    // what word w has of the numbers that block b begins with; begin: its first byte
    V_INLINE void load_head(int b, int begin, vi word, int w) {
        const auto half = [&](int at) { return at % 4 == 0 ? v_f16_lo(word) : v_f16_hi(word); };
        if (w == begin/4) {
            d[b] = half(begin);
        }
        if (row::has_min && w == (begin + 2)/4) {
            min[b] = half(begin + 2);
        }
        if constexpr (row::n_bits == 5) {
            const int at = begin + row::at - 4;
            if (w == at/4) {
                fifth = word;
            } else if (w == at/4 + 1 && at % 4 != 0) {
                fifth = v_join16(fifth, word);
            }
        }
    }

    V_INLINE void add_to(vf acc[N], const query * Q) const {
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
KVM_UNROLL
            for (int b = 0; b < 2; ++b) {
                vi sum = s[b][0][r].value();
                if constexpr (row::n_sums == 2) {
                    sum = v_iadd(sum, s[b][1][r].value());
                }
                if constexpr (row::has_min) {
                    const vf more = v_mul(min[b], v_from_int(v_iset(Q[r].sum[b])));
                    acc[r] = v_fma(v_fma(v_from_int(sum), d[b], more), v_set(Q[r].d[b]), acc[r]);
                } else {
                    acc[r] = v_fma(v_from_int(v_iadd(sum, v_iset(Q[r].sum[b]))), v_mul(d[b], v_set(Q[r].d[b])), acc[r]);
                }
            }
        }
    }
};

template <class row>
constexpr llama_kv_mixed_format make_nibble_format(const char * name, ggml_type type, decltype(llama_kv_mixed_format::quantize) quantize) {
    constexpr auto load_tile = row::sum::fast ? load_tile_int<row> : nullptr;
    constexpr auto scores    = row::sum::fast ? scores_int<row>    : nullptr;
    return {
        name, type, nullptr, quantize, expand_float<row>, dot_int<row>, acc_int<row>, sizeof(typename row::query), load_query_nibbles<row>,
        load_tile, scores, true,
    };
}

} // namespace
