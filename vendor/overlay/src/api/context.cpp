#include "api/api.h"

#include "cache/kv-cache-mixed.h"
#include "cache/presets.h"
#include "formats/formats.h"

#include "llama-model.h"

#include <cstdio>
#include <tuple>

static uint64_t get_bytes(const llama_memory_i & mem) {
    uint64_t res = 0;

    for (const auto & [buft, size] : mem.memory_breakdown()) {
        res += size;
    }

    return res;
}

LLAMA_API llama_kv_mixed_params llama_kv_mixed_default_params(void) {
    return {
        /*.struct_size =*/ sizeof(llama_kv_mixed_params),
        /*.n_hot       =*/ LLAMA_KV_MIXED_HOT_AUTO,
        /*.n_cold      =*/ 0,
        /*.n_group     =*/ 128,
        /*.n_sink      =*/ 4,
        /*.threshold   =*/ 0.8f,
        /*.type_cold_k =*/ LLAMA_KV_MIXED_TYPE_AUTO,
        /*.type_cold_v =*/ LLAMA_KV_MIXED_TYPE_AUTO,
        /*.attn        =*/ LLAMA_KV_MIXED_ATTN_AUTO,
        /*.mean        =*/ 1,
        /*.v_skip      =*/ 0.0f,
    };
}

LLAMA_API int32_t llama_kv_mixed_params_parse(const char * spec, llama_kv_mixed_params * params) {
    return guarded(-1, [&] {
        check(spec, "spec must not be NULL");
        check_size(params);

        const auto res = llama_kv_mixed_parse_spec(spec);
        if (!res) {
            return 1;
        }

        copy_out(*res, params);

        return 0;
    });
}

LLAMA_API int32_t llama_kv_mixed_params_format(const llama_kv_mixed_params * params, char * buf, size_t size) {
    return guarded(-1, [&] {
        const auto full = copy_in(params, llama_kv_mixed_default_params());
        llama_kv_mixed_validate(full);

        return snprintf(buf, size, "%s", llama_kv_mixed_format_spec(full).c_str());
    });
}

LLAMA_API int32_t llama_kv_mixed_set_default(const char * spec) {
    return guarded(-1, [&] {
        llama_kv_mixed_set_request(spec ? std::optional<std::string>(spec) : std::nullopt);

        return 0;
    });
}

LLAMA_API int32_t llama_kv_mixed_get_default(llama_kv_mixed_params * params) {
    return guarded(-1, [&] {
        check_size(params);

        const auto res = llama_kv_mixed_params_requested();
        if (!res) {
            return 0;
        }

        copy_out(*res, params);

        return 1;
    });
}

LLAMA_API int32_t llama_kv_mixed_get_preset(uint32_t i, llama_kv_mixed_preset * preset) {
    return guarded(-1, [&] {
        const auto * row = llama_kv_mixed_get_preset_row(i);
        check(row, "there is no such preset");

        copy_out({ sizeof(llama_kv_mixed_preset), row->name, row->what, row->spec }, preset);

        return 0;
    });
}

LLAMA_API llama_context * llama_kv_mixed_init_from_model(
        llama_model * model,
        llama_context_params cparams,
        const llama_kv_mixed_params * params) {
    std::optional<llama_kv_mixed_params> request;

    const bool ok = guarded(false, [&] {
        if (params) {
            request = copy_in(params, llama_kv_mixed_default_params());
            llama_kv_mixed_validate(*request);
        }
        return true;
    });
    if (!ok) {
        return nullptr;
    }

    llama_context * res;
    {
        llama_kv_mixed_params_scope scope(request);
        res = llama_init_from_model(model, cparams);
    }

    if (!res && llama_kv_mixed_error().empty()) {
        llama_kv_mixed_error() = "the context could not be created, the log says why";
    }

    return res;
}

LLAMA_API const char * llama_kv_mixed_last_error(void) {
    return llama_kv_mixed_error().c_str();
}

static const llama_kv_cache_mixed & get_mixed(llama_memory_t mem) {
    const auto * res = llama_kv_mixed_find(mem);
    check(res, "the memory is not a mixed KV cache, and has none in it");

    return *res;
}

LLAMA_API int32_t llama_kv_mixed_get_params(llama_memory_t mem, llama_kv_mixed_params * params) {
    return guarded(-1, [&] {
        llama_kv_mixed_params res = get_mixed(mem).get_params();
        res.struct_size = sizeof(res);

        copy_out(res, params);

        return 0;
    });
}

LLAMA_API int32_t llama_kv_mixed_get_stats(llama_memory_t mem, llama_kv_mixed_stats * stats) {
    return guarded(-1, [&] {
        const auto & kv = get_mixed(mem);

        auto res = kv.get_stats();
        res.bytes_rest = get_bytes(*mem) - get_bytes(kv);

        copy_out(res, stats);

        return 0;
    });
}

LLAMA_API int32_t llama_kv_mixed_get_seq_use(llama_memory_t mem, int32_t seq_id, uint32_t * n_hot, uint32_t * n_cold) {
    return guarded(-1, [&] {
        const auto & kv = get_mixed(mem);
        check(seq_id >= 0 && (uint32_t) seq_id < kv.get_n_seq_max(), "there is no such sequence");

        std::tie(*n_hot, *n_cold) = kv.get_seq_use(seq_id);

        return 0;
    });
}

LLAMA_API int32_t llama_kv_mixed_trace_start(llama_memory_t mem, uint32_t n_max, uint32_t flags) {
    auto * kv = llama_kv_mixed_find(mem);
    if (!kv) {
        return -1;
    }

    kv->trace_start(n_max, flags);

    return 0;
}

LLAMA_API uint32_t llama_kv_mixed_trace_read(llama_memory_t mem, llama_kv_mixed_event * events, uint32_t n_max, uint64_t * n_dropped) {
    auto * kv = llama_kv_mixed_find(mem);

    return kv ? kv->get_trace().read(events, n_max, n_dropped) : 0;
}

LLAMA_API uint32_t llama_kv_mixed_trace_read_layers(llama_memory_t mem, llama_kv_mixed_layer_error * errors, uint32_t n_max) {
    auto * kv = llama_kv_mixed_find(mem);

    return kv ? kv->get_trace().read(errors, n_max) : 0;
}

LLAMA_API int32_t llama_kv_mixed_get_format_info(uint32_t i, llama_kv_mixed_format_info * info) {
    return guarded(-1, [&] {
        const auto * format = llama_kv_mixed_get_format(i);
        check(format, "there is no such format");

        llama_kv_mixed_format_info res = {};

        res.struct_size = sizeof(res);
        res.name        = format->name;
        res.type        = format->type;
        res.n_block     = ggml_blck_size(format->type);
        res.size_block  = ggml_type_size(format->type);
        res.is_hot      = format->load != nullptr;
        res.is_direct   = format->dot && format->acc;
        res.is_fused    = format->quantize != nullptr;

        copy_out(res, info);

        return 0;
    });
}

LLAMA_API int32_t llama_kv_mixed_get_layer(const llama_model * model, uint32_t il, llama_kv_mixed_layer * layer) {
    const auto & hparams = model->hparams;

    llama_kv_mixed_layer res = {};

    res.struct_size = sizeof(res);

    if (il >= hparams.n_layer_all) {
        llama_kv_mixed_error() = "the model has no such layer";
        return -1;
    }

    // as in create_memory()
    bool is_attn = hparams.has_kv(il) && !hparams.is_recr(il);
    if (model->arch == LLM_ARCH_FALCON_H1) {
        is_attn = true; // next to the recurrent state
    }
    if (model->arch == LLM_ARCH_NEMOTRON_H || model->arch == LLM_ARCH_NEMOTRON_H_MOE) {
        is_attn = is_attn && hparams.n_ff(il) == 0;
    }

    if (is_attn) {
        res.n_head_kv     = hparams.n_head_kv(il);
        res.n_embd_head_k = hparams.n_embd_head_k(il);
        res.n_embd_head_v = hparams.is_mla() ? 0 : hparams.n_embd_head_v(il);
        res.is_swa        = hparams.is_swa(il);
    }

    return guarded(-1, [&] {
        copy_out(res, layer);

        return 0;
    });
}

LLAMA_API size_t llama_kv_mixed_sizeof(const char * name) {
    static const struct { const char * name; size_t size; } sizes[] = {
#define SIZE_OF(type) { #type, sizeof(type) }
        SIZE_OF(llama_batch),
        SIZE_OF(llama_chat_message),
        SIZE_OF(llama_context_params),
        SIZE_OF(llama_kv_mixed_attn_args),
        SIZE_OF(llama_kv_mixed_cell),
        SIZE_OF(llama_kv_mixed_event),
        SIZE_OF(llama_kv_mixed_format_info),
        SIZE_OF(llama_kv_mixed_layer),
        SIZE_OF(llama_kv_mixed_layer_error),
        SIZE_OF(llama_kv_mixed_params),
        SIZE_OF(llama_kv_mixed_preset),
        SIZE_OF(llama_kv_mixed_shape),
        SIZE_OF(llama_kv_mixed_stats),
        SIZE_OF(llama_kv_mixed_tier),
        SIZE_OF(llama_kv_mixed_ubatch),
        SIZE_OF(llama_logit_bias),
        SIZE_OF(llama_model_params),
        SIZE_OF(llama_model_quantize_params),
        SIZE_OF(llama_perf_context_data),
        SIZE_OF(llama_sampler_chain_params),
#undef SIZE_OF
    };

    for (const auto & s : sizes) {
        if (name && strcmp(s.name, name) == 0) {
            return s.size;
        }
    }

    return 0;
}
