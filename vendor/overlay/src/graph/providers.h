#pragma once

#include "ops/op.h"

#include "ggml.h"

#include <cstdint>
#include <string>

class llama_kv_cache_mixed;
class llama_kv_cache_mixed_context;

struct llama_hparams;
struct llm_graph_context;

//
// attention over cold and hot rows: who can compute it is asked in turn
//
// New rows are stored in hot as in any cache, and the mask covers [cold | hot]: see llama_kv_cache_mixed_context. What is
// left is attention over both, wherever build_attn() meets the context of a mixed cache.
//

// a layer of a cache
struct llama_kv_mixed_attn_layer {
    const llama_kv_cache_mixed & kv;
    const llama_hparams        & hparams;

    int32_t il;

    // no bias for every pair of tokens, and no other way of capping than ggml_flash_attn_ext()'s
    bool is_plain;
};

// the arguments of llm_graph_context::build_attn_mha(); k and v are the views of hot rows
struct llama_kv_mixed_attn_inputs {
    ggml_tensor * q;
    ggml_tensor * k;
    ggml_tensor * v;
    ggml_tensor * kq_b;
    ggml_tensor * kq_mask;
    ggml_tensor * sinks;

    float kq_scale;
    int   il;
};

// where a layer's rows are: in the CPU's memory, or in that of a device
enum llama_kv_mixed_place {
    LLAMA_KV_MIXED_ON_HOST,
    LLAMA_KV_MIXED_ON_DEVICE,
    LLAMA_KV_MIXED_ANYWHERE,
};

struct llama_kv_mixed_attn_provider {
    int32_t attn; // enum llama_kv_mixed_attn_type: what asks for this one alone

    const char * name;

    llama_kv_mixed_place place; // of the rows that it can work on

    // why it can not compute the attention of a layer, empty: it can
    std::string (*reason)(const llama_kv_mixed_attn_layer & layer);

    ggml_tensor * (*build)(const llm_graph_context & gctx, const llama_kv_cache_mixed_context & mctx, const llama_kv_mixed_attn_inputs & in);
};

// what an attention node of ours says of itself
llama_kv_mixed_op llama_kv_mixed_make_op(
    const llm_graph_context & gctx, const llama_kv_cache_mixed_context & mctx, const llama_kv_mixed_attn_inputs & in, bool is_host);

// throws a std::runtime_error that says why, when there is a layer whose attention nobody can compute
void llama_kv_mixed_check_attn(const llama_hparams & hparams, const llama_kv_cache_mixed & kv);

ggml_tensor * llama_kv_mixed_build_attn(const llm_graph_context & gctx, const llama_kv_cache_mixed_context & mctx, const llama_kv_mixed_attn_inputs & in);
