#pragma once

#include "graph/providers.h"

#include <functional>
#include <string>

//
// attention composed of ggml's operations, on any device: cold rows are expanded beside the hot ones, then it is upstream's own
//

// why the device that holds the rows of a layer can not do that, empty: it can
std::string llama_kv_mixed_compose_reason(const llama_kv_mixed_attn_layer & layer);

ggml_tensor * llama_kv_mixed_compose_build(const llm_graph_context & gctx, const llama_kv_cache_mixed_context & mctx, const llama_kv_mixed_attn_inputs & in);

// cold rows as numbers, followed by the hot ones: how that is done may be chosen
// cold, hot: [n_embd, n_head_kv, n, n_stream]; means: of the cold rows, null: none; rot: the matrix that cold rows are rotated by, null: they are not
using llama_kv_mixed_join_fn = std::function<ggml_tensor * (ggml_context * ctx, ggml_tensor * cold, ggml_tensor * means, ggml_tensor * hot, ggml_tensor * rot)>;

ggml_tensor * llama_kv_mixed_compose_build(
    const llm_graph_context & gctx, const llama_kv_cache_mixed_context & mctx, const llama_kv_mixed_attn_inputs & in, const llama_kv_mixed_join_fn & join);
