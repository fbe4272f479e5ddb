#pragma once

#include "graph/providers.h"

#include <string>

//
// attention composed of ggml's operations, on any device: cold rows are expanded beside the hot ones, then it is upstream's own
//

// why the device that holds the rows of a layer can not do that, empty: it can
std::string llama_kv_mixed_compose_reason(const llama_kv_mixed_attn_layer & layer);

ggml_tensor * llama_kv_mixed_compose_build(const llm_graph_context & gctx, const llama_kv_cache_mixed_context & mctx, const llama_kv_mixed_attn_inputs & in);
