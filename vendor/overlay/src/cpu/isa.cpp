#include "cpu/isa.h"

#include <cstring>
#include <vector>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__)
extern const llama_kv_mixed_isa llama_kv_mixed_isa_avx512;
extern const llama_kv_mixed_isa llama_kv_mixed_isa_avx2;
#elif defined(__aarch64__)
extern const llama_kv_mixed_isa llama_kv_mixed_isa_dotprod;
extern const llama_kv_mixed_isa llama_kv_mixed_isa_neon;
#endif
extern const llama_kv_mixed_isa llama_kv_mixed_isa_generic;

// those that this machine runs, best first
static std::vector<const llama_kv_mixed_isa *> get_isas() {
    std::vector<const llama_kv_mixed_isa *> res;
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")  && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi")) {
        res.push_back(&llama_kv_mixed_isa_avx512);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        res.push_back(&llama_kv_mixed_isa_avx2);
    }
#elif defined(__aarch64__)
#if defined(__APPLE__)
    res.push_back(&llama_kv_mixed_isa_dotprod);
#elif defined(__linux__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) {
        res.push_back(&llama_kv_mixed_isa_dotprod);
    }
#endif
    res.push_back(&llama_kv_mixed_isa_neon);
#endif
    res.push_back(&llama_kv_mixed_isa_generic);
    return res;
}

static const std::vector<const llama_kv_mixed_isa *> & isas() {
    static const auto res = get_isas();
    return res;
}

std::string llama_kv_mixed_get_isa_names() {
    std::string res;
    for (const auto * isa : isas()) {
        res += (res.empty() ? "" : " ") + std::string(isa->name);
    }
    return res;
}

const llama_kv_mixed_isa * llama_kv_mixed_get_isa(const char * name) {
    for (const auto * isa : isas()) {
        if (!name || strcmp(isa->name, name) == 0) {
            return isa;
        }
    }
    return nullptr;
}
