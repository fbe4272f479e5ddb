#pragma once

// Attention and migration as graphs of ggml's, for device_run.cpp: by our nodes, and as the cache composes them.

#include "device_graph.h"

#include "cache/means.h"

#include "llama-impl.h"

//
// our nodes; on the CPU they are host functions
//

static void attn_on_host(ggml_tensor * dst, int, int, void *) {
    llama_kv_mixed_attn_args a;
    GGML_ASSERT(llama_kv_mixed_op_read_attn(dst, a));

    llama_kv_mixed_attn_compute(*llama_kv_mixed_get_isa(), a, 1);
}

static void to_float(const ggml_tensor * t, int64_t head, int64_t cell, int64_t stream, float * dst) {
    const char * row = (const char *) t->data + head*t->nb[1] + cell*t->nb[2] + stream*t->nb[3];

    ggml_get_type_traits(t->type)->to_float(row, dst, t->ne[0]);
}

// to one head of a row, what its page's mean has
static void add_mean(const ggml_tensor * mean, int64_t head, int64_t cell, int64_t stream, std::vector<float> & row) {
    const char * page = (const char *) mean->data + (cell/LLAMA_KV_MIXED_PAGE)*mean->nb[1] + stream*mean->nb[2];

    for (size_t i = 0; i < row.size(); ++i) {
        row[i] += ggml_fp16_to_fp32(((const ggml_fp16_t *) page)[head*row.size() + i]);
    }
}

// by the orthonormal Walsh-Hadamard matrix, in blocks of n
static void rotate(std::vector<float> & row, size_t n) {
    for (size_t step = 1; step < n; step *= 2) {
        for (size_t i = 0; i < row.size(); ++i) {
            if ((i & step) == 0) {
                const float x = row[i], y = row[i + step];
                row[i]        = x + y;
                row[i + step] = x - y;
            }
        }
    }
    for (float & x : row) {
        x *= n > 0 ? 1/sqrtf(n) : 1;
    }
}

static void join_on_host(ggml_tensor * dst, int, int, void *) {
    llama_kv_mixed_join_args a;
    GGML_ASSERT(llama_kv_mixed_op_read_join(dst, a));

    std::vector<float> row(a.n_embd);
    auto * out = (ggml_fp16_t *) dst->data;

    for (int64_t s = 0; s < a.n_stream; ++s) {
        for (int64_t c = 0; c < a.n_cold + a.n_hot; ++c) {
            for (int64_t h = 0; h < a.n_head_kv; ++h) {
                if (c < a.n_cold) {
                    to_float(a.cold, h, c, s, row.data());
                    if (a.mean) {
                        add_mean(a.mean, h, c, s, row);
                    }
                } else {
                    to_float(a.hot, h, c - a.n_cold, s, row.data());
                    rotate(row, a.n_rot);
                }
                ggml_fp32_to_fp16_row(row.data(), out, a.n_embd);
                out += a.n_embd;
            }
        }
    }
}

static llama_kv_mixed_op make_op(llama_kv_mixed_op_kind kind) {
    llama_kv_mixed_op res = llama_kv_mixed_op_of(kind);
    res.is_host = is_cpu();
    return res;
}

//
// attention
//

struct attn_inputs {
    ggml_tensor * q;          // [n_embd_k, n_head, tokens of all streams]
    ggml_tensor * rows[2][2]; // cold, hot; K, V; null: nothing is cold
    ggml_tensor * mask;
    ggml_tensor * mask_f16;
    ggml_tensor * sinks;      // null: none
    ggml_tensor * mean;       // null: none
    ggml_tensor * rot[2];     // K, V; null: not rotated

    float scale, logit_softcap, max_bias;
};

static int32_t get_n_rot(const ggml_tensor * rot) {
    return rot ? rot->ne[0] : 0;
}

static ggml_tensor * build_node(ggml_context * ctx, const attn_inputs & in) {
    ggml_tensor * args[LLAMA_KV_MIXED_N_SRC] = {
        in.q, in.rows[1][0], in.rows[1][1], in.mask, in.rows[0][0], in.rows[0][1], in.mean, in.sinks,
    };

    ggml_tensor * res = ggml_custom_4d(ctx, GGML_TYPE_F32, in.rows[1][1]->ne[0]*in.q->ne[1], in.q->ne[2], 1, 1,
        args, LLAMA_KV_MIXED_N_SRC, attn_on_host, 1, nullptr);

    llama_kv_mixed_op op = make_op(LLAMA_KV_MIXED_OP_ATTN);
    op.scale         = in.scale;
    op.logit_softcap = in.logit_softcap;
    op.max_bias      = in.max_bias;
    op.n_rot_k       = get_n_rot(in.rot[0]);
    op.n_rot_v       = get_n_rot(in.rot[1]);
    llama_kv_mixed_op_write(res, op);

    llama_kv_mixed_attn_args a;
    GGML_ASSERT(llama_kv_mixed_op_read_attn(res, a));

    return res;
}

static ggml_tensor * build_join(
        ggml_context * ctx, ggml_tensor * cold, ggml_tensor * hot, ggml_tensor * mean, ggml_tensor * rot) {
    ggml_tensor * args[LLAMA_KV_MIXED_N_SRC_JOIN] = { cold, hot, mean };

    ggml_tensor * res = ggml_custom_4d(ctx, GGML_TYPE_F16,
        hot->ne[0], hot->ne[1], cold->ne[2] + hot->ne[2], hot->ne[3],
        args, LLAMA_KV_MIXED_N_SRC_JOIN, join_on_host, 1, nullptr);

    llama_kv_mixed_op op = make_op(LLAMA_KV_MIXED_OP_JOIN);
    op.n_rot_k = get_n_rot(rot);
    llama_kv_mixed_op_write(res, op);

    llama_kv_mixed_join_args a;
    GGML_ASSERT(llama_kv_mixed_op_read_join(res, a));

    return res;
}

// the same by ggml's operations, as graph/compose.cpp has it
static ggml_tensor * build_composed_join(
        ggml_context * ctx, ggml_tensor * cold, ggml_tensor * hot, ggml_tensor * mean, ggml_tensor * rot) {
    if (rot) {
        ggml_tensor * cur = llama_mul_mat_hadamard(ctx, ggml_cast(ctx, hot, GGML_TYPE_F32), rot);

        hot = hot->type == GGML_TYPE_F32 ? cur : ggml_cast(ctx, cur, hot->type);
    }

    if (ggml_is_quantized(cold->type)) {
        cold = ggml_cast(ctx, cold, GGML_TYPE_F32);
    }

    if (mean) {
        ggml_tensor * flat = ggml_reshape_3d(ctx, cold, cold->ne[0]*cold->ne[1], cold->ne[2], cold->ne[3]);

        flat = llama_kv_mixed_add_means(ctx, flat, mean);
        cold = ggml_reshape_4d(ctx, flat, cold->ne[0], cold->ne[1], cold->ne[2], cold->ne[3]);
    }

    if (cold->type != hot->type) {
        cold = ggml_cast(ctx, cold, hot->type);
    }

    return ggml_concat(ctx, cold, hot, 2);
}

// upstream's, as llm_graph_context::build_attn_mha() has it
static ggml_tensor * build_flash_attn(
        ggml_context * ctx, const attn_inputs & in, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v) {
    const int64_t n_stream = k->ne[3];
    const int64_t n_tokens = q->ne[2]/n_stream;

    // its kernels do not say so, but end the process
    if (is_cuda() && in.logit_softcap != 0.0f && q->ne[0] != 128 && q->ne[0] != 256) {
        throw refusal("ggml_flash_attn_ext() can not cap scores of heads of " + std::to_string(q->ne[0]) + " values on CUDA");
    }

    q = ggml_view_4d(ctx, q, q->ne[0], q->ne[1], n_tokens, n_stream, q->nb[1], q->nb[2], q->nb[2]*n_tokens, 0);

    q = ggml_permute(ctx, q, 0, 2, 1, 3);
    k = ggml_permute(ctx, k, 0, 2, 1, 3);
    v = ggml_permute(ctx, v, 0, 2, 1, 3);

    ggml_tensor * cur = ggml_flash_attn_ext(ctx, q, k, v, in.mask_f16, in.scale, in.max_bias, in.logit_softcap);

    ggml_flash_attn_ext_add_sinks(cur, in.sinks);
    ggml_prec_set_acc(cur, GGML_PREC_F32);

    return ggml_reshape_2d(ctx, cur, cur->ne[0]*cur->ne[1], cur->ne[2]*cur->ne[3]);
}

// node, join, compose; plain: of hot rows alone
static ggml_tensor * build_attn(ggml_context * ctx, const std::string & how, const attn_inputs & in) {
    if (how == "node") {
        return build_node(ctx, in);
    }

    ggml_tensor * q = in.q;
    ggml_tensor * k = in.rows[1][0];
    ggml_tensor * v = in.rows[1][1];

    if (how == "plain" || !in.rows[0][0]) {
        return build_flash_attn(ctx, in, q, k, v);
    }
    if (how != "join" && how != "compose") {
        throw refusal("attention can be computed by node, join, compose or plain, not by " + how);
    }

    const auto join = how == "join" ? build_join : build_composed_join;

    if (in.rot[0]) {
        q = llama_mul_mat_hadamard(ctx, q, in.rot[0]);
    }
    k = join(ctx, in.rows[0][0], k, in.mean, in.rot[0]);
    v = join(ctx, in.rows[0][1], v, nullptr, in.rot[1]);

    ggml_tensor * cur = build_flash_attn(ctx, in, q, k, v);

    return in.rot[1] ? llama_mul_mat_hadamard(ctx, cur, in.rot[1]) : cur;
}

//
// migration, as cache/mover.cpp has it
//

struct migration_inputs {
    ggml_tensor * from; // rows of the source
    ggml_tensor * to;   // and of the destination

    // of means
    ggml_tensor * page;
    ggml_tensor * page_new;
    ggml_tensor * share;
};

// rows: for rows that fill pages, one after the other
static migration_inputs add_migration_inputs(graph & g, const std::vector<int32_t> & from, const std::vector<int64_t> & to) {
    const int64_t n      = from.size();
    const int64_t n_page = n/LLAMA_KV_MIXED_PAGE;

    std::vector<int32_t> page    (n);
    std::vector<int64_t> page_new(n_page);
    std::vector<float>   share   (n*n_page, 0.0f);
    for (int64_t i = 0; i < n; ++i) {
        page[i] = i/LLAMA_KV_MIXED_PAGE;
        if (page[i] < n_page) {
            share[page[i]*n + i] = 1.0f/LLAMA_KV_MIXED_PAGE;
        }
    }
    for (int64_t i = 0; i < n_page; ++i) {
        page_new[i] = i;
    }

    migration_inputs res = {};
    res.from = g.add(GGML_TYPE_I32, { n }, from);
    res.to   = g.add(GGML_TYPE_I64, { n }, to);
    if (n_page > 0) {
        res.page     = g.add(GGML_TYPE_I32, { n }, page);
        res.page_new = g.add(GGML_TYPE_I64, { n_page }, page_new);
        res.share    = g.add(GGML_TYPE_F32, { n, n_page }, share);
    }
    return res;
}

// mean: F16 [n_embd, n_page], null: rows are stored as they are
static ggml_tensor * build_migration(
        graph & g, const migration_inputs & in, ggml_tensor * src, ggml_tensor * dst, ggml_tensor * rot, ggml_tensor * mean) {
    ggml_context * ctx = g.ctx.get();

    ggml_tensor * rows = ggml_get_rows(ctx, src, in.from);
    if (rot) {
        rows = llama_mul_mat_hadamard(ctx, rows, rot);
    }
    if (mean) {
        ggml_tensor * by_channel = ggml_cont(ctx, ggml_transpose(ctx, rows));

        mean = ggml_set_rows(ctx, mean, ggml_mul_mat(ctx, by_channel, in.share), in.page_new);
        rows = ggml_sub(ctx, rows, ggml_get_rows(ctx, mean, in.page));
    }

    ggml_tensor * res = ggml_set_rows(ctx, dst, rows, in.to);
    ggml_build_forward_expand(g.gf, res);
    return res;
}

// the same by our nodes
static ggml_tensor * build_move(
        graph & g, const migration_inputs & in, ggml_tensor * src, ggml_tensor * dst, ggml_tensor * rot, ggml_tensor * mean) {
    ggml_context * ctx = g.ctx.get();

    const auto add = [&](llama_kv_mixed_op_kind kind, std::vector<ggml_tensor *> args) {
        const auto no_host = [](ggml_tensor *, int, int, void *) { GGML_ABORT("rows are moved by nodes on a device only"); };

        ggml_tensor * res = ggml_custom_4d(ctx, GGML_TYPE_I32, 1, 1, 1, 1, args.data(), args.size(), no_host, 1, nullptr);

        llama_kv_mixed_op op = make_op(kind);
        op.n_rot_k = get_n_rot(rot);
        llama_kv_mixed_op_write(res, op);
        ggml_build_forward_expand(g.gf, res);
        return res;
    };

    if (mean) {
        add(LLAMA_KV_MIXED_OP_MEAN, { src, mean, in.from, in.page_new, in.page, nullptr });
    }
    return add(LLAMA_KV_MIXED_OP_MOVE, { src, dst, in.from, in.to, mean ? in.page : nullptr, mean });
}
