#pragma once

#include "common.cuh"

//
// nodes of a mixed KV cache (ops/op.h) in ggml's CUDA backend: what its source calls
//

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

inline const char * ggml_cuda_kv_mixed_reason(int, const ggml_tensor *) { return "the kernels are for NVIDIA GPUs"; }
inline bool         ggml_cuda_kv_mixed(ggml_backend_cuda_context &, ggml_tensor *) { return false; }

#else

// why this device can not compute a node of ours; null: it can
const char * ggml_cuda_kv_mixed_reason(int device, const ggml_tensor * node);

// false: the node is not one of ours
bool ggml_cuda_kv_mixed(ggml_backend_cuda_context & ctx, ggml_tensor * node);

#endif
