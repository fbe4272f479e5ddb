#include "graph/providers.h"

#include "graph/compose.h"
#include "graph/fused.h"

#include "cache/context.h"

#include "llama-graph.h"
#include "llama-hparams.h"
#include "llama-impl.h"

#include <stdexcept>

// in the order in which they are asked: composition, which runs anywhere, is the last
static const llama_kv_mixed_attn_provider providers[] = {
    { LLAMA_KV_MIXED_ATTN_FUSED,   "fused",   llama_kv_mixed_fused_reason,   llama_kv_mixed_fused_build   },
    { LLAMA_KV_MIXED_ATTN_COMPOSE, "compose", llama_kv_mixed_compose_reason, llama_kv_mixed_compose_build },
};

static const llama_kv_mixed_attn_provider & find_provider(const llama_kv_mixed_attn_layer & layer) {
    const int32_t attn = layer.kv.get_params().attn;

    std::string reasons;

    for (const auto & provider : providers) {
        if (attn != LLAMA_KV_MIXED_ATTN_AUTO && attn != provider.attn) {
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

void llama_kv_mixed_check_attn(const llama_hparams & hparams, const llama_kv_cache_mixed & kv) {
    for (const int32_t il : kv.get_hot()->get_layer_ids()) {
        find_provider({ kv, hparams, il, /*.is_plain =*/ true });
    }
}

ggml_tensor * llama_kv_mixed_build_attn(const llm_graph_context & gctx, const llama_kv_cache_mixed_context & mctx, const llama_kv_mixed_attn_inputs & in) {
    // (Grok caps in another way without flash attention)
    const bool is_plain = !in.kq_b && (gctx.arch != LLM_ARCH_GROK || gctx.cparams.flash_attn);

    return find_provider({ *mctx.get_kv(), gctx.hparams, in.il, is_plain }).build(gctx, mctx, in);
}
