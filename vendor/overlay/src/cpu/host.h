#pragma once

#include "ggml-backend.h"

// whether a tensor is in the CPU's memory, where its kernels can work on it
bool llama_kv_mixed_is_on_host(const ggml_tensor * t);

// the device that holds a tensor; the CPU where none does
ggml_backend_dev_t llama_kv_mixed_get_dev(const ggml_tensor * t);
