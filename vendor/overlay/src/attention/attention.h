#pragma once

#include "llama-kv-mixed.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

//
// attention over the hot and cold rows of a mixed KV cache, and how hot rows become cold ones, on the CPU
//
// softmax(Q K^T) V in one pass over both, with a running maximum and sum ("online softmax", Milakov & Gimelshein 2018;
// the split over positions is that of Flash-Decoding). Pure functions over pointers and strides, llama_kv_mixed_attn_args: nothing here knows of
// llama.cpp's caches and graphs.
//

// query rows of a task at most: query heads that share a KV head, times tokens
#define LLAMA_KV_MIXED_ATTN_MAX_ROWS 128

// largest head
#define LLAMA_KV_MIXED_ATTN_MAX_EMBD 1024

// largest block of values that a row is rotated in
#define LLAMA_KV_MIXED_QUANTIZE_MAX_ROT 1024

// how the work is split: into tasks that are independent of each other, the same ones for any number of threads
struct llama_kv_mixed_attn_plan {
    bool gemm;         // many query rows: tiles are expanded once and multiplied as matrices

    int64_t n_gqa;     // query heads that share a KV head
    int64_t n_tpb;     // tokens per block
    int64_t n_block;   // blocks of tokens
    int64_t n_rows;    // query rows of a block at most: n_tpb * n_gqa
    int64_t n_chunk;   // parts of the cells
    int64_t n_tile;    // tiles of cells per chunk
    int64_t n_task;
    int64_t n_hpt;     // KV heads per task: one, or all
    int64_t n_query;   // heads whose queries a thread keeps for later tasks

    int64_t ld_k;      // padded head sizes
    int64_t ld_v;

    size_t row_size[2][2]; // bytes of a row of K, V of a segment

    size_t n_partial;  // floats that a task leaves for the merge per KV head; 0: it writes dst itself
    size_t n_scratch;  // floats that a thread needs

    // floats that all tasks leave
    size_t n_partials() const { return n_task*n_hpt*n_partial; }
};

llama_kv_mixed_attn_plan llama_kv_mixed_attn_make_plan(const llama_kv_mixed_attn_args & args);

struct llama_kv_mixed_attn_kernel {
    const char * name;

    // task: [0, n_task); task_next: what the calling thread will probably do then, n_task: nothing; scratch: n_scratch floats
    // of that thread, before its first task all bits of the first n_query are set; partial: n_partials() floats
    void (*task)(const llama_kv_mixed_attn_args & args, const llama_kv_mixed_attn_plan & plan, int64_t task, int64_t task_next, float * partial, float * scratch);

    // when n_partial > 0, after all tasks: rows [row0, row1) of n_stream * n_tokens * n_head
    void (*merge)(const llama_kv_mixed_attn_args & args, const llama_kv_mixed_attn_plan & plan, const float * partial, int64_t row0, int64_t row1);

    // a row of n values, as the arguments of llama_kv_mixed_quantize_supports() say
    void (*quantize_row)(const void * src, int32_t type_src, void * dst, int32_t type_dst, int64_t n, int64_t n_rot);
};

// whether the kernels take these sizes
bool llama_kv_mixed_attn_supports(int64_t n_embd_k, int64_t n_embd_v, int64_t n_gqa);

// whether the kernels quantise rows of n values from one type to another, rotated in blocks of n_rot values, 0: not rotated
bool llama_kv_mixed_quantize_supports(int32_t type_src, int32_t type_dst, int64_t n, int64_t n_rot);

// the kernel for this machine, or the one of that name ("avx512", "avx2", "dotprod", "neon", "generic"); null when it can not run here
const llama_kv_mixed_attn_kernel * llama_kv_mixed_attn_get_kernel(const char * name = nullptr);

// their names, best first, separated by spaces
std::string llama_kv_mixed_attn_get_names();

// a thread's share of the tasks; next: the task to be taken next, shared by all threads
void llama_kv_mixed_attn_run(
    const llama_kv_mixed_attn_kernel & kernel,
      const llama_kv_mixed_attn_args & args,
      const llama_kv_mixed_attn_plan & plan,
                std::atomic<int64_t> & next,
                               float * partial,
                               float * scratch,
                                   int n_threads);

// the whole computation on threads of its own, for tests and tools
void llama_kv_mixed_attn_compute(const llama_kv_mixed_attn_kernel & kernel, const llama_kv_mixed_attn_args & args, int n_threads);
