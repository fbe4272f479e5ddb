#include "attention/kernel.h"
#include "formats/quantize.h"

extern const llama_kv_mixed_attn_kernel llama_kv_mixed_attn_generic;

const llama_kv_mixed_attn_kernel llama_kv_mixed_attn_generic = { "generic", attn_task, attn_merge, quantize_row };
