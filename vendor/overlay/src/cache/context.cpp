#include "cache/context.h"

#include <cassert>

llama_kv_cache_mixed_context::llama_kv_cache_mixed_context(llama_memory_status status) : llama_kv_cache_context(status) {}

llama_kv_cache_mixed_context::llama_kv_cache_mixed_context(
        llama_kv_cache_mixed * kv) : llama_kv_cache_context(kv), kv_mixed(kv), n_cold(kv->get_cold()->get_size()) {
}

llama_kv_cache_mixed_context::llama_kv_cache_mixed_context(
        llama_kv_cache_mixed * kv,
        llama_context * lctx,
        bool do_shift) : llama_kv_cache_context(kv, lctx, do_shift, {}), kv_mixed(kv) {
}

llama_kv_cache_mixed_context::llama_kv_cache_mixed_context(
        llama_kv_cache_mixed * kv,
        slot_info_vec_t sinfos,
        std::vector<llama_ubatch> ubatches) : llama_kv_cache_context(kv, std::move(sinfos), std::move(ubatches)), kv_mixed(kv) {
}

llama_kv_cache_mixed_context::~llama_kv_cache_mixed_context() {
    if (in_flight) {
        kv_mixed->drop(sinfos[i_cur], ubatches[i_cur]);
    }
}

bool llama_kv_cache_mixed_context::next() {
    in_flight = false;

    return llama_kv_cache_context::next();
}

bool llama_kv_cache_mixed_context::apply() {
    assert(!llama_memory_status_is_fail(status));

    // no ubatches -> this is a KV cache update
    if (ubatches.empty()) {
        // (where this is one of several caches, it may be another one that has something to do)
        return !do_shift || kv_mixed->update(lctx);
    }

    auto & sinfo = sinfos[i_cur];

    sinfo = kv_mixed->find_slot(ubatches[i_cur]);
    if (sinfo.empty()) {
        return false;
    }

    llama_kv_cache_context::apply();

    in_flight = true;

    kv_mixed->commit(sinfo);

    n_cold = kv_mixed->get_n_cold(sinfo);

    return true;
}

const llama_kv_cache_mixed * llama_kv_cache_mixed_context::get_kv() const {
    return kv_mixed;
}

uint32_t llama_kv_cache_mixed_context::get_n_cold() const {
    return n_cold;
}

ggml_tensor * llama_kv_cache_mixed_context::get_k_cold(ggml_context * ctx, int32_t il) const {
    return n_cold == 0 ? nullptr : kv_mixed->get_cold()->get_k(ctx, il, n_cold, sinfos[i_cur]);
}

ggml_tensor * llama_kv_cache_mixed_context::get_v_cold(ggml_context * ctx, int32_t il) const {
    return n_cold == 0 ? nullptr : kv_mixed->get_cold()->get_v(ctx, il, n_cold, sinfos[i_cur]);
}

ggml_tensor * llama_kv_cache_mixed_context::get_k_mean(ggml_context * ctx, int32_t il) const {
    ggml_tensor * t = n_cold == 0 ? nullptr : kv_mixed->get_k_mean(il);
    if (!t) {
        return nullptr;
    }

    // as llama_kv_cache::get_k() does
    const auto & sinfo = sinfos[i_cur];

    return ggml_view_3d(ctx, t, t->ne[0], llama_kv_mixed_means::page_of(n_cold - 1) + 1, sinfo.s1 - sinfo.s0 + 1,
        t->nb[1], t->nb[2], sinfo.s0*t->nb[2]);
}

void llama_kv_cache_mixed_context::set_input_kq_mask(ggml_tensor * dst, const llama_ubatch * ubatch, bool causal_attn) const {
    GGML_ASSERT(dst->ne[0] == (int64_t) n_cold + get_n_kv());

    kv_mixed->set_mask(dst, n_cold, *ubatch, causal_attn);
}

//
// llama_kv_cache_rest_context
//

llama_kv_cache_rest_context::llama_kv_cache_rest_context(
        llama_kv_cache_mixed * kv_mixed,
        llama_kv_cache * kv,
        llama_context * lctx,
        bool do_shift,
        stream_copy_info sc_info) :
    llama_kv_cache_context(kv, lctx, do_shift, sc_info),
    kv_mixed(kv_mixed), kv_rest(kv), lctx_rest(lctx), sc_info_rest(std::move(sc_info)) {
}

bool llama_kv_cache_rest_context::apply() {
    // (a NO_UPDATE status means that it is another part that has something to do)
    return kv_mixed->update(lctx_rest, *kv_rest, sc_info_rest);
}
