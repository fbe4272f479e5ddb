#pragma once

#include "formats/format.h"

#include "llama-kv-mixed.h"

#include "ggml.h"

#include <cstring>

//
// nodes of ours in a graph of ggml's: GGML_OP_CUSTOM, with what they compute written into their parameters
//
// ggml keeps a host function in the first bytes of a custom node's parameters, which is of use in this process and on the CPU
// alone. So behind it stands which operation it is, and with what numbers; sources are in a fixed order. Whoever executes nodes
// (a GPU's backend, a server on another machine) knows ours by their magic number, checks their tensors with
// llama_kv_mixed_op_read_...(), and computes them with code of its own. This header is all that they share.
//

// The function of a backend that says why a device of it does not compute a node, null: it does. Nobody else is given such a node.
// const char * (*)(ggml_backend_dev_t dev, const ggml_tensor * node)
#define LLAMA_KV_MIXED_OP_REASON "llama_kv_mixed_op_reason"

#define LLAMA_KV_MIXED_OP_MAGIC   0x564B584D // "MXKV"
#define LLAMA_KV_MIXED_OP_VERSION 1

enum llama_kv_mixed_op_kind {
    LLAMA_KV_MIXED_OP_ATTN = 1, // F32 [n_embd_v*n_head, n_tokens]: attention over cold and hot rows
    LLAMA_KV_MIXED_OP_JOIN = 2, // F16 [n_embd, n_head_kv, n_cold + n_hot, n_stream]: cold rows as numbers, then hot ones rotated as they are
    LLAMA_KV_MIXED_OP_MEAN = 3, // the means of pages that rows are the first to come to; the result is empty of meaning
    LLAMA_KV_MIXED_OP_MOVE = 4, // rows of hot go to cold: rotated, less their page's mean, quantised; the result likewise
};

// sources; null where there are none
enum {
    LLAMA_KV_MIXED_SRC_Q,      // F32 [n_embd_k, n_head, n_tokens]
    LLAMA_KV_MIXED_SRC_K_HOT,  // [n_embd_k, n_head_kv, n_hot, n_stream]
    LLAMA_KV_MIXED_SRC_V_HOT,  // [n_embd_v, n_head_kv, n_hot, n_stream]
    LLAMA_KV_MIXED_SRC_MASK,   // F16 or F32 [n_cold + n_hot, n_tokens/n_stream, 1, n_stream or 1]
    LLAMA_KV_MIXED_SRC_K_COLD,
    LLAMA_KV_MIXED_SRC_V_COLD,
    LLAMA_KV_MIXED_SRC_K_MEAN, // F16 [n_embd_k*n_head_kv, n_page, n_stream]
    LLAMA_KV_MIXED_SRC_SINKS,  // F32 [n_head]

    LLAMA_KV_MIXED_N_SRC,
};
enum {
    LLAMA_KV_MIXED_SRC_JOIN_COLD, // [n_embd, n_head_kv, n_cold, n_stream]
    LLAMA_KV_MIXED_SRC_JOIN_HOT,  // [n_embd, n_head_kv, n_hot,  n_stream]
    LLAMA_KV_MIXED_SRC_JOIN_MEAN, // of K, as above

    LLAMA_KV_MIXED_N_SRC_JOIN,
};
enum {
    LLAMA_KV_MIXED_SRC_MOVE_FROM,     // [n_embd, rows]
    LLAMA_KV_MIXED_SRC_MOVE_TO,       // [n_embd, rows], written; of a mean: F16 [n_embd, pages]
    LLAMA_KV_MIXED_SRC_MOVE_ROW_FROM, // I32 [n]
    LLAMA_KV_MIXED_SRC_MOVE_ROW_TO,   // I64 [n]; of a mean: the pages, I64 [n_new]
    LLAMA_KV_MIXED_SRC_MOVE_PAGE,     // I32 [n]: of each row, null: there are no means
    LLAMA_KV_MIXED_SRC_MOVE_MEAN,     // F16 [n_embd, pages], null: there are none

    LLAMA_KV_MIXED_N_SRC_MOVE,
};

// behind struct ggml_custom_op_params, which takes 24 bytes
#define LLAMA_KV_MIXED_OP_OFFSET 24

struct llama_kv_mixed_op {
    int32_t magic;
    int16_t version;
    int16_t kind;    // enum llama_kv_mixed_op_kind
    int32_t is_host; // 1: to be computed by the host function, whose memory lies behind the result

    float   scale;
    float   max_bias;
    float   logit_softcap;
    int32_t n_rot_k; // of the join: n_rot
    int32_t n_rot_v;

    float   v_skip;
};

static_assert(LLAMA_KV_MIXED_OP_OFFSET + sizeof(llama_kv_mixed_op) <= GGML_MAX_OP_PARAMS, "there is no room for that");

inline llama_kv_mixed_op llama_kv_mixed_op_of(llama_kv_mixed_op_kind kind) {
    llama_kv_mixed_op res = {};
    res.magic   = LLAMA_KV_MIXED_OP_MAGIC;
    res.version = LLAMA_KV_MIXED_OP_VERSION;
    res.kind    = kind;
    return res;
}

inline void llama_kv_mixed_op_write(ggml_tensor * node, const llama_kv_mixed_op & op) {
    memcpy((char *) node->op_params + LLAMA_KV_MIXED_OP_OFFSET, &op, sizeof(op));
}

// false: it is not a node of ours, or one of another version
inline bool llama_kv_mixed_op_read(const ggml_tensor * node, llama_kv_mixed_op & op) {
    memcpy(&op, (const char *) node->op_params + LLAMA_KV_MIXED_OP_OFFSET, sizeof(op));

    return node->op == GGML_OP_CUSTOM && op.magic == LLAMA_KV_MIXED_OP_MAGIC && op.version == LLAMA_KV_MIXED_OP_VERSION;
}

// whether rows of n_embd values can be rotated in blocks of n; 0: they are not rotated
inline bool llama_kv_mixed_op_is_rot(int64_t n, int64_t n_embd) {
    return n == 0 || (n >= 16 && n <= LLAMA_KV_MIXED_MAX_ROT && (n & (n - 1)) == 0 && n_embd % n == 0);
}

// rows of K or V: [n_embd, n_head_kv, n, n_stream], each row in one piece, no two dimensions swapped
inline bool llama_kv_mixed_op_is_rows(const ggml_tensor * t, int64_t n_embd, int64_t n_head_kv, int64_t n_stream) {
    if (!t || t->type < 0 || t->type >= GGML_TYPE_COUNT || ggml_blck_size(t->type) == 0) {
        return false;
    }
    return n_embd > 0 && n_head_kv > 0 && n_stream > 0 &&
        t->ne[0] == n_embd && t->ne[1] == n_head_kv && t->ne[2] > 0 && t->ne[3] == n_stream &&
        n_embd % ggml_blck_size(t->type) == 0 && t->nb[0] == ggml_type_size(t->type) &&
        t->nb[1] >= ggml_row_size(t->type, n_embd) && t->nb[1] % 2 == 0 && t->nb[2] % 2 == 0 && t->nb[3] % 2 == 0;
}

inline bool llama_kv_mixed_op_is_mean(const ggml_tensor * t, int64_t n_embd, int64_t n_head_kv, int64_t n_cold, int64_t n_stream) {
    return t->type == GGML_TYPE_F16 && t->nb[0] == sizeof(ggml_fp16_t) && t->ne[0] == n_embd*n_head_kv && t->ne[2] == n_stream && t->ne[3] == 1 &&
        t->ne[1] >= (n_cold + LLAMA_KV_MIXED_PAGE - 1)/LLAMA_KV_MIXED_PAGE && t->nb[1] % 2 == 0 && t->nb[2] % 2 == 0;
}

inline llama_kv_mixed_attn_segment llama_kv_mixed_op_get_segment(const ggml_tensor * k, const ggml_tensor * v) {
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

// what an attention node computes; false: its sources do not fit together
inline bool llama_kv_mixed_op_read_attn(const ggml_tensor * node, llama_kv_mixed_attn_args & args) {
    llama_kv_mixed_op op;
    if (!llama_kv_mixed_op_read(node, op) || op.kind != LLAMA_KV_MIXED_OP_ATTN || node->type != GGML_TYPE_F32) {
        return false;
    }

    const ggml_tensor * q      = node->src[LLAMA_KV_MIXED_SRC_Q];
    const ggml_tensor * k_hot  = node->src[LLAMA_KV_MIXED_SRC_K_HOT];
    const ggml_tensor * v_hot  = node->src[LLAMA_KV_MIXED_SRC_V_HOT];
    const ggml_tensor * mask   = node->src[LLAMA_KV_MIXED_SRC_MASK];
    const ggml_tensor * k_cold = node->src[LLAMA_KV_MIXED_SRC_K_COLD];
    const ggml_tensor * v_cold = node->src[LLAMA_KV_MIXED_SRC_V_COLD];
    const ggml_tensor * k_mean = node->src[LLAMA_KV_MIXED_SRC_K_MEAN];
    const ggml_tensor * sinks  = node->src[LLAMA_KV_MIXED_SRC_SINKS];

    if (!q || !k_hot || !v_hot || !mask || !k_cold != !v_cold || (k_mean && !k_cold)) {
        return false;
    }

    const int64_t n_embd_k = k_hot->ne[0], n_embd_v = v_hot->ne[0], n_head_kv = k_hot->ne[1], n_stream = k_hot->ne[3];

    if (!llama_kv_mixed_op_is_rows(k_hot, n_embd_k, n_head_kv, n_stream) || !llama_kv_mixed_op_is_rows(v_hot, n_embd_v, n_head_kv, n_stream) ||
            k_hot->ne[2] != v_hot->ne[2]) {
        return false;
    }
    if (k_cold && (!llama_kv_mixed_op_is_rows(k_cold, n_embd_k, n_head_kv, n_stream) ||
            !llama_kv_mixed_op_is_rows(v_cold, n_embd_v, n_head_kv, n_stream) || k_cold->ne[2] != v_cold->ne[2])) {
        return false;
    }

    const int64_t n_cold = k_cold ? k_cold->ne[2] : 0;

    if (k_mean && !llama_kv_mixed_op_is_mean(k_mean, n_embd_k, n_head_kv, n_cold, n_stream)) {
        return false;
    }
    if (q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) || q->nb[1] % sizeof(float) != 0 || q->nb[2] % sizeof(float) != 0 ||
            q->ne[0] != n_embd_k || q->ne[1] <= 0 || q->ne[1] % n_head_kv != 0 || q->ne[2] <= 0 || q->ne[2] % n_stream != 0 || q->ne[3] != 1) {
        return false;
    }
    if ((mask->type != GGML_TYPE_F16 && mask->type != GGML_TYPE_F32) || mask->nb[0] != ggml_type_size(mask->type) || mask->ne[0] != n_cold + k_hot->ne[2] ||
            mask->ne[1] < q->ne[2]/n_stream || mask->ne[2] != 1 || (mask->ne[3] != n_stream && mask->ne[3] != 1)) {
        return false;
    }
    if (sinks && (sinks->type != GGML_TYPE_F32 || sinks->nb[0] != sizeof(float) || sinks->ne[0] != q->ne[1])) {
        return false;
    }

    args = {};
    args.struct_size   = sizeof(args);
    args.n_embd_k      = n_embd_k;
    args.n_embd_v      = n_embd_v;
    args.n_head        = q->ne[1];
    args.n_head_kv     = n_head_kv;
    args.n_tokens      = q->ne[2]/n_stream;
    args.n_stream      = n_stream;
    args.scale         = op.scale;
    args.max_bias      = op.max_bias;
    args.logit_softcap = op.logit_softcap;
    args.n_rot_k       = op.n_rot_k;
    args.n_rot_v       = op.n_rot_v;
    args.v_skip        = op.v_skip;

    args.q       = (const float *) q->data;
    args.nb_q[0] = q->nb[1];
    args.nb_q[1] = q->nb[2];
    args.nb_q[2] = q->nb[2]*args.n_tokens;

    args.seg[1] = llama_kv_mixed_op_get_segment(k_hot, v_hot);
    if (k_cold) {
        args.seg[0] = llama_kv_mixed_op_get_segment(k_cold, v_cold);
    } else {
        args.seg[0].type_k = args.seg[1].type_k;
        args.seg[0].type_v = args.seg[1].type_v;
    }

    args.mask       = mask->data;
    args.mask_f16   = mask->type == GGML_TYPE_F16;
    args.nb_mask[0] = mask->nb[1];
    args.nb_mask[1] = mask->ne[3] > 1 ? mask->nb[3] : 0; // one for all streams

    if (k_mean) {
        args.k_mean       = k_mean->data;
        args.nb_k_mean[0] = n_embd_k*sizeof(ggml_fp16_t);
        args.nb_k_mean[1] = k_mean->nb[1];
        args.nb_k_mean[2] = k_mean->nb[2];
    }

    args.sinks = sinks ? (const float *) sinks->data : nullptr;
    args.dst   = (float *) node->data;

    return llama_kv_mixed_op_is_rot(args.n_rot_k, n_embd_k) && llama_kv_mixed_op_is_rot(args.n_rot_v, n_embd_v) &&
        args.v_skip >= 0.0f && args.v_skip < 1.0f && ggml_nelements(node)/n_embd_v >= q->ne[1]*q->ne[2];
}

struct llama_kv_mixed_join_args {
    int64_t n_embd, n_head_kv, n_cold, n_hot, n_stream, n_rot;

    const ggml_tensor * cold;
    const ggml_tensor * hot;
    const ggml_tensor * mean; // null: none
};

// what a join computes; false: its sources do not fit together
inline bool llama_kv_mixed_op_read_join(const ggml_tensor * node, llama_kv_mixed_join_args & args) {
    llama_kv_mixed_op op;
    if (!llama_kv_mixed_op_read(node, op) || op.kind != LLAMA_KV_MIXED_OP_JOIN || node->type != GGML_TYPE_F16) {
        return false;
    }

    args.cold = node->src[LLAMA_KV_MIXED_SRC_JOIN_COLD];
    args.hot  = node->src[LLAMA_KV_MIXED_SRC_JOIN_HOT];
    args.mean = node->src[LLAMA_KV_MIXED_SRC_JOIN_MEAN];

    if (!args.cold || !args.hot) {
        return false;
    }

    args.n_embd    = args.hot->ne[0];
    args.n_head_kv = args.hot->ne[1];
    args.n_cold    = args.cold->ne[2];
    args.n_hot     = args.hot->ne[2];
    args.n_stream  = args.hot->ne[3];
    args.n_rot     = op.n_rot_k;

    return llama_kv_mixed_op_is_rows(args.cold, args.n_embd, args.n_head_kv, args.n_stream) &&
        llama_kv_mixed_op_is_rows(args.hot, args.n_embd, args.n_head_kv, args.n_stream) &&
        (!args.mean || llama_kv_mixed_op_is_mean(args.mean, args.n_embd, args.n_head_kv, args.n_cold, args.n_stream)) &&
        llama_kv_mixed_op_is_rot(args.n_rot, args.n_embd) &&
        node->ne[0] == args.n_embd && node->ne[1] == args.n_head_kv && node->ne[2] == args.n_cold + args.n_hot && node->ne[3] == args.n_stream &&
        ggml_is_contiguous(node);
}

struct llama_kv_mixed_move_args {
    int64_t n_embd; // of a row, all heads
    int64_t n;      // rows
    int64_t n_to;   // rows, or new means
    int64_t n_rot;

    const ggml_tensor * from;
    const ggml_tensor * to;
    const ggml_tensor * mean; // null: none

    const int32_t * row_from;
    const int64_t * row_to;
    const int32_t * page;     // null: none
};

// what a node that moves rows, or makes means of them, computes; false: its sources do not fit together. The numbers of rows and
// pages are not looked at: they may be where they can not be read.
inline bool llama_kv_mixed_op_read_move(const ggml_tensor * node, llama_kv_mixed_move_args & args) {
    llama_kv_mixed_op op;
    if (!llama_kv_mixed_op_read(node, op) || (op.kind != LLAMA_KV_MIXED_OP_MOVE && op.kind != LLAMA_KV_MIXED_OP_MEAN)) {
        return false;
    }

    const bool is_mean = op.kind == LLAMA_KV_MIXED_OP_MEAN;

    const ggml_tensor * from     = node->src[LLAMA_KV_MIXED_SRC_MOVE_FROM];
    const ggml_tensor * to       = node->src[LLAMA_KV_MIXED_SRC_MOVE_TO];
    const ggml_tensor * row_from = node->src[LLAMA_KV_MIXED_SRC_MOVE_ROW_FROM];
    const ggml_tensor * row_to   = node->src[LLAMA_KV_MIXED_SRC_MOVE_ROW_TO];
    const ggml_tensor * page     = node->src[LLAMA_KV_MIXED_SRC_MOVE_PAGE];
    const ggml_tensor * mean     = node->src[LLAMA_KV_MIXED_SRC_MOVE_MEAN];

    if (!from || !to || !row_from || !row_to || (!page && (mean || is_mean)) || (mean && is_mean)) {
        return false;
    }

    const auto is_rows = [&](const ggml_tensor * t) {
        return t->ne[0] == from->ne[0] && t->ne[2] == 1 && t->ne[3] == 1 && ggml_is_contiguous(t);
    };
    const auto is_list = [](const ggml_tensor * t, ggml_type type, int64_t n) {
        return t->type == type && t->ne[0] == n && ggml_nelements(t) == n && ggml_is_contiguous(t);
    };

    args.n_embd   = from->ne[0];
    args.n        = row_from->ne[0];
    args.n_to     = row_to->ne[0];
    args.n_rot    = op.n_rot_k;
    args.from     = from;
    args.to       = to;
    args.mean     = mean;
    args.row_from = (const int32_t *) row_from->data;
    args.row_to   = (const int64_t *) row_to->data;
    args.page     = page ? (const int32_t *) page->data : nullptr;

    return is_rows(from) && is_rows(to) && (!mean || (is_rows(mean) && mean->type == GGML_TYPE_F16)) && (!is_mean || to->type == GGML_TYPE_F16) &&
        is_list(row_from, GGML_TYPE_I32, args.n) && is_list(row_to, GGML_TYPE_I64, args.n_to) && (!page || is_list(page, GGML_TYPE_I32, args.n)) &&
        (is_mean || args.n_to == args.n) &&
        llama_kv_mixed_op_is_rot(args.n_rot, args.n_embd);
}
