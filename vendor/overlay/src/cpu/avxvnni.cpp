#if defined(LLAMA_KV_MIXED_AVX_VNNI)

#define KVM_AVX2
#include "cpu/kernels.h"

extern const llama_kv_mixed_isa llama_kv_mixed_isa_avx_vnni;

const llama_kv_mixed_isa llama_kv_mixed_isa_avx_vnni = make_isa("avxvnni");

#endif
