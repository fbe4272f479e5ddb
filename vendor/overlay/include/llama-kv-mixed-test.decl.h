// What tests alone need of the mixed KV cache: declarations as in llama-kv-mixed.decl.h. The library has these functions,
// but they are no part of its interface, and this file is not installed.

// The next n migrations fail to copy their rows, and leave them where they are. Return 0; or -1 when there is no mixed cache.
int32_t llama_kv_mixed_cache_fail_moves(struct llama_kv_mixed_cache * cache, uint32_t n);

// The next shift of positions fails when it has computed the rows of n layers, before they are put in place (each tier and
// stream that has something to shift counts its own layers). Return as above.
int32_t llama_kv_mixed_cache_fail_shift(struct llama_kv_mixed_cache * cache, uint32_t n);

// The bytes that states were read and written with a checksum of, by all caches of the process so far.
uint64_t llama_kv_mixed_state_bytes_summed(void);
