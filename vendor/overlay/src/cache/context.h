#pragma once

#include "cache/kv-cache-mixed.h"

#include <vector>

//
// llama_kv_cache_mixed_context
//

class llama_kv_cache_mixed_context : public llama_kv_cache_context {
public:
    // used for errors
    llama_kv_cache_mixed_context(llama_memory_status status);

    // used to create a full-cache context
    llama_kv_cache_mixed_context(
            llama_kv_cache_mixed * kv);

    // used to create an update context
    llama_kv_cache_mixed_context(
            llama_kv_cache_mixed * kv,
            llama_context * lctx,
            bool do_shift);

    // used to create a batch processing context from a batch
    llama_kv_cache_mixed_context(
            llama_kv_cache_mixed * kv,
            slot_info_vec_t sinfos,
            std::vector<llama_ubatch> ubatches);

    virtual ~llama_kv_cache_mixed_context();

    //
    // llama_memory_context_i
    //

    bool next()  override;
    bool apply() override;

    //
    // llama_kv_cache_context: the hot rows, and a mask over [cold | hot]
    //

    // dst [n_cold + n_kv, n_tokens/n_stream, 1, n_stream]
    void set_input_kq_mask(ggml_tensor * dst, const llama_ubatch * ubatch, bool causal_attn) const override;

    //
    // llama_kv_cache_mixed_context specific API
    //

    const llama_kv_cache_mixed * get_kv() const;

    // cold cells in view
    uint32_t get_n_cold() const;

    // views of the cold rows in use, null when there are none
    ggml_tensor * get_k_cold(ggml_context * ctx, int32_t il) const;
    ggml_tensor * get_v_cold(ggml_context * ctx, int32_t il) const;

    // the means of their pages, [n_embd_k_gqa, n_page, n_stream]; null when rows are stored as they are
    ggml_tensor * get_k_mean(ggml_context * ctx, int32_t il) const;

private:
    llama_kv_cache_mixed * const kv_mixed = nullptr;

    // the current ubatch has been placed, and is not known to be computed yet
    bool in_flight = false;

    // for the current ubatch
    uint32_t n_cold = 0;
};

//
// llama_kv_cache_rest_context
//

// the update of a cache beside a mixed one, which carries it out
class llama_kv_cache_rest_context : public llama_kv_cache_context {
public:
    llama_kv_cache_rest_context(
            llama_kv_cache_mixed * kv_mixed,
            llama_kv_cache * kv,
            llama_context * lctx,
            bool do_shift,
            stream_copy_info sc_info);

    bool apply() override;

private:
    llama_kv_cache_mixed * const kv_mixed;
    llama_kv_cache       * const kv_rest;
    llama_context        * const lctx_rest;

    const stream_copy_info sc_info_rest;
};
