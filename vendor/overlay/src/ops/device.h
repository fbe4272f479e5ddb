#pragma once

#include "ops/op.h"

#include "ggml-backend.h"

#include <initializer_list>
#include <string>

//
// nodes for a device that knows them
//

// a node, kept for whom it is meant by whoever builds the graph: to compute it on the CPU is a fault
ggml_tensor * llama_kv_mixed_build_op(
    ggml_context * ctx, const llama_kv_mixed_op & op, ggml_type type, std::initializer_list<int64_t> ne, std::initializer_list<ggml_tensor *> src);

// why a device can not compute a node, empty: it can
std::string llama_kv_mixed_op_reason(ggml_backend_dev_t dev, const ggml_tensor * node);
