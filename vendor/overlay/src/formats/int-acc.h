// V in whole numbers: weights of 15 bits, a lane per element, two cells at a time.

#pragma once

#include "formats/float.h"

namespace {

// row: a struct with
//   size:         bytes of a block, which begins with its scale (F16)
//   has_min:      whether a number follows that is added to the scaled values (F16)
//   bias_acc:     what load_pairs() adds to the values, so that these have either sign: what rounding does to weights and
//                 scales is not of random sign, and would add up
//   load_pairs(): the values of a block in each of four rows, see v_load_i4_pairs(); p: the block of the first row

// Weights are rounded to 15 bits of pmax, scales to 15 bits of the tile's largest one, and so are their products: the sums
// over a tile fit in 32 bits (15 bits, 8 of a value at most, 7 for the cells).
// live: which cells have a weight at all, null: any may have; what free cells were left with must not set that scale
template <class row, int N>
void acc_rows_int(const float * P, const float * pmax, const tile & v, const bool * live, float * O, int64_t ld) {
    constexpr int MOST = 4; // blocks whose scales are prepared together

    const int n_pad = (v.n + 2*V_LEN - 1)/(2*V_LEN)*(2*V_LEN);

    alignas(64) int16_t p_int[N][TILE];
    alignas(64) float   d  [MOST][TILE];
    alignas(64) float   min[MOST][TILE];
    alignas(64) int16_t w[MOST][N][TILE];

    ahead next(v, v.n_block);

    for (int r = 0; r < N; ++r) {
        const vf scale = v_set(pmax[r] > 0.0f ? 32767.0f/pmax[r] : 0.0f);
        for (int j = 0; j < n_pad; j += 2*V_LEN) {
            v_istore(p_int[r] + j, v_to_i16(v_mul(v_load(P + r*TILE + j), scale), v_mul(v_load(P + r*TILE + j + V_LEN), scale)));
        }
    }

    for (int64_t b0 = 0; b0 < v.n_block; b0 += MOST) {
        const int n = (int) (v.n_block - b0 < MOST ? v.n_block - b0 : MOST);

        // one step for all blocks after the other: each ends with a sum over lanes, which takes its time
        float   dmax[MOST];
        float   unit[MOST][N];
        int32_t sum [MOST][N];
        float   more[MOST][N]; // what is added to all values of a block, the weighted sum of its minima

        for (int i = 0; i < n; ++i) {
            load_scales<row>(v.data, v.nb, v.n, b0 + i, d[i], min[i]);
            for (int j = (v.n + V_LEN - 1)/V_LEN*V_LEN; j < n_pad; j += V_LEN) {
                v_store(d  [i] + j, v_zero());
                v_store(min[i] + j, v_zero());
            }
            for (int j = 0; live && j < v.n; ++j) {
                d[i][j] = live[j] ? d[i][j] : 0.0f;
            }
        }
        for (int i = 0; row::has_min && i < n; ++i) {
            for (int r = 0; r < N; ++r) {
                vf total = v_zero();
                for (int j = 0; j < n_pad; j += V_LEN) {
                    const vf y = v_fma(v_load(d[i] + j), v_set(row::bias_acc), v_load(min[i] + j));
                    total = v_fma(v_load(P + r*TILE + j), y, total);
                }
                more[i][r] = v_hsum(total);
            }
        }
        for (int i = 0; i < n; ++i) {
            vf most = v_zero();
            for (int j = 0; j < n_pad; j += V_LEN) {
                most = v_max_bits(most, v_abs(v_load(d[i] + j)));
            }
            dmax[i] = v_hmax_bits(most); // not a number when one of them is not: then neither is what comes out
        }
        for (int i = 0; i < n; ++i) {
            const vf scale = v_set(dmax[i] > 0.0f ? 32767.0f/dmax[i] : 0.0f);
            vi total[N];
KVM_UNROLL
            for (int r = 0; r < N; ++r) {
                total[r] = v_izero();
            }
            for (int j = 0; j < n_pad; j += 2*V_LEN) {
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
                sum [i][r] = -row::bias_acc*v_ihsum(total[r]);
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

            const uint8_t * x = v.data + (b0 + i)*row::size;

            for (int j = 0; j < v.n; j += 4, x += 4*v.nb) {
                next.visit(4);

                vi y[2*V_BLOCK];
                row::load_pairs(x, v.nb, y);
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
                    const vf y = row::has_min ? v_add(v_load(dst), v_set(more[i][r])) : v_load(dst);
                    v_store(dst, v_fma(v_from_int(acc[r][k]), v_set(unit[i][r]), y));
                }
            }
        }
    }
}

// see llama_kv_mixed_format
template <class row>
void acc_int(const llama_kv_mixed_acc & a) {
    if (a.v.n % 4 != 0) {
        acc_float<row>(a);
        return;
    }

    bool live[TILE] = {};
    for (int64_t r = 0; a.masked && r < a.n_rows; ++r) {
        for (int j = 0; j < a.v.n; ++j) {
            live[j] |= a.P[r*TILE + j] > 0.0f;
        }
    }

    for_groups<V_ROWS_ACC>(a.n_rows, [&](auto n, int64_t r) {
        acc_rows_int<row, n.value>(a.P + r*TILE, a.pmax + r, a.v, a.masked ? live : nullptr, a.O + r*a.ld, a.ld);
    });
}

} // namespace
