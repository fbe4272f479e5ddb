// A tile of cells and the query rows of a task.

#pragma once

#include "attention/gemm.h"
#include "attention/products.h"
#include "attention/softmax.h"
#include "attention/workspace.h"
#include "formats/table.h"

namespace {

// query rows that share a tile's scores while these are in the first cache level
constexpr int ROWS = LLAMA_KV_MIXED_ATTN_ROWS;

static_assert(V_LEN <= LLAMA_KV_MIXED_MAX_LANES, "the plan leaves room for a sum per lane");

// a thread's scratch memory, for one of the KV heads of a task: see llama_kv_mixed_attn_layout
struct workspace {
    int32_t * kept;
    float   * Q;
    void    * query;
    float   * O;
    float   * m;
    float   * s;
    float   * slope;
    float   * m_hot;
    float   * s_hot;
    // for all heads
    float   * pmax;
    float   * mean;
    float   * S;
    float   * mask;
    float   * K;
    float   * KT;
    float   * V;
};

// part: which queries there are, those of a KV head, block and stream; h: the KV head's number in the task
V_INLINE workspace get_workspace(const attn_plan & p, float * scratch, int64_t part, int64_t h) {
    const auto & l = p.layout;

    workspace w;
    w.kept  = (int32_t *) l.kept.get(scratch, part % p.n_query);
    w.Q     = l.Q    .get(scratch, part % p.n_query);
    w.query = l.query.get(scratch, part % p.n_query);
    w.O     = l.O    .get(scratch, h);
    w.m     = l.m    .get(scratch, h);
    w.s     = l.s    .get(scratch, h);
    w.slope = l.slope.get(scratch, h);
    w.m_hot = l.m_hot.get(scratch, h);
    w.s_hot = l.s_hot.get(scratch, h);
    w.pmax  = l.pmax .get(scratch);
    w.mean  = l.mean .get(scratch);
    w.S     = l.S    .get(scratch);
    w.mask  = l.mask .get(scratch);
    w.K     = l.K    .get(scratch);
    w.KT    = l.KT   .get(scratch);
    w.V     = l.V    .get(scratch);
    return w;
}

const llama_kv_mixed_format & get_format(int32_t type) {
    for (const auto & format : formats) {
        if (format.type == type) {
            return format;
        }
    }
    GGML_ABORT("rows of type %d have no format", type);
}

// rows as floats, padded with zeros to whole blocks
void expand(const llama_kv_mixed_format & format, const tile & t, int64_t n_embd, float * dst, int64_t ld) {
    if (format.expand && n_embd % BLOCK == 0) {
        format.expand(t, dst, ld);
        return;
    }
    const auto to_float = ggml_get_type_traits(format.type)->to_float;
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

// The same in steps, behind a tile's last cell zeros: f(rows, the first of them). A step's rows are used while they are in the
// first cache level.
template <class F>
V_INLINE void expand_in_steps(const llama_kv_mixed_format & format, const tile & t, int64_t n_embd, float * dst, int64_t ld, const F & f) {
    constexpr int step = LLAMA_KV_MIXED_PRODUCT_CELLS;

    for (int j = 0; j < t.n; j += step) {
        tile part = t;
        part.n          = t.n - j < step ? t.n - j : step;
        part.data      += j*t.nb;
        part.next.data += j*t.next.nb;
        expand(format, part, n_embd, dst, ld);
        memset(dst + part.n*ld, 0, (step - part.n)*ld*sizeof(float));
        f(dst, j);
    }
}

// a tile that has been expanded
V_INLINE tile as_floats(const tile & t, const float * data, int64_t ld) {
    return { { (const uint8_t *) data, ld*sizeof(float), 0 }, t.n, ld/BLOCK, {}, nullptr, 0 };
}

// the rows of a segment's tile, and their formats
struct kv_tile {
    const llama_kv_mixed_format & format_k;
    const llama_kv_mixed_format & format_v;
    tile k;
    tile v;

    const uint8_t * mean; // of K, F16 [n_embd_k]; null: rows are stored as they are

    const llama_kv_mixed_products * products; // in BF16; null: there are none
};

void load_mean(const kv_tile & kv, int64_t n_embd, float * dst) {
    for (int64_t i = 0; i < n_embd; i += V_LEN) {
        v_store(dst + i, v_load_f16(kv.mean + 2*i));
    }
}

// rows of K as floats, with their mean
void expand_k(const attn_args & a, const attn_plan & p, const workspace & w, const kv_tile & kv) {
    expand(kv.format_k, kv.k, a.n_embd_k, w.K, p.ld_k);

    for (int64_t i = 0; kv.mean && i < a.n_embd_k; i += V_LEN) {
        const vf mean = v_load_f16(kv.mean + 2*i);
        for (int j = 0; j < kv.k.n; ++j) {
            v_store(w.K + j*p.ld_k + i, v_add(v_load(w.K + j*p.ld_k + i), mean));
        }
    }
}

// res[r] = Q[r] . mean
V_INLINE void dot_mean(const float * Q, int64_t ld, int64_t n_rows, const float * mean, int64_t n_embd, float * res) {
    for (int64_t r = 0; r < n_rows; r += 4) {
        const float * q[4];
        vf sum[4];
KVM_UNROLL
        for (int p = 0; p < 4; ++p) {
            q[p]   = Q + (r + p < n_rows ? r + p : n_rows - 1)*ld;
            sum[p] = v_zero();
        }
        for (int64_t i = 0; i < n_embd; i += V_LEN) {
            const vf x = v_load(mean + i);
KVM_UNROLL
            for (int p = 0; p < 4; ++p) {
                sum[p] = v_fma(v_load(q[p] + i), x, sum[p]);
            }
        }
        v_hsum4(res + r, sum[0], sum[1], sum[2], sum[3]);
    }
}

// Scores S [n_rows][TILE] of the query rows from r0 on to weights; add_mean: what the mean adds is not in them yet; pmax: see
// llama_kv_mixed_acc, null: nobody wants it
V_INLINE void scores_to_weights(const attn_args & a, const attn_plan & p, const workspace & w, int64_t r0, int64_t n_rows, int n,
        bool add_mean, const mask_kind * kind, float * pmax) {
    float add[ROWS + 3] = {};
    if (add_mean) {
        dot_mean(w.Q + r0*p.ld_k, p.ld_k, n_rows, w.mean, a.n_embd_k, add);
    }
    const float softcap = a.logit_softcap;

    for (int64_t i0 = 0; i0 < n_rows; i0 += 4) {
        vf lanes[4];
KVM_UNROLL
        for (int k = 0; k < 4; ++k) {
            const int64_t r = r0 + i0 + k;
            if (i0 + k >= n_rows) {
                lanes[k] = v_zero();
                continue;
            }
            const float * mask = kind[r/p.n_gqa] == MASK_NONE ? nullptr : w.mask + r/p.n_gqa*TILE;
            lanes[k] = finish_scores(w.S + (i0 + k)*TILE, n, add[i0 + k], mask, w.slope[r % p.n_gqa], softcap);
        }
        float most[4];
        v_hmax4(most, lanes[0], lanes[1], lanes[2], lanes[3]);

        for (int64_t i = i0; i < i0 + 4 && i < n_rows; ++i) {
            const int64_t r = r0 + i;

            // what is added to all scores can be added to the largest instead, where nothing else was done to them
            const float add_last = softcap != 0.0f ? 0.0f : add[i];
            to_weights(w.S + i*TILE, most[i - i0], add_last, pmax ? 0.0f : MOST_ABOVE, w.O + r*p.ld_v, p.ld_v, w.m[r], w.s + r*V_LEN);
            if (pmax) {
                pmax[i] = most[i - i0] == -INFINITY ? 0.0f : pow2_above(most[i - i0] + add_last - w.m[r]);
            }
        }
    }
}

// few query rows: the weights of a tile's cells, as they meet its rows of V
llama_kv_mixed_acc weigh(const attn_args & a, const attn_plan & p, const workspace & w, int64_t n_rows, int64_t n_tokens, const kv_tile & kv, const mask_kind * kind) {
    const tile & k = kv.k;

    // rows as they are stored meet the query without the mean, which then adds the same to all of a row's scores
    const bool is_direct = kv.format_k.dot && a.n_embd_k % BLOCK == 0;
    const bool add_mean  = kv.mean && is_direct;

    if (add_mean) {
        load_mean(kv, a.n_embd_k, w.mean);
    }

    llama_kv_mixed_dot dot = { n_rows, a.n_embd_k, w.Q, p.ld_k, w.query, k, (uint8_t *) w.K, w.S };
    if (is_direct) {
        kv.format_k.dot(dot);
    } else {
        expand_k(a, p, w, kv);
        dot.k = as_floats(k, w.K, p.ld_k);
        format_f32.dot(dot);
    }

    bool masked = false;
    for (int64_t t = 0; t < n_tokens; ++t) {
        masked |= kind[t] != MASK_NONE;
    }

    scores_to_weights(a, p, w, 0, n_rows, k.n, add_mean, kind, w.pmax);

    return { n_rows, w.S, w.pmax, masked, kv.v, w.O, p.ld_v };
}

// few query rows
void attend(const attn_args & a, const attn_plan & p, const workspace & w, int64_t n_rows, int64_t n_tokens, const kv_tile & kv, const mask_kind * kind) {
    auto acc = weigh(a, p, w, n_rows, n_tokens, kv, kind);
    if (kv.format_v.acc && a.n_embd_v % BLOCK == 0) {
        kv.format_v.acc(acc);
    } else {
        expand(kv.format_v, kv.v, a.n_embd_v, w.V, p.ld_v);
        acc.v = as_floats(kv.v, w.V, p.ld_v);
        format_f32.acc(acc);
    }
}

// how scores of many query rows are computed
enum score_kind : uint8_t {
    SCORE_FLOAT,
    SCORE_BF16, // where the processor has fast products of matrices
    SCORE_INT,  // where the format has them
};

V_INLINE score_kind get_score_kind(const llama_kv_mixed_format & format, const llama_kv_mixed_products * products, int64_t n_embd) {
    if (products && products->scores && format.is_coarse) {
        return SCORE_BF16;
    }
    return format.scores && n_embd % BLOCK == 0 ? SCORE_INT : SCORE_FLOAT;
}

// many query rows
void attend_gemm(const attn_args & a, const attn_plan & p, const workspace & w, int64_t n_rows, int64_t n_tokens, const kv_tile & kv, const mask_kind * kind) {
    (void) n_tokens;

    const tile & k = kv.k;
    const tile & v = kv.v;

    const auto * products = kv.products;

    const auto score  = get_score_kind(kv.format_k, products, a.n_embd_k);
    const bool v_bf16 = products && kv.format_v.is_coarse;

    // coarse rows stay as they are, less their mean, as with few query rows
    const bool add_mean = kv.mean && score != SCORE_FLOAT;
    if (add_mean) {
        load_mean(kv, a.n_embd_k, w.mean);
    }

    // cells behind the last one: finite, and masked
    if (score == SCORE_INT) {
        kv.format_k.load_tile(k, (uint8_t *) w.K, w.KT);
    } else if (score == SCORE_BF16) {
        expand_in_steps(kv.format_k, k, a.n_embd_k, w.K, p.ld_k, [&](const float * rows, int j) {
            products->load_k(rows, j, p.ld_k, (uint32_t *) w.KT);
        });
    } else {
        expand_k(a, p, w, kv);
        memset(w.K + k.n*p.ld_k, 0, (TILE - k.n)*p.ld_k*sizeof(float));
        transpose(w.K, p.ld_k, p.ld_k, w.KT);
    }

    if (v_bf16) {
        // words take the first half
        expand_in_steps(kv.format_v, v, a.n_embd_v, w.V + TILE/2*p.ld_v, p.ld_v, [&](const float * rows, int j) {
            products->load_v(rows, j, p.ld_v, (uint32_t *) w.V);
        });
    } else {
        expand(kv.format_v, v, a.n_embd_v, w.V, p.ld_v);
    }

    const int64_t step = score == SCORE_BF16 || v_bf16 ? 2*LLAMA_KV_MIXED_PRODUCT_ROWS : ROWS;

    for (int64_t r0 = 0; r0 < n_rows; r0 += step) {
        const int64_t n = n_rows - r0 < step ? n_rows - r0 : step;

        bool all = true;
        for (int64_t t = r0/p.n_gqa; t <= (r0 + n - 1)/p.n_gqa; ++t) {
            all &= kind[t] == MASK_ALL;
        }
        if (all) {
            continue;
        }

        if (score == SCORE_INT) {
            kv.format_k.scores(w.query, p.n_rows, r0, n, w.KT, k.n, a.n_embd_k, w.S);
        } else if (score == SCORE_BF16) {
            products->scores((const uint32_t *) w.query + r0*p.ld_k/2, (const uint32_t *) w.KT, n, p.ld_k, k.n, w.S);
        } else {
            gemm<false>(n, (k.n + BLOCK - 1)/BLOCK*BLOCK, p.ld_k, w.Q + r0*p.ld_k, p.ld_k, w.KT, TILE, w.S, TILE);
        }

        scores_to_weights(a, p, w, r0, n, k.n, add_mean, kind, nullptr);

        float * O = w.O + r0*p.ld_v;
        if (v_bf16) {
            products->load_p(w.S, n);
            products->outputs((const uint32_t *) w.S, (const uint32_t *) w.V, n, p.ld_v, k.n, O);
        } else {
            gemm<true>(n, p.ld_v, v.n, w.S, TILE, w.V, p.ld_v, O, p.ld_v);
        }
    }
}

// Any number of query rows, cell by cell, past all that a row's mask hides. Slow: for tiles with rows that are not finite,
// which must not get into the results of those that do not see them.
void attend_by_cell(const attn_args & a, const attn_plan & p, const workspace & w, int64_t n_rows, int64_t n_tokens, const kv_tile & kv, const mask_kind * kind) {
    (void) n_tokens;

    expand_k(a, p, w, kv);
    expand(kv.format_v, kv.v, a.n_embd_v, w.V, p.ld_v);

    for (int64_t r = 0; r < n_rows; ++r) {
        const int64_t t = r/p.n_gqa;
        const float * mask = kind[t] == MASK_NONE ? nullptr : w.mask + t*TILE;
        float * O = w.O + r*p.ld_v;

        format_f32.dot({ 1, a.n_embd_k, w.Q + r*p.ld_k, p.ld_k, nullptr, as_floats(kv.k, w.K, p.ld_k), nullptr, w.S });

        const vf lanes = finish_scores(w.S, kv.k.n, 0.0f, mask, w.slope[r % p.n_gqa], a.logit_softcap);
        to_weights(w.S, v_hmax(lanes), 0.0f, 0.0f, O, p.ld_v, w.m[r], w.s + r*V_LEN);

        for (int j = 0; j < kv.v.n; ++j) {
            if (mask && mask[j] == -INFINITY) {
                continue;
            }
            for (int64_t i = 0; i < p.ld_v; i += V_LEN) {
                v_store(O + i, v_fma(v_set(w.S[j]), v_load(w.V + j*p.ld_v + i), v_load(O + i)));
            }
        }
    }
}

} // namespace
