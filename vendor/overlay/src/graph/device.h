#pragma once

#include "graph/providers.h"

#include <string>

//
// attention by the kernels of the device that holds the rows: a GPU, or a server on another machine
//
// That is a node of ours (ops/op.h), which meets rows as they are stored. Where the device has nodes that make numbers of the
// rows, many tokens are upstream's own attention behind these: that costs little beside so many products.
//

// why it can not compute the attention of a layer, empty: it can
std::string llama_kv_mixed_device_reason(const llama_kv_mixed_attn_layer & layer);

ggml_tensor * llama_kv_mixed_device_build(const llm_graph_context & gctx, const llama_kv_cache_mixed_context & mctx, const llama_kv_mixed_attn_inputs & in);
