// the C interface of a cache that is driven by hand

#include "cache/kv-cache-mixed.h"
#include "cache/params.h"
#include "formats/formats.h"

#include "llama-batch.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <stdexcept>
#include <vector>

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

// runs f; on an exception: keeps its sentence, and returns the given value
template <typename T, typename F>
static T guarded(T failed, F f) {
    llama_kv_mixed_error().clear();

    try {
        return f();
    } catch (const std::bad_alloc &) {
        llama_kv_mixed_error() = "out of memory";
    } catch (const std::exception & err) {
        llama_kv_mixed_error() = err.what();
    }

    return failed;
}

static void check(bool ok, const char * what) {
    if (!ok) {
        throw std::invalid_argument(what);
    }
}

template <typename T>
static void check_size(const T * s) {
    if (!s || s->struct_size != sizeof(T)) {
        throw std::invalid_argument(format("the struct has %zu bytes here, the caller's has %zu", sizeof(T), s ? s->struct_size : 0));
    }
}

//
// cache
//

// a model that is nothing but the shape of its KV cache
static std::unique_ptr<llama_model> make_model(const llama_kv_mixed_shape & shape) {
    std::unique_ptr<llama_model> res(llama_model_create(LLM_ARCH_LLAMA, llama_model_default_params()));

    auto & hparams = res->hparams;

    hparams.n_layer_all = shape.n_layer;
    hparams.n_ctx_train = shape.n_ctx;
    hparams.n_embd      = shape.n_head_kv*shape.n_embd_head_k;

    hparams.n_embd_head_k_full = shape.n_embd_head_k;
    hparams.n_embd_head_v_full = shape.n_embd_head_v;
    hparams.n_rot_full         = shape.n_embd_head_k;

    hparams.rope_type = LLAMA_ROPE_TYPE_NORM;

    std::fill_n(hparams.n_head_arr   .begin(), shape.n_layer, shape.n_head_kv);
    std::fill_n(hparams.n_head_kv_arr.begin(), shape.n_layer, shape.n_head_kv);

    return res;
}

LLAMA_API llama_kv_mixed_cache * llama_kv_mixed_cache_init(const llama_kv_mixed_shape * shape, const llama_kv_mixed_params * params) {
    return guarded<llama_kv_mixed_cache *>(nullptr, [&] {
        check_size(shape);

        check(shape->n_layer > 0 && shape->n_layer <= LLAMA_MAX_LAYERS, "n_layer is out of range");
        check(shape->n_seq_max > 0 && shape->n_seq_max <= LLAMA_MAX_SEQ, "n_seq_max is out of range");
        check(shape->n_head_kv > 0, "n_head_kv must be at least 1");
        check(shape->n_embd_head_k > 0, "n_embd_head_k must be at least 1");
        check(shape->n_embd_head_v > 0, "n_embd_head_v must be at least 1");
        check(llama_kv_mixed_find_format(shape->type_k), "type_k is not a KV cache type");
        check(llama_kv_mixed_find_format(shape->type_v), "type_v is not a KV cache type");
        check(params || shape->n_ctx > 0, "n_ctx must be at least 1");

        const uint32_t n_pad = std::max(1u, shape->n_pad);

        auto res = std::make_unique<llama_kv_mixed_cache>();

        res->model   = make_model(*shape);
        res->hparams = &res->model->hparams;

        const ggml_type type_k = (ggml_type) shape->type_k;
        const ggml_type type_v = (ggml_type) shape->type_v;

        if (params) {
            check_size(params);
            check(shape->n_ctx > 0 || params->n_cold > 0, "n_ctx or n_cold must be at least 1");

            const uint32_t n_ctx = shape->n_ctx > 0 ? shape->n_ctx : params->n_hot + params->n_cold;

            auto kv = std::make_unique<llama_kv_cache_mixed>(*res->model, *res->hparams, type_k, type_v, *params,
                    /*offload*/ false, shape->unified != 0, n_ctx, shape->n_seq_max, n_pad, nullptr, nullptr, /*rotate*/ false);

            res->mixed = kv.get();
            res->hot   = kv->get_hot();
            res->cold  = kv->get_cold();
            res->own   = std::move(kv);
        } else {
            if (shape->n_ctx % n_pad != 0) {
                throw std::invalid_argument(format("n_ctx=%u is not a multiple of n_pad=%u", shape->n_ctx, n_pad));
            }
            check(shape->n_embd_head_k % ggml_blck_size(type_k) == 0, "n_embd_head_k is not a multiple of type_k's block");
            check(shape->n_embd_head_v % ggml_blck_size(type_v) == 0, "n_embd_head_v is not a multiple of type_v's block");

            auto kv = std::make_unique<llama_kv_cache>(*res->model, *res->hparams, type_k, type_v,
                    /*v_trans*/ false, /*offload*/ false, shape->unified != 0, shape->n_ctx, shape->n_seq_max, n_pad,
                    0, LLAMA_SWA_TYPE_NONE, nullptr, nullptr, nullptr, nullptr);

            res->hot = kv.get();
            res->own = std::move(kv);
        }

        return res.release();
    });
}

LLAMA_API llama_kv_mixed_cache * llama_kv_mixed_cache_from_context(llama_context * ctx) {
    return guarded<llama_kv_mixed_cache *>(nullptr, [&] {
        auto * mixed = ctx ? llama_kv_mixed_find(llama_get_memory(ctx)) : nullptr;
        check(mixed, "the context has no mixed KV cache");

        auto res = std::make_unique<llama_kv_mixed_cache>();

        res->mixed   = mixed;
        res->hot     = mixed->get_hot();
        res->cold    = mixed->get_cold();
        res->hparams = &llama_get_model(ctx)->hparams;
        res->ctx     = ctx;

        return res.release();
    });
}

LLAMA_API void llama_kv_mixed_cache_free(llama_kv_mixed_cache * cache) {
    delete cache;
}

LLAMA_API llama_memory_t llama_kv_mixed_cache_get_memory(llama_kv_mixed_cache * cache) {
    return &cache->mem();
}

//
// cells and rows
//

LLAMA_API int32_t llama_kv_mixed_cache_get_tier(const llama_kv_mixed_cache * cache, int32_t tier, llama_kv_mixed_tier * info) {
    return guarded(-1, [&] {
        check_size(info);

        const auto & kv = cache->tier(tier);

        // a tier without cells has no layers
        const auto ids = cache->hot->get_layer_ids();
        const uint32_t il = ids.at(0);

        const bool is_cold = tier == LLAMA_KV_MIXED_COLD;

        const ggml_type type_k = is_cold ? (ggml_type) cache->mixed->get_params().type_cold_k : kv.type_k();
        const ggml_type type_v = is_cold ? (ggml_type) cache->mixed->get_params().type_cold_v : kv.type_v();

        info->n_stream      = kv.get_n_stream();
        info->size          = kv.get_size();
        info->n_layer       = ids.size();
        info->type_k        = type_k;
        info->type_v        = type_v;
        info->n_embd_head_k = cache->hparams->n_embd_head_k(il);
        info->n_embd_head_v = cache->hparams->n_embd_head_v(il);
        info->n_head_kv     = cache->hparams->n_head_kv(il);
        info->row_size_k    = ggml_row_size(type_k, cache->hparams->n_embd_k_gqa(il));
        info->row_size_v    = ggml_row_size(type_v, cache->hparams->n_embd_v_gqa(il));

        return 0;
    });
}

LLAMA_API int32_t llama_kv_mixed_cache_get_stream(const llama_kv_mixed_cache * cache, int32_t seq_id) {
    const uint32_t n_seq_max = cache->hot->get_n_stream() == 1 ? LLAMA_MAX_SEQ : cache->hot->get_n_seq_max();

    return seq_id >= 0 && (uint32_t) seq_id < n_seq_max ? (int32_t) cache->hot->get_stream(seq_id) : -1;
}

// the sequence ids of a stream are all it has in a unified cache, else the stream's number
static const llama_kv_cells & get_cells(const llama_kv_cache & kv, uint32_t strm) {
    check(strm < kv.get_n_stream(), "there is no such stream");

    return kv.get_cells(strm);
}

LLAMA_API int32_t llama_kv_mixed_cache_get_cells(const llama_kv_mixed_cache * cache, int32_t tier, uint32_t strm, llama_kv_mixed_cell * dst) {
    return guarded(-1, [&] {
        const auto & cells = get_cells(cache->tier(tier), strm);

        for (uint32_t i = 0; i < cells.size(); ++i) {
            dst[i] = { -1, 0, {} };

            if (cells.is_empty(i)) {
                continue;
            }

            dst[i].pos   = cells.pos_get(i);
            dst[i].shift = cells.get_shift(i);

            const auto & seqs = cells.seq_get_all(i);
            for (uint32_t s = 0; s < LLAMA_MAX_SEQ; ++s) {
                dst[i].seqs[s/64] |= (uint64_t) seqs.test(s) << (s % 64);
            }
        }

        return 0;
    });
}

static void synchronize(const llama_kv_mixed_cache * cache) {
    if (cache->ctx) {
        llama_synchronize(cache->ctx);
    }
}

// a layer's K or V of one stream, and the bytes [offset, offset + size) of the rows asked for
struct rows {
    ggml_tensor * t; // null: none were asked for

    size_t offset;
    size_t size;
};

static rows get_rows(const llama_kv_mixed_cache * cache, int32_t tier, uint32_t il, int32_t v, uint32_t strm, uint32_t cell, uint32_t n) {
    const auto & kv = cache->tier(tier);

    const auto ids = cache->hot->get_layer_ids();

    check(std::find(ids.begin(), ids.end(), il) != ids.end(), "there is no such layer");
    check(strm < kv.get_n_stream(), "there is no such stream");
    check((uint64_t) cell + n <= kv.get_size(), "there are no such cells");

    if (n == 0) {
        return {};
    }

    synchronize(cache);

    ggml_tensor * t = v ? llama_kv_cache_mixed::get_v_storage(kv, il) : kv.get_k_storage(il);

    return { t, strm*t->nb[2] + cell*t->nb[1], n*t->nb[1] };
}

LLAMA_API int32_t llama_kv_mixed_cache_get_rows(
        const llama_kv_mixed_cache * cache, int32_t tier, uint32_t il, int32_t v, uint32_t strm, uint32_t cell, uint32_t n, void * dst) {
    return guarded(-1, [&] {
        const rows r = get_rows(cache, tier, il, v, strm, cell, n);
        if (r.t) {
            ggml_backend_tensor_get(r.t, dst, r.offset, r.size);
        }
        return 0;
    });
}

LLAMA_API int32_t llama_kv_mixed_cache_set_rows(
        llama_kv_mixed_cache * cache, int32_t tier, uint32_t il, int32_t v, uint32_t strm, uint32_t cell, uint32_t n, const void * src) {
    return guarded(-1, [&] {
        const rows r = get_rows(cache, tier, il, v, strm, cell, n);
        if (r.t) {
            ggml_backend_tensor_set(r.t, src, r.offset, r.size);
        }
        return 0;
    });
}

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

        const size_t size = dst->struct_size;
        memset(dst, 0, size);
        dst->struct_size = size;

        if (ubatch.n_tokens == 0) {
            check(sbatch->balloc->get_n_used() == sbatch->balloc->get_n_tokens(), "the batch can not be split like this");
            return 0;
        }

        sbatch->ubatches.push_back(std::move(ubatch));
        const auto & src = sbatch->ubatches.back();

        dst->index        = sbatch->ubatches.size() - 1;
        dst->n_tokens     = src.n_tokens;
        dst->n_seq_tokens = src.n_seq_tokens;
        dst->n_seqs       = src.n_seqs;
        dst->n_seqs_unq   = src.n_seqs_unq;
        dst->equal_seqs   = src.equal_seqs();

        dst->token    = src.token;
        dst->pos      = src.pos;
        dst->n_seq_id = src.n_seq_id;
        dst->seq_id   = src.seq_id;
        dst->output   = src.output;

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
            const auto & cells = get_cells(*cache->hot, sinfo.strm[s]);

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

LLAMA_API int32_t llama_kv_mixed_cache_fail_moves(llama_kv_mixed_cache * cache, uint32_t n) {
    return guarded(-1, [&] {
        check(cache->mixed, "the cache is not a mixed one");

        cache->mixed->fail_moves(n);

        return 0;
    });
}

//
// state
//

class io_write_bytes : public llama_io_write_i {
public:
    void write(const void * src, size_t size) override {
        bytes.insert(bytes.end(), (const uint8_t *) src, (const uint8_t *) src + size);
    }

    void write_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        bytes.resize(bytes.size() + size);
        ggml_backend_tensor_get(tensor, bytes.data() + bytes.size() - size, offset, size);
    }

    size_t n_bytes() override {
        return bytes.size();
    }

    std::vector<uint8_t> bytes;
};

class io_read_bytes : public llama_io_read_i {
public:
    io_read_bytes(const void * src, size_t size) : src((const uint8_t *) src), size(size) {}

    void read(void * dst, size_t n) override {
        memcpy(dst, take(n), n);
    }

    void read_tensor(ggml_tensor * tensor, size_t offset, size_t n) override {
        ggml_backend_tensor_set(tensor, take(n), offset, n);
    }

    size_t n_bytes() override {
        return pos;
    }

private:
    const uint8_t * src;
    size_t size;
    size_t pos = 0;

    const uint8_t * take(size_t n) {
        check(n <= size - pos, "the state ends too early");
        pos += n;
        return src + pos - n;
    }
};

static void check_seq(const llama_kv_mixed_cache * cache, int32_t seq_id) {
    check(seq_id == -1 || llama_kv_mixed_cache_get_stream(cache, seq_id) >= 0, "the cache has no such sequence");
}

LLAMA_API int64_t llama_kv_mixed_cache_state_get(const llama_kv_mixed_cache * cache, int32_t seq_id, void * dst, size_t size) {
    return guarded<int64_t>(-1, [&] {
        check_seq(cache, seq_id);
        synchronize(cache);

        io_write_bytes io;
        cache->mem().state_write(io, seq_id);

        if (dst) {
            check(size >= io.bytes.size(), "the buffer is too small for the state");
            memcpy(dst, io.bytes.data(), io.bytes.size());
        }

        return (int64_t) io.bytes.size();
    });
}

LLAMA_API int64_t llama_kv_mixed_cache_state_set(llama_kv_mixed_cache * cache, int32_t seq_id, const void * src, size_t size) {
    return guarded<int64_t>(-1, [&] {
        check_seq(cache, seq_id);
        synchronize(cache);

        cache->sinfo = {};

        io_read_bytes io(src, size);
        cache->mem().state_read(io, seq_id);

        return (int64_t) io.n_bytes();
    });
}
