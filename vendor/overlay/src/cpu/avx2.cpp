#if defined(__x86_64__) && defined(__GNUC__)

#define KVM_AVX2
#include "attention/kernel.h"
#include "formats/quantize.h"

extern const llama_kv_mixed_attn_kernel llama_kv_mixed_attn_avx2;

const llama_kv_mixed_attn_kernel llama_kv_mixed_attn_avx2 = { "avx2", attn_task, attn_merge, quantize_row };

#endif
