#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)

#define KVM_NEON
#include "attention/kernel.h"
#include "formats/quantize.h"

extern const llama_kv_mixed_attn_kernel llama_kv_mixed_attn_dotprod;

const llama_kv_mixed_attn_kernel llama_kv_mixed_attn_dotprod = { "dotprod", attn_task, attn_merge, quantize_row };

#endif
