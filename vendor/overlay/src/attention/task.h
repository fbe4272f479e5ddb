// A task of attention, and the merge of what tasks leave.

#pragma once

#include "attention/partial.h"
#include "attention/place.h"
#include "attention/skip.h"

namespace {

// a row's output from its sum of weighted V rows, and the attention sink's share of the weights
V_INLINE void finish_row(const attn_args & a, int64_t head, const float * O, float m, float s, float * dst) {
    float c = 1.0f;
    if (a.sinks) {
        const float sink = a.sinks[head]*LOG2_E;
        if (sink > m) {
            c = m == -INFINITY ? 0.0f : exp2_1(m - sink);
            s = s*c + 1.0f;
        } else {
            s += exp2_1(sink - m);
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
        int64_t n_rows, int i_seg, const llama_kv_mixed_products * products) {
    const auto & format = get_format(a.seg[i_seg].type_k);

    // ggml divides the scale, then multiplies what tanh gives; scores are to base 2
    const float scale = a.logit_softcap != 0.0f ? a.scale/a.logit_softcap : a.scale*LOG2_E;

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
        if (format.load_query && !p.gemm) {
            format.load_query(dst, a.n_embd_k, w.query, r, n_rows);
        }
    }
    const auto score = p.gemm ? get_score_kind(format, products, a.n_embd_k) : SCORE_FLOAT;
    if (score == SCORE_BF16) {
        products->load_q(w.Q, n_rows, p.ld_k, (uint32_t *) w.query);
    } else if (score == SCORE_INT) {
        load_query_int(w.Q, n_rows, a.n_embd_k, int_query(w.query, p.n_rows, a.n_embd_k));
    }
}

// the sums of rows of the first segment, which are rotated as these are
void rotate_back(const attn_args & a, const attn_plan & p, const workspace & w, int64_t n_rows) {
    for (int64_t r = 0; a.n_rot_v > 0 && r < n_rows; ++r) {
        rotate(w.O + r*p.ld_v, a.n_embd_v, a.n_rot_v);
    }
}

void attn_task(const attn_args & a, const attn_plan & p, int64_t task, int64_t task_next, float * partial, float * scratch,
        const llama_kv_mixed_products * products) {
    const tile_rows where(a, p, task, task_next);
    const partials<float> parts { a, p, partial };

    const int64_t ikv0   = where.here.ikv;
    const int64_t chunk  = where.here.chunk;
    const int64_t block  = where.here.block;
    const int64_t stream = where.here.stream;

    const int64_t token0   = block*p.n_tpb;
    const int64_t n_tokens = a.n_tokens - token0 < p.n_tpb ? a.n_tokens - token0 : p.n_tpb;
    const int64_t n_rows   = n_tokens*p.n_gqa;

    const int64_t part0 = (stream*p.n_block + block)*a.n_head_kv + ikv0;

    const auto workspace_of = [&](int64_t h) { return get_workspace(p, scratch, part0 + h, h); };

    // whether rows of V may be left unread, and are not fetched before it is known which
    const bool skips = p.n_chunk_hot > 0 && task >= p.n_task_hot;

    for (int64_t h = 0; skips && h < p.n_hpt; ++h) {
        load_hot(p, workspace_of(h), parts, stream, block, ikv0 + h, n_rows);
    }

    float * mask = workspace_of(0).mask;
    mask_kind kind[LLAMA_KV_MIXED_ATTN_MAX_ROWS];

    // heads [h0, h1) of the task through all its tiles
    const auto walk = [&](int64_t h0, int64_t h1, auto && attend_tile, const auto & finish) {
        for (int64_t h = h0; h < h1; ++h) {
            const workspace w = workspace_of(h);
            for (int64_t r = 0; r < n_rows; ++r) {
                w.m[r] = -INFINITY;
                v_store(w.s + r*V_LEN, v_zero());
            }
            memset(w.O, 0, n_rows*p.ld_v*sizeof(float));
        }

        int i_seg = -1;

        for (int64_t it = where.here.begin; it < where.here.end; ++it) {
            const int i = where.get_segment(it);
            const auto & seg = a.seg[i];

            for (int64_t h = h0; i != i_seg && h < h1; ++h) {
                const workspace w = workspace_of(h);
                if (i_seg == 0) {
                    rotate_back(a, p, w, n_rows);
                }
                const int32_t query = (int32_t) (2*(part0 + h) + i);
                if (*w.kept != query) {
                    load_query(a, p, w, ikv0 + h, stream, token0, n_rows, i, products);
                    *w.kept = query;
                }
            }
            i_seg = i;

            const int64_t cell = where.get_cell(it);
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

            for (int64_t h = h0; h < h1; ++h) {
                const auto get_tile = [&](bool is_v) {
                    const int64_t n_block = ((is_v ? a.n_embd_v : a.n_embd_k) + BLOCK - 1)/BLOCK;
                    return tile { where.get(it, ikv0 + h, stream, is_v), n_seen, n_block, is_v && skips ? rows {} : where.get_next(it, h, is_v), nullptr, 0 };
                };

                const uint8_t * mean = nullptr;
                if (a.k_mean && i == 0) {
                    mean = (const uint8_t *) a.k_mean + (ikv0 + h)*a.nb_k_mean[0] + it*a.nb_k_mean[1] + stream*a.nb_k_mean[2];
                }

                attend_tile(a, p, workspace_of(h), n_rows, n_tokens,
                    kv_tile { get_format(seg.type_k), get_format(seg.type_v), get_tile(false), get_tile(true), mean, products }, kind);
            }
        }
        finish();

        // where whole chunks are of rotated rows, that waits for the merge
        for (int64_t h = h0; h < h1; ++h) {
            if (i_seg == 0 && (p.n_partial == 0 || chunk >= first_segment_chunks(a, p))) {
                rotate_back(a, p, workspace_of(h), n_rows);
            }
        }
    };

    for (int64_t h = 0; h < p.n_hpt; ++h) {
        const workspace w = workspace_of(h);
        for (int64_t g = 0; g < p.n_gqa; ++g) {
            w.slope[g] = alibi_slope(a, (ikv0 + h)*p.n_gqa + g);
        }
    }

    alignas(64) uint8_t state[64];
    if (p.gemm && products) {
        products->begin(state);
    }
    const auto nothing = [] {};
    if (skips) {
        skipper s(a);
        walk(0, p.n_hpt, s, [&] { s.finish(); });
    } else {
        walk(0, p.n_hpt, p.gemm ? attend_gemm : attend, nothing);
    }
    if (p.gemm && products) {
        products->end(state);
    }

    for (int64_t h = 0; h < p.n_hpt; ++h) {
        const workspace w = workspace_of(h);

        // 0 times infinity is not 0: a row that no query sees may have been one of those
        if (!is_finite(w.O, n_rows*p.ld_v)) {
            walk(h, h + 1, attend_by_cell, nothing);
        }

        if (p.n_partial > 0) {
            const auto part = parts.get(stream, block, chunk, ikv0 + h);
            memcpy(part.O(0),  w.O, n_rows*p.ld_v*sizeof(float));
            memcpy(&part.m(0), w.m, n_rows*sizeof(float));
            for (int64_t r = 0; r < n_rows; ++r) {
                part.s(r) = v_hsum(v_load(w.s + r*V_LEN));
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

// with products in BF16, null: without
template <const llama_kv_mixed_products * products>
void attn_task_of(const attn_args & a, const attn_plan & p, int64_t task, int64_t task_next, float * partial, float * scratch) {
    attn_task(a, p, task, task_next, partial, scratch, products);
}

void attn_merge(const attn_args & a, const attn_plan & p, const float * partial, int64_t row0, int64_t row1) {
    const partials<const float> parts { a, p, partial };

    const int64_t n_rotated = a.n_rot_v > 0 ? first_segment_chunks(a, p) : 0;

    for (int64_t row = row0; row < row1; ++row) {
        const int64_t head   = row % a.n_head;
        const int64_t token  = row / a.n_head % a.n_tokens;
        const int64_t stream = row / a.n_head / a.n_tokens;

        const int64_t block = token/p.n_tpb;
        const int64_t r     = token % p.n_tpb*p.n_gqa + head % p.n_gqa;

        const int64_t ikv = head/p.n_gqa;

        const float m = parts.get_max(stream, block, 0, p.n_chunk, ikv, r);

        float O[LLAMA_KV_MIXED_MAX_EMBD] = {};
        float s = 0.0f;
        for (int64_t c = 0; c < p.n_chunk; ++c) {
            if (c == n_rotated && c > 0) {
                rotate(O, a.n_embd_v, a.n_rot_v);
            }
            const auto part = parts.get(stream, block, c, ikv);
            if (part.s(r) == 0.0f) {
                continue;
            }
            const float e = exp2_1(part.m(r) - m);
            s += e*part.s(r);
            for (int64_t i = 0; i < p.ld_v; i += V_LEN) {
                v_store(O + i, v_fma(v_set(e), v_load(part.O(r) + i), v_load(O + i)));
            }
        }

        if (n_rotated == p.n_chunk) {
            rotate(O, a.n_embd_v, a.n_rot_v);
        }

        finish_row(a, head, O, m, s, a.dst + row*a.n_embd_v);
    }
}

} // namespace
