#pragma once

#include "formats/format.h"

#include <cstddef>
#include <cstdint>

//
// the scratch memory of a thread: the plan lays it out, the kernel's tasks find their arrays by it
//

// query rows of a task at most: query heads that share a KV head, times tokens
#define LLAMA_KV_MIXED_ATTN_MAX_ROWS 128

// so many of them meet cells as these are stored; more: cells are expanded first
#define LLAMA_KV_MIXED_ATTN_FEW_ROWS 16

// query rows that share a tile's scores while these are in the first cache level
#define LLAMA_KV_MIXED_ATTN_ROWS 48

// lanes of the widest vectors
#define LLAMA_KV_MIXED_MAX_LANES 16

struct llama_kv_mixed_attn_plan;

// in floats
struct llama_kv_mixed_attn_layout {
    // several arrays of one size, one after the other
    struct arrays {
        size_t offset;
        size_t size;

        float * get(float * scratch, int64_t i = 0) const { return scratch + offset + i*size; }
    };

    // for each KV head whose queries are kept
    arrays kept;  // [1] whose queries these are
    arrays Q;     // [n_rows][ld_k], scaled
    arrays query; // Q in the form that a segment's rows want, see llama_kv_mixed_format

    // for each KV head of a task
    arrays O;     // [n_rows][ld_v]
    arrays m;     // [n_rows]
    arrays s;     // [n_rows][lanes]
    arrays slope; // [n_gqa]
    arrays m_hot; // [n_rows], [n_rows]: m and the sum of s after all hot cells, where rows of V may be left unread
    arrays s_hot;

    // for a task
    arrays pmax;  // [2][few rows]
    arrays mean;  // [ld_k], of a page's K
    arrays S;     // [LLAMA_KV_MIXED_ATTN_ROWS][tile]
    arrays mask;  // [n_tpb][tile]
    arrays K;     // [tile][ld_k]
    arrays KT;    // [ld_k][tile], many query rows
    arrays V;     // [tile][ld_v]

    size_t size;  // of all
};

// size_query: the largest of the formats that queries meet, bytes for every 64 values
llama_kv_mixed_attn_layout llama_kv_mixed_attn_make_layout(const llama_kv_mixed_attn_plan & plan, int64_t size_query);
