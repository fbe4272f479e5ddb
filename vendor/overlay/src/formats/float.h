// Rows as floats: what any format can be that says how a block of it is loaded as such.

#pragma once

#include "formats/tile.h"

namespace {

// row: a struct with
//   scaled:  whether a block has a scale, which is then its first two bytes (F16)
//   has_min: whether a number is added to the scaled values, which is then its next two bytes (F16)
//   size:    bytes of a block, where it has a scale
//   load():  vector i of block b, without these

template <class row>
V_INLINE vf load_value(const uint8_t * x, int64_t b, int i, float d, float min) {
    const vf y = row::load(x, b, i);
    if constexpr (row::has_min) {
        return v_fma(y, v_set(d), v_set(min)); // the product is exact
    }
    return row::scaled ? v_mul(y, v_set(d)) : y;
}

// S[r][j] = Q[r] . K[j], for N query rows
template <class row, int N>
void dot_rows(const float * Q, int64_t ld, const tile & k, float * S) {
    alignas(64) float d  [LLAMA_KV_MIXED_MAX_EMBD/BLOCK][TILE];
    alignas(64) float min[row::has_min ? LLAMA_KV_MIXED_MAX_EMBD/BLOCK : 1][TILE];
    if constexpr (row::scaled) {
        for (int64_t b = 0; b < k.n_block; ++b) {
            load_scales<row>(k.data, k.nb, k.n, b, d[b], min[row::has_min ? b : 0]);
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
            if constexpr (row::scaled && !row::has_min) {
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
                        const vf y = row::has_min ? load_value<row>(x[p], b, i, d[b][j[p]], min[b][j[p]]) : row::load(x[p], b, i);
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
    alignas(64) float d  [TILE];
    alignas(64) float min[TILE];
    alignas(64) float w[N][TILE];

    ahead next(v, v.n_block);

    for (int64_t b = 0; b < v.n_block; ++b) {
        if constexpr (row::scaled) {
            load_scales<row>(v.data, v.nb, v.n, b, d, min);
        }
KVM_UNROLL
        for (int r = 0; r < N; ++r) {
            for (int j = 0; j < TILE; j += V_LEN) {
                const vf p = v_load(P + r*TILE + j);
                v_store(w[r] + j, row::scaled && !row::has_min ? v_mul(p, v_load(d + j)) : p);
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
                const vf y = row::has_min ? load_value<row>(x, b, i, d[j], min[j]) : row::load(x, b, i);
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

//
// the functions of a format, see llama_kv_mixed_format
//

template <class row>
void dot_float(const llama_kv_mixed_dot & a) {
    for_groups<V_ROWS_DOT>(a.n_rows, [&](auto n, int64_t r) {
        dot_rows<row, n.value>(a.Q + r*a.ld, a.ld, a.k, a.S + r*TILE);
    });
}

template <class row>
void acc_float(const llama_kv_mixed_acc & a) {
    for_groups<V_ROWS_ACC>(a.n_rows, [&](auto n, int64_t r) {
        acc_rows<row, n.value>(a.P + r*TILE, a.v, a.O + r*a.ld, a.ld);
    });
}

template <class row>
void expand_float(const tile & t, float * dst, int64_t ld) {
    alignas(64) float d  [TILE];
    alignas(64) float min[TILE];
    ahead next(t, t.n_block);
    const size_t nb = t.nb;
    const int    n  = t.n;
    for (int64_t b = 0; b < t.n_block; ++b) {
        if constexpr (row::scaled) {
            load_scales<row>(t.data, nb, n, b, d, min);
        }
        const auto expand = [&](auto n_rows, int j) {
            constexpr int N = decltype(n_rows)::value;
            const uint8_t * x = t.data + j*nb;
            float * y = dst + j*ld + b*BLOCK;
            next.visit(N);
KVM_UNROLL
            for (int p = 0; p < N; ++p) {
KVM_UNROLL
                for (int i = 0; i < V_BLOCK; ++i) {
                    v_store(y + p*ld + i*V_LEN, load_value<row>(x + p*nb, b, i, d[j + p], min[j + p]));
                }
            }
        };
        int j = 0;
        for (; j + 4 <= n; j += 4) {
            expand(number<4>(), j);
        }
        for (; j < n; ++j) {
            expand(number<1>(), j);
        }
    }
}

// one row, and nothing to fetch after it
template <class row>
void load_float(const uint8_t * src, int64_t n, float * dst) {
    for (int64_t b = 0; b < n/BLOCK; ++b) {
KVM_UNROLL
        for (int i = 0; i < V_BLOCK; ++i) {
            v_store(dst + b*BLOCK + i*V_LEN, row::load(src, b, i));
        }
    }
}

template <class row>
constexpr llama_kv_mixed_format make_float_format(const char * name, ggml_type type, decltype(llama_kv_mixed_format::quantize) quantize) {
    return { name, type, load_float<row>, quantize, expand_float<row>, dot_float<row>, acc_float<row>, 0, nullptr, nullptr, nullptr, false };
}

//
// the types of hot rows
//

struct row_floats {
    static constexpr bool scaled  = false;
    static constexpr bool has_min = false;
};

struct row_f32 : row_floats {
    static V_INLINE vf load(const uint8_t * row, int64_t b, int i) { return v_load((const float *) row + b*BLOCK + i*V_LEN); }
};

struct row_f16 : row_floats {
    static V_INLINE vf load(const uint8_t * row, int64_t b, int i) { return v_load_f16(row + 2*(b*BLOCK + i*V_LEN)); }
};

struct row_bf16 : row_floats {
    static V_INLINE vf load(const uint8_t * row, int64_t b, int i) { return v_load_bf16(row + 2*(b*BLOCK + i*V_LEN)); }
};

void quantize_f32 (const float * x, int64_t n, uint8_t * dst) { memcpy(dst, x, n*sizeof(float)); }
void quantize_f16 (const float * x, int64_t n, uint8_t * dst) { ggml_fp32_to_fp16_row(x, (ggml_fp16_t *) dst, n); }
void quantize_bf16(const float * x, int64_t n, uint8_t * dst) { ggml_fp32_to_bf16_row_ref(x, (ggml_bf16_t *) dst, n); }

constexpr auto format_f32  = make_float_format<row_f32> ("f32",  GGML_TYPE_F32,  quantize_f32);
constexpr auto format_f16  = make_float_format<row_f16> ("f16",  GGML_TYPE_F16,  quantize_f16);
constexpr auto format_bf16 = make_float_format<row_bf16>("bf16", GGML_TYPE_BF16, quantize_bf16);

} // namespace
