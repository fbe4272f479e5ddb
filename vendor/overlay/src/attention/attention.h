#pragma once

#include "llama-kv-mixed.h"

#include "attention/workspace.h"
#include "cpu/isa.h"

#include <atomic>
#include <cstddef>
#include <cstdint>

//
// attention over the hot and cold rows of a mixed KV cache, on the CPU
//
// softmax(Q K^T) V in one pass over both, with a running maximum and sum ("online softmax", Milakov & Gimelshein 2018;
// the split over positions is that of Flash-Decoding). Pure functions over pointers and strides, llama_kv_mixed_attn_args: nothing here knows of
// llama.cpp's caches and graphs.
//

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

    // Where rows of V may be left unread (see skip.h) no chunk is of both segments, and the last ones are those of the second.
    // Their tasks are the first, and all others wait for them. Else 0.
    int64_t n_chunk_hot;
    int64_t n_task_hot;

    int64_t n_hpt;     // KV heads per task
    int64_t n_query;   // heads whose queries a thread keeps for later tasks

    int64_t ld_k;      // padded head sizes
    int64_t ld_v;

    size_t row_size[2][2]; // bytes of a row of K, V of a segment

    size_t n_partial;  // floats that a task leaves for the merge per KV head; 0: it writes dst itself

    llama_kv_mixed_attn_layout layout; // of the scratch memory that a thread needs

    // floats that all tasks leave
    size_t n_partials() const { return n_task*n_hpt*n_partial; }

    // floats of scratch memory that a thread needs
    size_t n_scratch() const { return layout.size; }
};

llama_kv_mixed_attn_plan llama_kv_mixed_attn_make_plan(const llama_kv_mixed_attn_args & args);

// whether the kernels take these sizes
bool llama_kv_mixed_attn_supports(int64_t n_embd_k, int64_t n_embd_v, int64_t n_gqa);

// how far all threads are
struct llama_kv_mixed_attn_progress {
    std::atomic<int64_t> next { 0 }; // the task to be taken next
    std::atomic<int64_t> hot  { 0 }; // how many of n_task_hot are done

    void reset() {
        next = 0;
        hot  = 0;
    }
};

// a thread's share of the tasks
void llama_kv_mixed_attn_run(
    const llama_kv_mixed_isa & isa,
      const llama_kv_mixed_attn_args & args,
      const llama_kv_mixed_attn_plan & plan,
        llama_kv_mixed_attn_progress & progress,
                               float * partial,
                               float * scratch,
                                   int n_threads);

// the whole computation on threads of its own, for tests and tools
void llama_kv_mixed_attn_compute(const llama_kv_mixed_isa & isa, const llama_kv_mixed_attn_args & args, int n_threads);
