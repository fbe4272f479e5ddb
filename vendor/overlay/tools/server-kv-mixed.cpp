#include "server-kv-mixed.h"

#include <cmath>
#include <string>

void server_kv_mixed::update(llama_context * ctx, bool is_decoding) {
    if (is_decoding) {
        return;
    }

    stats.struct_size = sizeof(stats);

    is_mixed = ctx && llama_kv_mixed_get_stats(llama_get_memory(ctx), &stats) == 0;
    if (!is_mixed) {
        return;
    }

    use.resize(llama_n_seq_max(ctx));
    for (size_t s = 0; s < use.size(); ++s) {
        llama_kv_mixed_get_seq_use(llama_get_memory(ctx), s, &use[s].first, &use[s].second);
    }
}

void server_kv_mixed::add_metrics(std::ostream & out) const {
    if (!is_mixed) {
        return;
    }

    const auto add = [&](const char * type, const char * name, const char * what, const auto & value) {
        out << "# HELP llamacpp:kv_mixed_" << name << " Mixed KV cache: " << what << "\n"
            << "# TYPE llamacpp:kv_mixed_" << name << " " << type << "\n"
            << "llamacpp:kv_mixed_"        << name << " " << value << "\n";
    };

    add("counter", "migrations_total",        "migrations from hot to cold",         stats.n_migrations);
    add("counter", "tokens_moved_total",      "tokens moved from hot to cold",       stats.n_tokens_moved);
    add("counter", "migration_seconds_total", "time spent on migrations",            stats.t_migrate_us/1e6);
    add("counter", "batches_refused_total",   "batches for which there was no room", stats.n_refused);

    add("gauge", "hot_cells_used",  "hot cells in use",  stats.hot_used);
    add("gauge", "hot_cells",       "hot cells",         stats.hot_size);
    add("gauge", "cold_cells_used", "cold cells in use", stats.cold_used);
    add("gauge", "cold_cells",      "cold cells",        stats.cold_size);
    add("gauge", "bytes",           "bytes of hot and cold", stats.bytes_hot + stats.bytes_cold);
    add("gauge", "plain_bytes",     "bytes that a plain cache of the hot type takes for the same context", stats.bytes_plain);
}

common_json server_kv_mixed::add_to_slot(common_json slot) const {
    const size_t id = slot.at("id").get<int>();

    if (is_mixed && id < use.size()) {
        slot["kv_mixed"] = common_json {
            {"n_hot",  use[id].first},
            {"n_cold", use[id].second},
            {"cache", {
                {"hot_used",       stats.hot_used},
                {"hot_size",       stats.hot_size},
                {"cold_used",      stats.cold_used},
                {"cold_size",      stats.cold_size},
                {"n_migrations",   stats.n_migrations},
                {"n_tokens_moved", stats.n_tokens_moved},
                {"n_refused",      stats.n_refused},
                {"bytes",          stats.bytes_hot + stats.bytes_cold},
                {"bytes_plain",    stats.bytes_plain},
            }},
        };
    }

    return slot;
}

common_json server_kv_mixed::get_props(llama_context * ctx) {
    llama_kv_mixed_params params = {};
    params.struct_size = sizeof(params);

    llama_kv_mixed_stats stats = {};
    stats.struct_size = sizeof(stats);

    if (llama_kv_mixed_get_params(llama_get_memory(ctx), &params) != 0 || llama_kv_mixed_get_stats(llama_get_memory(ctx), &stats) != 0) {
        return nullptr;
    }

    char spec[256];
    llama_kv_mixed_params_format(&params, spec, sizeof(spec));

    static const char * const attn_names[] = { "auto", "fused", "compose" }; // by llama_kv_mixed_attn_type

    const auto type_name = [](int32_t type) { return ggml_type_name((ggml_type) type); };

    return {
        {"spec",        spec},
        {"hot",         params.n_hot},
        {"cold_size",   params.n_cold},
        {"n_stream",    stats.n_stream},
        {"type_hot_k",  type_name(stats.type_hot_k)},
        {"type_hot_v",  type_name(stats.type_hot_v)},
        {"type_cold_k", type_name(stats.type_cold_k)},
        {"type_cold_v", type_name(stats.type_cold_v)},
        {"group",       params.n_group},
        {"threshold",   std::round(params.threshold*1e6)/1e6},
        {"sink",        params.n_sink},
        {"mean",        params.mean != 0},
        {"attn",        attn_names[params.attn]},
        {"v_skip",      std::round(params.v_skip*1e6)/1e6},
        {"bytes",       stats.bytes_hot + stats.bytes_cold},
        {"bytes_plain", stats.bytes_plain},
    };
}

void server_kv_mixed_add_props(common_json & props, const common_json & kv_mixed) {
    if (!kv_mixed.is_null()) {
        props["kv_mixed"] = kv_mixed;
    }
}
