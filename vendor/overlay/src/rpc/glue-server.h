#pragma once

//
// part of ggml-rpc.cpp, which includes this behind its server
//

#include "rpc/protocol.h"
#include "rpc/serve.h"

// a tensor as it came
bool rpc_server::kv_mixed_check(const rpc_tensor & tensor) const {
    if (tensor.type >= GGML_TYPE_COUNT || tensor.op >= GGML_OP_COUNT) {
        GGML_LOG_ERROR("RPC server: there is no such type or operation\n");
        return false;
    }

    ggml_tensor t = {};
    t.type   = (ggml_type) tensor.type;
    t.op     = (ggml_op) tensor.op;
    t.data   = (void *) tensor.data;
    t.buffer = (ggml_backend_buffer_t) tensor.buffer;
    for (int i = 0; i < GGML_MAX_DIMS; ++i) {
        t.ne[i] = tensor.ne[i];
        t.nb[i] = tensor.nb[i];
    }
    if (buffers.find(t.buffer) == buffers.end()) {
        t.buffer = nullptr;
    }

    const bool res = llama_kv_mixed_rpc_check_tensor(&t);
    if (!res) {
        GGML_LOG_ERROR("RPC server: a tensor's size is impossible, or goes beyond its buffer\n");
    }
    return res;
}

// answers LLAMA_KV_MIXED_RPC_CMD_REASON; false: the client is not to be served any longer
bool rpc_server::kv_mixed_reason(socket_ptr sock) {
    rpc_msg_get_alloc_size_req request;
    if (!recv_msg(sock, &request, sizeof(request)) || request.device >= backends.size()) {
        return false;
    }

    ggml_context_ptr ctx{ ggml_init({ ggml_tensor_overhead()*(1 + GGML_MAX_SRC), nullptr, true }) };

    ggml_tensor * node = deserialize_tensor(ctx.get(), &request.tensor);
    for (int i = 0; node && i < GGML_MAX_SRC; ++i) {
        if (request.srcs[i].id != 0) {
            node->src[i] = deserialize_tensor(ctx.get(), &request.srcs[i]);
            node = node->src[i] ? node : nullptr;
        }
    }
    if (!node) {
        return false;
    }

    char response[LLAMA_KV_MIXED_RPC_REASON_SIZE];
    llama_kv_mixed_rpc_reason(backends[request.device], node, response);

    return send_msg(sock, response, sizeof(response));
}
