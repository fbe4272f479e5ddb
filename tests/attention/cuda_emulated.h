// The kernels for CUDA, emulated on the CPU: launched as src/cuda/launch*.cu do it.
#pragma once

#define LLAMA_KV_MIXED_EMULATED

#include "cuda_emulation.h"

#include "cuda/args.h"
#include "cuda/attend.cuh"
#include "cuda/join.cuh"
#include "cuda/move.cuh"

template <int D, int NC, int FK, int FV, int FH>
static void launch(kv_mixed_attend & p, int n_stream) {
    const int n_group = p.n_head_kv*((p.n_col + NC - 1)/NC);

    // few blocks, so that warps have several tiles
    int tile[2];
    const int shared = kv_attend_shared<D, NC, FK, FV, FH>(p, tile);

    kv_split(p, 3, tile, KV_N_WARP);

    const int     n_split = p.seg[0].n_split + p.seg[1].n_split;
    const int64_t n_rows  = int64_t(n_stream)*p.n_head_kv*p.n_col;

    std::vector<float>  parts(n_rows*n_split*D, NAN);
    std::vector<float2> meta (n_rows*n_split, float2{ NAN, NAN });
    p.parts = parts.data();
    p.meta  = meta .data();

    emulation::launch(dim3(n_split, n_group, n_stream), 32*KV_N_WARP, shared, [&] { kv_attend<D, NC, FK, FV, FH>(p); });
    emulation::launch(dim3(n_rows), 32*KV_N_WARP_COMBINE, 0, [&] { kv_combine<D>(p); });
}

template <int D, int NC>
static void launch(kv_mixed_attend & p, int n_stream) {
    const int  k = p.seg[0].format_k, v = p.seg[0].format_v;
    const bool is_hot = p.seg[1].format_k == KV_F16 && p.seg[1].format_v == KV_F16;

    if (is_hot && k == KV_Q4_0 && v == KV_Q4_0) {
        launch<D, NC, KV_Q4_0, KV_Q4_0, KV_F16>(p, n_stream);
    } else if (is_hot && k == KV_IQ4_NL && v == KV_IQ4_NL) {
        launch<D, NC, KV_IQ4_NL, KV_IQ4_NL, KV_F16>(p, n_stream);
    } else if (is_hot && k == KV_Q8_0 && v == KV_Q8_0) {
        launch<D, NC, KV_Q8_0, KV_Q8_0, KV_F16>(p, n_stream);
    } else {
        launch<D, NC, KV_ANY, KV_ANY, KV_ANY>(p, n_stream);
    }
}

template <int D>
static void launch(kv_mixed_attend & p, int n_stream, int n_col) {
    if (n_col == 8) {
        launch<D, 8>(p, n_stream);
    } else {
        launch<D, 16>(p, n_stream);
    }
}

// n_col: query rows of a block, 8 or 16
static void emulate_attn(const llama_kv_mixed_attn_args & args, int n_col) {
    auto p = kv_get_attend(args);

    switch (args.n_embd_k) {
        case  64: launch< 64>(p, args.n_stream, n_col); break;
        case  96: launch< 96>(p, args.n_stream, n_col); break;
        case 128: launch<128>(p, args.n_stream, n_col); break;
        case 256: launch<256>(p, args.n_stream, n_col); break;
        default:  GGML_ABORT("no kernel for heads of that size");
    }
}

template <int D>
static void launch_join(const kv_mixed_join & p, int n_stream, bool is_cold) {
    if (is_cold) {
        emulation::launch(dim3(kv_join_n_block<D>(p.n_kv), p.n_head_kv, n_stream), 256, 0, [&] { kv_join_cold<D, KV_ANY>(p); });
    } else {
        emulation::launch(dim3((p.n_kv + 7)/8, p.n_head_kv, n_stream), 256, 0, [&] { kv_join_hot<D>(p); });
    }
}

static void emulate_join(const llama_kv_mixed_join_args & args, void * dst) {
    for (const bool is_cold : { true, false }) {
        const auto p = kv_get_join(args, (char *) dst, is_cold);

        switch (args.n_embd) {
            case  64: launch_join< 64>(p, args.n_stream, is_cold); break;
            case  96: launch_join< 96>(p, args.n_stream, is_cold); break;
            case 128: launch_join<128>(p, args.n_stream, is_cold); break;
            case 256: launch_join<256>(p, args.n_stream, is_cold); break;
            default:  GGML_ABORT("no kernel for heads of that size");
        }
    }
}

template <int N, int F>
static void launch_move(const kv_mixed_move & p) {
    emulation::launch(dim3(p.n, kv_move_n_block<N>(p.n_embd)), 32*KV_MOVE_WARPS, 0, [&] { kv_move<N, F>(p); });
}

template <int N>
static void launch_move(const kv_mixed_move & p, bool is_mean) {
    if (is_mean) {
        emulation::launch(dim3(p.n_to, p.n_embd/(32*N)), 32*KV_MOVE_WARPS, 0, [&] { kv_mean<N>(p); });
        return;
    }
    switch (p.format_to) {
        case KV_Q4_0:   launch_move<N, KV_Q4_0>  (p); break;
        case KV_Q5_0:   launch_move<N, KV_Q5_0>  (p); break;
        case KV_Q8_0:   launch_move<N, KV_Q8_0>  (p); break;
        case KV_IQ4_NL: launch_move<N, KV_IQ4_NL>(p); break;
    }
}

static void emulate_move(const kv_mixed_move & p, bool is_mean) {
    switch (kv_get_move_blocks(p)) {
        case 1: launch_move<1>(p, is_mean); break;
        case 2: launch_move<2>(p, is_mean); break;
        case 4: launch_move<4>(p, is_mean); break;
        case 8: launch_move<8>(p, is_mean); break;
    }
}

// a node that kv_get_reason() has nothing against
static void emulate_node(ggml_tensor * node) {
    llama_kv_mixed_op op;
    llama_kv_mixed_op_read(node, op);

    llama_kv_mixed_attn_args attn;
    llama_kv_mixed_join_args join;
    llama_kv_mixed_move_args move;

    if (llama_kv_mixed_op_read_attn(node, attn)) {
        emulate_attn(attn, attn.n_head/attn.n_head_kv*attn.n_tokens <= 8 ? 8 : 16);
    } else if (llama_kv_mixed_op_read_join(node, join)) {
        emulate_join(join, node->data);
    } else if (llama_kv_mixed_op_read_move(node, move)) {
        emulate_move(kv_get_move(move), op.kind == LLAMA_KV_MIXED_OP_MEAN);
    }
}
