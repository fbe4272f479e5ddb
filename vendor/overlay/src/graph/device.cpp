#include "graph/device.h"

#include "graph/compose.h"

#include "cache/context.h"
#include "cpu/host.h"
#include "ops/device.h"

#include "llama-graph.h"
#include "llama-hparams.h"
#include "llama-impl.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

// query rows of a KV head up to which a node of ours takes less time than making numbers of the rows
static const int64_t max_rows_node = 64;

static ggml_tensor * build_attn(
        ggml_context * ctx, ggml_tensor * q, ggml_tensor * k_hot, ggml_tensor * v_hot, ggml_tensor * mask, ggml_tensor * k_cold, ggml_tensor * v_cold,
        ggml_tensor * k_mean, ggml_tensor * sinks, const llama_kv_mixed_op & op) {
    return llama_kv_mixed_build_op(ctx, op, GGML_TYPE_F32, { v_hot->ne[0]*q->ne[1], q->ne[2] }, { q, k_hot, v_hot, mask, k_cold, v_cold, k_mean, sinks });
}

static ggml_tensor * build_join(ggml_context * ctx, ggml_tensor * cold, ggml_tensor * mean, ggml_tensor * hot, int64_t n_rot) {
    llama_kv_mixed_op op = llama_kv_mixed_op_of(LLAMA_KV_MIXED_OP_JOIN);
    op.n_rot_k = n_rot;

    return llama_kv_mixed_build_op(ctx, op, GGML_TYPE_F16, { hot->ne[0], hot->ne[1], cold->ne[2] + hot->ne[2], hot->ne[3] }, { cold, hot, mean });
}

// why the device that has a layer's rows does not compute its nodes of that kind, which are described with all cells that there are
static std::string find_reason(const llama_kv_mixed_attn_layer & layer, llama_kv_mixed_op_kind kind) {
    const ggml_tensor * k_hot = layer.kv.get_hot()->get_k_storage(layer.il);
    const ggml_tensor * v_hot = llama_kv_cache_mixed::get_v_storage(*layer.kv.get_hot(), layer.il);

    const ggml_backend_dev_t dev = llama_kv_mixed_get_dev(k_hot);

    ggml_context_ptr ctx_ptr(ggml_init({ /*.mem_size =*/ 32*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true }));
    ggml_context * ctx = ctx_ptr.get();

    const auto & hparams = layer.hparams;

    const int64_t n_head_kv = hparams.n_head_kv(layer.il);
    const int64_t n_stream  = k_hot->ne[2];

    const auto rows = [&](const ggml_tensor * storage, int64_t n_embd) {
        return ggml_new_tensor_4d(ctx, storage->type, n_embd, n_head_kv, storage->ne[1], n_stream);
    };

    ggml_tensor * k = rows(k_hot, hparams.n_embd_head_k(layer.il));
    ggml_tensor * v = rows(v_hot, hparams.n_embd_head_v(layer.il));

    ggml_tensor * k_cold = nullptr;
    ggml_tensor * v_cold = nullptr;
    ggml_tensor * mean   = nullptr;
    if (layer.kv.has_cold()) {
        k_cold = rows(layer.kv.get_cold()->get_k_storage(layer.il), k->ne[0]);
        v_cold = rows(llama_kv_cache_mixed::get_v_storage(*layer.kv.get_cold(), layer.il), v->ne[0]);
        if (layer.kv.get_means()) {
            mean = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, k->ne[0]*n_head_kv, k_cold->ne[2]/LLAMA_KV_MIXED_PAGE + 1, n_stream);
        }
    }

    llama_kv_mixed_op op = llama_kv_mixed_op_of(LLAMA_KV_MIXED_OP_ATTN);
    op.n_rot_k = layer.kv.get_n_rot_k();
    op.n_rot_v = layer.kv.get_n_rot_v();

    if (kind == LLAMA_KV_MIXED_OP_ATTN) {
        ggml_tensor * q    = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, k->ne[0], hparams.n_head(layer.il), n_stream);
        ggml_tensor * mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, k->ne[2] + (k_cold ? k_cold->ne[2] : 0), 1, 1, n_stream);

        return llama_kv_mixed_op_reason(dev, build_attn(ctx, q, k, v, mask, k_cold, v_cold, mean, nullptr, op));
    }

    const std::string res = llama_kv_mixed_op_reason(dev, build_join(ctx, k_cold ? k_cold : k, mean, k, op.n_rot_k));

    return res.empty() ? llama_kv_mixed_op_reason(dev, build_join(ctx, v_cold ? v_cold : v, nullptr, v, op.n_rot_v)) : res;
}

std::string llama_kv_mixed_device_reason(const llama_kv_mixed_attn_layer & layer) {
    if (!layer.is_plain) {
        return "the model adds a bias for every pair of tokens, or caps scores in a way of its own";
    }

    const std::string reason = find_reason(layer, LLAMA_KV_MIXED_OP_ATTN);

    return reason.empty() ? "" : "the cache is not in the CPU's memory, and " + reason;
}

ggml_tensor * llama_kv_mixed_device_build(const llm_graph_context & gctx, const llama_kv_cache_mixed_context & mctx, const llama_kv_mixed_attn_inputs & in) {
    ggml_context * ctx = gctx.ctx0;

    const ggml_backend_dev_t dev = llama_kv_mixed_get_dev(mctx.get_kv()->get_hot()->get_k_storage(in.il));

    // the nodes are kept where they can be computed: other devices might claim that they can do anything
    const auto pin = [&](ggml_tensor * node) {
        for (int i = 0; i < ggml_backend_sched_get_n_backends(gctx.sched); ++i) {
            ggml_backend_t backend = ggml_backend_sched_get_backend(gctx.sched, i);
            if (ggml_backend_get_device(backend) == dev) {
                ggml_backend_sched_set_tensor_backend(gctx.sched, node, backend);
            }
        }
        return node;
    };

    // a device that makes numbers of rows has upstream's own attention for many tokens, and for hot rows alone
    if (find_reason({ *mctx.get_kv(), gctx.hparams, in.il, true }, LLAMA_KV_MIXED_OP_JOIN).empty()) {
        if (mctx.get_n_cold() == 0) {
            return gctx.build_attn_mha(in.q, in.k, in.v, in.kq_b, in.kq_mask, in.sinks, nullptr, 0, in.kq_scale, in.il);
        }

        const int64_t n_gqa    = in.q->ne[1]/in.k->ne[1];
        const int64_t n_tokens = in.q->ne[2]/in.k->ne[3];

        if (n_gqa*n_tokens > max_rows_node) {
            return llama_kv_mixed_compose_build(gctx, mctx, in, [&](ggml_context * ctx, ggml_tensor * cold, ggml_tensor * mean, ggml_tensor * hot, ggml_tensor * rot) {
                return pin(build_join(ctx, cold, mean, hot, rot ? rot->ne[0] : 0));
            });
        }
    }

    ggml_tensor * q = in.q->nb[0] == sizeof(float) ? in.q : ggml_cont(ctx, in.q);

    const auto build = [&](ggml_tensor * mask) {
        return build_attn(ctx, q, in.k, in.v, mask, mctx.get_k_cold(ctx, in.il), mctx.get_v_cold(ctx, in.il), mctx.get_k_mean(ctx, in.il), in.sinks,
            llama_kv_mixed_make_op(gctx, mctx, in, /*.is_host =*/ false));
    };

    ggml_tensor * cur = build(in.kq_mask);
    if (in.kq_mask->type != GGML_TYPE_F16 && !llama_kv_mixed_op_reason(dev, cur).empty()) {
        cur = build(ggml_cast(ctx, in.kq_mask, GGML_TYPE_F16));
    }
    pin(cur);

    ggml_build_forward_expand(gctx.gf, cur);

    return cur;
}
