#pragma once

#include "graph/providers.h"

#include <string>

//
// attention by the CPU's kernel, over rows that are in the CPU's memory
//

// why it can not compute the attention of a layer, empty: it can
std::string llama_kv_mixed_fused_reason(const llama_kv_mixed_attn_layer & layer);

ggml_tensor * llama_kv_mixed_fused_build(const llm_graph_context & gctx, const llama_kv_cache_mixed_context & mctx, const llama_kv_mixed_attn_inputs & in);
