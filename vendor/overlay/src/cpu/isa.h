#pragma once

#include "formats/format.h"

#include <cstddef>
#include <cstdint>
#include <string>

struct llama_kv_mixed_attn_args;
struct llama_kv_mixed_attn_plan;

//
// what is compiled once for each instruction set
//

struct llama_kv_mixed_isa {
    const char * name;

    const llama_kv_mixed_format * formats;
    size_t                        n_formats;

    // a row of n values from one format to another, rotated in blocks of n_rot values, 0: not; see llama_kv_mixed_can_quantize()
    // mean: n of F16 that are subtracted after that, null: none
    void (*quantize_row)(const llama_kv_mixed_format & from, const void * src, const llama_kv_mixed_format & to, void * dst, int64_t n, int64_t n_rot, const void * mean);

    // the mean of rows, as quantize_row() wants it; src: row 0, nb bytes from one to the next
    void (*mean_rows)(const llama_kv_mixed_format & from, const void * src, size_t nb, const int32_t * rows, int64_t n_rows, int64_t n, int64_t n_rot, void * mean);

    // a task of attention, [0, n_task); task_next: what the calling thread will probably do then, n_task: nothing
    // scratch: n_scratch() floats of that thread, before its first task reset by llama_kv_mixed_attn_run(); partial: n_partials() floats
    void (*attn_task)(const llama_kv_mixed_attn_args & args, const llama_kv_mixed_attn_plan & plan, int64_t task, int64_t task_next, float * partial, float * scratch);

    // when n_partial > 0, after all tasks: rows [row0, row1) of n_stream * n_tokens * n_head
    void (*attn_merge)(const llama_kv_mixed_attn_args & args, const llama_kv_mixed_attn_plan & plan, const float * partial, int64_t row0, int64_t row1);
};

// the best one of this machine, or the one of that name ("amx", "avx512bf16", "avx512", "avxvnni", "avx2", "neonbf16", "dotprod",
// "neon", "generic"); null when it can not run here
const llama_kv_mixed_isa * llama_kv_mixed_get_isa(const char * name = nullptr);

// their names, best first, separated by spaces
std::string llama_kv_mixed_get_isa_names();
