#include "cpu/kernels.h"

extern const llama_kv_mixed_isa llama_kv_mixed_isa_generic;

const llama_kv_mixed_isa llama_kv_mixed_isa_generic = make_isa("generic");
