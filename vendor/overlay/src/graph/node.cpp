#include "graph/node.h"

#include <algorithm>
#include <climits>

// sources of the first node
enum { SRC_Q, SRC_K_HOT, SRC_V_HOT, SRC_MASK, SRC_OTHER };

static llama_kv_mixed_attn_segment get_segment(const ggml_tensor * k, const ggml_tensor * v) {
    llama_kv_mixed_attn_segment res = {};
    res.k      = k->data;
    res.v      = v->data;
    res.type_k = k->type;
    res.type_v = v->type;
    res.n_kv   = k->ne[2];
    for (int i = 0; i < 3; ++i) {
        res.nb_k[i] = k->nb[i + 1];
        res.nb_v[i] = v->nb[i + 1];
    }
    return res;
}

ggml_tensor * llama_kv_mixed_attn_nodes::build(
        ggml_context * ctx, const llama_kv_mixed_node_inputs & inputs, float scale, float max_bias, float logit_softcap, int n_threads) {
    ggml_tensor * q = inputs.q;
    if (q->nb[0] != sizeof(float)) {
        q = ggml_cont(ctx, q);
    }

    GGML_ASSERT(q->type == GGML_TYPE_F32 && q->ne[3] == 1);

    const int64_t n_stream = inputs.k_hot->ne[3];

    node & n = nodes.emplace_back();

    n.isa       = llama_kv_mixed_get_isa();
    n.has_cold  = inputs.k_cold != nullptr;
    n.has_mean  = inputs.k_mean != nullptr;
    n.has_sinks = inputs.sinks  != nullptr;
    n.n_slot    = std::max(n_threads, 1);

    auto & a = n.args;
    a = {};
    a.struct_size   = sizeof(a);
    a.n_embd_k      = inputs.k_hot->ne[0];
    a.n_embd_v      = inputs.v_hot->ne[0];
    a.n_head        = q->ne[1];
    a.n_head_kv     = inputs.k_hot->ne[1];
    a.n_tokens      = q->ne[2]/n_stream;
    a.n_stream      = n_stream;
    a.scale         = scale;
    a.max_bias      = max_bias;
    a.logit_softcap = logit_softcap;
    a.mask_f16      = inputs.mask->type == GGML_TYPE_F16;
    a.n_rot_k       = inputs.n_rot_k;
    a.n_rot_v       = inputs.n_rot_v;
    a.seg[1]        = get_segment(inputs.k_hot, inputs.v_hot);
    if (n.has_cold) {
        a.seg[0] = get_segment(inputs.k_cold, inputs.v_cold);
    } else {
        a.seg[0].type_k = a.seg[1].type_k;
        a.seg[0].type_v = a.seg[1].type_v;
    }

    n.plan = llama_kv_mixed_attn_make_plan(a);

    ggml_tensor * args[SRC_OTHER + 4] = { q, inputs.k_hot, inputs.v_hot, inputs.mask };
    int n_args = SRC_OTHER;
    if (n.has_cold) {
        args[n_args++] = inputs.k_cold;
        args[n_args++] = inputs.v_cold;
    }
    if (n.has_mean) {
        args[n_args++] = inputs.k_mean;
    }
    if (n.has_sinks) {
        args[n_args++] = inputs.sinks;
    }

    // output, partial results of the tasks, scratch memory of the threads
    const int64_t n_out     = a.n_embd_v*a.n_head*a.n_tokens*n_stream;
    const int64_t n_partial = n.plan.n_partials();

    ggml_tensor * res = ggml_custom_4d(ctx, GGML_TYPE_F32, n_out + n_partial + n.n_slot*(int64_t) n.plan.n_scratch(), 1, 1, 1,
        args, n_args, compute, GGML_N_TASKS_MAX, &n);

    if (n_partial > 0) {
        ggml_tensor * parts[2] = { res, inputs.sinks };
        res = ggml_custom_4d(ctx, GGML_TYPE_F32, a.n_embd_v*a.n_head, a.n_tokens*n_stream, 1, 1,
            parts, n.has_sinks ? 2 : 1, merge, GGML_N_TASKS_MAX, &n);
    }

    // Without a merge the view cuts the output off what lies behind it. With one it is there for ggml's allocator, which
    // takes a graph for the one that it planned memory for when both have as many nodes: so they must differ by the merge.

    return ggml_view_2d(ctx, res, a.n_embd_v*a.n_head, a.n_tokens*n_stream, a.n_embd_v*a.n_head*sizeof(float), 0);
}

void llama_kv_mixed_attn_nodes::reset() {
    for (node & n : nodes) {
        n.next = 0;
    }
}

int llama_kv_mixed_attn_nodes::get_n_threads() const {
    int res = INT_MAX;
    for (const node & n : nodes) {
        res = std::min(res, n.n_slot);
    }
    return res;
}

void llama_kv_mixed_attn_nodes::compute(ggml_tensor * dst, int ith, int nth, void * userdata) {
    node & n = *(node *) userdata;
    if (ith >= n.n_slot) {
        return;
    }

    llama_kv_mixed_attn_args a = n.args;

    const ggml_tensor * q = dst->src[SRC_Q];
    a.q       = (const float *) q->data;
    a.nb_q[0] = q->nb[1];
    a.nb_q[1] = q->nb[2];
    a.nb_q[2] = q->nb[2]*a.n_tokens;

    a.seg[1] = get_segment(dst->src[SRC_K_HOT], dst->src[SRC_V_HOT]);
    if (n.has_cold) {
        a.seg[0] = get_segment(dst->src[SRC_OTHER], dst->src[SRC_OTHER + 1]);
    }

    const ggml_tensor * mask = dst->src[SRC_MASK];
    a.mask       = mask->data;
    a.nb_mask[0] = mask->nb[1];
    a.nb_mask[1] = mask->nb[3];

    if (n.has_mean) {
        const ggml_tensor * mean = dst->src[SRC_OTHER + 2*n.has_cold];
        a.k_mean       = mean->data;
        a.nb_k_mean[0] = a.n_embd_k*mean->nb[0];
        a.nb_k_mean[1] = mean->nb[1];
        a.nb_k_mean[2] = mean->nb[2];
    }

    if (n.has_sinks) {
        a.sinks = (const float *) dst->src[SRC_OTHER + 2*n.has_cold + n.has_mean]->data;
    }

    a.dst = (float *) dst->data;

    float * partial = a.dst + a.n_embd_v*a.n_head*a.n_tokens*a.n_stream;
    float * scratch = partial + n.plan.n_partials() + ith*n.plan.n_scratch();

    llama_kv_mixed_attn_run(*n.isa, a, n.plan, n.next, partial, scratch, std::min(nth, n.n_slot));
}

void llama_kv_mixed_attn_nodes::merge(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const node & n = *(const node *) userdata;

    llama_kv_mixed_attn_args a = n.args;
    if (n.has_sinks) {
        a.sinks = (const float *) dst->src[1]->data;
    }
    a.dst = (float *) dst->data;

    const int64_t n_rows = a.n_head*a.n_tokens*a.n_stream;

    n.isa->attn_merge(a, n.plan, (const float *) dst->src[0]->data + a.n_embd_v*n_rows, n_rows*ith/nth, n_rows*(ith + 1)/nth);
}
