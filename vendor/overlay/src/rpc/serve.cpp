#include "rpc/serve.h"

#include "rpc/execute.h"

#include "formats/formats.h"
#include "ops/op.h"

#include "ggml-impl.h"

#include <algorithm>
#include <cstdio>

static int n_threads_cpu = 1;

void llama_kv_mixed_rpc_set_n_threads(int n_threads) {
    n_threads_cpu = std::max(n_threads, 1);
}

//
// tensors
//

bool llama_kv_mixed_rpc_check_tensor(const ggml_tensor * t) {
    if (t->op < 0 || t->op >= GGML_OP_COUNT || t->type < 0 || t->type >= GGML_TYPE_COUNT) {
        return false;
    }

    const int64_t n_block = ggml_blck_size(t->type);
    if (n_block == 0 || t->ne[0] % n_block != 0) {
        return false;
    }

    // what ggml computes of sizes must not be too large for 64 bits; those that came have 32 themselves
    double n_elements = 1.0, n_bytes = ggml_type_size(t->type);
    for (int i = 0; i < GGML_MAX_DIMS; ++i) {
        if (t->ne[i] < 0) {
            return false;
        }
        n_elements *= t->ne[i];
        n_bytes    += (double) t->ne[i]*t->nb[i];
    }

    static const double max = 1ll << 60;
    if (n_elements*ggml_type_size(t->type) > max || n_bytes > max) {
        return false;
    }
    if (!t->buffer) {
        return true;
    }

    const uint64_t start = (uint64_t) ggml_backend_buffer_get_base(t->buffer);
    const uint64_t size  = ggml_backend_buffer_get_size(t->buffer);
    const uint64_t data  = (uint64_t) t->data;

    return data >= start && data - start <= size && ggml_nbytes(t) <= size - (data - start);
}

// whether it is in this process's memory, with numbers where numbers of its type may be
static bool is_on_host(const ggml_tensor * t) {
    const size_t alignment = t->type == GGML_TYPE_I64 ? 8 : t->type == GGML_TYPE_F32 || t->type == GGML_TYPE_I32 ? 4 : 2;

    bool res = t->data && t->buffer && ggml_backend_buffer_is_host(t->buffer) && (uintptr_t) t->data % alignment == 0;
    for (int i = 1; i < GGML_MAX_DIMS; ++i) {
        res = res && t->nb[i] % alignment == 0;
    }
    return res;
}

//
// nodes
//

// what a node of ours computes
struct node_args {
    llama_kv_mixed_attn_args attn;
    llama_kv_mixed_move_args move; // or means

    bool is_attn;
};

static const char * const reason_fit = "the operation's tensors do not fit together";

static const char * get_attn_reason(const ggml_tensor * node, llama_kv_mixed_attn_args & args) {
    if (!llama_kv_mixed_op_read_attn(node, args)) {
        return reason_fit;
    }
    if (!llama_kv_mixed_attn_supports(args.n_embd_k, args.n_embd_v, args.n_head/args.n_head_kv)) {
        return "the heads are too large, or too many share a KV head";
    }
    if (node->ne[0] != args.n_embd_v*args.n_head || node->ne[1] != args.n_tokens*args.n_stream || !ggml_is_contiguous(node) ||
            ggml_nrows(node) != node->ne[1]) {
        return "the operation's result has another shape";
    }
    for (const auto & seg : args.seg) {
        if (!llama_kv_mixed_find_format(seg.type_k) || !llama_kv_mixed_find_format(seg.type_v)) {
            return "the rows have a type that is none of a KV cache";
        }
    }
    if (args.k_mean && args.n_embd_k % LLAMA_KV_MIXED_BLOCK != 0) {
        return "there are no means of heads of this size";
    }

    return nullptr;
}

static const char * get_move_reason(const ggml_tensor * node, bool is_mean, llama_kv_mixed_move_args & args) {
    if (!llama_kv_mixed_op_read_move(node, args)) {
        return reason_fit;
    }

    const auto * from = llama_kv_mixed_find_format(args.from->type);
    const auto * to   = llama_kv_mixed_find_format(args.to->type);
    if (!from || !to) {
        return "the rows have a type that is none of a KV cache";
    }

    // (a mean is no row: what is asked is whether the kernels know the rows that it is of)
    return llama_kv_mixed_can_quantize(*from, is_mean ? *llama_kv_mixed_find_format(GGML_TYPE_Q8_0) : *to, args.n_embd, args.n_rot) ? nullptr :
        "the kernels do not move rows of this size or type";
}

// why the CPU's kernels do not compute a node of ours
static const char * get_cpu_reason(const ggml_tensor * node, node_args & args) {
    llama_kv_mixed_op op;
    if (!llama_kv_mixed_op_read(node, op)) {
        return "it does not know this operation";
    }
    if (op.is_host != 0) {
        return "the operation is one for the process that made it";
    }

    args.is_attn = op.kind == LLAMA_KV_MIXED_OP_ATTN;

    switch (op.kind) {
        case LLAMA_KV_MIXED_OP_ATTN: return get_attn_reason(node, args.attn);
        case LLAMA_KV_MIXED_OP_MEAN: return get_move_reason(node, true,  args.move);
        case LLAMA_KV_MIXED_OP_MOVE: return get_move_reason(node, false, args.move);
        default:                     return "a CPU has no need of this operation";
    }
}

typedef const char * (*reason_t)(ggml_backend_dev_t dev, const ggml_tensor * node);

static const char * get_reason(ggml_backend_t backend, const ggml_tensor * node, node_args & args) {
    ggml_backend_dev_t dev = ggml_backend_get_device(backend);

    if (ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU) {
        return get_cpu_reason(node, args);
    }

    // which rows a move reads and writes stands in tensors that can not be looked at here
    llama_kv_mixed_op op;
    if (!llama_kv_mixed_op_read(node, op) || (op.kind != LLAMA_KV_MIXED_OP_ATTN && op.kind != LLAMA_KV_MIXED_OP_JOIN)) {
        return "a server does not move rows for its clients by these operations";
    }

    const auto reason = (reason_t) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), LLAMA_KV_MIXED_OP_REASON);

    return reason ? reason(dev, node) : "its device does not know this operation";
}

void llama_kv_mixed_rpc_reason(ggml_backend_t backend, const ggml_tensor * node, char (&res)[LLAMA_KV_MIXED_RPC_REASON_SIZE]) {
    const char * reason = nullptr;

    if (node->op == GGML_OP_CPY || node->op == GGML_OP_SET_ROWS) {
        const bool is_whole = node->src[0] && node->src[1] && (node->op == GGML_OP_CPY || node->src[2]);
        reason = is_whole && ggml_backend_supports_op(backend, node) ? nullptr : "its device does not have this operation";
    } else {
        node_args args;
        reason = get_reason(backend, node, args);
    }

    memset(res, 0, sizeof(res));
    snprintf(res, sizeof(res), "%s", reason ? reason : "");
}

//
// graphs
//

// why a node is not computed
static const char * prepare_node(ggml_backend_t backend, ggml_tensor * node, llama_kv_mixed_rpc_graph & graph) {
    if (ggml_op_is_empty(node->op)) {
        return nullptr;
    }

    // (a tensor of a server that is gone, for one, has no memory)
    bool is_whole = ggml_is_empty(node) || node->data;
    for (const ggml_tensor * src : node->src) {
        is_whole = is_whole && (!src || ggml_is_empty(src) || src->data);
    }
    if (!is_whole) {
        return "a tensor has no memory";
    }

    switch (node->op) {
        case GGML_OP_MAP_CUSTOM1:
        case GGML_OP_MAP_CUSTOM2:
        case GGML_OP_MAP_CUSTOM3:
            return "it is a function of another process";
        case GGML_OP_CUSTOM:
            break;
        default:
            return nullptr;
    }

    // the function's address
    memset(node->op_params, 0, sizeof(ggml_custom_op_params));

    node_args args;
    if (const char * reason = get_reason(backend, node, args)) {
        return reason;
    }
    if (ggml_backend_dev_type(ggml_backend_get_device(backend)) != GGML_BACKEND_DEVICE_TYPE_CPU) {
        return nullptr; // it has code of its own for that
    }

    bool on_host = is_on_host(node);
    for (const ggml_tensor * src : node->src) {
        on_host = on_host && (!src || is_on_host(src));
    }
    if (!on_host) {
        return "a tensor is not in this process's memory";
    }

    const bool is_added = args.is_attn ? graph.add_attn(node, args.attn) : graph.add_move(node, args.move);

    return is_added ? nullptr : "there is not enough memory for it";
}

std::shared_ptr<llama_kv_mixed_rpc_graph> llama_kv_mixed_rpc_prepare(ggml_backend_t backend, ggml_cgraph * graph) {
    auto res = std::make_shared<llama_kv_mixed_rpc_graph>(n_threads_cpu);

    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        ggml_tensor * node = ggml_graph_node(graph, i);

        const char * reason = node ? prepare_node(backend, node, *res) : "there is none";
        if (reason) {
            GGML_LOG_ERROR("RPC server: the client's graph is refused, node %d (%s): %s\n", i, node ? ggml_op_name(node->op) : "", reason);
            return nullptr;
        }
    }

    return res;
}
