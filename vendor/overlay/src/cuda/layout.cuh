#pragma once

#include "params.cuh"

//
// the shared memory of a block of attention: its queries, then for each warp the rows that it works on and those that come next;
// in the end, in the same place, what warps leave for the merge
//

#define KV_N_WARP 4

// cells of a page of means
#define KV_PAGE 128

// cells of a tile
static constexpr KV_BOTH int kv_tile(int d, int format_k, int format_v) {
    return d > 128 || format_k == KV_ANY || (kv_is_float(format_k) && kv_is_float(format_v)) ? 16 : 32;
}

// of a row in shared memory: words; floats are padded, so that rows begin in different banks
static constexpr KV_BOTH int kv_row_size(int format, int d) {
    return (d/32*kv_block_size(format) + (kv_is_float(format) ? 16 : 0) + 3)/4*4;
}

// tiles that are there or on their way
static constexpr KV_BOTH int kv_n_stage(int format_k, int format_v) {
    return format_k == KV_ANY || (kv_is_float(format_k) && kv_is_float(format_v)) ? 1 : 2;
}

// rows of K and V of a tile, and the mean of their page
static constexpr KV_BOTH int kv_stage_size(int d, int tile, int row_k, int row_v) {
    return (tile*(row_k + row_v) + 2*d + 15)/16*16;
}

static constexpr KV_BOTH int kv_query_row(int d) {
    return 2*d + 16;
}

// floats of a query row that warps leave for the merge
static constexpr KV_BOTH int kv_merge_row(int d) {
    return d + 4;
}

// shared memory of a warp for rows of these sizes, by a kernel for format_k and format_v (or KV_ANY: they are made F16 first)
static constexpr KV_BOTH int kv_warp_size(int d, int format_k, int format_v, int row_k, int row_v) {
    return kv_n_stage(format_k, format_v)*kv_stage_size(d, kv_tile(d, format_k, format_v), row_k, row_v) +
        (format_k == KV_ANY ? kv_tile(d, format_k, format_v)*2*kv_row_size(KV_F16, d) : 0);
}

// of a block
static constexpr KV_BOTH int kv_shared_size(int d, int nc, int size_warp) {
    const int stages = nc*kv_query_row(d) + KV_N_WARP*size_warp;
    const int merge  = KV_N_WARP*nc*(kv_merge_row(d)*4 + 8);

    return stages > merge ? stages : merge;
}
