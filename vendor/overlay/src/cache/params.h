#pragma once

#include "llama-kv-mixed.h"

#include <optional>
#include <string>

//
// the parameters of a mixed KV cache, and where they come from
//

// a cold type that depends on the device
#define LLAMA_KV_MIXED_TYPE_AUTO (-1)

// params with that as the given type
llama_kv_mixed_params llama_kv_mixed_with_auto(llama_kv_mixed_params params, ggml_type type);

// throws std::invalid_argument with one sentence
llama_kv_mixed_params llama_kv_mixed_parse_spec(const std::string & spec);
void                  llama_kv_mixed_validate  (const llama_kv_mixed_params & params);

// what the context that is being created on this thread asks for: llama_kv_mixed_init_from_model()'s parameters,
// else those of the environment variable LLAMA_KV_MIXED; nothing when the feature is off
std::optional<llama_kv_mixed_params> llama_kv_mixed_params_requested();

// for the duration of a scope, what llama_kv_mixed_params_requested() answers on this thread
class llama_kv_mixed_params_scope {
public:
    explicit llama_kv_mixed_params_scope(std::optional<llama_kv_mixed_params> params);
    ~llama_kv_mixed_params_scope();

    llama_kv_mixed_params_scope(const llama_kv_mixed_params_scope &) = delete;
    llama_kv_mixed_params_scope & operator=(const llama_kv_mixed_params_scope &) = delete;
};

// the text behind llama_kv_mixed_last_error()
std::string & llama_kv_mixed_error();
