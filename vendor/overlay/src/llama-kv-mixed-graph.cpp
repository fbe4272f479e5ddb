#include "llama-kv-mixed-graph.h"

#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

static int64_t get_n_stream(const llama_ubatch & ubatch, const llama_cparams & cparams) {
    return cparams.kv_unified ? 1 : ubatch.n_seqs_unq;
}

llm_graph_input_attn_kv_mixed::llm_graph_input_attn_kv_mixed(
        const llama_hparams & hparams,
        const llama_cparams & cparams,
        const llama_kv_cache_mixed_context * mctx) :
    llm_graph_input_attn_kv(hparams, cparams, mctx->get_hot_ctx()),
    mctx_mixed(mctx),
    n_cold(mctx->get_n_cold()) {
}

void llm_graph_input_attn_kv_mixed::set_input(const llama_ubatch * ubatch) {
    mctx->set_input_k_idxs(self_k_idxs, ubatch);
    mctx->set_input_v_idxs(self_v_idxs, ubatch);

    fused.reset();

    mctx_mixed->set_input_kq_mask(self_kq_mask, ubatch, cparams.causal_attn);

    // the rotation is that of the cold cache
    if (self_k_rot) {
        mctx_mixed->get_cold()->set_input_k_rot(self_k_rot);
    }
    if (self_v_rot) {
        mctx_mixed->get_cold()->set_input_v_rot(self_v_rot);
    }
}

bool llm_graph_input_attn_kv_mixed::can_reuse(const llm_graph_params & params) {
    mctx_mixed = static_cast<const llama_kv_cache_mixed_context *>(params.mctx);

    // the parent class operates on the hot cache
    this->mctx = mctx_mixed->get_hot_ctx();

    const int64_t n_tokens = params.ubatch.n_tokens;
    const int64_t n_stream = get_n_stream(params.ubatch, params.cparams);

    bool res = true;

    res &= n_cold == mctx_mixed->get_n_cold();

    res &= self_k_idxs->ne[0] == n_tokens;

    res &= self_kq_mask->ne[0] == (int64_t) mctx_mixed->get_n_cold() + mctx_mixed->get_n_hot();
    res &= self_kq_mask->ne[1] == n_tokens/n_stream;
    res &= self_kq_mask->ne[3] == n_stream;

    return res;
}

llm_graph_input_attn_kv * llm_build_attn_inp_kv_mixed(const llm_graph_context & gctx) {
    const auto * mctx = dynamic_cast<const llama_kv_cache_mixed_context *>(gctx.mctx);
    if (!mctx) {
        return nullptr;
    }

    ggml_context * ctx = gctx.ctx0;

    auto inp = std::make_unique<llm_graph_input_attn_kv_mixed>(gctx.hparams, gctx.cparams, mctx);

    inp->self_k_idxs = mctx->get_hot_ctx()->build_input_k_idxs(ctx, gctx.ubatch);
    inp->self_v_idxs = mctx->get_hot_ctx()->build_input_v_idxs(ctx, gctx.ubatch);

    const int64_t n_stream = get_n_stream(gctx.ubatch, gctx.cparams);

    // flash attention requires an f16 mask
    inp->self_kq_mask = ggml_new_tensor_4d(ctx, gctx.cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32,
            mctx->get_n_cold() + mctx->get_n_hot(), gctx.ubatch.n_tokens/n_stream, 1, n_stream);
    ggml_set_input(inp->self_kq_mask);
    ggml_set_name (inp->self_kq_mask, "attn_inp_kq_mask");

    inp->self_kq_mask_cnv = inp->self_kq_mask;

    inp->self_k_rot = mctx->get_cold()->build_input_k_rot(ctx);
    inp->self_v_rot = mctx->get_cold()->build_input_v_rot(ctx);

    return (llm_graph_input_attn_kv *) gctx.res->add_input(std::move(inp));
}

// why a layer's attention can not be fused, null: it can
static const char * get_fused_reason(const llama_kv_cache_mixed & kv, const llama_hparams & hparams, int32_t il) {
    return llama_kv_mixed_fused_reason(kv.get_hot()->get_k_storage(il), kv.get_cold()->get_k_storage(il),
        hparams.n_embd_head_k(il), hparams.n_embd_head_v(il), hparams.n_gqa(il));
}

void llama_kv_mixed_check_attn(const llama_model & model, const llama_kv_cache_mixed & kv) {
    if (kv.get_params().attn != LLAMA_KV_MIXED_ATTN_FUSED) {
        return;
    }
    for (const int32_t il : kv.get_hot()->get_layer_ids()) {
        if (const char * reason = get_fused_reason(kv, model.hparams, il)) {
            throw std::runtime_error(format("attn=fused is not possible for layer %d: %s", il, reason));
        }
    }
}

// cold rows in the type of the hot ones, followed by the hot ones
static ggml_tensor * build_join(ggml_context * ctx, ggml_tensor * cold, ggml_tensor * hot) {
    // backends expand quantised rows to f32 only
    if (ggml_is_quantized(cold->type)) {
        cold = ggml_cast(ctx, cold, GGML_TYPE_F32);
    }

    if (cold->type != hot->type) {
        cold = ggml_cast(ctx, cold, hot->type);
    }

    return ggml_concat(ctx, cold, hot, 2);
}

ggml_tensor * llm_build_attn_mixed(
        const llm_graph_context & gctx,
        const llm_graph_input_attn_kv * inp,
        ggml_tensor * q,
        ggml_tensor * k,
        ggml_tensor * v,
        ggml_tensor * kq_b,
        ggml_tensor * sinks,
              float   kq_scale,
                int   il) {
    const auto * inp_mixed = dynamic_cast<const llm_graph_input_attn_kv_mixed *>(inp);

    if (!inp_mixed) {
        return gctx.build_attn_mha(q, k, v, kq_b, inp->get_kq_mask(), sinks, nullptr, 0, kq_scale, il);
    }

    const auto * mctx = inp_mixed->mctx_mixed;

    // a bias for every pair of tokens, and Grok's other way of capping without flash attention, are left to the stock operations
    const bool is_plain = !kq_b && (gctx.arch != LLM_ARCH_GROK || gctx.cparams.flash_attn);

    if (is_plain && mctx->get_kv()->get_params().attn != LLAMA_KV_MIXED_ATTN_COMPOSE && !get_fused_reason(*mctx->get_kv(), gctx.hparams, il)) {
        const auto & hparams = gctx.hparams;

        ggml_tensor * cur = inp_mixed->fused.build(gctx.ctx0, {
                q, k, v, mctx->get_k_cold(gctx.ctx0, il), mctx->get_v_cold(gctx.ctx0, il), inp->get_kq_mask(), sinks,
            }, kq_scale, hparams.f_max_alibi_bias, hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f,
            std::max(gctx.cparams.n_threads, gctx.cparams.n_threads_batch));

        ggml_build_forward_expand(gctx.gf, cur);

        return cur;
    }

    if (inp_mixed->n_cold > 0) {
        k = build_join(gctx.ctx0, mctx->get_k_cold(gctx.ctx0, il), k);
        v = build_join(gctx.ctx0, mctx->get_v_cold(gctx.ctx0, il), v);
    }

    return gctx.build_attn_mha(q, k, v, kq_b, inp->get_kq_mask(), sinks, nullptr, 0, kq_scale, il);
}
