#include "llama-kv-mixed-hooks.h"

#include "cache/context.h"
#include "cache/kv-cache-mixed.h"
#include "cache/request.h"
#include "graph/providers.h"

#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

// of the context that is being created on this thread: the tokens of a ubatch, and why they must have room in hot at once; null:
// they need not
static thread_local struct {
    const char * reason = nullptr;
    uint32_t     n      = 0;
} whole;

// why a model's memory can not be mixed, null when it can
static const char * unsupported_reason(const llama_model & model, const llama_memory_params & params) {
    const auto & hparams = model.hparams;

    if (llm_arch_is_recurrent(model.arch)) {
        return "its memory is a recurrent state, not a KV cache";
    }

    switch (model.arch) {
        case LLM_ARCH_MINIMAX_M3:
            return "its sparse attention (MSA) picks rows of one cache, which is not supported yet";
        case LLM_ARCH_DEEPSEEK4:
            return "its compressed attention (DSV4) keeps caches of its own, which is not supported yet";
        case LLM_ARCH_DEEPSEEK32:
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_GLM5_NEXT:
        case LLM_ARCH_DOTS3NOTE:
            return "its sparse attention (DSA) picks rows of one cache, which is not supported yet";
        case LLM_ARCH_QWEN4EXP:
            return "its sparse attention (QSA) picks rows of one cache, which is not supported yet";
        case LLM_ARCH_DFLASH:
        case LLM_ARCH_GEMMA4_ASSISTANT:
            return "it is a draft model that lives on the cache of another one";
        case LLM_ARCH_PLM:
            return "its graph hands V over in a shape that only a transposed V cache takes";
        default:
            break;
    }

    if (hparams.is_mla()) {
        return "its multi-head latent attention (MLA) keeps no V rows, which is not supported yet";
    }
    if (hparams.n_rel_attn_bkts > 0) {
        return "its relative position buckets are computed for one cache only";
    }
    if (hparams.ple_n_heads > 0) {
        return "its n-gram embeddings look up earlier tokens in one cache only";
    }
    if (params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
        return "a context of this type shares its cache with another one";
    }

    return nullptr;
}

[[noreturn]] static void fail(const std::string & reason) {
    llama_kv_mixed_error() = reason;
    throw std::runtime_error(reason);
}

static std::optional<llama_kv_mixed_params> requested_or_fail() {
    try {
        return llama_kv_mixed_params_requested();
    } catch (const std::invalid_argument & err) {
        fail(err.what());
    }
}

void llama_kv_mixed_take_params(llama_context_params & params) {
    llama_kv_mixed_check_environment();
    llama_kv_mixed_take_types(params.type_k, params.type_v);
}

void llama_kv_mixed_check_model(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    // (other draft models have a context to draft for as well, and a cache of their own)
    if (model.arch == LLM_ARCH_GEMMA4_ASSISTANT && llama_kv_mixed_find(params.mem_other)) {
        fail(format("a %s model reads the rows of another context's cache, and that is a mixed one", llm_arch_name(model.arch)));
    }

    if (!requested_or_fail()) {
        return;
    }

    if (const char * reason = unsupported_reason(model, params)) {
        fail(format("no mixed KV cache for a %s model: %s", llm_arch_name(model.arch), reason));
    }

    if (!cparams.causal_attn) {
        fail("no mixed KV cache without causal attention: its batches can not be split to fit in hot");
    }

    whole = { llama_kv_mixed_whole_reason(cparams, model.hparams), cparams.n_ubatch };
}

// hot grows where a ubatch can not be split
static void grow_hot(llama_kv_mixed_params & params, uint32_t n_ctx_seq, uint32_t n_seq_stream) {
    if (!whole.reason || params.n_hot >= n_ctx_seq) {
        return;
    }

    // beside the sinks that other sequences may have; these are no more than half of hot, or the sinks of one sequence
    const uint64_t n_sinks = std::min<uint64_t>((uint64_t) params.n_sink*n_seq_stream, std::max(whole.n, params.n_sink));
    const uint32_t n_hot   = std::min<uint64_t>(n_ctx_seq, GGML_PAD(whole.n + n_sinks, 256));

    if (params.n_hot < n_hot) {
        LLAMA_LOG_WARN("%s: hot=%u grows to %u cells: a batch %s has to fit in it as a whole, and n_ubatch is %u\n",
            __func__, params.n_hot, n_hot, whole.reason, whole.n);
        params.n_hot = n_hot;
    }
}

llama_memory_i * llama_kv_mixed_check_memory(llama_memory_i * mem) {
    if (requested_or_fail() && !llama_kv_mixed_find(mem)) {
        const bool none = mem == nullptr;
        delete mem;
        fail(none ? "no mixed KV cache for a model without a KV cache" : "no mixed KV cache for this model: its cache is of a kind that is not supported yet");
    }

    return mem;
}

// whether layers are on a device of their own
static bool is_on_device(const llama_model & model) {
    for (uint32_t il = 0; il < model.hparams.n_layer(); ++il) {
        if (ggml_backend_dev_type(model.dev_layer(il)) != GGML_BACKEND_DEVICE_TYPE_CPU) {
            return true;
        }
    }
    return false;
}

llama_kv_cache * llama_kv_mixed_new_cache(
                            const llama_model & model,
                          const llama_hparams & hparams,
                                    ggml_type   type_k,
                                    ggml_type   type_v,
                                         bool   v_trans,
                                         bool   offload,
                                         bool   unified,
                                     uint32_t   kv_size,
                                     uint32_t   n_seq_max,
                                     uint32_t   n_pad,
                                     uint32_t   n_swa,
                               llama_swa_type   swa_type,
                               llama_memory_t   mem_other,
        const llama_memory_i::layer_filter_cb & filter,
        const  llama_memory_i::layer_reuse_cb & reuse,
        const  llama_memory_i::layer_share_cb & share) {
    auto params = requested_or_fail();
    if (!params) {
        return new llama_kv_cache(
                model, hparams, type_k, type_v, v_trans, offload, unified, kv_size, n_seq_max, n_pad,
                n_swa, swa_type, mem_other, filter, reuse, share);
    }

    GGML_ASSERT(swa_type == LLAMA_SWA_TYPE_NONE && !mem_other);

    const bool hot_auto = params->n_hot == LLAMA_KV_MIXED_HOT_AUTO;

    const auto create = [&](ggml_type type_auto) {
        auto res = std::make_unique<llama_kv_cache_mixed>(
                model, hparams, type_k, type_v, llama_kv_mixed_with_auto(*params, type_auto), offload, unified, kv_size, n_seq_max, n_pad, filter, reuse);
        llama_kv_mixed_check_attn(model.hparams, *res);
        res->announce(hot_auto);
        return res.release();
    };

    try {
        // (a GPU has no use for ubatches of a few tokens, which is what a larger one would be divided into)
        if (hot_auto) {
            params->n_hot = llama_kv_mixed_hot_auto(kv_size, unified ? n_seq_max : 1, offload && is_on_device(model) ? whole.n : 0);
        }

        grow_hot(*params, kv_size, unified ? n_seq_max : 1);

        if (params->type_cold_k != LLAMA_KV_MIXED_TYPE_AUTO && params->type_cold_v != LLAMA_KV_MIXED_TYPE_AUTO) {
            return create(GGML_TYPE_COUNT);
        }

        try {
            return create(GGML_TYPE_IQ4_NL);
        } catch (const std::exception & err) {
            LLAMA_LOG_DEBUG("%s: cold rows are not iq4_nl: %s\n", __func__, err.what());
        }
        return create(GGML_TYPE_Q4_0);
    } catch (const std::exception & err) {
        fail(err.what());
    }
}

llama_kv_cache_context * llama_kv_mixed_new_context(
                             llama_kv_cache * kv,
            llama_kv_cache::slot_info_vec_t   sinfos,
                  std::vector<llama_ubatch>   ubatches) {
    if (auto * mixed = dynamic_cast<llama_kv_cache_mixed *>(kv)) {
        return new llama_kv_cache_mixed_context(mixed, std::move(sinfos), std::move(ubatches));
    }

    return new llama_kv_cache_context(kv, std::move(sinfos), std::move(ubatches));
}

llama_ubatch llama_kv_mixed_split_simple(
                             llama_kv_cache & kv,
                         llama_batch_allocr & balloc,
            const std::vector<llama_ubatch> & ubatches,
                                   uint32_t   n_ubatch) {
    auto * mixed = dynamic_cast<llama_kv_cache_mixed *>(&kv);

    return mixed ? mixed->split_simple(balloc, ubatches, n_ubatch) : balloc.split_simple(n_ubatch);
}

llama_ubatch llama_kv_mixed_split_equal(
                             llama_kv_cache & kv,
                         llama_batch_allocr & balloc,
            const std::vector<llama_ubatch> & ubatches,
                                   uint32_t   n_ubatch,
                                       bool   sequential) {
    auto * mixed = dynamic_cast<llama_kv_cache_mixed *>(&kv);

    return mixed ? mixed->split_equal(balloc, ubatches, n_ubatch, sequential) : balloc.split_equal(n_ubatch, sequential, 0);
}

uint32_t llama_kv_mixed_n_ubatch(
                             llama_kv_cache & kv,
                   const llama_batch_allocr & balloc,
            const std::vector<llama_ubatch> & ubatches,
                                   uint32_t   n_ubatch,
                                   uint32_t   n_tail) {
    auto * mixed = dynamic_cast<llama_kv_cache_mixed *>(&kv);

    return mixed ? mixed->get_n_ubatch(balloc, ubatches, n_ubatch, n_tail) : n_ubatch;
}

uint32_t llama_kv_mixed_n_ctx_seq(const llama_kv_cache & kv) {
    const auto * mixed = dynamic_cast<const llama_kv_cache_mixed *>(&kv);

    return mixed ? mixed->get_n_ctx_seq() : kv.get_size();
}

uint32_t llama_kv_mixed_n_cold(const llama_kv_cache_context * mctx) {
    const auto * mixed = dynamic_cast<const llama_kv_cache_mixed_context *>(mctx);

    return mixed ? mixed->get_n_cold() : 0;
}

llama_memory_context_ptr llama_kv_mixed_init_update(llama_kv_cache & kv_attn, llama_kv_cache & kv, llama_context * lctx, bool optimize) {
    auto * mixed = dynamic_cast<llama_kv_cache_mixed *>(&kv_attn);

    return mixed ? mixed->init_update(lctx, kv) : kv.init_update(lctx, optimize);
}

llama_memory_status llama_kv_mixed_status_failed(const llama_kv_cache & kv) {
    const auto * mixed = dynamic_cast<const llama_kv_cache_mixed *>(&kv);

    return mixed && mixed->is_shift_pending() ? LLAMA_MEMORY_STATUS_FAILED_COMPUTE : LLAMA_MEMORY_STATUS_FAILED_PREPARE;
}

void llama_kv_mixed_state_write(
             llama_kv_cache & kv_attn,
             llama_memory_i & part,
           llama_io_write_i & io,
               llama_seq_id   seq_id,
      llama_state_seq_flags   flags) {
    if (const auto * mixed = dynamic_cast<const llama_kv_cache_mixed *>(&kv_attn)) {
        mixed->state_write_rest(io, seq_id, flags, part);
    } else {
        part.state_write(io, seq_id, flags);
    }
}

void llama_kv_mixed_state_read(
             llama_kv_cache & kv_attn,
             llama_memory_i & part,
            llama_io_read_i & io,
               llama_seq_id   seq_id,
      llama_state_seq_flags   flags) {
    auto * mixed = dynamic_cast<llama_kv_cache_mixed *>(&kv_attn);

    if (!mixed) {
        part.state_read(io, seq_id, flags);
    } else if (&part == &kv_attn) {
        mixed->state_read_part(io, seq_id, flags);
    } else {
        mixed->state_read_rest(io, seq_id, flags, part);
    }
}

void llm_refuse_mixed(const llama_kv_cache_context * mctx) {
    if (dynamic_cast<const llama_kv_cache_mixed_context *>(mctx)) {
        fail("no mixed KV cache for this model: its attention reads V out of the rows of K");
    }
}

ggml_tensor * llm_build_attn_mixed(
              const llm_graph_context & gctx,
         const llama_kv_cache_context * mctx_cur,
                          ggml_tensor * q,
                          ggml_tensor * k,
                          ggml_tensor * v,
                          ggml_tensor * kq_b,
                          ggml_tensor * kq_mask,
                          ggml_tensor * sinks,
                          ggml_tensor * v_mla,
                                float   kq_scale,
                                  int   il) {
    const auto * mctx = dynamic_cast<const llama_kv_cache_mixed_context *>(mctx_cur);

    if (!mctx) {
        return gctx.build_attn_mha(q, k, v, kq_b, kq_mask, sinks, v_mla, 0, kq_scale, il);
    }

    GGML_ASSERT(!v_mla);

    try {
        return llama_kv_mixed_build_attn(gctx, *mctx, { q, k, v, kq_b, kq_mask, sinks, kq_scale, il });
    } catch (const std::exception & err) {
        fail(err.what());
    }
}
