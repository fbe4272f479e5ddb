#pragma once

#include "cache/params.h"

//
// which cache a context is to have: what its maker, the process, the environment and the context's own types ask for
//

// What the context that is being created on this thread asks for: llama_kv_mixed_init_from_model()'s parameters, else those of
// llama_kv_mixed_set_default(), else those of the environment variable LLAMA_KV_MIXED; nothing when the feature is off. A cold
// type that is left open is that of the context, see llama_kv_mixed_take_types().
// Throws std::invalid_argument with one sentence.
std::optional<llama_kv_mixed_params> llama_kv_mixed_params_requested();

// for the duration of a scope, what llama_kv_mixed_params_requested() answers on this thread
class llama_kv_mixed_params_scope {
public:
    explicit llama_kv_mixed_params_scope(std::optional<llama_kv_mixed_params> params);
    ~llama_kv_mixed_params_scope();

    llama_kv_mixed_params_scope(const llama_kv_mixed_params_scope &) = delete;
    llama_kv_mixed_params_scope & operator=(const llama_kv_mixed_params_scope &) = delete;
};

// see llama_kv_mixed_set_default()
void llama_kv_mixed_set_request(std::optional<std::string> spec);

// A context on this thread is to have rows of these types. Where it asks for a mixed cache, a quantised type is that of cold
// rows, unless the parameters name another one, and what is not cold is F16: the types change to that, and the log says so.
void llama_kv_mixed_take_types(ggml_type & type_k, ggml_type & type_v);

// once in a process: a warning on stderr about variables that look like ours and are not
void llama_kv_mixed_check_environment();

// the text behind llama_kv_mixed_last_error()
std::string & llama_kv_mixed_error();
