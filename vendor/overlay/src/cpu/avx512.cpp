#if defined(__x86_64__) && defined(__GNUC__)

#define KVM_AVX512
#include "cpu/kernels.h"

extern const llama_kv_mixed_isa llama_kv_mixed_isa_avx512;

const llama_kv_mixed_isa llama_kv_mixed_isa_avx512 = make_isa("avx512");

// the same with other products of matrices

#if defined(LLAMA_KV_MIXED_BF16)
extern const llama_kv_mixed_products llama_kv_mixed_products_bf16;
extern const llama_kv_mixed_isa llama_kv_mixed_isa_avx512_bf16;

const llama_kv_mixed_isa llama_kv_mixed_isa_avx512_bf16 = make_isa<&llama_kv_mixed_products_bf16>("avx512bf16");
#endif

#if defined(LLAMA_KV_MIXED_AMX)
extern const llama_kv_mixed_products llama_kv_mixed_products_amx;
extern const llama_kv_mixed_isa llama_kv_mixed_isa_amx;

const llama_kv_mixed_isa llama_kv_mixed_isa_amx = make_isa<&llama_kv_mixed_products_amx>("amx");
#endif

#endif
