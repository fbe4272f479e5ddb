#if defined(__aarch64__)

#define KVM_NEON
#include "llama-kv-mixed-attn-kernel.h"
#include "llama-kv-mixed-quantize.h"

extern const llama_kv_mixed_attn_kernel llama_kv_mixed_attn_neon;

const llama_kv_mixed_attn_kernel llama_kv_mixed_attn_neon = { "neon", attn_task, attn_merge, quantize_row };

#endif
