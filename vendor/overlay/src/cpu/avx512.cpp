#if defined(__x86_64__) && defined(__GNUC__)

#define KVM_AVX512
#include "cpu/kernels.h"

extern const llama_kv_mixed_isa llama_kv_mixed_isa_avx512;

const llama_kv_mixed_isa llama_kv_mixed_isa_avx512 = make_isa("avx512");

#endif
