#pragma once

#include "llama-kv-mixed.h"

#include <optional>
#include <string>

//
// the parameters of a mixed KV cache, and their text
//

// a cold type that depends on the device
#define LLAMA_KV_MIXED_TYPE_AUTO (-1)

// hot cells that depend on the context
#define LLAMA_KV_MIXED_HOT_AUTO 0

// params with that as the given type
llama_kv_mixed_params llama_kv_mixed_with_auto(llama_kv_mixed_params params, ggml_type type);

// hot cells of a stream of n_ctx_seq tokens that n_seq_stream sequences share
// n_whole: tokens that had better have room at once, 0: none
uint32_t llama_kv_mixed_hot_auto(uint32_t n_ctx_seq, uint32_t n_seq_stream, uint32_t n_whole = 0);

// nothing: the spec asks for a plain cache; throws std::invalid_argument with one sentence
std::optional<llama_kv_mixed_params> llama_kv_mixed_parse_spec(const std::string & spec);

void llama_kv_mixed_validate(const llama_kv_mixed_params & params);

// a spec that is read back to the same parameters, without those that are the defaults but for hot and cold
std::string llama_kv_mixed_format_spec(const llama_kv_mixed_params & params);
