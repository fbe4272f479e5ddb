#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)

#define KVM_NEON
#include "cpu/kernels.h"

extern const llama_kv_mixed_isa llama_kv_mixed_isa_dotprod;

const llama_kv_mixed_isa llama_kv_mixed_isa_dotprod = make_isa("dotprod");

// the same with other products of matrices

#if defined(LLAMA_KV_MIXED_NEON_BF16)
extern const llama_kv_mixed_products llama_kv_mixed_products_neon;
extern const llama_kv_mixed_isa llama_kv_mixed_isa_neon_bf16;

const llama_kv_mixed_isa llama_kv_mixed_isa_neon_bf16 = make_isa<&llama_kv_mixed_products_neon>("neonbf16");
#endif

#endif
