#pragma once

#include "rpc/protocol.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <memory>

//
// graphs that a client sends to an RPC server: what may be computed of them, and nodes of ours on the CPU
//
// A custom node carries the address of a function in the client's process, which is never called here: a node of ours gets one of
// this process, any other is refused. All sizes are checked against each other, and tensors against their buffers.
//

// threads that compute a graph on the CPU
void llama_kv_mixed_rpc_set_n_threads(int n_threads);

// a tensor as it came, with its buffer (null: none), before ggml looks at it; false: no such tensor can be, or it leaves its buffer
bool llama_kv_mixed_rpc_check_tensor(const ggml_tensor * t);

// why the backend does not compute a node of ours, or a copy of rows, whose tensors need no memory yet, empty: it does
void llama_kv_mixed_rpc_reason(ggml_backend_t backend, const ggml_tensor * node, char (&res)[LLAMA_KV_MIXED_RPC_REASON_SIZE]);

// what nodes of ours need in a graph, for as long as that may be computed
struct llama_kv_mixed_rpc_graph;

// before a graph is computed for the first time; null: it is refused, and the log says why
std::shared_ptr<llama_kv_mixed_rpc_graph> llama_kv_mixed_rpc_prepare(ggml_backend_t backend, ggml_cgraph * graph);
