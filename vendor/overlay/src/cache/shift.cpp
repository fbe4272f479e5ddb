// K rows are rotated to the new positions of their tokens (K-shift)

#include "cache/kv-cache-mixed.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

class llm_graph_input_k_shift_mixed : public llm_graph_input_i {
public:
    llm_graph_input_k_shift_mixed(const llama_kv_cache * kv) : kv(kv) {}
    virtual ~llm_graph_input_k_shift_mixed() = default;

    void set_input(const llama_ubatch * ubatch) override {
        GGML_UNUSED(ubatch);

        if (k_shift->buffer) {
            kv->set_input_k_shift(k_shift);
        }
        if (k_rot && k_rot->buffer) {
            kv->set_input_k_rot(k_rot);
        }
    }

    ggml_tensor * k_shift; // I32 [kv_size*n_stream]
    ggml_tensor * k_rot;   // F32 [n_rot, n_rot], null when the rows are not rotated

    const llama_kv_cache * kv;
};

ggml_cgraph * llama_kv_cache_mixed::build_graph_shift(llm_graph_result * res, llama_context * lctx) const {
    auto * ctx = res->get_ctx();
    auto * gf  = res->get_gf();

    const auto & cparams = lctx->get_cparams();

    for (const llama_kv_cache * kv : { kv_hot, kv_cold.get() }) {
        auto inp = std::make_unique<llm_graph_input_k_shift_mixed>(kv);

        const int64_t n_cells = (int64_t) kv->get_size()*kv->get_n_stream();

        inp->k_shift = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_cells);
        ggml_set_input(inp->k_shift);

        inp->k_rot = kv->build_input_k_rot(ctx);

        for (const auto & layer : kv->layers) {
            const uint32_t il = layer.il;

            if (!hparams.has_rope(il)) {
                continue;
            }

            const int64_t n_head_kv   = hparams.n_head_kv(il);
            const int64_t n_embd_head = hparams.n_embd_head_k(il);
            const int64_t n_rot       = hparams.n_rot(il);
            const int64_t n_nope      = hparams.n_lora_kv > 0 ? n_embd_head - n_rot : 0;

            ggml_tensor * k = ggml_view_3d(ctx, layer.k, n_embd_head, n_head_kv, n_cells,
                    ggml_row_size(layer.k->type, n_embd_head),
                    ggml_row_size(layer.k->type, n_embd_head*n_head_kv), 0);

            ggml_tensor * cur = ggml_cast(ctx, k, GGML_TYPE_F32);

            if (inp->k_rot) {
                cur = llama_mul_mat_hadamard(ctx, cur, inp->k_rot);
            }

            // the part of each head that carries the position
            ggml_tensor * rope = ggml_view_3d(ctx, cur, n_rot, n_head_kv, n_cells, cur->nb[1], cur->nb[2], n_nope*cur->nb[0]);

            rope = ggml_rope_ext_inplace(ctx, rope, inp->k_shift, model.get_rope_factors(cparams, il),
                    n_rot, hparams.rope_type, cparams.n_ctx_orig_yarn,
                    model.get_rope_freq_base(cparams, il), model.get_rope_freq_scale(cparams, il),
                    cparams.yarn_ext_factor, cparams.yarn_attn_factor, cparams.yarn_beta_fast, cparams.yarn_beta_slow);

            // what follows reads the rows that this has changed in place
            ggml_build_forward_expand(gf, rope);

            if (inp->k_rot) {
                cur = llama_mul_mat_hadamard(ctx, cur, inp->k_rot);
            }

            ggml_build_forward_expand(gf, ggml_cpy(ctx, cur, k));
        }

        res->add_input(std::move(inp));
    }

    return gf;
}

// A scheduler over the devices of another one, with backends of its own: those of a context heed its abort callback, and a
// shift that was cut short could neither be finished nor undone.
struct shift_sched {
    std::vector<ggml_backend_ptr> backends;

    ggml_backend_sched_ptr sched; // null: out of memory

    shift_sched(ggml_backend_sched_t other, int n_threads, size_t graph_size) {
        std::vector<ggml_backend_t>             ptrs;
        std::vector<ggml_backend_buffer_type_t> bufts;

        for (int i = 0; i < ggml_backend_sched_get_n_backends(other); ++i) {
            ggml_backend_t backend = ggml_backend_sched_get_backend(other, i);

            ggml_backend_dev_t dev = ggml_backend_get_device(backend);

            backends.emplace_back(ggml_backend_dev_init(dev, nullptr));
            if (!backends.back()) {
                return;
            }

            ptrs .push_back(backends.back().get());
            bufts.push_back(ggml_backend_sched_get_buffer_type(other, backend));

            auto * set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
                    ggml_backend_dev_backend_reg(dev), "ggml_backend_set_n_threads");
            if (set_n_threads) {
                set_n_threads(ptrs.back(), n_threads);
            }
        }

        sched.reset(ggml_backend_sched_new(ptrs.data(), bufts.data(), ptrs.size(), graph_size, false, false));
    }
};

bool llama_kv_cache_mixed::update(llama_context * lctx) {
    if (!get_can_shift()) {
        LLAMA_LOG_ERROR("%s: this model does not support moving tokens to other positions\n", __func__);
        return false;
    }

    if (hparams.rope_type != LLAMA_ROPE_TYPE_NONE) {
        // the rows may still be on their way
        ggml_backend_sched_synchronize(lctx->get_sched());

        auto * res = lctx->get_gf_res_reserve();
        res->reset();

        auto * gf = build_graph_shift(res, lctx);

        const shift_sched own(lctx->get_sched(), lctx->n_threads(), ggml_graph_size(gf));

        if (!own.sched || !ggml_backend_sched_alloc_graph(own.sched.get(), gf)) {
            LLAMA_LOG_ERROR("%s: failed to allocate compute graph for K-shift\n", __func__);
            return false;
        }

        res->set_inputs(nullptr);

        if (ggml_backend_sched_graph_compute(own.sched.get(), gf) != GGML_STATUS_SUCCESS) {
            LLAMA_LOG_ERROR("%s: failed to compute K-shift\n", __func__);
            return false;
        }
    }

    for (llama_kv_cache * kv : { kv_hot, kv_cold.get() }) {
        for (auto & cells : kv->v_cells) {
            cells.reset_shift();
        }
    }

    return true;
}
