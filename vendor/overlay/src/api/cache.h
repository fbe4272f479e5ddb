#pragma once

// what the C interface of a cache that is driven by hand is made of

#include "api/api.h"

#include "cache/kv-cache-mixed.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-model.h"

#include <deque>
#include <memory>

struct llama_kv_mixed_cache {
    // a cache of its own and the model it was made for, null when the cache is that of a context
    std::unique_ptr<llama_model>    model;
    std::unique_ptr<llama_memory_i> own;

    // the context that the cache is part of; it may still be computing rows
    llama_context * ctx = nullptr;

    // mixed, or plain with hot alone
    llama_kv_cache_mixed * mixed = nullptr;
    llama_kv_cache       * hot   = nullptr;
    llama_kv_cache       * cold  = nullptr;

    const llama_hparams * hparams = nullptr;

    // what find_slot() found
    llama_kv_cache::slot_info sinfo;
    llama_ubatch              ubatch;

    // in a context there may be more to it than the cache
    llama_memory_i & mem() const {
        return ctx ? *llama_get_memory(ctx) : (llama_memory_i &) *hot;
    }

    const llama_kv_cache & tier(int32_t id) const {
        if (id == LLAMA_KV_MIXED_HOT) {
            return *hot;
        }
        if (id == LLAMA_KV_MIXED_COLD && cold) {
            return *cold;
        }
        throw std::invalid_argument(format("there is no tier %d", id));
    }
};

struct llama_kv_mixed_sbatch {
    llama_vocab vocab; // for debug output only

    std::unique_ptr<llama_batch_allocr> balloc;

    std::deque<llama_ubatch> ubatches;
};

// waits for the context that the cache is part of, which may still be computing rows
static inline void synchronize(const llama_kv_mixed_cache * cache) {
    if (cache->ctx) {
        llama_synchronize(cache->ctx);
    }
}
