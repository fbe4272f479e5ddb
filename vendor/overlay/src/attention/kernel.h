// The kernel, for the instruction set that the including file is compiled for. Nothing from the standard library is
// instantiated here: the linker could take such code for the whole program, and it would run where it can not.

#pragma once

#include "attention/attention.h"
#include "formats/rows.h"

#include "ggml.h"

namespace {

// cells that are worked on together
constexpr int TILE = 128;

// query rows that share a tile's scores while these are in the first cache level
constexpr int ROWS = 48;

using attn_args = llama_kv_mixed_attn_args;
using attn_plan = llama_kv_mixed_attn_plan;

// the scales of block b in rows [0, n), n rounded up to whole vectors; rows from n on are not read
template <class row>
V_INLINE void load_scales(const uint8_t * x, size_t nb, int n, int64_t b, float * dst) {
    int j = 0;
    for (; j + V_LEN <= n; j += V_LEN) {
        vi word[4]; // the scale, and the first values
        v_transpose4(x + j*nb + b*row::size, nb, word);
        v_store(dst + j, v_f16_lo(word[0]));
    }
    if (j < n) {
        uint8_t rest[2*V_LEN] = {};
        for (int i = j; i < n; ++i) {
            memcpy(rest + 2*(i - j), x + i*nb + b*row::size, 2);
        }
        v_store(dst + j, v_load_f16(rest));
    }
}

struct rows {
    const uint8_t * data;    // row 0
    size_t          nb;      // bytes from row to row
    int64_t         n_bytes; // bytes per row
};

struct tile : rows {
    int     n;       // rows
    int64_t n_block; // blocks per row
    rows    next;    // those of the tile that comes next, n_bytes == 0: none
};

// Fetches the rows of the next tile evenly while one is worked on: a processor has few buffers for cache lines that are on
// their way, and waits when these are taken.
class ahead {
public:
    // n_visits: how often each row of the tile is visited
    V_INLINE ahead(const tile & t, int64_t n_visits) : next(t.next), n_visits(n_visits) {}

    V_INLINE void visit(int64_t n_rows) {
        for (n += n_rows; n >= n_visits; n -= n_visits) {
            // where a row begins in the midst of a line, that came with the row before
            for (int64_t i = next.n_bytes - 1; i >= 0; i -= 64) {
                prefetch(next.data + i);
            }
            next.data += next.nb;
        }
    }

private:
    rows          next;
    const int64_t n_visits;
    int64_t       n = 0;
};

//
// few query rows: scores and outputs straight from the rows as they are stored
//

// S[r][j] = Q[r] . K[j], for N query rows
template <class row, int N>
void dot_rows(const float * Q, int64_t ld, const tile & k, float * S) {
    alignas(64) float d[LLAMA_KV_MIXED_ATTN_MAX_EMBD/BLOCK][TILE];
    if constexpr (row::scaled) {
        for (int64_t b = 0; b < k.n_block; ++b) {
            load_scales<row>(k.data, k.nb, k.n, b, d[b]);
        }
    }

    ahead next(k, 1);

    // four cells at a time, the last one again when their number is not a multiple of that
    for (int j0 = 0; j0 < k.n; j0 += 4) {
        int j[4];
        const uint8_t * x[4];
KVM_UNROLL
        for (int p = 0; p < 4; ++p) {
            j[p] = j0 + p < k.n ? j0 + p : k.n - 1;
            x[p] = k.data + j[p]*k.nb;
        }
        next.visit(4);

        vf acc[N][4];
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
KVM_UNROLL
            for (int p = 0; p < 4; ++p) {
                acc[r][p] = v_zero();
            }
        }

        for (int64_t b = 0; b < k.n_block; ++b) {
            if constexpr (row::scaled) {
KVM_UNROLL
                for (int p = 0; p < 4; ++p) {
                    vf sum[N];
KVM_UNROLL
                    for (int r = 0; r < N; ++r) {
                        sum[r] = v_zero();
                    }
KVM_UNROLL
                    for (int i = 0; i < V_BLOCK; ++i) {
                        const vf y = row::load(x[p], b, i);
KVM_UNROLL
                        for (int r = 0; r < N; ++r) {
                            sum[r] = v_fma(y, v_load(Q + r*ld + b*BLOCK + i*V_LEN), sum[r]);
                        }
                    }
KVM_UNROLL
                    for (int r = 0; r < N; ++r) {
                        acc[r][p] = v_fma(sum[r], v_set(d[b][j[p]]), acc[r][p]);
                    }
                }
            } else {
KVM_UNROLL
                for (int i = 0; i < V_BLOCK; ++i) {
KVM_UNROLL
                    for (int p = 0; p < 4; ++p) {
                        const vf y = row::load(x[p], b, i);
KVM_UNROLL
                        for (int r = 0; r < N; ++r) {
                            acc[r][p] = v_fma(y, v_load(Q + r*ld + b*BLOCK + i*V_LEN), acc[r][p]);
                        }
                    }
                }
            }
        }

KVM_UNROLL
        for (int r = 0; r < N; ++r) {
            v_hsum4(S + r*TILE + j0, acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
        }
    }
}

// O[r] += sum over j of P[r][j] V[j], for N query rows
template <class row, int N>
void acc_rows(const float * P, const tile & v, float * O, int64_t ld) {
    alignas(64) float d[TILE];
    alignas(64) float w[N][TILE];

    ahead next(v, v.n_block);

    for (int64_t b = 0; b < v.n_block; ++b) {
        if constexpr (row::scaled) {
            load_scales<row>(v.data, v.nb, v.n, b, d);
        }
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
            for (int j = 0; j < TILE; j += V_LEN) {
                const vf p = v_load(P + r*TILE + j);
                v_store(w[r] + j, row::scaled ? v_mul(p, v_load(d + j)) : p);
            }
        }

        vf acc[N][V_BLOCK];
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
KVM_UNROLL
            for (int i = 0; i < V_BLOCK; ++i) {
                acc[r][i] = v_load(O + r*ld + b*BLOCK + i*V_LEN);
            }
        }

        for (int j = 0; j < v.n; ++j) {
            const uint8_t * x = v.data + j*v.nb;
            next.visit(1);
KVM_UNROLL
            for (int i = 0; i < V_BLOCK; ++i) {
                const vf y = row::load(x, b, i);
KVM_UNROLL
                for (int r = 0; r < N; ++r) {
                    acc[r][i] = v_fma(y, v_set(w[r][j]), acc[r][i]);
                }
            }
        }

KVM_UNROLL
        for (int r = 0; r < N; ++r) {
KVM_UNROLL
            for (int i = 0; i < V_BLOCK; ++i) {
                v_store(O + r*ld + b*BLOCK + i*V_LEN, acc[r][i]);
            }
        }
    }
}

// a template for every number of rows up to the one that fits in registers
template <class row, int N>
void dot_rows_n(int n, const float * Q, int64_t ld, const tile & k, float * S) {
    if (n == N) {
        dot_rows<row, N>(Q, ld, k, S);
    } else if constexpr (N > 1) {
        dot_rows_n<row, N - 1>(n, Q, ld, k, S);
    }
}

template <class row, int N>
void acc_rows_n(int n, const float * P, const tile & v, float * O, int64_t ld) {
    if (n == N) {
        acc_rows<row, N>(P, v, O, ld);
    } else if constexpr (N > 1) {
        acc_rows_n<row, N - 1>(n, P, v, O, ld);
    }
}

// n rows in groups of nearly equal size, none above the most
V_INLINE int group_size(int64_t n, int most) {
    const int64_t n_group = (n + most - 1)/most;
    return (int) ((n + n_group - 1)/n_group);
}

template <class row>
void dot_all(const float * Q, int64_t ld, int64_t n_rows, const tile & k, float * S) {
    const int size = group_size(n_rows, V_ROWS_DOT);
    for (int64_t r = 0; r < n_rows; r += size) {
        const int n = (int) (n_rows - r < size ? n_rows - r : size);
        dot_rows_n<row, V_ROWS_DOT>(n, Q + r*ld, ld, k, S + r*TILE);
    }
}

template <class row>
void acc_all(const float * P, int64_t n_rows, const tile & v, float * O, int64_t ld) {
    const int size = group_size(n_rows, V_ROWS_ACC);
    for (int64_t r = 0; r < n_rows; r += size) {
        const int n = (int) (n_rows - r < size ? n_rows - r : size);
        acc_rows_n<row, V_ROWS_ACC>(n, P + r*TILE, v, O + r*ld, ld);
    }
}

//
// few query rows against K in Q4_0: the query in 8 bits, cells in lanes
//

// Two blocks are 36 bytes, nine words: [d0 | 16 bytes | d1 | 16 bytes]. The query is laid out likewise, with zeros where
// the scales are: words [0, 9) meet the low nibbles, [9, 18) the high ones. Word 4 has the end of the first block and
// the scale of the second.
struct query_q8 {
    int32_t word[18];
    float   d  [2]; // scale of the query's block
    int32_t sum[2]; // -8 times the sum of its values: nibbles are stored with 8 added
};

// blocks of 32 values in 8 bits with the largest at 127, as ggml's Q8_0
// dst: pair by pair, n_rows from one to the next
void quantize_query(const float * Q, int64_t n_pair, query_q8 * dst, int64_t n_rows) {
    for (int64_t i = 0; i < n_pair; ++i, dst += n_rows) {
        int8_t byte[2][36] = {};
        for (int b = 0; b < 2; ++b) {
            const block_f32 x(Q + (2*i + b)*BLOCK);
            const float amax = x.max([](vf y) { return v_abs(y); });

            const vf scale = v_set(amax > 0.0f ? 127.0f/amax : 0.0f);
            vi sum = v_izero();
KVM_UNROLL
            for (int j = 0; j < V_BLOCK; ++j) {
                const vi y = v_to_int(v_mul(x.v[j], scale));
                v_store_i8(byte[j*V_LEN/16] + 18*b + 2 + j*V_LEN%16, y);
                sum = v_iadd(sum, y);
            }
            dst->d  [b] = amax/127.0f;
            dst->sum[b] = -8*v_ihsum(sum);
        }
        memcpy(dst->word, byte, sizeof(byte));
    }
}

// word w of every cell with that of N queries
// (sums of their own for low and high nibbles where registers allow it: the additions of one sum wait for each other)
template <int N>
V_INLINE void dot_word(va sum[V_DOT_SUMS][N], vi word, const query_q8 * Q, int w) {
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
    V_INLINE void begin(const uint8_t * x, size_t nb, const query_q8 * Q, vf & d0, vf & d1) {
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

    V_INLINE void add_to(vf acc[N], vf d0, vf d1, const query_q8 * Q) {
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
            const query_q8 & q = Q[r];
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
void dot_rows_q4_0(const query_q8 * Q, int64_t n_rows, int64_t n_pair, const tile & k, float * S) {
    ahead next(k, n_pair);

    for (int j = 0; j < k.n; j += V_LEN) {
        vf acc[N];
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
            acc[r] = v_zero();
        }

        const uint8_t  * x = k.data + j*k.nb;
        const query_q8 * q = Q;

        pair_sums<N> sums;
        vf d0, d1;
        vi word[8];

        int64_t i = 0;

        // two pairs: 18 words, the last two as the end of four
        for (; i + 2 <= n_pair; i += 2, x += 4*SIZE_Q4, q += 2*n_rows) {
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
void dot_rows_q4_0_n(int n, const query_q8 * Q, int64_t n_rows, int64_t n_pair, const tile & k, float * S) {
    if (n == N) {
        dot_rows_q4_0<N>(Q, n_rows, n_pair, k, S);
    } else if constexpr (N > 1) {
        dot_rows_q4_0_n<N - 1>(n, Q, n_rows, n_pair, k, S);
    }
}

//
// few query rows against V in Q4_0: weights in 16 bits, elements in lanes
//

// O[r] += sum over j of P[r][j] V[j]; pmax[r]: no weight of P[r] is above it
// Weights are rounded to 15 bits of pmax, scales to 15 bits of the tile's largest one, and so are their products.
// live: which cells have a weight at all, null: any may have; what free cells were left with must not set that scale
template <int N>
void acc_rows_q4_0(const float * P, const float * pmax, const tile & v, const bool * live, float * O, int64_t ld) {
    constexpr int MOST = 4; // blocks whose scales are prepared together

    alignas(64) int16_t p_int[N][TILE];
    alignas(64) float   d[MOST][TILE];
    alignas(64) int16_t w[MOST][N][TILE];

    ahead next(v, v.n_block);

    for (int r = 0; r < N; ++r) {
        const vf scale = v_set(pmax[r] > 0.0f ? 32767.0f/pmax[r] : 0.0f);
        for (int j = 0; j < TILE; j += 2*V_LEN) {
            v_istore(p_int[r] + j, v_to_i16(v_mul(v_load(P + r*TILE + j), scale), v_mul(v_load(P + r*TILE + j + V_LEN), scale)));
        }
    }

    for (int64_t b0 = 0; b0 < v.n_block; b0 += MOST) {
        const int n = (int) (v.n_block - b0 < MOST ? v.n_block - b0 : MOST);

        // one step for all blocks after the other: each ends with a sum over lanes, which takes its time
        float   dmax[MOST];
        float   unit[MOST][N];
        int32_t sum [MOST][N];

        for (int i = 0; i < n; ++i) {
            load_scales<row_q4_0>(v.data, v.nb, v.n, b0 + i, d[i]);
            for (int j = (v.n + V_LEN - 1)/V_LEN*V_LEN; j < TILE; j += V_LEN) {
                v_store(d[i] + j, v_zero());
            }
            for (int j = 0; live && j < v.n; ++j) {
                d[i][j] = live[j] ? d[i][j] : 0.0f;
            }
        }
        for (int i = 0; i < n; ++i) {
            vf most = v_zero();
            for (int j = 0; j < TILE; j += V_LEN) {
                most = v_max(most, v_abs(v_load(d[i] + j)));
            }
            dmax[i] = v_hmax(most);
        }
        for (int i = 0; i < n; ++i) {
            const vf scale = v_set(dmax[i] > 0.0f ? 32767.0f/dmax[i] : 0.0f);
            vi total[N];
KVM_UNROLL
            for (int r = 0; r < N; ++r) {
                total[r] = v_izero();
            }
            for (int j = 0; j < TILE; j += 2*V_LEN) {
                const vi d_int = v_to_i16(v_mul(v_load(d[i] + j), scale), v_mul(v_load(d[i] + j + V_LEN), scale));
KVM_UNROLL
                for (int r = 0; r < N; ++r) {
                    const vi x = v_mulhrs16(v_iload(p_int[r] + j), d_int);
                    v_istore(w[i][r] + j, x);
                    total[r] = v_dot16(total[r], x, 0x00010001);
                }
            }
            for (int r = 0; r < N; ++r) {
                unit[i][r] = pmax[r]*dmax[i]*(32768.0f/(32767.0f*32767.0f));
                sum [i][r] = -8*v_ihsum(total[r]); // nibbles are stored with 8 added
            }
        }

        for (int i = 0; i < n; ++i) {
            vi acc[N][V_BLOCK];
KVM_UNROLL
            for (int r = 0; r < N; ++r) {
KVM_UNROLL
                for (int k = 0; k < V_BLOCK; ++k) {
                    acc[r][k] = v_iset(sum[i][r]);
                }
            }

            const uint8_t * x = v.data + (b0 + i)*SIZE_Q4 + 2;

            for (int j = 0; j < v.n; j += 4, x += 4*v.nb) {
                next.visit(4);

                vi y[2*V_BLOCK];
                v_load_i4_pairs(x, v.nb, y);
KVM_UNROLL
                for (int r = 0; r < N; ++r) {
                    const int32_t w0 = load_i32(w[i][r] + j);
                    const int32_t w1 = load_i32(w[i][r] + j + 2);
KVM_UNROLL
                    for (int k = 0; k < V_BLOCK; ++k) {
                        acc[r][k] = v_dot16(acc[r][k], y[k          ], w0);
                        acc[r][k] = v_dot16(acc[r][k], y[k + V_BLOCK], w1);
                        KVM_KEEP(acc[r][k]);
                    }
                }
            }

KVM_UNROLL
            for (int r = 0; r < N; ++r) {
KVM_UNROLL
                for (int k = 0; k < V_BLOCK; ++k) {
                    float * dst = O + r*ld + (b0 + i)*BLOCK + k*V_LEN;
                    v_store(dst, v_fma(v_from_int(acc[r][k]), v_set(unit[i][r]), v_load(dst)));
                }
            }
        }
    }
}

template <int N>
void acc_rows_q4_0_n(int n, const float * P, const float * pmax, const tile & v, const bool * live, float * O, int64_t ld) {
    if (n == N) {
        acc_rows_q4_0<N>(P, pmax, v, live, O, ld);
    } else if constexpr (N > 1) {
        acc_rows_q4_0_n<N - 1>(n, P, pmax, v, live, O, ld);
    }
}

//
// many query rows: a tile is expanded to floats once, scores and outputs are matrix products
//

// C (+)= A B with M rows of A; N_VEC vectors of columns; n_in: columns of A, rows of B
template <int M, int N_VEC, bool add>
V_INLINE void gemm_block(const float * A, int64_t lda, const float * B, int64_t ldb, float * C, int64_t ldc, int64_t n_in) {
    vf acc[M][N_VEC];
KVM_UNROLL
    for (int m = 0; m < M; ++m) {
KVM_UNROLL
        for (int n = 0; n < N_VEC; ++n) {
            acc[m][n] = add ? v_load(C + m*ldc + n*V_LEN) : v_zero();
        }
    }
    for (int64_t i = 0; i < n_in; ++i) {
        vf b[N_VEC];
KVM_UNROLL
        for (int n = 0; n < N_VEC; ++n) {
            b[n] = v_load(B + i*ldb + n*V_LEN);
        }
KVM_UNROLL
        for (int m = 0; m < M; ++m) {
            const vf a = v_set(A[m*lda + i]);
KVM_UNROLL
            for (int n = 0; n < N_VEC; ++n) {
                acc[m][n] = v_fma(a, b[n], acc[m][n]);
            }
        }
    }
KVM_UNROLL
    for (int m = 0; m < M; ++m) {
KVM_UNROLL
        for (int n = 0; n < N_VEC; ++n) {
            v_store(C + m*ldc + n*V_LEN, acc[m][n]);
        }
    }
}

template <int M, int N_VEC, bool add>
V_INLINE void gemm_rows(int64_t n_rows, const float * A, int64_t lda, const float * B, int64_t ldb, float * C, int64_t ldc, int64_t n_in) {
    int64_t r = 0;
    for (; r + M <= n_rows; r += M) {
        gemm_block<M, N_VEC, add>(A + r*lda, lda, B, ldb, C + r*ldc, ldc, n_in);
    }
    for (; r < n_rows; ++r) {
        gemm_block<1, N_VEC, add>(A + r*lda, lda, B, ldb, C + r*ldc, ldc, n_in);
    }
}

// n_cols: a multiple of BLOCK
template <bool add>
void gemm(int64_t n_rows, int64_t n_cols, int64_t n_in, const float * A, int64_t lda, const float * B, int64_t ldb, float * C, int64_t ldc) {
    constexpr int step = V_GEMM_VECS*V_LEN;
    int64_t c = 0;
    for (; c + step <= n_cols; c += step) {
        gemm_rows<V_GEMM_ROWS, V_GEMM_VECS, add>(n_rows, A, lda, B + c, ldb, C + c, ldc, n_in);
    }
    for (; c < n_cols; c += BLOCK) {
        gemm_rows<V_GEMM_ROWS, V_BLOCK < V_GEMM_VECS ? V_BLOCK : V_GEMM_VECS, add>(n_rows, A, lda, B + c, ldb, C + c, ldc, n_in);
    }
}

// rows to floats, padded with zeros to whole blocks
template <class row>
void expand(const tile & t, float * dst, int64_t ld) {
    alignas(64) float d[TILE];
    ahead next(t, t.n_block);
    for (int64_t b = 0; b < t.n_block; ++b) {
        if constexpr (row::scaled) {
            load_scales<row>(t.data, t.nb, t.n, b, d);
        }
        for (int j = 0; j < t.n; ++j) {
            const uint8_t * x = t.data + j*t.nb;
            next.visit(1);
KVM_UNROLL
            for (int i = 0; i < V_BLOCK; ++i) {
                const vf y = row::load(x, b, i);
                v_store(dst + j*ld + b*BLOCK + i*V_LEN, row::scaled ? v_mul(y, v_set(d[j])) : y);
            }
        }
    }
}

void expand_any(const tile & t, int32_t type, int64_t n_embd, float * dst, int64_t ld) {
    if (n_embd % BLOCK == 0) {
        switch (type) {
            case GGML_TYPE_F32:  expand<row_f32 >(t, dst, ld); return;
            case GGML_TYPE_F16:  expand<row_f16 >(t, dst, ld); return;
            case GGML_TYPE_BF16: expand<row_bf16>(t, dst, ld); return;
            case GGML_TYPE_Q8_0: expand<row_q8_0>(t, dst, ld); return;
            case GGML_TYPE_Q4_0: expand<row_q4_0>(t, dst, ld); return;
            default: break;
        }
    }
    const auto to_float = ggml_get_type_traits((ggml_type) type)->to_float;
    ahead next(t, 1);
    for (int j = 0; j < t.n; ++j) {
        const uint8_t * x = t.data + j*t.nb;
        next.visit(1);
        if (to_float) {
            to_float(x, dst + j*ld, n_embd);
        } else {
            memcpy(dst + j*ld, x, n_embd*sizeof(float));
        }
        memset(dst + j*ld + n_embd, 0, (ld - n_embd)*sizeof(float));
    }
}

// dst[i][j] = src[j][i]: rows of TILE; n_embd: a multiple of 4
void transpose(const float * src, int64_t ld, int64_t n_embd, float * dst) {
    for (int j = 0; j < TILE; j += V_LEN) {
        for (int64_t i = 0; i < n_embd; i += 4) {
            vi x[4];
            v_transpose4((const uint8_t *) (src + j*ld + i), ld*sizeof(float), x);
KVM_UNROLL
            for (int p = 0; p < 4; ++p) {
                v_store(dst + (i + p)*TILE + j, v_from_bits(x[p]));
            }
        }
    }
}

//
// softmax
//

// what a mask says of a token and a tile
enum mask_kind : uint8_t {
    MASK_NONE, // every cell counts as it is
    MASK_SOME,
    MASK_ALL,  // no cell counts
};

// a token's mask over n cells, as TILE floats: -inf beyond them
V_INLINE mask_kind load_mask(const attn_args & a, int64_t stream, int64_t token, int64_t cell, int n, float * dst) {
    const float inf = INFINITY;

    if (n < TILE) {
        for (int j = 0; j < TILE; ++j) {
            dst[j] = j < n ? 0.0f : -inf;
        }
        if (!a.mask) {
            return MASK_SOME;
        }
    } else if (!a.mask) {
        return MASK_NONE;
    }

    const uint8_t * x = (const uint8_t *) a.mask + token*a.nb_mask[0] + stream*a.nb_mask[1];

    if (n == TILE) {
        vf lo = v_set( inf);
        vf hi = v_set(-inf);
        for (int j = 0; j < TILE; j += V_LEN) {
            const vf y = a.mask_f16 ? v_load_f16(x + 2*(cell + j)) : v_load((const float *) x + cell + j);
            v_store(dst + j, y);
            lo = v_min(lo, y);
            hi = v_max(hi, y);
        }
        const float most = v_hmax(hi);
        if (most == -inf) {
            return MASK_ALL;
        }
        return most == 0.0f && v_hmax(v_sub(v_zero(), lo)) == 0.0f ? MASK_NONE : MASK_SOME;
    }

    bool any = false;
    for (int j = 0; j < n; ++j) {
        if (a.mask_f16) {
            const ggml_fp16_t y = load_u16(x + 2*(cell + j));
            dst[j] = ggml_fp16_to_fp32(y);
        } else {
            dst[j] = ((const float *) x)[cell + j];
        }
        any |= dst[j] != -inf;
    }
    return any ? MASK_SOME : MASK_ALL;
}

// the larger of n_seen and the cells up to the last one that counts, in whole vectors where there are as many cells
V_INLINE int count_seen(mask_kind kind, int n, const float * mask, int n_seen) {
    if (kind != MASK_SOME) {
        return kind == MASK_ALL ? n_seen : n;
    }
    int j = (n + V_LEN - 1)/V_LEN*V_LEN;
    while (j > n_seen && v_hmax(v_load(mask + j - V_LEN)) == -INFINITY) {
        j -= V_LEN;
    }
    return j <= n_seen ? n_seen : j < n ? j : n;
}

// slope of a head's bias, as ggml's soft_max has it (ALiBi, Press et al. 2022)
float alibi_slope(const attn_args & a, int64_t head) {
    if (a.max_bias <= 0.0f) {
        return 1.0f;
    }
    int64_t n = 1;
    while (2*n <= a.n_head) {
        n *= 2;
    }
    const float m0 = powf(2.0f, -a.max_bias/n);
    const float m1 = powf(2.0f, -a.max_bias/2.0f/n);
    return head < n ? powf(m0, (float) (head + 1)) : powf(m1, (float) (2*(head - n) + 1));
}

// n scores to weights in place, TILE of them; O, m, s: the row's output, largest score and sums of weights so far, V_LEN of
// these; returns the largest of the weights
V_INLINE float softmax_row(float * S, int n, const float * mask, float slope, float softcap, float * O, int64_t n_embd, float & m, float * s) {
    for (int j = n; j < TILE; ++j) {
        S[j] = 0.0f; // their mask is -inf
    }

    constexpr int N_VEC = TILE/V_LEN;
    vf x[N_VEC];

KVM_UNROLL
    for (int i = 0; i < N_VEC; ++i) {
        x[i] = v_load(S + i*V_LEN);
        if (softcap != 0.0f) {
            x[i] = v_mul(v_set(softcap), v_tanh(x[i]));
        }
        if (mask) {
            x[i] = v_fma(v_set(slope), v_load(mask + i*V_LEN), x[i]);
        }
    }

    vf most = x[0];
KVM_UNROLL
    for (int i = 1; i < N_VEC; ++i) {
        most = v_max(most, x[i]);
    }

    const float m_tile = v_hmax(most);
    if (m_tile == -INFINITY) { // nothing counts: the weights are 0, not e^(inf - inf)
        memset(S, 0, TILE*sizeof(float));
        return 0.0f;
    }

    vf sum = v_load(s);
    if (m_tile > m) {
        if (m != -INFINITY) {
            const vf c = v_exp(v_set(m - m_tile));
            for (int64_t i = 0; i < n_embd; i += V_LEN) {
                v_store(O + i, v_mul(v_load(O + i), c));
            }
            sum = v_mul(sum, c);
        }
        m = m_tile;
    }

    const vf base = v_set(m);
KVM_UNROLL
    for (int i = 0; i < N_VEC; ++i) {
        const vf w = v_exp(v_sub(x[i], base));
        v_store(S + i*V_LEN, w);
        sum = v_add(sum, w);
    }
    v_store(s, sum);

    // the largest weight e^(m_tile - m), up to a factor of 2
    return pow2_above((m_tile - m)*1.44269504f);
}

//
// task
//

// a task's part of the scratch memory, for one of its KV heads
struct workspace {
    int32_t  * kept;  // whose queries these are
    float    * Q;     // [n_rows][ld_k], scaled
    query_q8 * Q8;    // [ld_k/64][n_rows]
    float    * O;     // [n_rows][ld_v]
    float    * m;     // [n_rows]
    float    * s;     // [n_rows][V_LEN]
    float    * slope; // [n_gqa]
    // for all heads
    float    * pmax;  // [n_rows], few query rows
    float    * S;     // [ROWS][TILE]
    float    * mask;  // [n_tpb][TILE]
    float    * K;     // [TILE][ld_k]
    float    * KT;    // [ld_k][TILE]
    float    * V;     // [TILE][ld_v]
};

// few query rows
void attend(const attn_args & a, const attn_plan & p, const workspace & w, int64_t n_rows, int64_t n_tokens,
        const tile & k, int32_t type_k, const tile & v, int32_t type_v, const mask_kind * kind) {
    float * S = w.S;

    const bool whole_k = a.n_embd_k % BLOCK == 0;
    const bool whole_v = a.n_embd_v % BLOCK == 0;

    if (type_k == GGML_TYPE_Q4_0 && a.n_embd_k % (2*BLOCK) == 0) {
        // whole vectors of cells are read: the last ones of a cache are copied to where there is room behind them
        tile t = k;
        if (k.n % V_LEN != 0) {
            t.data = (const uint8_t *) w.K;
            t.nb   = k.n_bytes;
            for (int j = 0; j < k.n; ++j) {
                memcpy((uint8_t *) w.K + j*k.n_bytes, k.data + j*k.nb, k.n_bytes);
            }
            const int n = (k.n + V_LEN - 1)/V_LEN*V_LEN;
            memset((uint8_t *) w.K + k.n*k.n_bytes, 0, (n - k.n)*k.n_bytes);
        }
        const int64_t n_pair = a.n_embd_k/(2*BLOCK);
        const int size = group_size(n_rows, V_ROWS_DOT);
        for (int64_t r = 0; r < n_rows; r += size) {
            const int n = (int) (n_rows - r < size ? n_rows - r : size);
            dot_rows_q4_0_n<V_ROWS_DOT>(n, w.Q8 + r, n_rows, n_pair, t, S + r*TILE);
        }
    } else if (whole_k && type_k == GGML_TYPE_F16 ) { dot_all<row_f16 >(w.Q, p.ld_k, n_rows, k, S);
    } else if (whole_k && type_k == GGML_TYPE_BF16) { dot_all<row_bf16>(w.Q, p.ld_k, n_rows, k, S);
    } else if (whole_k && type_k == GGML_TYPE_F32 ) { dot_all<row_f32 >(w.Q, p.ld_k, n_rows, k, S);
    } else if (whole_k && type_k == GGML_TYPE_Q8_0) { dot_all<row_q8_0>(w.Q, p.ld_k, n_rows, k, S);
    } else if (whole_k && type_k == GGML_TYPE_Q4_0) { dot_all<row_q4_0>(w.Q, p.ld_k, n_rows, k, S);
    } else {
        expand_any(k, type_k, a.n_embd_k, w.K, p.ld_k);
        const tile t = { { (const uint8_t *) w.K, p.ld_k*sizeof(float), 0 }, k.n, p.ld_k/BLOCK, {} };
        dot_all<row_f32>(w.Q, p.ld_k, n_rows, t, S);
    }

    for (int64_t r = 0; r < n_rows; ++r) {
        const int64_t t = r/p.n_gqa;
        w.pmax[r] = softmax_row(S + r*TILE, k.n, kind[t] == MASK_NONE ? nullptr : w.mask + t*TILE, w.slope[r % p.n_gqa],
            a.logit_softcap, w.O + r*p.ld_v, p.ld_v, w.m[r], w.s + r*V_LEN);
    }
    if      (whole_v && type_v == GGML_TYPE_F16 ) { acc_all<row_f16 >(S, n_rows, v, w.O, p.ld_v); }
    else if (whole_v && type_v == GGML_TYPE_BF16) { acc_all<row_bf16>(S, n_rows, v, w.O, p.ld_v); }
    else if (whole_v && type_v == GGML_TYPE_F32 ) { acc_all<row_f32 >(S, n_rows, v, w.O, p.ld_v); }
    else if (whole_v && type_v == GGML_TYPE_Q8_0) { acc_all<row_q8_0>(S, n_rows, v, w.O, p.ld_v); }
    else if (whole_v && type_v == GGML_TYPE_Q4_0 && v.n % 4 == 0) {
        bool live[TILE] = {};
        bool masked = false;
        for (int64_t t = 0; t < n_tokens; ++t) {
            masked |= kind[t] != MASK_NONE;
        }
        for (int64_t r = 0; masked && r < n_rows; ++r) {
            for (int j = 0; j < v.n; ++j) {
                live[j] |= S[r*TILE + j] > 0.0f;
            }
        }

        const int size = group_size(n_rows, V_ROWS_ACC);
        for (int64_t r = 0; r < n_rows; r += size) {
            const int n = (int) (n_rows - r < size ? n_rows - r : size);
            acc_rows_q4_0_n<V_ROWS_ACC>(n, S + r*TILE, w.pmax + r, v, masked ? live : nullptr, w.O + r*p.ld_v, p.ld_v);
        }
    }
    else if (whole_v && type_v == GGML_TYPE_Q4_0) { acc_all<row_q4_0>(S, n_rows, v, w.O, p.ld_v); }
    else {
        expand_any(v, type_v, a.n_embd_v, w.V, p.ld_v);
        const tile t = { { (const uint8_t *) w.V, p.ld_v*sizeof(float), 0 }, v.n, p.ld_v/BLOCK, {} };
        acc_all<row_f32>(S, n_rows, t, w.O, p.ld_v);
    }
}

// many query rows
void attend_gemm(const attn_args & a, const attn_plan & p, const workspace & w, int64_t n_rows, int64_t n_tokens,
        const tile & k, int32_t type_k, const tile & v, int32_t type_v, const mask_kind * kind) {
    // cells behind the last one: finite, and masked
    expand_any(k, type_k, a.n_embd_k, w.K, p.ld_k);
    memset(w.K + k.n*p.ld_k, 0, (TILE - k.n)*p.ld_k*sizeof(float));
    transpose(w.K, p.ld_k, p.ld_k, w.KT);

    expand_any(v, type_v, a.n_embd_v, w.V, p.ld_v);
    memset(w.V + v.n*p.ld_v, 0, (TILE - v.n)*p.ld_v*sizeof(float));

    const int64_t step = ROWS >= p.n_gqa ? ROWS/p.n_gqa : 1; // tokens

    for (int64_t t0 = 0; t0 < n_tokens; t0 += step) {
        const int64_t t1 = t0 + step < n_tokens ? t0 + step : n_tokens;

        bool all = true;
        for (int64_t t = t0; t < t1; ++t) {
            all &= kind[t] == MASK_ALL;
        }
        if (all) {
            continue;
        }

        const int64_t r1 = t1*p.n_gqa < n_rows ? t1*p.n_gqa : n_rows;
        for (int64_t r0 = t0*p.n_gqa; r0 < r1; r0 += ROWS) {
            const int64_t n = r1 - r0 < ROWS ? r1 - r0 : ROWS;

            gemm<false>(n, TILE, p.ld_k, w.Q + r0*p.ld_k, p.ld_k, w.KT, TILE, w.S, TILE);

            for (int64_t i = 0; i < n; ++i) {
                const int64_t r = r0 + i;
                const int64_t t = r/p.n_gqa;
                softmax_row(w.S + i*TILE, k.n, kind[t] == MASK_NONE ? nullptr : w.mask + t*TILE, w.slope[r % p.n_gqa],
                    a.logit_softcap, w.O + r*p.ld_v, p.ld_v, w.m[r], w.s + r*V_LEN);
            }

            gemm<true>(n, p.ld_v, TILE, w.S, TILE, w.V, p.ld_v, w.O + r0*p.ld_v, p.ld_v);
        }
    }
}

// a row's output from its sum of weighted V rows, and the attention sink's share of the weights
V_INLINE void finish_row(const attn_args & a, int64_t head, const float * O, float m, float s, float * dst) {
    float c = 1.0f;
    if (a.sinks) {
        const float sink = a.sinks[head];
        if (sink > m) {
            c = m == -INFINITY ? 0.0f : exp_1(m - sink);
            s = s*c + 1.0f;
        } else {
            s += exp_1(sink - m);
        }
    }
    // a token that sees no cell at all: 0
    c = s > 0.0f ? c/s : 0.0f;
    for (int64_t i = 0; i < a.n_embd_v; ++i) {
        dst[i] = O[i]*c;
    }
}

// the query rows of a task, scaled, as they meet a segment
void load_query(const attn_args & a, const attn_plan & p, const workspace & w, int64_t ikv, int64_t stream, int64_t token0,
        int64_t n_rows, int i_seg) {
    // ggml divides the scale, then multiplies what tanh gives
    const float scale = a.logit_softcap != 0.0f ? a.scale/a.logit_softcap : a.scale;

    for (int64_t r = 0; r < n_rows; ++r) {
        const int64_t head = ikv*p.n_gqa + r % p.n_gqa;
        const float * q = (const float *) ((const uint8_t *) a.q
            + head*a.nb_q[0] + (token0 + r/p.n_gqa)*a.nb_q[1] + stream*a.nb_q[2]);
        float * dst = w.Q + r*p.ld_k;
        for (int64_t i = 0; i < a.n_embd_k; ++i) {
            dst[i] = q[i]*scale;
        }
        memset(dst + a.n_embd_k, 0, (p.ld_k - a.n_embd_k)*sizeof(float));
        if (i_seg == 0 && a.n_rot_k > 0) {
            rotate(dst, a.n_embd_k, a.n_rot_k);
        }
        if (!p.gemm && a.seg[i_seg].type_k == GGML_TYPE_Q4_0 && a.n_embd_k % (2*BLOCK) == 0) {
            quantize_query(dst, a.n_embd_k/(2*BLOCK), w.Q8 + r, n_rows);
        }
    }
}

// the sums of rows of the first segment, which are rotated as these are
void rotate_back(const attn_args & a, const attn_plan & p, const workspace & w, int64_t n_rows) {
    for (int64_t r = 0; a.n_rot_v > 0 && r < n_rows; ++r) {
        rotate(w.O + r*p.ld_v, a.n_embd_v, a.n_rot_v);
    }
}

// chunks that lie in the first segment as a whole
V_INLINE int64_t first_segment_chunks(const attn_args & a, const attn_plan & p) {
    return (a.seg[0].n_kv + TILE - 1)/TILE/p.n_tile;
}

// what a task is about
struct place {
    int64_t ikv, chunk, block, stream; // ikv: the first of its KV heads

    // heads next to each other read cells next to each other
    V_INLINE place(const attn_args & a, const attn_plan & p, int64_t task) :
        ikv   (task*p.n_hpt % a.n_head_kv),
        chunk (task*p.n_hpt / a.n_head_kv % p.n_chunk),
        block (task*p.n_hpt / a.n_head_kv / p.n_chunk % p.n_block),
        stream(task*p.n_hpt / a.n_head_kv / p.n_chunk / p.n_block) {}
};

// part: which queries there are, those of a KV head, block and stream; h: the KV head's number in the task
V_INLINE workspace get_workspace(const attn_plan & p, float * scratch, int64_t part, int64_t h) {
    float * next = scratch;
    // the i-th of count arrays
    const auto take = [&next](int64_t n, int64_t i = 0, int64_t count = 1) {
        n = (n + 15)/16*16;
        float * res = next + i*n;
        next += count*n;
        return res;
    };

    const int64_t n_q8 = p.gemm ? 0 : p.n_rows*p.ld_k/64*(int64_t) (sizeof(query_q8)/sizeof(float));

    workspace w;
    w.kept  = (int32_t *) take(p.n_query) + part % p.n_query;
    w.Q     = take(p.n_rows*p.ld_k, part % p.n_query, p.n_query);
    w.Q8    = (query_q8 *) take(n_q8, part % p.n_query, p.n_query);
    w.O     = take(p.n_rows*p.ld_v, h, p.n_hpt);
    w.m     = take(p.n_rows,        h, p.n_hpt);
    w.s     = take(p.n_rows*V_LEN,  h, p.n_hpt);
    w.slope = take(p.n_gqa,         h, p.n_hpt);
    w.pmax  = take(p.n_rows);
    w.S     = take(ROWS*TILE);
    w.mask  = take(p.n_tpb*TILE);
    w.K     = take(TILE*p.ld_k);
    w.KT    = take(p.gemm ? TILE*p.ld_k : 0);
    w.V     = take(TILE*p.ld_v);
    return w;
}

void attn_task(const attn_args & a, const attn_plan & p, int64_t task, int64_t task_next, float * partial, float * scratch) {
    const auto [ikv0, chunk, block, stream] = place(a, p, task);
    const place after(a, p, task_next);

    const int64_t token0   = block*p.n_tpb;
    const int64_t n_tokens = a.n_tokens - token0 < p.n_tpb ? a.n_tokens - token0 : p.n_tpb;
    const int64_t n_rows   = n_tokens*p.n_gqa;

    const int64_t part0 = (stream*p.n_block + block)*a.n_head_kv + ikv0;

    const auto workspace_of = [&](int64_t h) { return get_workspace(p, scratch, part0 + h, h); };

    for (int64_t h = 0; h < p.n_hpt; ++h) {
        const workspace w = workspace_of(h);
        for (int64_t r = 0; r < n_rows; ++r) {
            w.m[r] = -INFINITY;
            v_store(w.s + r*V_LEN, v_zero());
        }
        memset(w.O, 0, n_rows*p.ld_v*sizeof(float));
        for (int64_t g = 0; g < p.n_gqa; ++g) {
            w.slope[g] = alibi_slope(a, (ikv0 + h)*p.n_gqa + g);
        }
    }

    // the chunk's tiles; none lies in both segments
    const int64_t n_tile[2] = { (a.seg[0].n_kv + TILE - 1)/TILE, (a.seg[1].n_kv + TILE - 1)/TILE };

    const int64_t begin = chunk*p.n_tile;
    const int64_t end   = begin + p.n_tile < n_tile[0] + n_tile[1] ? begin + p.n_tile : n_tile[0] + n_tile[1];

    const auto locate = [&](int64_t t, int64_t head_kv, int64_t i_stream, bool is_v) {
        const int i = t >= n_tile[0];
        const auto & seg = a.seg[i];
        const size_t * nb = is_v ? seg.nb_v : seg.nb_k;
        return rows {
            (const uint8_t *) (is_v ? seg.v : seg.k) + head_kv*nb[0] + (t - (i ? n_tile[0] : 0))*TILE*nb[1] + i_stream*nb[2], nb[1],
            (int64_t) p.row_size[i][is_v],
        };
    };

    // What is fetched while head h of a tile is worked on: its rows of the next tile. Those of all heads lie side by side and
    // share cache lines: then each one fetches as much of them.
    const auto locate_next = [&](int64_t it, int64_t h, bool is_v) {
        const bool last = it + 1 == end;
        if (last && task_next >= p.n_task) {
            return rows {};
        }
        const int64_t t = last ? after.chunk*p.n_tile : it + 1;
        rows res = locate(t, (last ? after.ikv : ikv0) + h, last ? after.stream : stream, is_v);
        const auto & seg = a.seg[t >= n_tile[0]];
        const size_t nb_head = (is_v ? seg.nb_v : seg.nb_k)[0];
        if (p.n_hpt == a.n_head_kv && nb_head*p.n_hpt <= res.nb) {
            res.nb      = (res.nb + p.n_hpt - 1)/p.n_hpt;
            res.data   += h*(TILE*res.nb - nb_head);
            res.n_bytes = res.nb;
        }
        return res;
    };

    float * mask = workspace_of(0).mask;
    mask_kind kind[LLAMA_KV_MIXED_ATTN_MAX_ROWS];

    int i_seg = -1;

    for (int64_t it = begin; it < end; ++it) {
        const int i = it >= n_tile[0];
        const auto & seg = a.seg[i];

        for (int64_t h = 0; i != i_seg && h < p.n_hpt; ++h) {
            const workspace w = workspace_of(h);
            if (i_seg == 0) {
                rotate_back(a, p, w, n_rows);
            }
            const int32_t query = (int32_t) (2*(part0 + h) + i);
            if (*w.kept != query) {
                load_query(a, p, w, ikv0 + h, stream, token0, n_rows, i);
                *w.kept = query;
            }
        }
        i_seg = i;

        const int64_t cell = (it - (i ? n_tile[0] : 0))*TILE;
        const int64_t col  = cell + (i ? a.seg[0].n_kv : 0); // of the mask
        const int n = (int) (seg.n_kv - cell < TILE ? seg.n_kv - cell : TILE);

        int n_seen = 0; // cells behind these are hidden from all
        for (int64_t t = 0; t < n_tokens; ++t) {
            kind[t] = load_mask(a, stream, token0 + t, col, n, mask + t*TILE);
            n_seen = count_seen(kind[t], n, mask + t*TILE, n_seen);
        }
        if (n_seen == 0) {
            continue;
        }

        for (int64_t h = 0; h < p.n_hpt; ++h) {
            const auto get_tile = [&](bool is_v) {
                const int64_t n_block = ((is_v ? a.n_embd_v : a.n_embd_k) + BLOCK - 1)/BLOCK;
                return tile { locate(it, ikv0 + h, stream, is_v), n_seen, n_block, locate_next(it, h, is_v) };
            };

            (p.gemm ? attend_gemm : attend)(a, p, workspace_of(h), n_rows, n_tokens,
                get_tile(false), seg.type_k, get_tile(true), seg.type_v, kind);
        }
    }

    for (int64_t h = 0; h < p.n_hpt; ++h) {
        const workspace w = workspace_of(h);

        // where whole chunks are of rotated rows, that waits for the merge
        if (i_seg == 0 && (p.n_partial == 0 || chunk >= first_segment_chunks(a, p))) {
            rotate_back(a, p, w, n_rows);
        }

        if (p.n_partial > 0) {
            float * dst = partial + (task*p.n_hpt + h)*p.n_partial;
            memcpy(dst, w.O, n_rows*p.ld_v*sizeof(float));
            memcpy(dst + p.n_rows*p.ld_v, w.m, n_rows*sizeof(float));
            for (int64_t r = 0; r < n_rows; ++r) {
                dst[p.n_rows*p.ld_v + p.n_rows + r] = v_hsum(v_load(w.s + r*V_LEN));
            }
            continue;
        }

        for (int64_t r = 0; r < n_rows; ++r) {
            const int64_t head = (ikv0 + h)*p.n_gqa + r % p.n_gqa;
            float * dst = a.dst + ((stream*a.n_tokens + token0 + r/p.n_gqa)*a.n_head + head)*a.n_embd_v;
            finish_row(a, head, w.O + r*p.ld_v, w.m[r], v_hsum(v_load(w.s + r*V_LEN)), dst);
        }
    }
}

void attn_merge(const attn_args & a, const attn_plan & p, const float * partial, int64_t row0, int64_t row1) {
    const int64_t n_rotated = a.n_rot_v > 0 ? first_segment_chunks(a, p) : 0;

    for (int64_t row = row0; row < row1; ++row) {
        const int64_t head   = row % a.n_head;
        const int64_t token  = row / a.n_head % a.n_tokens;
        const int64_t stream = row / a.n_head / a.n_tokens;

        const int64_t block = token/p.n_tpb;
        const int64_t r     = token % p.n_tpb*p.n_gqa + head % p.n_gqa;

        // partial results of the row, chunk by chunk
        const float * x = partial + ((stream*p.n_block + block)*p.n_chunk*a.n_head_kv + head/p.n_gqa)*p.n_partial;
        const int64_t step = a.n_head_kv*p.n_partial;

        float m = -INFINITY;
        for (int64_t c = 0; c < p.n_chunk; ++c) {
            const float y = x[c*step + p.n_rows*p.ld_v + r];
            m = y > m ? y : m;
        }

        float O[LLAMA_KV_MIXED_ATTN_MAX_EMBD] = {};
        float s = 0.0f;
        for (int64_t c = 0; c < p.n_chunk; ++c) {
            if (c == n_rotated && c > 0) {
                rotate(O, a.n_embd_v, a.n_rot_v);
            }
            const float * y = x + c*step;
            const float s_c = y[p.n_rows*p.ld_v + p.n_rows + r];
            if (s_c == 0.0f) {
                continue;
            }
            const float e = exp_1(y[p.n_rows*p.ld_v + r] - m);
            s += e*s_c;
            for (int64_t i = 0; i < p.ld_v; i += V_LEN) {
                v_store(O + i, v_fma(v_set(e), v_load(y + r*p.ld_v + i), v_load(O + i)));
            }
        }

        if (n_rotated == p.n_chunk) {
            rotate(O, a.n_embd_v, a.n_rot_v);
        }

        finish_row(a, head, O, m, s, a.dst + row*a.n_embd_v);
    }
}

} // namespace
