#include "graph/providers.h"

#include "cache/params.h"

#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

void llm_graph_input_kv_mixed_fused::set_input(const llama_ubatch * ubatch) {
    GGML_UNUSED(ubatch);

    fused.reset();
}

bool llm_graph_input_kv_mixed_fused::can_reuse(const llm_graph_params & params) {
    GGML_UNUSED(params);

    // the mask's own check sees to the numbers of cells
    return true;
}

void llm_graph_input_kv_mixed_rot::set_input(const llama_ubatch * ubatch) {
    GGML_UNUSED(ubatch);

    if (k_rot && k_rot->buffer) {
        cold->set_input_k_rot(k_rot);
    }
    if (v_rot && v_rot->buffer) {
        cold->set_input_v_rot(v_rot);
    }
}

bool llm_graph_input_kv_mixed_rot::can_reuse(const llm_graph_params & params) {
    GGML_UNUSED(params);

    // they are always the same
    return true;
}

// the input of this graph, which all its layers share
static const llm_graph_input_kv_mixed_rot * get_input_rot(const llm_graph_context & gctx, const llama_kv_cache * cold) {
    for (const auto & inp : gctx.res->inputs) {
        const auto * res = dynamic_cast<const llm_graph_input_kv_mixed_rot *>(inp.get());
        if (res && res->cold == cold) {
            return res;
        }
    }

    auto inp = std::make_unique<llm_graph_input_kv_mixed_rot>(cold);

    inp->k_rot = cold->build_input_k_rot(gctx.ctx0);
    inp->v_rot = cold->build_input_v_rot(gctx.ctx0);

    return (const llm_graph_input_kv_mixed_rot *) gctx.res->add_input(std::move(inp));
}

// why a layer's attention can not be fused, null: it can
static const char * get_fused_reason(const llama_kv_cache_mixed & kv, const llama_hparams & hparams, int32_t il) {
    return llama_kv_mixed_fused_reason(kv.get_hot()->get_k_storage(il), kv.get_cold()->get_k_storage(il),
        hparams.n_embd_head_k(il), hparams.n_embd_head_v(il), hparams.n_gqa(il));
}

void llama_kv_mixed_check_attn(const llama_model & model, const llama_kv_cache_mixed & kv) {
    if (kv.get_params().attn != LLAMA_KV_MIXED_ATTN_FUSED || !kv.has_cold()) {
        return;
    }
    for (const int32_t il : kv.get_hot()->get_layer_ids()) {
        if (const char * reason = get_fused_reason(kv, model.hparams, il)) {
            throw std::runtime_error(format("attn=fused is not possible for layer %d: %s", il, reason));
        }
    }
}

// cold rows in the type of the hot ones, followed by the hot ones, which are rotated by rot if there is one
static ggml_tensor * build_join(ggml_context * ctx, ggml_tensor * cold, ggml_tensor * hot, ggml_tensor * rot) {
    if (rot) {
        ggml_tensor * cur = llama_mul_mat_hadamard(ctx, ggml_cast(ctx, hot, GGML_TYPE_F32), rot);

        hot = hot->type == GGML_TYPE_F32 ? cur : ggml_cast(ctx, cur, hot->type);
    }

    // backends expand quantised rows to f32 only
    if (ggml_is_quantized(cold->type)) {
        cold = ggml_cast(ctx, cold, GGML_TYPE_F32);
    }

    if (cold->type != hot->type) {
        cold = ggml_cast(ctx, cold, hot->type);
    }

    return ggml_concat(ctx, cold, hot, 2);
}

ggml_tensor * llama_kv_mixed_build_attn(
               const llm_graph_context & gctx,
    const llama_kv_cache_mixed_context & mctx,
                           ggml_tensor * q,
                           ggml_tensor * k,
                           ggml_tensor * v,
                           ggml_tensor * kq_b,
                           ggml_tensor * kq_mask,
                           ggml_tensor * sinks,
                                 float   kq_scale,
                                   int   il) {
    // all is as in a plain cache
    if (!mctx.get_kv()->has_cold()) {
        return gctx.build_attn_mha(q, k, v, kq_b, kq_mask, sinks, nullptr, 0, kq_scale, il);
    }

    // a bias for every pair of tokens, and Grok's other way of capping without flash attention, are left to the stock operations
    const bool is_plain = !kq_b && (gctx.arch != LLM_ARCH_GROK || gctx.cparams.flash_attn);

    if (is_plain && mctx.get_kv()->get_params().attn != LLAMA_KV_MIXED_ATTN_COMPOSE && !get_fused_reason(*mctx.get_kv(), gctx.hparams, il)) {
        const auto & hparams = gctx.hparams;

        auto * inp = (llm_graph_input_kv_mixed_fused *) gctx.res->add_input(std::make_unique<llm_graph_input_kv_mixed_fused>());

        ggml_tensor * cur = inp->fused.build(gctx.ctx0, {
                q, k, v, mctx.get_k_cold(gctx.ctx0, il), mctx.get_v_cold(gctx.ctx0, il), kq_mask, sinks,
                mctx.get_kv()->get_n_rot_k(), mctx.get_kv()->get_n_rot_v(),
            }, kq_scale, hparams.f_max_alibi_bias, hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f,
            std::max(gctx.cparams.n_threads, gctx.cparams.n_threads_batch));

        ggml_build_forward_expand(gctx.gf, cur);

        return cur;
    }

    if (mctx.get_n_cold() == 0) {
        return gctx.build_attn_mha(q, k, v, kq_b, kq_mask, sinks, nullptr, 0, kq_scale, il);
    }

    // hot rows and queries are rotated rather than cold rows back: there are more of those
    const auto * rot = get_input_rot(gctx, mctx.get_kv()->get_cold());

    if (rot->k_rot) {
        q = llama_mul_mat_hadamard(gctx.ctx0, q, rot->k_rot);
    }

    k = build_join(gctx.ctx0, mctx.get_k_cold(gctx.ctx0, il), k, rot->k_rot);
    v = build_join(gctx.ctx0, mctx.get_v_cold(gctx.ctx0, il), v, rot->v_rot);

    ggml_tensor * cur = gctx.build_attn_mha(q, k, v, kq_b, kq_mask, sinks, nullptr, 0, kq_scale, il);

    if (rot->v_rot) {
        cur = llama_mul_mat_hadamard(gctx.ctx0, cur, rot->v_rot);
        ggml_build_forward_expand(gctx.gf, cur);
    }

    return cur;
}
