#include "graph/compose.h"

#include "cache/context.h"
#include "cpu/host.h"
#include "formats/formats.h"

#include "llama-graph.h"
#include "llama-hparams.h"
#include "llama-impl.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

// the matrices that rotate what meets cold rows
class llm_graph_input_kv_mixed_rot : public llm_graph_input_i {
public:
    llm_graph_input_kv_mixed_rot(const llama_kv_cache * cold) : cold(cold) {}
    virtual ~llm_graph_input_kv_mixed_rot() = default;

    void set_input(const llama_ubatch * ubatch) override {
        GGML_UNUSED(ubatch);

        if (k_rot && k_rot->buffer) {
            cold->set_input_k_rot(k_rot);
        }
        if (v_rot && v_rot->buffer) {
            cold->set_input_v_rot(v_rot);
        }
    }

    bool can_reuse(const llm_graph_params & params) override {
        GGML_UNUSED(params);

        // they are always the same
        return true;
    }

    ggml_tensor * k_rot = nullptr; // F32 [n_rot, n_rot], null: rows are not rotated
    ggml_tensor * v_rot = nullptr;

    const llama_kv_cache * const cold;
};

// the input of this graph, which all its layers share
static const llm_graph_input_kv_mixed_rot * get_input_rot(const llm_graph_context & gctx, const llama_kv_cache * cold) {
    for (const auto & inp : gctx.res->inputs) {
        const auto * res = dynamic_cast<const llm_graph_input_kv_mixed_rot *>(inp.get());
        if (res && res->cold == cold) {
            return res;
        }
    }

    auto inp = std::make_unique<llm_graph_input_kv_mixed_rot>(cold);

    inp->k_rot = cold->build_input_k_rot(gctx.ctx0);
    inp->v_rot = cold->build_input_v_rot(gctx.ctx0);

    return (const llm_graph_input_kv_mixed_rot *) gctx.res->add_input(std::move(inp));
}

// cold rows in the type of the hot ones, with their means if there are any, followed by the hot ones, which are rotated by rot
// if there is one
static ggml_tensor * build_join(ggml_context * ctx, ggml_tensor * cold, ggml_tensor * means, ggml_tensor * hot, ggml_tensor * rot) {
    if (rot) {
        ggml_tensor * cur = llama_mul_mat_hadamard(ctx, ggml_cast(ctx, hot, GGML_TYPE_F32), rot);

        hot = hot->type == GGML_TYPE_F32 ? cur : ggml_cast(ctx, cur, hot->type);
    }

    // backends expand quantised rows to f32 only
    if (ggml_is_quantized(cold->type)) {
        cold = ggml_cast(ctx, cold, GGML_TYPE_F32);
    }

    if (means) {
        ggml_tensor * flat = ggml_reshape_3d(ctx, cold, cold->ne[0]*cold->ne[1], cold->ne[2], cold->ne[3]);

        flat = llama_kv_mixed_add_means(ctx, flat, means);
        cold = ggml_reshape_4d(ctx, flat, cold->ne[0], cold->ne[1], cold->ne[2], cold->ne[3]);
    }

    if (cold->type != hot->type) {
        cold = ggml_cast(ctx, cold, hot->type);
    }

    return ggml_concat(ctx, cold, hot, 2);
}

// the rows of K or V in one layer
struct layer_rows {
    ggml_type type_cold;
    ggml_type type_hot;

    int64_t n_embd; // of a head
    int64_t n_head;
    int64_t n_rot;

    bool has_mean;
};

// the first operation that a device does not have of those that put rows into cold and those of build_join()
// empty: it has them all
static std::string find_missing(ggml_backend_dev_t dev, const layer_rows & r) {
    ggml_context_ptr ctx_ptr(ggml_init({ /*.mem_size =*/ 64*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true }));
    ggml_context * ctx = ctx_ptr.get();

    const int64_t n_cells = 2*LLAMA_KV_MIXED_PAGE;

    ggml_tensor * cold = ggml_new_tensor_4d(ctx, r.type_cold, r.n_embd, r.n_head, n_cells, 1);
    ggml_tensor * hot  = ggml_new_tensor_4d(ctx, r.type_hot,  r.n_embd, r.n_head, n_cells, 1);
    ggml_tensor * rot  = r.n_rot > 0 ? ggml_new_tensor_2d(ctx, GGML_TYPE_F32, r.n_rot, r.n_rot) : nullptr;

    ggml_tensor * mean = r.has_mean ? ggml_new_tensor_3d(ctx, GGML_TYPE_F16, r.n_embd*r.n_head, 2, 1) : nullptr;

    ggml_set_rows(ctx, ggml_reshape_2d(ctx, cold, r.n_embd*r.n_head, n_cells),
        ggml_new_tensor_2d(ctx, GGML_TYPE_F32, r.n_embd*r.n_head, 1), ggml_new_tensor_1d(ctx, GGML_TYPE_I64, 1));

    build_join(ctx, cold, mean, hot, rot);

    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        if (t->op != GGML_OP_NONE && !ggml_backend_dev_supports_op(dev, t)) {
            return format("%s of %s rows to %s", ggml_op_desc(t), ggml_type_name(t->src[0]->type), ggml_type_name(t->type));
        }
    }

    return "";
}

// the formats of cold rows that a device can work with, by name
static std::string find_possible(ggml_backend_dev_t dev, layer_rows k, layer_rows v) {
    std::string res;

    for (size_t i = 0; const auto * cold = llama_kv_mixed_get_format(i); ++i) {
        bool possible = true;

        for (layer_rows * r : { &k, &v }) {
            r->type_cold = cold->type;
            r->has_mean  = r->has_mean && ggml_is_quantized(cold->type);
            r->n_rot     = ggml_is_quantized(cold->type) && r->n_embd % 64 == 0 ? 64 : 0; // where upstream rotates

            possible = possible && r->n_embd % ggml_blck_size(cold->type) == 0 && find_missing(dev, *r).empty();
        }

        if (possible) {
            res += (res.empty() ? "" : ", ") + std::string(cold->name);
        }
    }

    return res;
}

std::string llama_kv_mixed_compose_reason(const llama_kv_mixed_attn_layer & layer) {
    if (!layer.kv.has_cold()) {
        return ""; // then it is upstream's own attention
    }

    const ggml_tensor * k_hot  = layer.kv.get_hot ()->get_k_storage(layer.il);
    const ggml_tensor * k_cold = layer.kv.get_cold()->get_k_storage(layer.il);
    const ggml_tensor * v_hot  = llama_kv_cache_mixed::get_v_storage(*layer.kv.get_hot (), layer.il);
    const ggml_tensor * v_cold = llama_kv_cache_mixed::get_v_storage(*layer.kv.get_cold(), layer.il);

    ggml_backend_dev_t dev = llama_kv_mixed_get_dev(k_cold);

    const int64_t n_head_kv = layer.hparams.n_head_kv(layer.il);

    const layer_rows k = { k_cold->type, k_hot->type, layer.hparams.n_embd_head_k(layer.il), n_head_kv, layer.kv.get_n_rot_k(), layer.kv.get_means() != nullptr };
    const layer_rows v = { v_cold->type, v_hot->type, layer.hparams.n_embd_head_v(layer.il), n_head_kv, layer.kv.get_n_rot_v(), false };

    std::string missing = find_missing(dev, k);
    if (missing.empty()) {
        missing = find_missing(dev, v);
    }
    if (missing.empty()) {
        return "";
    }

    const std::string possible = find_possible(dev, k, v);

    return format("%s has no %s, %s%s", ggml_backend_dev_name(dev), missing.c_str(),
        possible.empty() ? "keep the cache in the CPU's memory (offload_kqv=false)" : "take one of these cold types: ", possible.c_str());
}

ggml_tensor * llama_kv_mixed_compose_build(const llm_graph_context & gctx, const llama_kv_cache_mixed_context & mctx, const llama_kv_mixed_attn_inputs & in) {
    return llama_kv_mixed_compose_build(gctx, mctx, in, build_join);
}

ggml_tensor * llama_kv_mixed_compose_build(
        const llm_graph_context & gctx, const llama_kv_cache_mixed_context & mctx, const llama_kv_mixed_attn_inputs & in, const llama_kv_mixed_join_fn & join) {
    ggml_context * ctx = gctx.ctx0;

    ggml_tensor * q = in.q;
    ggml_tensor * k = in.k;
    ggml_tensor * v = in.v;

    ggml_tensor * v_rot = nullptr;

    if (mctx.get_n_cold() > 0) {
        const auto * rot = get_input_rot(gctx, mctx.get_kv()->get_cold());

        v_rot = rot->v_rot;

        // hot rows and queries are rotated rather than cold rows back: there are more of those
        if (rot->k_rot) {
            q = llama_mul_mat_hadamard(ctx, q, rot->k_rot);
        }

        k = join(ctx, mctx.get_k_cold(ctx, in.il), mctx.get_k_mean(ctx, in.il), k, rot->k_rot);
        v = join(ctx, mctx.get_v_cold(ctx, in.il), nullptr, v, rot->v_rot);
    }

    ggml_tensor * cur = gctx.build_attn_mha(q, k, v, in.kq_b, in.kq_mask, in.sinks, nullptr, 0, in.kq_scale, in.il);

    if (v_rot) {
        cur = llama_mul_mat_hadamard(ctx, cur, v_rot);
        ggml_build_forward_expand(gctx.gf, cur);
    }

    return cur;
}
