#pragma once

// the cells of a saved state, and where they go

#include "cache/kv-cache-mixed.h"

#include <cstdint>
#include <map>
#include <vector>

struct llama_kv_cache_mixed::state_cell {
    uint32_t  i;
    llama_pos pos;
    llama_pos shift;

    llama_kv_cell_ext ext;

    llama_kv_cells::seq_set_t seqs;
};

struct llama_kv_cache_mixed::state_stream {
    uint32_t head; // where the search for free cells begins

    std::vector<state_cell> cells;

    // of the pages that the cells of cold are in, layer by layer
    std::map<uint32_t, std::vector<std::vector<uint8_t>>> means;
};

// where the cells of a tier of a state's stream go
struct llama_kv_cache_mixed::state_places {
    static constexpr uint32_t NONE = UINT32_MAX;

    std::vector<uint32_t> idxs; // by the state's cells; NONE: to cold, as hot tokens go there

    std::map<uint32_t, uint32_t> pages; // of the state, by those of this cache that take their means
};

struct llama_kv_cache_mixed::state_tier {
    std::vector<state_stream> streams;
};
