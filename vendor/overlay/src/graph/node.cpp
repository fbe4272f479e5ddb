#include "graph/node.h"

#include <algorithm>
#include <climits>

ggml_tensor * llama_kv_mixed_attn_nodes::build(
        ggml_context * ctx, const llama_kv_mixed_node_inputs & inputs, const llama_kv_mixed_op & op, int n_threads) {
    ggml_tensor * q = inputs.q;
    if (q->nb[0] != sizeof(float)) {
        q = ggml_cont(ctx, q);
    }

    GGML_ASSERT(q->type == GGML_TYPE_F32 && q->ne[3] == 1);

    ggml_tensor * args[LLAMA_KV_MIXED_N_SRC] = { q, inputs.k_hot, inputs.v_hot, inputs.mask, inputs.k_cold, inputs.v_cold, inputs.k_mean, inputs.sinks };

    node & n = nodes.emplace_back();

    n.isa    = llama_kv_mixed_get_isa();
    n.n_slot = std::max(n_threads, 1);

    // the plan says how large the node is, and is made of what stands in it
    ggml_tensor described = {};
    described.op   = GGML_OP_CUSTOM;
    described.type = GGML_TYPE_F32;
    for (int i = 0; i < 4; ++i) {
        described.ne[i] = i == 0 ? inputs.v_hot->ne[0]*ggml_nrows(q) : 1;
    }
    std::copy(std::begin(args), std::end(args), described.src);
    llama_kv_mixed_op_write(&described, op);

    llama_kv_mixed_attn_args a;
    GGML_ASSERT(llama_kv_mixed_op_read_attn(&described, a));

    n.plan = llama_kv_mixed_attn_make_plan(a);

    // output, partial results of the tasks, scratch memory of the threads
    const int64_t n_out     = a.n_embd_v*a.n_head*a.n_tokens*a.n_stream;
    const int64_t n_partial = n.plan.n_partials();

    ggml_tensor * res = ggml_custom_4d(ctx, GGML_TYPE_F32, n_out + n_partial + n.n_slot*(int64_t) n.plan.n_scratch(), 1, 1, 1,
        args, LLAMA_KV_MIXED_N_SRC, compute, GGML_N_TASKS_MAX, &n);
    llama_kv_mixed_op_write(res, op);

    if (n_partial > 0) {
        ggml_tensor * parts[2] = { res, inputs.sinks };
        res = ggml_custom_4d(ctx, GGML_TYPE_F32, a.n_embd_v*a.n_head, a.n_tokens*a.n_stream, 1, 1,
            parts, 2, merge, GGML_N_TASKS_MAX, &n);
        }

    // Without a merge the view cuts the output off what lies behind it. With one it is there for ggml's allocator, which
    // takes a graph for the one that it planned memory for when both have as many nodes: so they must differ by the merge.

    return ggml_view_2d(ctx, res, a.n_embd_v*a.n_head, a.n_tokens*a.n_stream, a.n_embd_v*a.n_head*sizeof(float), 0);
}

void llama_kv_mixed_attn_nodes::reset() {
    for (node & n : nodes) {
        n.progress.reset();
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

    llama_kv_mixed_attn_args a;
    GGML_ASSERT(llama_kv_mixed_op_read_attn(dst, a));

    float * partial = a.dst + a.n_embd_v*a.n_head*a.n_tokens*a.n_stream;
    float * scratch = partial + n.plan.n_partials() + ith*n.plan.n_scratch();

    llama_kv_mixed_attn_run(*n.isa, a, n.plan, n.progress, partial, scratch, std::min(nth, n.n_slot));
}

void llama_kv_mixed_attn_nodes::merge(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const node & n = *(const node *) userdata;

    // the merge is over what the first node has left
    const ggml_tensor * parts = dst->src[0];

    llama_kv_mixed_attn_args a;
    GGML_ASSERT(llama_kv_mixed_op_read_attn(parts, a));
    a.dst = (float *) dst->data;

    const int64_t n_rows = a.n_head*a.n_tokens*a.n_stream;

    n.isa->attn_merge(a, n.plan, (const float *) parts->data + a.n_embd_v*n_rows, n_rows*ith/nth, n_rows*(ith + 1)/nth);
}
