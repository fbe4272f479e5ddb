#include "kv-mixed.cuh"

#include "args.h"
#include "launch.cuh"

static int get_shared(const llama_kv_mixed_attn_args & args) {
    const kv_mixed_attend p = kv_get_attend(args);

    switch (args.n_embd_k) {
        case  64: return kv_get_shared< 64>(p);
        case  96: return kv_get_shared< 96>(p);
        case 128: return kv_get_shared<128>(p);
        default:  return kv_get_shared<256>(p);
    }
}

const char * ggml_cuda_kv_mixed_reason(int device, const ggml_tensor * node) {
    if (const char * reason = kv_get_reason(node)) {
        return reason;
    }
    if (!ampere_mma_available(ggml_cuda_info().devices[device].cc)) {
        return "the kernels are for NVIDIA GPUs of compute capability 8.0 and above";
    }

    llama_kv_mixed_attn_args args;
    if (llama_kv_mixed_op_read_attn(node, args) && (size_t) get_shared(args) > ggml_cuda_info().devices[device].smpbo) {
        return "its rows are too large for this device's shared memory";
    }
    return nullptr;
}

static void compute_attn(ggml_backend_cuda_context & ctx, ggml_tensor * node) {
    llama_kv_mixed_attn_args args;
    GGML_ASSERT(llama_kv_mixed_op_read_attn(node, args));

    kv_mixed_attend p = kv_get_attend(args);

    switch (args.n_embd_k) {
        case  64: kv_launch_attend< 64>(ctx, p, args.n_stream); break;
        case  96: kv_launch_attend< 96>(ctx, p, args.n_stream); break;
        case 128: kv_launch_attend<128>(ctx, p, args.n_stream); break;
        case 256: kv_launch_attend<256>(ctx, p, args.n_stream); break;
        default:  GGML_ABORT("no kernel for heads of %d values", (int) args.n_embd_k);
    }
}

static void launch_join(ggml_backend_cuda_context & ctx, const llama_kv_mixed_join_args & args, const kv_mixed_join & p, bool is_cold) {
    switch (args.n_embd) {
        case  64: kv_launch_join< 64>(ctx, p, args.n_stream, is_cold); break;
        case  96: kv_launch_join< 96>(ctx, p, args.n_stream, is_cold); break;
        case 128: kv_launch_join<128>(ctx, p, args.n_stream, is_cold); break;
        case 256: kv_launch_join<256>(ctx, p, args.n_stream, is_cold); break;
        default:  GGML_ABORT("no kernel for heads of %d values", (int) args.n_embd);
    }
}

static void compute_join(ggml_backend_cuda_context & ctx, ggml_tensor * node) {
    llama_kv_mixed_join_args args;
    GGML_ASSERT(llama_kv_mixed_op_read_join(node, args));

    for (const bool is_cold : { true, false }) {
        launch_join(ctx, args, kv_get_join(args, (char *) node->data, is_cold), is_cold);
    }
}

static void compute_move(ggml_backend_cuda_context & ctx, ggml_tensor * node, bool is_mean) {
    llama_kv_mixed_move_args args;
    GGML_ASSERT(llama_kv_mixed_op_read_move(node, args));

    const kv_mixed_move p = kv_get_move(args);

    kv_launch_move(ctx, p, kv_get_move_blocks(p), is_mean);
}

bool ggml_cuda_kv_mixed(ggml_backend_cuda_context & ctx, ggml_tensor * node) {
    if (ggml_cuda_kv_mixed_reason(ctx.device, node)) {
        return false;
    }

    ggml_cuda_set_device(ctx.device);

    llama_kv_mixed_op op;
    llama_kv_mixed_op_read(node, op);

    switch (op.kind) {
        case LLAMA_KV_MIXED_OP_ATTN: compute_attn(ctx, node);        break;
        case LLAMA_KV_MIXED_OP_JOIN: compute_join(ctx, node);        break;
        case LLAMA_KV_MIXED_OP_MEAN: compute_move(ctx, node, true);  break;
        case LLAMA_KV_MIXED_OP_MOVE: compute_move(ctx, node, false); break;
    }

    return true;
}
