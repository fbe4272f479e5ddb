#pragma once

#include "llama-graph.h"

#include "cache/context.h"
#include "graph/fused.h"

//
// the mixed KV cache in the compute graph
//

// new rows are stored in hot as in any cache, and the mask covers [cold | hot]: see llama_kv_cache_mixed_context
// what is left is attention over both, wherever build_attn() meets the context of a mixed cache

// holds what the fused attention of one layer needs for as long as its graph lives
class llm_graph_input_kv_mixed_fused : public llm_graph_input_i {
public:
    virtual ~llm_graph_input_kv_mixed_fused() = default;

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    llama_kv_mixed_fused fused;
};

// the matrices that rotate what meets cold rows, for attention that is composed of ggml's operations
class llm_graph_input_kv_mixed_rot : public llm_graph_input_i {
public:
    llm_graph_input_kv_mixed_rot(const llama_kv_cache * cold) : cold(cold) {}
    virtual ~llm_graph_input_kv_mixed_rot() = default;

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    ggml_tensor * k_rot = nullptr; // F32 [n_rot, n_rot], null: rows are not rotated
    ggml_tensor * v_rot = nullptr;

    const llama_kv_cache * const cold;
};

// throws when the cache's attention is to be fused and can not be
void llama_kv_mixed_check_attn(const llama_model & model, const llama_kv_cache_mixed & kv);

// llm_graph_context::build_attn_mha() over cold and hot; k and v are the views of hot rows
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
                                   int   il);
