#pragma once

//
// part of ggml-rpc.cpp, which includes this within its client: what has to know that file's own structures
//

#include "ops/op.h"
#include "rpc/lost.h"
#include "rpc/protocol.h"

#include <set>

//
// the client: what a server computes of ours
//

// what the server's answer depends on: not on how many cells, tokens and streams there are
static std::string llama_kv_mixed_rpc_get_key(uint32_t device, const ggml_tensor * node, const llama_kv_mixed_op & op) {
    std::string res((const char *) &op, sizeof(op));
    res += std::to_string(device);
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        const ggml_tensor * src = node->src[i];
        if (!src) {
            res += " -";
            continue;
        }

        const bool is_attn = op.kind == LLAMA_KV_MIXED_OP_ATTN;
        const bool is_mask = is_attn && i == LLAMA_KV_MIXED_SRC_MASK;
        const bool is_mean = is_attn ? i == LLAMA_KV_MIXED_SRC_K_MEAN : i == LLAMA_KV_MIXED_SRC_JOIN_MEAN;

        res += " " + std::to_string(src->type);
        if (!is_mask && !is_mean) {
            res += "," + std::to_string(src->ne[0]) + "," + std::to_string(src->ne[1]);
        }
    }
    return res;
}

// asks a server of ours, once for each key; null: it computes the node
static const char * llama_kv_mixed_rpc_ask(
        const std::shared_ptr<rpc_dispatcher> & dispatcher, uint32_t device, const ggml_tensor * node, const std::string & key) {
    static std::mutex mutex;
    std::lock_guard<std::mutex> lock(mutex);

    // as long as this process lives
    static std::set<std::string> sentences;

    auto & reasons = dispatcher->reasons;

    auto it = reasons.find(key);
    if (it == reasons.end()) {
        auto request = std::make_shared<rpc_msg_get_alloc_size_req>();
        request->device = device;
        request->tensor = serialize_tensor(node);
        for (int i = 0; i < GGML_MAX_SRC; ++i) {
            request->srcs[i] = serialize_tensor(node->src[i]);
        }

        char response[LLAMA_KV_MIXED_RPC_REASON_SIZE] = {};
        dispatcher->send((rpc_cmd) LLAMA_KV_MIXED_RPC_CMD_REASON, request, sizeof(*request), response, sizeof(response));
        if (dispatcher->lost) {
            return "its server is gone";
        }
        response[sizeof(response) - 1] = '\0';
        it = reasons.emplace(key, response[0] ? sentences.insert(response).first->c_str() : nullptr).first;
    }
    return it->second;
}

// null: the server of this device computes the node
static const char * llama_kv_mixed_rpc_op_reason(ggml_backend_dev_t dev, const ggml_tensor * node) {
    const auto & ctx = *(const ggml_backend_rpc_device_context *) dev->context;

    llama_kv_mixed_op op;
    if (!llama_kv_mixed_op_read(node, op) || op.is_host != 0) {
        return "it is a function of this process";
    }
    for (int i = 0; i < GGML_MAX_SRC*GGML_MAX_DIMS; ++i) {
        const ggml_tensor * src = node->src[i/GGML_MAX_DIMS];
        if (src && (src->ne[i % GGML_MAX_DIMS] > UINT32_MAX || src->nb[i % GGML_MAX_DIMS] > UINT32_MAX)) {
            return "the protocol has no room for tensors with strides of 4 GiB and more";
        }
    }

    const auto dispatcher = get_dispatcher(ctx.endpoint);
    if (dispatcher->mark != LLAMA_KV_MIXED_RPC_MARK) {
        return "its server is not one of this build, or of another version";
    }

    return llama_kv_mixed_rpc_ask(dispatcher, ctx.device, node, llama_kv_mixed_rpc_get_key(ctx.device, node, op));
}

// Whether a server's device has a copy of rows, which are quantised before or after it: not all devices have all of them. What that of
// another build has is not known: what many do not have is not sent there.
static bool llama_kv_mixed_rpc_copies(ggml_backend_dev_t dev, const ggml_tensor * op) {
    const auto & ctx = *(const ggml_backend_rpc_device_context *) dev->context;

    const ggml_type from = op->src[0]->type, to = op->type;
    if (!ggml_is_quantized(from) && !ggml_is_quantized(to)) {
        return true;
    }

    const auto dispatcher = get_dispatcher(ctx.endpoint);
    if (dispatcher->mark != LLAMA_KV_MIXED_RPC_MARK) {
        return from != GGML_TYPE_IQ4_NL && to != GGML_TYPE_IQ4_NL;
    }

    return !llama_kv_mixed_rpc_ask(dispatcher, ctx.device, op, std::to_string(ctx.device) + " " + ggml_op_name(op->op) + " " + ggml_type_name(from) + " " + ggml_type_name(to));
}

// operations that are functions of a process, and some that a server may not have
static bool llama_kv_mixed_rpc_supports(ggml_backend_dev_t dev, const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_MAP_CUSTOM1:
        case GGML_OP_MAP_CUSTOM2:
        case GGML_OP_MAP_CUSTOM3:
            return false;
        case GGML_OP_CUSTOM:
            return !llama_kv_mixed_rpc_op_reason(dev, op);
        case GGML_OP_CPY:
        case GGML_OP_SET_ROWS:
            return llama_kv_mixed_rpc_copies(dev, op);
        default:
            return true;
    }
}

static void * llama_kv_mixed_rpc_get_proc_address(const char * name) {
    if (strcmp(name, LLAMA_KV_MIXED_OP_REASON) == 0) {
        return (void *) llama_kv_mixed_rpc_op_reason;
    }
    if (strcmp(name, LLAMA_KV_MIXED_RPC_N_LOST) == 0) {
        return (void *) llama_kv_mixed_rpc_n_lost;
    }
    return nullptr;
}

// whether a connection was lost that a graph's tensors have their memory by
static bool llama_kv_mixed_rpc_is_lost(ggml_cgraph * graph) {
    const auto is_lost = [](const ggml_tensor * t) {
        return t && t->buffer && ggml_backend_buffer_is_rpc(t->buffer) &&
            ((const ggml_backend_rpc_buffer_context *) t->buffer->context)->dispatcher->lost;
    };

    for (int i = 0; i < graph->n_nodes; ++i) {
        const ggml_tensor * node = graph->nodes[i];
        if (is_lost(node) || std::any_of(std::begin(node->src), std::end(node->src), is_lost)) {
            return true;
        }
    }
    return false;
}
