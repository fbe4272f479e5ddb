#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>

//
// a format: how rows of a KV cache are stored, and what the CPU's kernels can do with them
//
// The formats of an instruction set are a table (table.h). All that deals with rows reads it: parameters, plan, kernel,
// mover, composition, shift, error measurement, state, and Python. What a row of the table lacks is null: callers then take
// ggml's own operations, or refuse the format by its name.
//

// cells that are worked on together
#define LLAMA_KV_MIXED_TILE 128

// Cells of a page, aligned: where K is quantised, rows of K are stored less their page's mean, [n_embd] of F16 for each KV head
// (in the rotated basis). The page's first rows make it, see cache/means.h. A page is a tile of the kernels.
#define LLAMA_KV_MIXED_PAGE LLAMA_KV_MIXED_TILE

// values that the kernels work on together: a format's functions take whole blocks of so many
#define LLAMA_KV_MIXED_BLOCK 32

// largest head
#define LLAMA_KV_MIXED_MAX_EMBD 1024

// largest block of values that a row is rotated in
#define LLAMA_KV_MIXED_MAX_ROT 1024

// rows of one KV head
struct llama_kv_mixed_rows {
    const uint8_t * data;    // row 0
    size_t          nb;      // bytes from row to row
    int64_t         n_bytes; // bytes per row
};

struct llama_kv_mixed_tile : llama_kv_mixed_rows {
    int     n;       // rows, at most LLAMA_KV_MIXED_TILE
    int64_t n_block; // blocks per row

    llama_kv_mixed_rows next; // those of the tile that comes next, n_bytes == 0: none

    // which rows of it come next, null: as many as there are in this one
    const int32_t * next_list;
    int             n_next_list;
};

// S[r][j] = Q[r] . K[j]
struct llama_kv_mixed_dot {
    int64_t n_rows; // of Q
    int64_t n_embd;

    const float * Q;  // [n_rows][ld]
    int64_t       ld;
    const void *  query; // the same as load_query() left it

    llama_kv_mixed_tile k;

    uint8_t * spare; // room for a tile of K

    float * S; // [n_rows][LLAMA_KV_MIXED_TILE]
};

// O[r] += sum over j of P[r][j] V[j]
struct llama_kv_mixed_acc {
    int64_t n_rows; // of P and O

    const float * P;    // [n_rows][LLAMA_KV_MIXED_TILE], none below 0
    const float * pmax; // [n_rows]: no weight of P[r] is above it
    bool          masked; // a row of P may have weights of 0: V[j] counts only where it has another one

    llama_kv_mixed_tile v;

    float * O; // [n_rows][ld]
    int64_t ld;
};

struct llama_kv_mixed_format {
    const char * name;
    ggml_type    type; // of the tensors that hold the rows

    // a row of n values as floats; null: rows of this format are never hot
    void (*load)(const uint8_t * row, int64_t n, float * dst);

    // n floats as a row; null: by ggml's operations
    void (*quantize)(const float * x, int64_t n, uint8_t * dst);

    // a tile as floats [k.n][ld], padded with zeros to whole blocks; null: by ggml's to_float
    void (*expand)(const llama_kv_mixed_tile & t, float * dst, int64_t ld);

    // few query rows meet rows as they are stored; null: they meet the expanded tile
    void (*dot)(const llama_kv_mixed_dot & a);
    void (*acc)(const llama_kv_mixed_acc & a);

    // the form in which a query meets rows of K, where that is not floats: size_query bytes for every 64 values
    // writes row r of n_rows; 0, null: there is no such form
    int64_t size_query;
    void (*load_query)(const float * Q, int64_t n_embd, void * dst, int64_t r, int64_t n_rows);

    // many query rows meet K in whole numbers, see int-gemm.h; null: they are multiplied as floats
    // load_tile: a tile of K to room; spare: room for its bytes
    // scores: S [n_rows][LLAMA_KV_MIXED_TILE] of n cells and the query rows from r0 on, of n_query that load_query_int() left in query
    void (*load_tile)(const llama_kv_mixed_tile & k, uint8_t * spare, void * room);
    void (*scores)(void * query, int64_t n_query, int64_t r0, int64_t n_rows, void * room, int n, int64_t n_embd, float * S);

    // whether values are so coarse that products of matrices may round them to BF16, see attention/products.h
    bool is_coarse;
};
