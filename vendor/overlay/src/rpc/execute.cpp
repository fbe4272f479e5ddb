#include "rpc/execute.h"

#include "formats/formats.h"

#include "ggml-impl.h"

#include <algorithm>
#include <new>
#include <thread>

// scratch memory that a node may ask for, in bytes: far above what any model needs
static const double max_scratch = 1ll << 30;

static void set_function(ggml_tensor * node, ggml_custom_op_t function, void * userdata) {
    const ggml_custom_op_params params = { function, GGML_N_TASKS_MAX, userdata };
    memcpy(node->op_params, &params, sizeof(params));
}

//
// attention
//

bool llama_kv_mixed_rpc_graph::add_attn(ggml_tensor * node, const llama_kv_mixed_attn_args & args) {
    entry & e = entries.emplace_back();

    e.graph = this;
    e.plan  = llama_kv_mixed_attn_make_plan(args);

    const auto & plan = e.plan;

    // (as numbers of 53 bits: their products may be too large for 64)
    if (((double) plan.n_task*plan.n_hpt*plan.n_partial + (double) plan.n_scratch()*n_threads)*sizeof(float) > max_scratch) {
        return false;
    }
    try {
        partial.resize(std::max(partial.size(), plan.n_partials()));
        scratch.resize(std::max(scratch.size(), plan.n_scratch()*n_threads));
    } catch (const std::bad_alloc &) {
        return false;
    }

    set_function(node, attend, &e);

    return true;
}

void llama_kv_mixed_rpc_graph::attend(ggml_tensor * dst, int ith, int nth, void * userdata) {
    entry & e = *(entry *) userdata;

    auto & graph = *e.graph;
    if (ith >= graph.n_threads) {
        return;
    }
    nth = std::min(nth, graph.n_threads);

    llama_kv_mixed_attn_args args;
    GGML_ASSERT(llama_kv_mixed_op_read_attn(dst, args));

    const auto & isa = *llama_kv_mixed_get_isa();

    llama_kv_mixed_attn_run(isa, args, e.plan, e.progress, graph.partial.data(), graph.scratch.data() + ith*e.plan.n_scratch(), nth);

    if (e.plan.n_partial > 0) {
        // the merge is over what all tasks have left
        e.done.fetch_add(1);
        while (e.done.load() < nth) {
            std::this_thread::yield();
        }

        const int64_t n_rows = args.n_head*args.n_tokens*args.n_stream;

        isa.attn_merge(args, e.plan, graph.partial.data(), n_rows*ith/nth, n_rows*(ith + 1)/nth);
    }

    // the last one leaves the node as it was
    if (e.left.fetch_add(1) + 1 == nth) {
        e.progress.reset();
        e.done = 0;
        e.left = 0;
    }
}

//
// rows that become cold
//
// Which rows and pages they are is known when the node is computed, and looked at then: what is beyond its tensor is left out.
//

bool llama_kv_mixed_rpc_graph::add_move(ggml_tensor * node, const llama_kv_mixed_move_args & args) {
    llama_kv_mixed_op op;
    GGML_ASSERT(llama_kv_mixed_op_read(node, op));

    const bool is_mean = op.kind == LLAMA_KV_MIXED_OP_MEAN;

    try {
        rows.resize(std::max<size_t>(rows.size(), is_mean ? args.n*n_threads : 0));
    } catch (const std::bad_alloc &) {
        return false;
    }
    set_function(node, is_mean ? make_means : move, this);

    return true;
}

static bool is_row(int64_t i, const ggml_tensor * t) {
    return i >= 0 && i < t->ne[1];
}

void llama_kv_mixed_rpc_graph::move(ggml_tensor * dst, int ith, int nth, void * userdata) {
    GGML_UNUSED(userdata);

    llama_kv_mixed_move_args args;
    GGML_ASSERT(llama_kv_mixed_op_read_move(dst, args));

    const auto & isa = *llama_kv_mixed_get_isa();

    const auto * format_from = llama_kv_mixed_find_format(args.from->type);
    const auto * format_to   = llama_kv_mixed_find_format(args.to->type);

    for (int64_t i = args.n*ith/nth; i < args.n*(ith + 1)/nth; ++i) {
        const int64_t from = args.row_from[i];
        const int64_t to   = args.row_to[i];
        const int64_t page = args.mean ? args.page[i] : 0;

        if (!is_row(from, args.from) || !is_row(to, args.to) || (args.mean && !is_row(page, args.mean))) {
            continue;
        }

        isa.quantize_row(*format_from, (const char *) args.from->data + from*args.from->nb[1], *format_to, (char *) args.to->data + to*args.to->nb[1],
            args.n_embd, args.n_rot, args.mean ? (const char *) args.mean->data + page*args.mean->nb[1] : nullptr);
    }
}

void llama_kv_mixed_rpc_graph::make_means(ggml_tensor * dst, int ith, int nth, void * userdata) {
    auto & graph = *(llama_kv_mixed_rpc_graph *) userdata;
    if (ith >= graph.n_threads) {
        return;
    }
    nth = std::min(nth, graph.n_threads);

    llama_kv_mixed_move_args args;
    GGML_ASSERT(llama_kv_mixed_op_read_move(dst, args));

    int32_t * rows = graph.rows.data() + ith*args.n;

    for (int64_t i = args.n_to*ith/nth; i < args.n_to*(ith + 1)/nth; ++i) {
        const int64_t page = args.row_to[i];

        int64_t n_rows = 0;
        for (int64_t r = 0; r < args.n; ++r) {
            if (args.page[r] == page && is_row(args.row_from[r], args.from)) {
                rows[n_rows++] = args.row_from[r];
            }
        }

        if (is_row(page, args.to) && n_rows > 0) {
            llama_kv_mixed_get_isa()->mean_rows(*llama_kv_mixed_find_format(args.from->type), args.from->data, args.from->nb[1], rows, n_rows,
                args.n_embd, args.n_rot, (char *) args.to->data + page*args.to->nb[1]);
        }
    }
}
