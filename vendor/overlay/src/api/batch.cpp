// the C interface of a cache that is driven by hand: batches, and places for them

#include "api/cache.h"

#include <cstring>

//
// batches
//

LLAMA_API llama_kv_mixed_sbatch * llama_kv_mixed_sbatch_init(llama_batch batch, uint32_t n_seq_max, uint32_t n_vocab, llama_memory_t mem) {
    return guarded<llama_kv_mixed_sbatch *>(nullptr, [&] {
        check(batch.n_tokens > 0 && batch.token && !batch.embd, "the batch has no tokens");
        check(batch.pos && batch.n_seq_id && batch.seq_id, "the batch has no positions or no sequences");
        check(n_seq_max > 0 && n_seq_max <= LLAMA_MAX_SEQ, "n_seq_max is out of range");

        for (int32_t i = 0; i < batch.n_tokens; ++i) {
            // upstream takes these for granted
            check(batch.pos[i] >= 0, "a position is negative");
            check(batch.n_seq_id[i] > 0, "a token has no sequence");
        }

        llama_batch_ext ext(batch.n_tokens, 1, 1, n_seq_max, mem, n_vocab, 1);
        llama_batch_compat::init(ext, batch);

        auto res = std::make_unique<llama_kv_mixed_sbatch>();

        res->balloc = std::make_unique<llama_batch_allocr>(1);

        // what is wrong with the batch is in the log
        check(res->balloc->init(ext, res->vocab, false), "the batch is not consistent");

        res->balloc->split_reset();

        return res.release();
    });
}

LLAMA_API void llama_kv_mixed_sbatch_free(llama_kv_mixed_sbatch * sbatch) {
    delete sbatch;
}

LLAMA_API void llama_kv_mixed_sbatch_reset(llama_kv_mixed_sbatch * sbatch) {
    sbatch->balloc->split_reset();
    sbatch->ubatches.clear();
}

LLAMA_API int32_t llama_kv_mixed_sbatch_split(llama_kv_mixed_sbatch * sbatch, int32_t split, uint32_t n_ubatch, llama_kv_mixed_ubatch * dst) {
    return guarded(-1, [&] {
        check_size(dst);
        check(n_ubatch > 0, "n_ubatch must be at least 1");

        llama_ubatch ubatch = {};

        switch (split) {
            case LLAMA_KV_MIXED_SPLIT_SIMPLE: ubatch = sbatch->balloc->split_simple(n_ubatch);          break;
            case LLAMA_KV_MIXED_SPLIT_EQUAL:  ubatch = sbatch->balloc->split_equal (n_ubatch, true, 0); break;
            case LLAMA_KV_MIXED_SPLIT_SEQ:    ubatch = sbatch->balloc->split_seq   (n_ubatch);          break;
            default: check(false, "there is no such split");
        }

        llama_kv_mixed_ubatch res = {};

        if (ubatch.n_tokens == 0) {
            check(sbatch->balloc->get_n_used() == sbatch->balloc->get_n_tokens(), "the batch can not be split like this");
            copy_out(res, dst);
            return 0;
        }

        sbatch->ubatches.push_back(std::move(ubatch));
        const auto & src = sbatch->ubatches.back();

        res.index        = sbatch->ubatches.size() - 1;
        res.n_tokens     = src.n_tokens;
        res.n_seq_tokens = src.n_seq_tokens;
        res.n_seqs       = src.n_seqs;
        res.n_seqs_unq   = src.n_seqs_unq;
        res.equal_seqs   = src.equal_seqs();

        res.token    = src.token;
        res.pos      = src.pos;
        res.n_seq_id = src.n_seq_id;
        res.seq_id   = src.seq_id;
        res.output   = src.output;

        copy_out(res, dst);

        return (int32_t) src.n_tokens;
    });
}

//
// slots
//

LLAMA_API int32_t llama_kv_mixed_cache_find_slot(llama_kv_mixed_cache * cache, llama_kv_mixed_sbatch * sbatch, uint32_t index, uint32_t * cells) {
    return guarded(-1, [&] {
        check(index < sbatch->ubatches.size(), "there is no such ubatch");

        const auto & ubatch = sbatch->ubatches[index];

        check(&cache->mem() == cache->hot, "the cache is one part of its context's memory, tokens can not be added to it alone");

        for (uint32_t s = 0; s < ubatch.n_seqs_unq; ++s) {
            check(llama_kv_mixed_cache_get_stream(cache, ubatch.seq_id_unq[s]) >= 0, "the cache has no such sequence");
        }

        const uint32_t n_stream = cache->hot->get_n_stream();
        check(n_stream == 1 || ubatch.equal_seqs(), "a cache with one stream per sequence takes ubatches of an equal split only");

        cache->sinfo = {};

        auto sinfo = cache->mixed ? cache->mixed->find_slot(ubatch) : cache->hot->find_slot(ubatch, false);
        if (sinfo.empty()) {
            return 1;
        }

        for (const auto & idxs : sinfo.idxs) {
            for (const uint32_t i : idxs) {
                if (cells) {
                    *cells++ = i;
                }
            }
        }

        cache->sinfo  = std::move(sinfo);
        cache->ubatch = ubatch;

        return 0;
    });
}

LLAMA_API int32_t llama_kv_mixed_cache_commit(llama_kv_mixed_cache * cache) {
    return guarded(-1, [&] {
        check(!cache->sinfo.empty(), "commit without find_slot: there is no slot to commit");

        const auto sinfo = std::move(cache->sinfo);
        cache->sinfo = {};

        for (size_t s = 0; s < sinfo.n_stream(); ++s) {
            const auto & cells = cache->hot->get_cells(sinfo.strm[s]);

            for (const uint32_t i : sinfo.idxs[s]) {
                check(cells.is_empty(i), "the slot has been taken since find_slot");
            }
        }

        cache->hot->apply_ubatch(sinfo, cache->ubatch);

        if (cache->mixed) {
            cache->mixed->commit(sinfo);
        }

        return 0;
    });
}

LLAMA_API int32_t llama_kv_mixed_cache_rollback(llama_kv_mixed_cache * cache) {
    return guarded(-1, [&] {
        check(!cache->sinfo.empty(), "rollback without find_slot: there is no slot to forget");

        cache->sinfo = {};

        return 0;
    });
}

LLAMA_API int32_t llama_kv_mixed_cache_move_to_cold(llama_kv_mixed_cache * cache, uint32_t strm, uint32_t n) {
    return guarded(-1, [&] {
        check(cache->mixed, "the cache is not a mixed one");
        check(strm < cache->hot->get_n_stream(), "there is no such stream");

        uint32_t n_moved = 0;

        while (n_moved < n) {
            const uint32_t n_cur = cache->mixed->move_tokens_to_cold_cache(strm, n - n_moved, LLAMA_KV_MIXED_TRIGGER_MANUAL);
            if (n_cur == 0) {
                break;
            }
            n_moved += n_cur;
        }

        return (int32_t) n_moved;
    });
}
