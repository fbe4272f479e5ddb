#include "cpu/isa.h"

#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__)
extern const llama_kv_mixed_isa llama_kv_mixed_isa_amx;
extern const llama_kv_mixed_isa llama_kv_mixed_isa_avx512_bf16;
extern const llama_kv_mixed_isa llama_kv_mixed_isa_avx512;
extern const llama_kv_mixed_isa llama_kv_mixed_isa_avx_vnni;
extern const llama_kv_mixed_isa llama_kv_mixed_isa_avx2;
#elif defined(__aarch64__)
extern const llama_kv_mixed_isa llama_kv_mixed_isa_neon_bf16;
extern const llama_kv_mixed_isa llama_kv_mixed_isa_dotprod;
extern const llama_kv_mixed_isa llama_kv_mixed_isa_neon;
#endif
extern const llama_kv_mixed_isa llama_kv_mixed_isa_generic;

#if defined(__x86_64__) && defined(__GNUC__)
// a bit of what cpuid says: leaf 1, and extended features (leaf 7); reg: eax, ebx, ecx, edx
static bool has_feature(unsigned leaf, unsigned subleaf, int reg, int bit) {
    unsigned regs[4] = {};
    return __get_cpuid_count(leaf, subleaf, &regs[0], &regs[1], &regs[2], &regs[3]) && (regs[reg] >> bit & 1);
}

[[maybe_unused]] static bool has_avx512_bf16() {
    return has_feature(7, 1, 0, 5);
}

// Tiles have to be asked for: the kernel then keeps their 8 KiB for the threads of this process.
[[maybe_unused]] static bool has_amx_bf16() {
#if defined(__linux__)
    constexpr long request_permission = 0x1023; // ARCH_REQ_XCOMP_PERM
    constexpr long tile_data          = 18;     // XFEATURE_XTILE_DATA
    return has_avx512_bf16() && has_feature(7, 0, 3, 22) && has_feature(7, 0, 3, 24) &&
        syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}
#endif

#if defined(__aarch64__)
[[maybe_unused]] static bool has_neon_bf16() {
#if defined(__linux__)
    constexpr unsigned long bf16 = 1 << 14; // HWCAP2_BF16, which older headers lack
    return getauxval(AT_HWCAP2) & bf16;
#elif defined(__APPLE__)
    int res = 0;
    size_t size = sizeof(res);
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &res, &size, nullptr, 0) == 0 && res;
#else
    return false;
#endif
}
#endif

// those that this machine runs, best first
static std::vector<const llama_kv_mixed_isa *> get_isas() {
    std::vector<const llama_kv_mixed_isa *> res;
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")  && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi")) {
#if defined(LLAMA_KV_MIXED_AMX)
        if (has_amx_bf16()) {
            res.push_back(&llama_kv_mixed_isa_amx);
        }
#endif
        res.push_back(&llama_kv_mixed_isa_avx512);
#if defined(LLAMA_KV_MIXED_BF16)
        if (has_avx512_bf16()) {
            // Intel's processors do half as many products in BF16 per cycle as AMD's, no more than in F32
            res.insert(__builtin_cpu_is("intel") ? res.end() : res.end() - 1, &llama_kv_mixed_isa_avx512_bf16);
        }
#endif
    }
    const bool has_f16c = has_feature(1, 0, 2, 29); // older versions of clang do not know it by name
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c) {
#if defined(LLAMA_KV_MIXED_AVX_VNNI)
        if (has_feature(7, 1, 0, 4)) {
            res.push_back(&llama_kv_mixed_isa_avx_vnni);
        }
#endif
        res.push_back(&llama_kv_mixed_isa_avx2);
    }
#elif defined(__aarch64__)
#if defined(__APPLE__)
    const bool has_dotprod = true;
#elif defined(__linux__)
    const bool has_dotprod = getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    const bool has_dotprod = false;
#endif
#if defined(LLAMA_KV_MIXED_NEON_BF16)
    if (has_dotprod && has_neon_bf16()) {
        res.push_back(&llama_kv_mixed_isa_neon_bf16);
    }
#endif
    if (has_dotprod) {
        res.push_back(&llama_kv_mixed_isa_dotprod);
    }
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
