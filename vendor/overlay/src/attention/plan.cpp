#include "attention/attention.h"

#include "formats/formats.h"

#include "ggml.h"

#include <algorithm>

static const int64_t tile_size = LLAMA_KV_MIXED_TILE;

// as many tasks as keep the threads of a large machine busy to the end
static const int64_t n_task_wanted = 64;

// A cell's rows of all KV heads lie side by side and share cache lines, so a task has several heads:
// - as many as have a tile of this size, which leaves room in the second cache level for the next tile;
// - if at least the smaller number of tasks remain, and cells are split for the larger one: more parts would cost more to merge
//   than they gain
static const int64_t max_tile_bytes    = 160*1024;
static const int64_t min_tasks_grouped = 16;
static const int64_t max_tasks_grouped = 32;

static int64_t div_up(int64_t a, int64_t b) {
    return (a + b - 1)/b;
}

static int64_t pad(int64_t n, int64_t to) {
    return div_up(n, to)*to;
}

bool llama_kv_mixed_attn_supports(int64_t n_embd_k, int64_t n_embd_v, int64_t n_gqa) {
    return n_embd_k <= LLAMA_KV_MIXED_MAX_EMBD && n_embd_v <= LLAMA_KV_MIXED_MAX_EMBD && n_gqa <= LLAMA_KV_MIXED_ATTN_MAX_ROWS;
}

llama_kv_mixed_attn_plan llama_kv_mixed_attn_make_plan(const llama_kv_mixed_attn_args & args) {
    llama_kv_mixed_attn_plan res = {};

    res.n_gqa = args.n_head/args.n_head_kv;
    res.gemm  = res.n_gqa*args.n_tokens > LLAMA_KV_MIXED_ATTN_FEW_ROWS;
    res.n_tpb = res.gemm ? LLAMA_KV_MIXED_ATTN_MAX_ROWS/res.n_gqa : args.n_tokens;

    // blocks of nearly equal size
    res.n_block = div_up(args.n_tokens, res.n_tpb);
    res.n_tpb   = div_up(args.n_tokens, res.n_block);
    res.n_rows  = res.n_tpb*res.n_gqa;

    for (int i = 0; i < 2; ++i) {
        res.row_size[i][0] = ggml_row_size((ggml_type) args.seg[i].type_k, args.n_embd_k);
        res.row_size[i][1] = ggml_row_size((ggml_type) args.seg[i].type_v, args.n_embd_v);
    }

    const int64_t n_tile_cold = div_up(args.seg[0].n_kv, tile_size);
    const int64_t n_tile_hot  = div_up(args.seg[1].n_kv, tile_size);
    const int64_t n_tile      = n_tile_cold + n_tile_hot;
    const int64_t n_part = args.n_stream*res.n_block*args.n_head_kv; // tasks of one head without a split over cells

    // tiles per chunk for so many tasks, no less than two
    const auto get_n_tile = [&](int64_t n_hpt, int64_t n_task) {
        const int64_t n_chunk = div_up(n_task, n_part/n_hpt);
        return std::max(div_up(n_tile, n_chunk), std::min<int64_t>(n_tile, 2));
    };
    const auto set_split = [&](int64_t n_hpt, int64_t n_tile_chunk) {
        res.n_hpt   = n_hpt;
        res.n_tile  = n_tile_chunk;
        res.n_chunk = n_tile > 0 ? div_up(n_tile, n_tile_chunk) : 1;
        res.n_task  = n_part/n_hpt*res.n_chunk;
    };

    int64_t n_hpt = args.n_head_kv;
    while (n_hpt % 2 == 0 && n_hpt*tile_size*(int64_t) (res.row_size[0][0] + res.row_size[0][1]) > max_tile_bytes) {
        n_hpt /= 2;
    }
    set_split(n_hpt, get_n_tile(n_hpt, max_tasks_grouped));

    if (res.gemm || res.n_task < min_tasks_grouped) {
        set_split(1, get_n_tile(1, n_part >= n_task_wanted/4 ? n_part : n_task_wanted));
    }

    // a chunk for each tile of hot cells, so that those who wait do so for the shortest time
    const auto * format_v = llama_kv_mixed_find_format(args.seg[0].type_v);
    if (args.v_skip > 0.0f && !res.gemm && n_tile_hot > 0 && n_tile_cold > n_tile_hot &&
            format_v && format_v->acc && args.n_embd_v % LLAMA_KV_MIXED_BLOCK == 0) {
        const int64_t n_task_chunk = n_part/res.n_hpt;
        res.n_chunk_hot = n_tile_hot;
        res.n_chunk     = div_up(n_tile_cold, res.n_tile) + res.n_chunk_hot;
        res.n_task      = n_task_chunk*res.n_chunk;
        res.n_task_hot  = n_task_chunk*res.n_chunk_hot;
    }

    res.ld_k = pad(args.n_embd_k, 32);
    res.ld_v = pad(args.n_embd_v, 32);

    // for the next head of the tile, or the next chunk
    res.n_query = !res.gemm && (res.n_chunk > 1 || res.n_hpt > 1) ? args.n_head_kv : 1;

    if (res.n_chunk > 1) {
        res.n_partial = pad(res.n_rows*(res.ld_v + 2), 16);
    }

    int64_t size_query = 0;
    for (const auto & seg : args.seg) {
        const auto * format = llama_kv_mixed_find_format(seg.type_k);
        size_query = std::max(size_query, format ? format->size_query : 0);
    }
    res.layout = llama_kv_mixed_attn_make_layout(res, size_query);

    return res;
}
