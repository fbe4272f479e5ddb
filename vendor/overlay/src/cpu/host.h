#pragma once

#include "ggml.h"

// whether the CPU computes on the rows of this tensor where they are
bool llama_kv_mixed_is_on_host(const ggml_tensor * t);
