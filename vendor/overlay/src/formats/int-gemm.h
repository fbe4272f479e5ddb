// K in whole numbers for many query rows: a tile is laid out once, a lane per cell, four values of each in a word.

#pragma once

#include "formats/float.h"

namespace {

// What all queries of a task are rounded to: blocks of values with the largest at 127, as in ggml's Q8_0.
struct int_query {
    int32_t * words; // [n_rows][n_embd/4]
    float   * d;     // [n_rows][n_embd/BLOCK]
    int32_t * sum;   // [n_rows][n_embd/BLOCK] of values

    V_INLINE int_query(void * room, int64_t n_rows, int64_t n_embd) :
        words((int32_t *) room), d((float *) (words + n_rows*n_embd/4)), sum((int32_t *) (d + n_rows*n_embd/BLOCK)) {}
};

// a tile of rows
struct int_tile {
    int32_t * words; // [n_embd/4][TILE], for each block the words of its low nibbles, then those of its high ones
    float   * d;     // [n_embd/BLOCK][TILE]
    float   * min;   // [n_embd/BLOCK][TILE], where rows have minima

    V_INLINE int_tile(void * room, int64_t n_embd) :
        words((int32_t *) room), d((float *) (words + n_embd/4*TILE)), min(d + n_embd/BLOCK*TILE) {}
};

// row: what nibble_pair wants, see nibbles.h
template <class row>
void load_tile_int(const tile & t, uint8_t * spare, void * room) {
    const tile k = whole_vectors(t, spare);
    const int_tile dst(room, k.n_block*BLOCK);

    ahead next(k, k.n_block);

    for (int64_t b = 0; b < k.n_block; ++b) {
        load_scales<row>(k.data, k.nb, k.n, b, dst.d + b*TILE, dst.min + b*TILE);

        for (int j = 0; j < k.n; j += V_LEN) {
            next.visit(V_LEN);

            const uint8_t * x = k.data + j*k.nb + b*row::size;
            int32_t       * y = dst.words + b*BLOCK/4*TILE + j;

            vi word[4];
            vi fifth[4];
            v_transpose4(x + row::at, k.nb, word);
            if constexpr (row::n_bits == 5) {
                v_transpose4(x + row::at - 4, k.nb, fifth);
            }
KVM_UNROLL
            for (int w = 0; w < 4; ++w) {
                vi lo = row::lo(word[w]);
                vi hi = row::hi(word[w]);
                if constexpr (row::n_bits == 5) {
                    lo = v_fifth(lo, fifth[0], 4*w);
                    hi = v_fifth(hi, fifth[0], 4*w + 16);
                }
                v_istore(y + w*TILE,       lo);
                v_istore(y + (w + 4)*TILE, hi);
            }
        }
    }
}

// of M query rows from r on, with N_VEC vectors of cells from j on
template <class row, int M, int N_VEC>
V_INLINE void scores_block(const int_query & Q, int64_t r, const int_tile & K, int j, int64_t n_embd, float * S) {
    // how many words fit in a sum of 16 bits, where sums are that
    constexpr int step = row::n_bits == 5 && V_DOT_BITS == 16 ? 4 : 8;

    const int64_t n_block = n_embd/BLOCK;

    vf res[M][N_VEC];
KVM_UNROLL
    for (int m = 0; m < M; ++m) {
KVM_UNROLL
        for (int n = 0; n < N_VEC; ++n) {
            res[m][n] = v_zero();
        }
    }

    for (int64_t b = 0; b < n_block; ++b) {
        vi total[M][N_VEC];
KVM_UNROLL
        for (int m = 0; m < M; ++m) {
            const vi bias = v_iset(row::has_min ? 0 : -row::bias*Q.sum[(r + m)*n_block + b]);
KVM_UNROLL
            for (int n = 0; n < N_VEC; ++n) {
                total[m][n] = bias;
            }
        }

        for (int w0 = 0; w0 < BLOCK/4; w0 += step) {
            typename row::sum acc[M][N_VEC];
KVM_UNROLL
            for (int m = 0; m < M; ++m) {
KVM_UNROLL
                for (int n = 0; n < N_VEC; ++n) {
                    acc[m][n].clear();
                }
            }
KVM_UNROLL
            for (int w = w0; w < w0 + step; ++w) {
                const int64_t at = b*BLOCK/4 + w;
                vi k[N_VEC];
KVM_UNROLL
                for (int n = 0; n < N_VEC; ++n) {
                    k[n] = v_iload(K.words + at*TILE + j + n*V_LEN);
                }
KVM_UNROLL
                for (int m = 0; m < M; ++m) {
                    const int32_t q = Q.words[(r + m)*(n_embd/4) + at];
KVM_UNROLL
                    for (int n = 0; n < N_VEC; ++n) {
                        acc[m][n].add(k[n], q);
                        KVM_KEEP(acc[m][n].s);
                    }
                }
            }
KVM_UNROLL
            for (int m = 0; m < M; ++m) {
KVM_UNROLL
                for (int n = 0; n < N_VEC; ++n) {
                    total[m][n] = v_iadd(total[m][n], acc[m][n].value());
                }
            }
        }

KVM_UNROLL
        for (int n = 0; n < N_VEC; ++n) {
            const vf d   = v_load(K.d + b*TILE + j + n*V_LEN);
            const vf min = row::has_min ? v_load(K.min + b*TILE + j + n*V_LEN) : v_zero();
KVM_UNROLL
            for (int m = 0; m < M; ++m) {
                const vf dq = v_set(Q.d[(r + m)*n_block + b]);
                const vf x  = v_from_int(total[m][n]);
                if constexpr (row::has_min) {
                    const vf more = v_mul(min, v_from_int(v_iset(Q.sum[(r + m)*n_block + b])));
                    res[m][n] = v_fma(v_fma(x, d, more), dq, res[m][n]);
                } else {
                    res[m][n] = v_fma(x, v_mul(d, dq), res[m][n]);
                }
            }
        }
    }

KVM_UNROLL
    for (int m = 0; m < M; ++m) {
KVM_UNROLL
        for (int n = 0; n < N_VEC; ++n) {
            v_store(S + m*TILE + j + n*V_LEN, res[m][n]);
        }
    }
}

// S [n_rows][TILE] of the query rows from r0 on and n cells
template <class row>
void scores_int(void * query, int64_t n_query, int64_t r0, int64_t n_rows, void * room, int n, int64_t n_embd, float * S) {
    const int_query Q(query, n_query, n_embd);
    const int_tile  K(room, n_embd);

    for (int j = 0; j < n; j += 2*V_LEN) {
        int64_t r = 0;
        for (; r + V_ROWS_INT <= n_rows; r += V_ROWS_INT) {
            scores_block<row, V_ROWS_INT, 2>(Q, r0 + r, K, j, n_embd, S + r*TILE);
        }
        for (; r < n_rows; ++r) {
            scores_block<row, 1, 2>(Q, r0 + r, K, j, n_embd, S + r*TILE);
        }
    }
}

} // namespace
