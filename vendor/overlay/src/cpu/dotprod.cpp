#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)

#define KVM_NEON
#include "cpu/kernels.h"

extern const llama_kv_mixed_isa llama_kv_mixed_isa_dotprod;

const llama_kv_mixed_isa llama_kv_mixed_isa_dotprod = make_isa("dotprod");

#endif
