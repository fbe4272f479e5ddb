// What a mixed cache is made of.

#include "cache/kv-cache-mixed.h"

#include "cache/huge-pages.h"
#include "cache/params.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

// the cells of the two caches, after what the context asks for has been taken into account
static llama_kv_mixed_params resolve_params(llama_kv_mixed_params params, uint32_t n_ctx_seq, uint32_t n_pad) {
    llama_kv_mixed_validate(params);

    // more hot cells than the context has tokens would never be used
    params.n_hot = std::min(params.n_hot, n_ctx_seq);

    // none where all fits in hot: there is nothing to quantise
    if (params.n_cold == 0) {
        params.n_cold = (n_ctx_seq - params.n_hot + n_pad - 1)/n_pad*n_pad;
    }

    if (params.n_hot % n_pad != 0) {
        throw std::runtime_error(format("hot=%u is not a multiple of n_pad=%u", params.n_hot, n_pad));
    }
    if (params.n_cold % n_pad != 0) {
        throw std::runtime_error(format("cold_size=%u is not a multiple of n_pad=%u", params.n_cold, n_pad));
    }

    if ((uint64_t) params.n_hot + params.n_cold < n_ctx_seq) {
        throw std::runtime_error(format("hot=%u and cold_size=%u hold fewer tokens than the context of %u",
            params.n_hot, params.n_cold, n_ctx_seq));
    }

    return params;
}

static std::string type_label(ggml_type type) {
    std::string res = type == GGML_TYPE_F16 ? "fp16" : ggml_type_name(type);
    std::transform(res.begin(), res.end(), res.begin(), [](unsigned char c) { return std::toupper(c); });
    return res;
}

static std::string type_label(ggml_type type_k, ggml_type type_v) {
    return type_k == type_v ? type_label(type_k) : type_label(type_k) + "/" + type_label(type_v);
}

llama_kv_cache_mixed::setup llama_kv_cache_mixed::make_setup(
            const llama_hparams & hparams,
                      ggml_type   type_k,
                      ggml_type   type_v,
    const llama_kv_mixed_params & params_req,
                       uint32_t   n_ctx_seq,
                       uint32_t   n_pad,
          const layer_filter_cb & filter) {
    const auto params = llama_kv_mixed_with_auto(resolve_params(params_req, n_ctx_seq, n_pad), GGML_TYPE_IQ4_NL);

    for (const ggml_type type : { type_k, type_v }) {
        if (type != GGML_TYPE_F16 && type != GGML_TYPE_BF16 && type != GGML_TYPE_F32) {
            throw std::runtime_error(format("the hot type must be f16, bf16 or f32, not %s: "
                "the types of the context are those of hot, cold=%s is how older tokens are stored",
                ggml_type_name(type), ggml_type_name(type)));
        }
    }

    bool any = false;

    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (!hparams.has_kv(il) || (filter && !filter(il))) {
            continue;
        }

        any = true;

        const struct { const char * name; ggml_type type; uint32_t n_embd_head; } sides[] = {
            { "cold_k", (ggml_type) params.type_cold_k, hparams.n_embd_head_k(il) },
            { "cold_v", (ggml_type) params.type_cold_v, hparams.n_embd_head_v(il) },
        };

        for (const auto & side : sides) {
            if (side.n_embd_head % ggml_blck_size(side.type) != 0) {
                throw std::runtime_error(format("%s=%s stores blocks of %d values, and the head size %u of layer %u is not a multiple of that",
                    side.name, ggml_type_name(side.type), (int) ggml_blck_size(side.type), side.n_embd_head, il));
            }
        }
    }

    if (!any) {
        throw std::runtime_error("no layer of this model attends to the whole context, there is nothing to mix");
    }

    LLAMA_LOG_INFO("%s: creating hot KV cache (%s), size = %u cells\n", "llama_kv_cache_mixed", type_label(type_k, type_v).c_str(), params.n_hot);

    return { params };
}

llama_kv_cache_mixed::llama_kv_cache_mixed(
              const llama_model & model,
            const llama_hparams & hparams,
                      ggml_type   type_k,
                      ggml_type   type_v,
    const llama_kv_mixed_params & params,
                           bool   offload,
                           bool   unified,
                       uint32_t   n_ctx_seq,
                       uint32_t   n_seq_max,
                       uint32_t   n_pad,
          const layer_filter_cb & filter,
           const layer_reuse_cb & reuse,
                     bool   rotate) :
    llama_kv_cache_mixed(
            model, hparams, type_k, type_v,
            make_setup(hparams, type_k, type_v, params, n_ctx_seq, n_pad, filter),
            offload, unified, n_ctx_seq, n_seq_max, n_pad, filter, reuse, rotate) {
}

// note: rows of V are never transposed, quantised ones can not be
llama_kv_cache_mixed::llama_kv_cache_mixed(
              const llama_model & model,
            const llama_hparams & hparams,
                      ggml_type   type_k,
                      ggml_type   type_v,
                    const setup & su,
                           bool   offload,
                           bool   unified,
                       uint32_t   n_ctx_seq,
                       uint32_t   n_seq_max,
                       uint32_t   n_pad,
          const layer_filter_cb & filter,
           const layer_reuse_cb & reuse,
                     bool   rotate) :
    llama_kv_cache(
            model, hparams, type_k, type_v, /*v_trans*/ false, offload, unified, su.params.n_hot, n_seq_max, n_pad,
            0, LLAMA_SWA_TYPE_NONE, nullptr, filter, reuse, nullptr, "hot_"),
    params(su.params),
    policy({ params.n_hot, params.n_group, params.n_sink, params.threshold }),
    n_ctx_seq(n_ctx_seq) {

    const ggml_type type_cold_k = (ggml_type) params.type_cold_k;
    const ggml_type type_cold_v = (ggml_type) params.type_cold_v;

    if (has_cold()) {
        LLAMA_LOG_INFO("%s: creating cold KV cache (%s), size = %u cells\n", __func__,
                ggml_is_quantized(type_cold_k) ? "quantized" : type_label(type_cold_k, type_cold_v).c_str(), params.n_cold);
    } else {
        LLAMA_LOG_INFO("%s: no cold KV cache: the %u tokens of the context fit in hot\n", __func__, n_ctx_seq);
    }

    // (memory of no size can not be allocated: without cells there are no layers either)
    const layer_filter_cb filter_none = [](int32_t) { return false; };

    kv_cold = std::make_unique<llama_kv_cache>(
            model, hparams, type_cold_k, type_cold_v, /*v_trans*/ false, offload, unified, params.n_cold, n_seq_max, n_pad,
            0, LLAMA_SWA_TYPE_NONE, nullptr, has_cold() ? filter : filter_none, reuse, nullptr, "cold_");

    for (const auto & [ctx, buf] : kv_cold->ctxs_bufs) {
        llama_kv_mixed_use_huge_pages(buf.get());
    }

    if (!rotate) {
        kv_cold->attn_rot_k = false;
        kv_cold->attn_rot_v = false;
    }

    // the matrices that upstream's graphs would get
    {
        ggml_context_ptr ctx(ggml_init({ /*.mem_size =*/ 2*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true }));

        const ggml_tensor * rot_k = kv_cold->build_input_k_rot(ctx.get());
        const ggml_tensor * rot_v = kv_cold->build_input_v_rot(ctx.get());

        n_rot_k = rot_k ? rot_k->ne[0] : 0;
        n_rot_v = rot_v ? rot_v->ne[0] : 0;
    }

    const auto get_rot = [this](int64_t n_rot) {
        return n_rot > 0 ? kv_cold->attn_rot_hadamard.at(n_rot).data() : nullptr;
    };

    for (const auto & hot : kv_hot->layers) {
        for (const ggml_tensor * t : { hot.k, hot.v }) {
            bytes_plain += (uint64_t) ggml_row_size(t->type, t->ne[0])*n_ctx_seq*t->ne[2];
        }
    }

    if (has_cold() && params.mean && ggml_is_quantized(type_cold_k)) {
        std::vector<ggml_tensor *> k;
        for (const auto & layer : kv_cold->layers) {
            k.push_back(layer.k);
        }
        means = std::make_unique<llama_kv_mixed_means>(*kv_cold, k, hparams.no_alloc);
    }

    for (size_t i = 0; i < kv_cold->layers.size(); ++i) {
        const auto & hot  = kv_hot ->layers[i];
        const auto & cold = kv_cold->layers[i];

        pairs.push_back({ hot.k, cold.k, n_rot_k, get_rot(n_rot_k), means ? means->get(i) : nullptr });
        pairs.push_back({ hot.v, cold.v, n_rot_v, get_rot(n_rot_v), nullptr });
    }

    // without allocated tensors there is nothing to move (the model is only being measured)
    if (has_cold() && !hparams.no_alloc) {
        mover = std::make_unique<llama_kv_mixed_mover>(pairs, policy.n_move_max());
    }

    trace = std::make_unique<llama_kv_mixed_trace>(type_label(type_k, type_v), type_label(type_cold_k, type_cold_v));
}
