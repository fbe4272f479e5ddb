// the C interface of a cache that is driven by hand: the cache, its cells and rows

#include "api/cache.h"
#include "formats/formats.h"

#include <algorithm>

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

LLAMA_API llama_kv_mixed_cache * llama_kv_mixed_cache_init(const llama_kv_mixed_shape * shape_req, const llama_kv_mixed_params * params_req) {
    return guarded<llama_kv_mixed_cache *>(nullptr, [&] {
        const auto shape_full  = copy_in(shape_req, llama_kv_mixed_shape {});
        auto params_full = params_req ? copy_in(params_req, llama_kv_mixed_default_params()) : llama_kv_mixed_params {};

        const auto * shape  = &shape_full;
        const auto * params = params_req ? &params_full : nullptr;

        if (params && params->n_hot == LLAMA_KV_MIXED_HOT_AUTO) {
            params_full.n_hot = llama_kv_mixed_hot_auto(
                shape->n_ctx > 0 ? shape->n_ctx : UINT32_MAX, shape->unified ? std::max(1u, shape->n_seq_max) : 1);
        }

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
        const auto & kv = cache->tier(tier);

        // a tier without cells has no layers
        const auto ids = cache->hot->get_layer_ids();
        const uint32_t il = ids.at(0);

        const bool is_cold = tier == LLAMA_KV_MIXED_COLD;

        const ggml_type type_k = is_cold ? (ggml_type) cache->mixed->get_params().type_cold_k : kv.type_k();
        const ggml_type type_v = is_cold ? (ggml_type) cache->mixed->get_params().type_cold_v : kv.type_v();

        llama_kv_mixed_tier res = {};

        res.struct_size   = sizeof(res);
        res.n_stream      = kv.get_n_stream();
        res.size          = kv.get_size();
        res.n_layer       = ids.size();
        res.type_k        = type_k;
        res.type_v        = type_v;
        res.n_embd_head_k = cache->hparams->n_embd_head_k(il);
        res.n_embd_head_v = cache->hparams->n_embd_head_v(il);
        res.n_head_kv     = cache->hparams->n_head_kv(il);
        res.row_size_k    = ggml_row_size(type_k, cache->hparams->n_embd_k_gqa(il));
        res.row_size_v    = ggml_row_size(type_v, cache->hparams->n_embd_v_gqa(il));

        res.n_page        = is_cold && cache->mixed->get_means() ? cache->mixed->get_means()->get_n_page() : 0;

        copy_out(res, info);

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

// the means of some pages of a layer's K: where they are, and their bytes
static rows get_means(const llama_kv_mixed_cache * cache, uint32_t il, uint32_t strm, uint32_t page, uint32_t n) {
    check(cache->mixed && cache->mixed->get_means(), "K is stored as it is, there are no means");

    const auto ids = cache->hot->get_layer_ids();

    check(std::find(ids.begin(), ids.end(), il) != ids.end(), "there is no such layer");
    check(strm < cache->cold->get_n_stream(), "there is no such stream");
    check((uint64_t) page + n <= cache->mixed->get_means()->get_n_page(), "there are no such pages");

    synchronize(cache);

    ggml_tensor * t = cache->mixed->get_k_mean(il);

    return { n > 0 ? t : nullptr, strm*t->nb[2] + page*t->nb[1], n*t->nb[1] };
}

LLAMA_API int32_t llama_kv_mixed_cache_get_means(
        const llama_kv_mixed_cache * cache, uint32_t il, uint32_t strm, uint32_t page, uint32_t n, void * dst) {
    return guarded(-1, [&] {
        const rows r = get_means(cache, il, strm, page, n);
        if (r.t) {
            ggml_backend_tensor_get(r.t, dst, r.offset, r.size);
        }
        return 0;
    });
}

LLAMA_API int32_t llama_kv_mixed_cache_set_means(
        llama_kv_mixed_cache * cache, uint32_t il, uint32_t strm, uint32_t page, uint32_t n, const void * src) {
    return guarded(-1, [&] {
        const rows r = get_means(cache, il, strm, page, n);
        if (r.t) {
            ggml_backend_tensor_set(r.t, src, r.offset, r.size);
        }
        return 0;
    });
}
