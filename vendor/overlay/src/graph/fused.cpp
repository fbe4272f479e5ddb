#include "graph/fused.h"

#include "graph/node.h"

#include "cache/context.h"

#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-hparams.h"

#include <algorithm>

static int get_n_threads(const llama_cparams & cparams) {
    return std::max(cparams.n_threads, cparams.n_threads_batch);
}

// holds the nodes of one layer for as long as their graph lives
class llm_graph_input_kv_mixed_nodes : public llm_graph_input_i {
public:
    virtual ~llm_graph_input_kv_mixed_nodes() = default;

    void set_input(const llama_ubatch * ubatch) override {
        GGML_UNUSED(ubatch);

        nodes.reset();
    }

    // the mask's own check sees to the numbers of cells
    bool can_reuse(const llm_graph_params & params) override {
        return get_n_threads(params.cparams) <= nodes.get_n_threads();
    }

    llama_kv_mixed_attn_nodes nodes;
};

std::string llama_kv_mixed_fused_reason(const llama_kv_mixed_attn_layer & layer) {
    const auto & hparams = layer.hparams;

    const int32_t il = layer.il;

    if (!layer.is_plain) {
        return "the model adds a bias for every pair of tokens, or caps scores in a way of its own";
    }
    if (!llama_kv_mixed_attn_supports(hparams.n_embd_head_k(il), hparams.n_embd_head_v(il), hparams.n_gqa(il))) {
        return "the heads are too large, or too many share a KV head";
    }

    return "";
}

ggml_tensor * llama_kv_mixed_fused_build(const llm_graph_context & gctx, const llama_kv_cache_mixed_context & mctx, const llama_kv_mixed_attn_inputs & in) {
    auto * inp = (llm_graph_input_kv_mixed_nodes *) gctx.res->add_input(std::make_unique<llm_graph_input_kv_mixed_nodes>());

    ggml_tensor * cur = inp->nodes.build(gctx.ctx0, {
            in.q, in.k, in.v, mctx.get_k_cold(gctx.ctx0, in.il), mctx.get_v_cold(gctx.ctx0, in.il),
            mctx.get_k_mean(gctx.ctx0, in.il), in.kq_mask, in.sinks,
        }, llama_kv_mixed_make_op(gctx, mctx, in, /*.is_host =*/ true), get_n_threads(gctx.cparams));

    // functions of this process: some devices claim to have any operation (an RPC server does), and would be given them
    for (ggml_tensor * node = cur->src[0]; node->op == GGML_OP_CUSTOM; node = node->src[0]) {
        ggml_backend_sched_set_tensor_backend(gctx.sched, node, gctx.backend_cpu);
    }

    ggml_build_forward_expand(gctx.gf, cur);

    return cur;
}
