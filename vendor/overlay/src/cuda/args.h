#pragma once

#include "params.cuh"

#include "ops/op.h"

#include <cmath>
#include <initializer_list>

//
// nodes as the kernels take them
//

// -1: rows that the kernels do not know
inline int kv_get_format(int type) {
    switch (type) {
        case GGML_TYPE_F16:    return KV_F16;
        case GGML_TYPE_BF16:   return KV_BF16;
        case GGML_TYPE_Q4_0:   return KV_Q4_0;
        case GGML_TYPE_Q4_1:   return KV_Q4_1;
        case GGML_TYPE_Q5_0:   return KV_Q5_0;
        case GGML_TYPE_Q5_1:   return KV_Q5_1;
        case GGML_TYPE_Q8_0:   return KV_Q8_0;
        case GGML_TYPE_IQ4_NL: return KV_IQ4_NL;
        default:               return -1;
    }
}

// the largest power of 2 up to 16 that all are multiples of
inline int kv_get_alignment(const void * data, std::initializer_list<int64_t> sizes) {
    int64_t all = (int64_t) data | 16;
    for (const int64_t size : sizes) {
        all |= size;
    }
    return all & -all;
}

inline kv_mixed_segment kv_get_segment(const llama_kv_mixed_attn_segment & seg, int64_t n_embd, int64_t first) {
    kv_mixed_segment res = {};
    res.k        = (const char *) seg.k;
    res.v        = (const char *) seg.v;
    res.format_k = kv_get_format(seg.type_k);
    res.format_v = kv_get_format(seg.type_v);
    res.n_kv     = seg.n_kv;
    res.first    = first;
    for (int i = 0; i < 3; ++i) {
        res.nb_k[i] = seg.nb_k[i];
        res.nb_v[i] = seg.nb_v[i];
    }
    res.copy_k = kv_get_alignment(seg.k, { res.nb_k[0], res.nb_k[1], res.nb_k[2], (int64_t) ggml_row_size((ggml_type) seg.type_k, n_embd) });
    res.copy_v = kv_get_alignment(seg.v, { res.nb_v[0], res.nb_v[1], res.nb_v[2], (int64_t) ggml_row_size((ggml_type) seg.type_v, n_embd) });
    return res;
}

// all but the splits and the memory for parts
inline kv_mixed_attend kv_get_attend(const llama_kv_mixed_attn_args & args) {
    kv_mixed_attend p = {};
    p.seg[0] = kv_get_segment(args.seg[0], args.n_embd_k, 0);
    p.seg[1] = kv_get_segment(args.seg[1], args.n_embd_k, args.seg[0].n_kv);

    p.q    = (const char *) args.q;
    p.mask = (const char *) args.mask;
    p.mean = (const char *) args.k_mean;
    for (int i = 0; i < 3; ++i) {
        p.nb_q   [i] = args.nb_q     [i];
        p.nb_mean[i] = args.nb_k_mean[i];
    }
    p.nb_mask[0] = args.nb_mask[0];
    p.nb_mask[1] = args.nb_mask[1];
    p.sinks      = args.sinks;

    p.scale    = args.scale;
    p.softcap  = args.logit_softcap;
    p.max_bias = args.max_bias;

    // as ggml_flash_attn_ext() has it
    p.n_head_log2   = 1 << (int) floorf(log2f(args.n_head));
    p.slope_base[0] = powf(2.0f, -args.max_bias       /p.n_head_log2);
    p.slope_base[1] = powf(2.0f, -args.max_bias/2.0f/p.n_head_log2);

    p.n_rot[0]  = args.n_rot_k;
    p.n_rot[1]  = args.n_rot_v;
    p.n_head    = args.n_head;
    p.n_head_kv = args.n_head_kv;
    p.n_gqa     = args.n_head/args.n_head_kv;
    p.n_tokens  = args.n_tokens;
    p.n_col     = p.n_gqa*p.n_tokens;
    p.dst       = args.dst;

    return p;
}

inline kv_mixed_join kv_get_join(const llama_kv_mixed_join_args & args, char * dst, bool is_cold) {
    const ggml_tensor * src = is_cold ? args.cold : args.hot;

    kv_mixed_join p = {};
    p.src       = (const char *) src->data;
    p.dst       = dst;
    p.format    = kv_get_format(src->type);
    p.n_kv      = src->ne[2];
    p.first     = is_cold ? 0 : args.n_cold;
    p.n_dst     = args.n_cold + args.n_hot;
    p.n_head_kv = args.n_head_kv;
    p.n_rot     = args.n_rot;
    for (int i = 0; i < 3; ++i) {
        p.nb[i] = src->nb[i + 1];
    }
    if (is_cold && args.mean) {
        p.mean       = (const char *) args.mean->data;
        p.nb_mean[0] = args.n_embd*sizeof(ggml_fp16_t);
        p.nb_mean[1] = args.mean->nb[1];
        p.nb_mean[2] = args.mean->nb[2];
    }

    return p;
}

inline kv_mixed_move kv_get_move(const llama_kv_mixed_move_args & args) {
    kv_mixed_move p = {};
    p.from        = (const char *) args.from->data;
    p.to          = (char *) args.to->data;
    p.mean        = args.mean ? (const char *) args.mean->data : nullptr;
    p.row_from    = args.row_from;
    p.row_to      = args.row_to;
    p.page        = args.page;
    p.format_from = kv_get_format(args.from->type);
    p.format_to   = kv_get_format(args.to->type);
    p.n           = args.n;
    p.n_to        = args.n_to;
    p.n_embd      = args.n_embd;
    p.n_rot       = args.n_rot;

    return p;
}

inline bool kv_can_store(int format) {
    return format == KV_Q4_0 || format == KV_Q5_0 || format == KV_Q8_0 || format == KV_IQ4_NL;
}

// blocks of 32 values that a warp of the kernels works on; 0: there is none for such rows
inline int kv_get_move_blocks(const kv_mixed_move & p) {
    const int n = p.n_rot <= 32 ? 1 : p.n_rot/32;

    return p.n_embd % 32 == 0 && n <= 8 ? n : 0;
}

//
// why there is no kernel for a node, null: there is one
//

inline bool kv_is_size(int64_t n_embd) {
    return n_embd == 64 || n_embd == 96 || n_embd == 128 || n_embd == 256;
}

inline bool kv_is_hot(const ggml_tensor * t) {
    return (t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_BF16) && t->nb[1] % 16 == 0 && t->nb[2] % 16 == 0 && t->nb[3] % 16 == 0;
}

inline bool kv_is_mean(const ggml_tensor * t) {
    return !t || (t->nb[1] % 16 == 0 && t->nb[2] % 16 == 0);
}

inline const char * kv_get_reason_attn(const ggml_tensor * node) {
    llama_kv_mixed_attn_args args;
    if (!llama_kv_mixed_op_read_attn(node, args)) {
        return "the tensors do not fit together";
    }
    if (node->ne[0] != args.n_embd_v*args.n_head || node->ne[1] != args.n_tokens*args.n_stream || !ggml_is_contiguous(node)) {
        return "the node is one for the CPU";
    }
    if (args.n_embd_k != args.n_embd_v || !kv_is_size(args.n_embd_k)) {
        return "there is no kernel for the size of its heads";
    }
    if (!kv_is_hot(node->src[LLAMA_KV_MIXED_SRC_K_HOT]) || !kv_is_hot(node->src[LLAMA_KV_MIXED_SRC_V_HOT])) {
        return "there is no kernel for hot rows of that type";
    }
    if (kv_get_format(args.seg[0].type_k) < 0 || kv_get_format(args.seg[0].type_v) < 0) {
        return "there is no kernel for cold rows of that type";
    }
    if (!args.mask_f16) {
        return "there is no kernel for a mask that is not F16";
    }
    if (!kv_is_mean(node->src[LLAMA_KV_MIXED_SRC_K_MEAN])) {
        return "the means are not aligned";
    }
    return nullptr;
}

inline const char * kv_get_reason_join(const ggml_tensor * node) {
    llama_kv_mixed_join_args args;
    if (!llama_kv_mixed_op_read_join(node, args)) {
        return "the tensors do not fit together";
    }
    if (!kv_is_size(args.n_embd)) {
        return "there is no kernel for the size of its heads";
    }
    if (!kv_is_hot(args.hot)) {
        return "there is no kernel for hot rows of that type";
    }
    if (kv_get_format(args.cold->type) < 0) {
        return "there is no kernel for cold rows of that type";
    }
    if (!kv_is_mean(args.mean)) {
        return "the means are not aligned";
    }
    return nullptr;
}

inline const char * kv_get_reason_move(const ggml_tensor * node, bool is_mean) {
    llama_kv_mixed_move_args args;
    if (!llama_kv_mixed_op_read_move(node, args)) {
        return "the tensors do not fit together";
    }
    if (args.from->type != GGML_TYPE_F16 && args.from->type != GGML_TYPE_BF16) {
        return "there is no kernel for hot rows of that type";
    }
    if (!is_mean && !kv_can_store(kv_get_format(args.to->type))) {
        return "there is no kernel that stores rows of that type";
    }
    if (kv_get_move_blocks(kv_get_move(args)) == 0) {
        return "there is no kernel for the size of its rows, or of what is rotated";
    }
    return nullptr;
}

inline const char * kv_get_reason(const ggml_tensor * node) {
    llama_kv_mixed_op op;
    if (!llama_kv_mixed_op_read(node, op) || op.is_host) {
        return "it is not a node that this build knows";
    }
    switch (op.kind) {
        case LLAMA_KV_MIXED_OP_ATTN: return kv_get_reason_attn(node);
        case LLAMA_KV_MIXED_OP_JOIN: return kv_get_reason_join(node);
        case LLAMA_KV_MIXED_OP_MEAN: return kv_get_reason_move(node, true);
        case LLAMA_KV_MIXED_OP_MOVE: return kv_get_reason_move(node, false);
        default:                     return "it is not a node that this build knows";
    }
}
