#pragma once

#include "json.h"

#include "llama-kv-mixed.h"

#include <ostream>
#include <utility>
#include <vector>

//
// the mixed KV cache in llama-server: all that the patches of tools/server call
//

// What the server's mixed cache holds and has done. It is a copy, taken between batches by the thread that decodes: /metrics and
// /slots are answered by other threads while a batch is computed.
struct server_kv_mixed {
    // is_decoding: a batch is being computed, so nothing changes
    void update(llama_context * ctx, bool is_decoding);

    // as Prometheus reads them, nothing where the cache is a plain one
    void add_metrics(std::ostream & out) const;

    // a slot as /slots shows it, with its share of the cache and what all of it holds; as it is where the cache is a plain one
    common_json add_to_slot(common_json slot) const;

    // parameters and sizes for /props, null where the cache is a plain one
    static common_json get_props(llama_context * ctx);

private:
    bool is_mixed = false;

    llama_kv_mixed_stats stats = {};

    std::vector<std::pair<uint32_t, uint32_t>> use; // tokens that are hot and cold, by sequence
};

// the server's properties, with those of its mixed cache if there are any
void server_kv_mixed_add_props(common_json & props, const common_json & kv_mixed);
