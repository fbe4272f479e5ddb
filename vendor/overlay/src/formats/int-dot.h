// K in whole numbers: a lane per cell, four values of each at a time, and queries in whole numbers too.

#pragma once

#include "formats/float.h"

namespace {

// Two blocks of a row are read together, as words of four bytes. A query is laid out as they are, with zeros where they have
// anything but values, so that a word may have the end of one block and what the next one begins with.

// row: a struct with
//   size:    bytes of a block
//   query:   two blocks of a query, as the format's load_query() leaves them
//   n_pairs: pairs of blocks that are read together, 2 where this takes fewer reads
//   pair<N>: the dot products of a pair of blocks with N queries
//     add():    word w of every cell with that of the queries; called in their order, 0 begins a pair
//     add_to(): with all words added, the products of cells and queries
// and what dot_float() wants

// the words of n_pairs pairs at x, from w0 on; what is read ends with the last one
template <class row, int N, int n_pairs, int w0 = 0>
V_INLINE void dot_words(const uint8_t * x, size_t nb, const typename row::query * Q, int64_t n_rows, ahead & next,
        typename row::template pair<N> & pair, vf acc[N]) {
    constexpr int n_words = 2*row::size/4; // of a pair
    constexpr int n_left  = n_pairs*n_words - w0;
    constexpr int n       = n_left < 8 ? n_left : 8;
    constexpr int n_read  = n <= 4 ? 4 : 8;

    vi word[8];
    if constexpr (n_read == 4) {
        v_transpose4(x + 4*(w0 + n - n_read), nb, word);
    } else {
        v_transpose8(x + 4*(w0 + n - n_read), nb, word);
    }

KVM_UNROLL
    for (int i = 0; i < n; ++i) {
        const int w = (w0 + i) % n_words;
        const auto * q = Q + (w0 + i)/n_words*n_rows;
        if (w == 0 || w == (n_words + 1)/2) {
            next.visit(V_LEN/2);
        }
        pair.add(word[n_read - n + i], w, q);
        if (w == n_words - 1) {
            pair.add_to(acc, q);
        }
    }

    if constexpr (n_left > 8) {
        dot_words<row, N, n_pairs, w0 + 8>(x, nb, Q, n_rows, next, pair, acc);
    }
}

// S[r][j] = Q[r] . K[j], for N queries; Q: pair by pair, n_rows from one to the next
template <class row, int N>
void dot_rows_int(const typename row::query * Q, int64_t n_rows, int64_t n_pair, const tile & k, float * S) {
    ahead next(k, n_pair);

    for (int j = 0; j < k.n; j += V_LEN) {
        vf acc[N];
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
            acc[r] = v_zero();
        }

        const uint8_t * x = k.data + j*k.nb;
        const auto    * q = Q;

        typename row::template pair<N> pair;

        int64_t i = 0;
        for (; i + row::n_pairs <= n_pair; i += row::n_pairs) {
            dot_words<row, N, row::n_pairs>(x, k.nb, q, n_rows, next, pair, acc);
            x += row::n_pairs*2*row::size;
            q += row::n_pairs*n_rows;
        }
        if (i < n_pair) {
            dot_words<row, N, 1>(x, k.nb, q, n_rows, next, pair, acc);
        }

KVM_UNROLL
        for (int r = 0; r < N; ++r) {
            v_store(S + r*TILE + j, acc[r]);
        }
    }
}

// see llama_kv_mixed_format
template <class row>
void dot_int(const llama_kv_mixed_dot & a) {
    if (a.n_embd % (2*BLOCK) != 0) {
        dot_float<row>(a);
        return;
    }

    const tile k = whole_vectors(a.k, a.spare);

    for_groups<V_ROWS_DOT8>(a.n_rows, [&](auto n, int64_t r) {
        dot_rows_int<row, n.value>((const typename row::query *) a.query + r, a.n_rows, a.n_embd/(2*BLOCK), k, a.S + r*TILE);
    });
}

} // namespace
