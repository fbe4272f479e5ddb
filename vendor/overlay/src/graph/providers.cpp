#include "graph/providers.h"

#include "graph/compose.h"
#include "graph/device.h"
#include "graph/fused.h"

#include "cache/context.h"
#include "cpu/host.h"

#include "llama-graph.h"
#include "llama-hparams.h"
#include "llama-impl.h"

#include <stdexcept>

// in the order in which they are asked: composition, which runs anywhere, is the last
static const llama_kv_mixed_attn_provider providers[] = {
    { LLAMA_KV_MIXED_ATTN_FUSED,   "fused",   LLAMA_KV_MIXED_ON_HOST,    llama_kv_mixed_fused_reason,   llama_kv_mixed_fused_build   },
    { LLAMA_KV_MIXED_ATTN_FUSED,   "fused",   LLAMA_KV_MIXED_ON_DEVICE,  llama_kv_mixed_device_reason,  llama_kv_mixed_device_build  },
    { LLAMA_KV_MIXED_ATTN_COMPOSE, "compose", LLAMA_KV_MIXED_ANYWHERE,   llama_kv_mixed_compose_reason, llama_kv_mixed_compose_build },
};

// reasons: why those that come before it can not
static const llama_kv_mixed_attn_provider & find_provider(const llama_kv_mixed_attn_layer & layer, std::string & reasons) {
    const int32_t attn = layer.kv.get_params().attn;

    const auto place = llama_kv_mixed_is_on_host(layer.kv.get_hot()->get_k_storage(layer.il)) ? LLAMA_KV_MIXED_ON_HOST : LLAMA_KV_MIXED_ON_DEVICE;

    for (const auto & provider : providers) {
        if (attn != LLAMA_KV_MIXED_ATTN_AUTO && attn != provider.attn) {
            continue;
        }
        if (provider.place != LLAMA_KV_MIXED_ANYWHERE && provider.place != place) {
            continue;
        }

        const std::string reason = provider.reason(layer);
        if (reason.empty()) {
            return provider;
        }

        reasons += format("%sattn=%s is not possible for layer %d: %s", reasons.empty() ? "" : "; ", provider.name, layer.il, reason.c_str());
    }

    throw std::runtime_error(reasons);
}

llama_kv_mixed_op llama_kv_mixed_make_op(
        const llm_graph_context & gctx, const llama_kv_cache_mixed_context & mctx, const llama_kv_mixed_attn_inputs & in, bool is_host) {
    const auto & hparams = gctx.hparams;

    llama_kv_mixed_op res = llama_kv_mixed_op_of(LLAMA_KV_MIXED_OP_ATTN);
    res.is_host       = is_host;
    res.scale         = in.kq_scale;
    res.max_bias      = hparams.f_max_alibi_bias;
    res.logit_softcap = hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f;
    res.n_rot_k       = mctx.get_kv()->get_n_rot_k();
    res.n_rot_v       = mctx.get_kv()->get_n_rot_v();
    res.v_skip        = mctx.get_kv()->get_params().v_skip;

    return res;
}

void llama_kv_mixed_check_attn(const llama_hparams & hparams, const llama_kv_cache_mixed & kv) {
    std::string why; // of the first one
    uint32_t    n = 0;

    for (const int32_t il : kv.get_hot()->get_layer_ids()) {
        std::string reasons;
        if (find_provider({ kv, hparams, il, /*.is_plain =*/ true }, reasons).attn == LLAMA_KV_MIXED_ATTN_COMPOSE && !reasons.empty()) {
            why = n++ == 0 ? reasons : why;
        }
    }

    // what is slower than it might be is told
    if (n > 0) {
        LLAMA_LOG_INFO("llama_kv_mixed: attention of %u layers is composed of ggml's operations: %s\n", n, why.c_str());
    }
}

ggml_tensor * llama_kv_mixed_build_attn(const llm_graph_context & gctx, const llama_kv_cache_mixed_context & mctx, const llama_kv_mixed_attn_inputs & in) {
    // (Grok caps in another way without flash attention)
    const bool is_plain = !in.kq_b && (gctx.arch != LLM_ARCH_GROK || gctx.cparams.flash_attn);

    std::string reasons;

    return find_provider({ *mctx.get_kv(), gctx.hparams, in.il, is_plain }, reasons).build(gctx, mctx, in);
}
