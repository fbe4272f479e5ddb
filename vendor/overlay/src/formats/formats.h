#pragma once

#include "cpu/isa.h"
#include "formats/format.h"

#include <cstdint>
#include <string>

//
// the table of formats, as an instruction set has it: they differ in functions alone
//

// the i-th format; null: there are no more
const llama_kv_mixed_format * llama_kv_mixed_get_format(size_t i, const llama_kv_mixed_isa & isa = *llama_kv_mixed_get_isa());

// the format of rows in tensors of this type (enum ggml_type), or of that name; null: there is none
const llama_kv_mixed_format * llama_kv_mixed_find_format(int32_t type, const llama_kv_mixed_isa & isa = *llama_kv_mixed_get_isa());
const llama_kv_mixed_format * llama_kv_mixed_find_format(const std::string & name);

// their names, separated by commas
std::string llama_kv_mixed_format_names();

// whether rows of n values go from one format to another by the kernels, rotated in blocks of n_rot values, 0: not rotated
bool llama_kv_mixed_can_quantize(const llama_kv_mixed_format & from, const llama_kv_mixed_format & to, int64_t n, int64_t n_rot);

// a row of n values as floats, by ggml
void llama_kv_mixed_expand_row(const llama_kv_mixed_format & format, const void * src, int64_t n, float * dst);

// a cold row as it was when it was hot, but for what quantisation took away: mean is added, n of F16 (null: none), then what was
// rotated in blocks of n_rot values (0: nothing) is rotated back
void llama_kv_mixed_restore_row(const llama_kv_mixed_format & format, const void * src, const void * mean, int64_t n, int64_t n_rot, float * dst);
