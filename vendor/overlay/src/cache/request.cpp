#include "cache/request.h"

#include "llama-impl.h"

#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <stdexcept>

#if defined(__APPLE__)
#include <crt_externs.h>
#elif !defined(_WIN32)
#include <unistd.h>
extern char ** environ;
#endif

std::string & llama_kv_mixed_error() {
    static thread_local std::string error;
    return error;
}

namespace {
struct request {
    bool set = false; // false: ask the process, and the environment
    std::optional<llama_kv_mixed_params> params;
};
}

static thread_local request request_cur;

// of the context that is being created on this thread: the types that it asks for, where they are quantised
static thread_local struct {
    int32_t k = LLAMA_KV_MIXED_TYPE_AUTO;
    int32_t v = LLAMA_KV_MIXED_TYPE_AUTO;
} types_cur;

// of the process
static std::optional<std::string> spec_process;

llama_kv_mixed_params_scope::llama_kv_mixed_params_scope(std::optional<llama_kv_mixed_params> params) {
    request_cur = { true, params };
}

llama_kv_mixed_params_scope::~llama_kv_mixed_params_scope() {
    request_cur = {};
}

void llama_kv_mixed_set_request(std::optional<std::string> spec) {
    if (spec) {
        llama_kv_mixed_parse_spec(*spec);
    }
    spec_process = std::move(spec);
}

// without the context's types
static std::optional<llama_kv_mixed_params> get_request() {
    if (request_cur.set) {
        return request_cur.params;
    }

    if (spec_process) {
        return llama_kv_mixed_parse_spec(*spec_process);
    }

    const char * LLAMA_KV_MIXED = getenv("LLAMA_KV_MIXED");

    try {
        return llama_kv_mixed_parse_spec(LLAMA_KV_MIXED ? LLAMA_KV_MIXED : "");
    } catch (const std::invalid_argument & err) {
        throw std::invalid_argument(format("LLAMA_KV_MIXED: %s", err.what()));
    }
}

std::optional<llama_kv_mixed_params> llama_kv_mixed_params_requested() {
    auto res = get_request();

    if (res) {
        if (res->type_cold_k == LLAMA_KV_MIXED_TYPE_AUTO) { res->type_cold_k = types_cur.k; }
        if (res->type_cold_v == LLAMA_KV_MIXED_TYPE_AUTO) { res->type_cold_v = types_cur.v; }
    }

    return res;
}

void llama_kv_mixed_take_types(ggml_type & type_k, ggml_type & type_v) {
    types_cur = {};

    std::optional<llama_kv_mixed_params> params;
    try {
        params = get_request();
    } catch (const std::invalid_argument &) {
        return; // this is said where the memory is made
    }

    if (!params) {
        return;
    }

    const struct { char name; ggml_type & type; int32_t & cur; int32_t cold; } sides[] = {
        { 'K', type_k, types_cur.k, params->type_cold_k },
        { 'V', type_v, types_cur.v, params->type_cold_v },
    };

    for (const auto & side : sides) {
        if (!ggml_is_quantized(side.type)) {
            continue;
        }

        if (side.cold == LLAMA_KV_MIXED_TYPE_AUTO) {
            LLAMA_LOG_INFO("llama_kv_mixed: the cache type %s of %c is that of its cold rows, the others are f16\n", ggml_type_name(side.type), side.name);
        } else {
            LLAMA_LOG_INFO("llama_kv_mixed: the cache type %s of %c is not used: the parameters of the mixed cache name %s for its cold rows, the others are f16\n",
                ggml_type_name(side.type), side.name, ggml_type_name((ggml_type) side.cold));
        }

        side.cur  = side.type;
        side.type = GGML_TYPE_F16;
    }
}

//
// the environment
//

// letters only, in upper case
static std::string letters(const std::string & s) {
    std::string res;
    for (const unsigned char c : s) {
        if (std::isalpha(c)) {
            res += (char) std::toupper(c);
        }
    }
    return res;
}

static bool looks_like_ours(const std::string & name) {
    const std::string text = letters(name);

    return text.compare(0, 5, "LLAMA") == 0 && (text.find("KVMIX") != std::string::npos || text.find("MIXEDKV") != std::string::npos);
}

void llama_kv_mixed_check_environment() {
    static std::once_flag once;

    std::call_once(once, [] {
#if defined(__APPLE__)
        char ** vars = *_NSGetEnviron();
#elif defined(_WIN32)
        char ** vars = _environ;
#else
        char ** vars = environ;
#endif
        for (; vars && *vars; ++vars) {
            const std::string var  = *vars;
            const std::string name = var.substr(0, var.find('='));

            const bool known = name == "LLAMA_KV_MIXED" || name == "LLAMA_ARG_KV_MIXED" || name == "LLAMA_KV_MIXED_TRACE";

            if (!known && looks_like_ours(name)) {
                // not to the log, which many programs turn off
                fprintf(stderr, "warning: the variable %s is not known and does nothing: a mixed KV cache is switched on by LLAMA_KV_MIXED, its trace by LLAMA_KV_MIXED_TRACE\n",
                    name.c_str());
            }
        }
    });
}
