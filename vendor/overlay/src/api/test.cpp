// for tests: what makes a cache fail, see llama-kv-mixed-test.decl.h

#include "api/cache.h"

#include "cache/state-io.h"

#include "llama-kv-mixed-test.h"

LLAMA_API int32_t llama_kv_mixed_cache_fail_moves(llama_kv_mixed_cache * cache, uint32_t n) {
    return guarded(-1, [&] {
        check(cache->mixed, "the cache is not a mixed one");

        cache->mixed->fail_moves(n);

        return 0;
    });
}

LLAMA_API int32_t llama_kv_mixed_cache_fail_shift(llama_kv_mixed_cache * cache, uint32_t n) {
    return guarded(-1, [&] {
        check(cache->mixed, "the cache is not a mixed one");

        cache->mixed->fail_shift(n);

        return 0;
    });
}

LLAMA_API uint64_t llama_kv_mixed_state_bytes_summed(void) {
    return state_bytes_summed;
}
