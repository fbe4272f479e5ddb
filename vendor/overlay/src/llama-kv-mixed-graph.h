#pragma once

#include "llama-graph.h"

#include "llama-kv-cache-mixed.h"
#include "llama-kv-mixed-fused.h"

//
// the mixed KV cache in the compute graph
//

// new rows are stored in hot exactly as in a plain cache, so this is the plain input over the hot cache
// with a mask over [cold | hot]
class llm_graph_input_attn_kv_mixed : public llm_graph_input_attn_kv {
public:
    llm_graph_input_attn_kv_mixed(
            const llama_hparams & hparams,
            const llama_cparams & cparams,
            const llama_kv_cache_mixed_context * mctx);
    ~llm_graph_input_attn_kv_mixed() = default;

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    const llama_kv_cache_mixed_context * mctx_mixed;

    // cold cells that the graph was built for
    uint32_t n_cold;

    // inputs reach the functions that build the graph as constants
    mutable llama_kv_mixed_fused fused;
};

//
// call sites in upstream's code
//

// the input of a mixed cache, null when the memory is another
llm_graph_input_attn_kv * llm_build_attn_inp_kv_mixed(const llm_graph_context & gctx);

// throws when the cache's attention is to be fused and can not be
void llama_kv_mixed_check_attn(const llama_model & model, const llama_kv_cache_mixed & kv);

// attention over cold and hot; over k and v alone when inp is not that of a mixed cache
// q, k, v as for llm_graph_context::build_attn_mha(), k and v being the views of the hot rows
ggml_tensor * llm_build_attn_mixed(
        const llm_graph_context & gctx,
        const llm_graph_input_attn_kv * inp,
        ggml_tensor * q,
        ggml_tensor * k,
        ggml_tensor * v,
        ggml_tensor * kq_b,
        ggml_tensor * sinks,
              float   kq_scale,
                int   il);
