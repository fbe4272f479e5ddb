// what the log tells of a cache when it begins and when it ends

#include "cache/kv-cache-mixed.h"
#include "cache/params.h"

#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cinttypes>
#include <cstdlib>
#include <string>

// The lines begin with this: programs of llama.cpp show such a line where they leave out what libllama has to say.
#define PREFIX "llama_kv_mixed: "

static double to_mib(uint64_t n_bytes) {
    return n_bytes/1024.0/1024.0;
}

static std::string types_text(int32_t type_k, int32_t type_v) {
    const std::string k = ggml_type_name((ggml_type) type_k);
    const std::string v = ggml_type_name((ggml_type) type_v);

    return k == v ? k : "K " + k + ", V " + v;
}

static std::string bytes_text(const llama_kv_mixed_stats & stats) {
    const uint64_t n_bytes = stats.bytes_hot + stats.bytes_cold;

    return format("%.1f MiB, %.3f of the %.1f MiB of %s alone", to_mib(n_bytes), (double) n_bytes/std::max<uint64_t>(1, stats.bytes_plain),
        to_mib(stats.bytes_plain), types_text(stats.type_hot_k, stats.type_hot_v).c_str());
}

void llama_kv_cache_mixed::announce(bool hot_auto) {
    // (a model that is only being measured has no memory)
    if (model.hparams.no_alloc) {
        return;
    }

    is_announced = true;

    const auto stats = get_stats();

    const uint32_t n_shared = n_stream == 1 ? n_seq_max : 1;

    std::string cold = "no cold ones: the context fits in hot";
    if (has_cold()) {
        cold = format("%u cold cells of %s", params.n_cold, types_text(stats.type_cold_k, stats.type_cold_v).c_str());
    }

    std::string text = format("mixed KV cache: %u hot cells of %s, %s", params.n_hot, types_text(stats.type_hot_k, stats.type_hot_v).c_str(), cold.c_str());
    if (n_stream > 1) {
        text += format(", for each of %u sequences", n_stream);
    }
    text += "; " + bytes_text(stats);
    if (n_shared > 1) {
        text += format("; %u sequences share hot", n_shared);
    }

    // what the shares of the other sequences take, against cold cells in their place
    const uint32_t n_one = llama_kv_mixed_hot_auto(n_ctx_seq, 1);
    if (hot_auto && has_cold() && n_shared > 1 && params.n_hot > n_one) {
        const double bytes_cell = (double) stats.bytes_hot/stats.hot_size - (double) stats.bytes_cold/stats.cold_size;

        text += format(", which has %u cells for each of them and takes %.1f MiB more than with %u for all (hot=%u)",
            params.n_hot/n_shared, to_mib((params.n_hot - n_one)*bytes_cell), n_one, n_one);
    }

    LLAMA_LOG_INFO(PREFIX "%s\n", text.c_str());

    // for programs that know nothing of this cache
    const char * LLAMA_KV_MIXED_TRACE = getenv("LLAMA_KV_MIXED_TRACE");
    const std::string level = LLAMA_KV_MIXED_TRACE ? LLAMA_KV_MIXED_TRACE : "";

    trace->start_stderr(level == "on" ? 1 : std::atoi(level.c_str()), make_event(LLAMA_KV_MIXED_EVENT_INIT, -1));
}

llama_kv_cache_mixed::~llama_kv_cache_mixed() {
    if (!is_announced) {
        return;
    }

    const auto stats = get_stats();

    std::string text = format("the mixed KV cache ends: %u of %u hot and %u of %u cold cells in use",
        stats.hot_used, stats.hot_size, stats.cold_used, stats.cold_size);

    text += format("; %" PRIu64 " migrations moved %" PRIu64 " tokens in %.1f ms", stats.n_migrations, stats.n_tokens_moved, stats.t_migrate_us/1000.0);
    if (stats.n_refused > 0) {
        text += format(", %" PRIu64 " batches were refused", stats.n_refused);
    }

    LLAMA_LOG_INFO(PREFIX "%s; %s\n", text.c_str(), bytes_text(stats).c_str());
}
