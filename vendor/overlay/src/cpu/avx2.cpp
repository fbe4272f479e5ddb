#if defined(__x86_64__) && defined(__GNUC__)

#define KVM_AVX2
#include "cpu/kernels.h"

extern const llama_kv_mixed_isa llama_kv_mixed_isa_avx2;

const llama_kv_mixed_isa llama_kv_mixed_isa_avx2 = make_isa("avx2");

#endif
