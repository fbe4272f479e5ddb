#pragma once

#include <algorithm>
#include <cstdint>

//
// what the kernels are given: pointers, strides in bytes, numbers; and how blocks of the formats are made
//

#ifdef __CUDACC__
#define KV_BOTH __host__ __device__
#else
#define KV_BOTH
#endif

struct float2;

// as the tables of formats name them; what is not quantised is one: F16 or BF16
enum kv_mixed_format { KV_F16, KV_BF16, KV_Q4_0, KV_Q4_1, KV_Q5_0, KV_Q5_1, KV_Q8_0, KV_IQ4_NL };

// in place of a format: known when the kernel runs
#define KV_ANY -1

static constexpr KV_BOTH int kv_block_size(int format) {
    return format == KV_Q4_0 || format == KV_IQ4_NL ? 18 : format == KV_Q4_1 ? 20 : format == KV_Q5_0 ? 22 : format == KV_Q5_1 ? 24 : format == KV_Q8_0 ? 34 : 64;
}

static constexpr KV_BOTH bool kv_is_float(int format) {
    return format == KV_F16 || format == KV_BF16;
}

// where the numbers of a block begin
static constexpr KV_BOTH int kv_offset(int format) {
    return format == KV_Q4_1 ? 4 : format == KV_Q5_0 ? 6 : format == KV_Q5_1 ? 8 : 2;
}

static constexpr KV_BOTH bool kv_has_min(int format) {
    return format == KV_Q4_1 || format == KV_Q5_1;
}

struct kv_mixed_segment {
    const char * k;
    const char * v;
    int64_t      nb_k[3]; // from one head, cell, stream to the next
    int64_t      nb_v[3];
    int          format_k;
    int          format_v;
    int          copy_k;  // bytes that rows and strides are multiples of: 16, 8, 4 or 2
    int          copy_v;
    int          n_kv;
    int          first;   // in the mask
    int          n_split; // blocks that share the cells of a head
    int          n_tile;  // of a block
};

struct kv_mixed_attend {
    kv_mixed_segment seg[2]; // cold, hot

    const char * q;       // F32
    int64_t      nb_q[3]; // head, token, stream
    const char * mask;    // F16
    int64_t      nb_mask[2]; // token, stream
    const char * mean;    // F16; null: none
    int64_t      nb_mean[3]; // head, page, stream
    const float * sinks;  // null: none

    float scale;
    float softcap;        // 0: none
    float max_bias;       // 0: none
    float slope_base[2];  // ALiBi: of the heads below n_head_log2, and of the others
    int   n_head_log2;

    int n_rot[2];         // K, V
    int n_head;
    int n_head_kv;
    int n_gqa;
    int n_tokens;         // of a stream
    int n_col;            // n_gqa*n_tokens: query rows of a KV head

    // for each stream, KV head, query row and block of cold, then hot cells: an unnormalised sum, and the maximum
    // (times log2(e)) and the sum of its weights
    float  * parts;
    float2 * meta;

    float * dst;          // [stream, token, head, D]
};

// n_block: blocks that a KV head's group of query rows can have; each gets as many tiles (of so many cells) as the others, for n_warp warps in turn
inline void kv_split(kv_mixed_attend & p, int64_t n_block, const int (&tile)[2], int n_warp) {
    const auto div_up = [](int64_t a, int64_t b) { return (a + b - 1)/b; };

    const int64_t n_tile[2] = { div_up(p.seg[0].n_kv, tile[0]), div_up(p.seg[1].n_kv, tile[1]) };

    int64_t n = div_up(div_up(n_tile[0] + n_tile[1], std::max<int64_t>(n_block, 1)), n_warp)*n_warp;
    while (div_up(n_tile[0], n) + div_up(n_tile[1], n) > std::max<int64_t>(n_block, 2)) {
        n += n_warp;
    }

    for (int i = 0; i < 2; ++i) {
        p.seg[i].n_tile  = n;
        p.seg[i].n_split = div_up(n_tile[i], n);
    }
}

struct kv_mixed_join {
    const char * src;
    int64_t      nb[3];
    const char * mean;    // null: none
    int64_t      nb_mean[3];
    char       * dst;     // F16 [stream, cell, head, D]
    int          format;
    int          n_kv;
    int          first;   // in dst
    int          n_dst;   // cells of dst
    int          n_head_kv;
    int          n_rot;   // rows are rotated, in blocks of so many; 0: they are not
};

// rows of n_embd values without gaps between them
struct kv_mixed_move {
    const char * from;    // F16 or BF16
    char       * to;      // of new means: F16
    const char * mean;    // F16, null: none

    const int32_t * row_from;
    const int64_t * row_to; // or the new means' pages
    const int32_t * page;   // null: none

    int format_from;
    int format_to;
    int n;                // rows
    int n_to;             // rows, or new means
    int n_embd;
    int n_rot;
};
