#if defined(__aarch64__)

#define KVM_NEON
#include "attention/kernel.h"
#include "formats/quantize.h"

extern const llama_kv_mixed_attn_kernel llama_kv_mixed_attn_neon;

const llama_kv_mixed_attn_kernel llama_kv_mixed_attn_neon = { "neon", attn_task, attn_merge, quantize_row };

#endif
