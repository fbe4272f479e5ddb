#if defined(__aarch64__)

#define KVM_NEON
#include "cpu/kernels.h"

extern const llama_kv_mixed_isa llama_kv_mixed_isa_neon;

const llama_kv_mixed_isa llama_kv_mixed_isa_neon = make_isa("neon");

#endif
