#include "rpc/lost.h"

#include "ggml-impl.h"

#include <map>
#include <mutex>
#include <string>

static std::mutex mutex;

static std::map<std::string, uint32_t> & get_counts() {
    static std::map<std::string, uint32_t> res;
    return res;
}

void llama_kv_mixed_rpc_add_lost(const char * endpoint) {
    GGML_LOG_ERROR("RPC: no server at %s, or it is gone, or it refused what it was sent: its log says what was\n", endpoint);

    std::lock_guard<std::mutex> lock(mutex);
    ++get_counts()[endpoint];
}

uint32_t llama_kv_mixed_rpc_n_lost(const char * endpoint) {
    std::lock_guard<std::mutex> lock(mutex);
    return get_counts()[endpoint];
}
