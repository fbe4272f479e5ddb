#pragma once

#include "cache/kv-cache-mixed.h"

#include "llama-memory-recurrent.h"

#include <functional>
#include <vector>

// Parts of a memory as they are before a state is read into them: their cells, and the rows that the state may overwrite
// (those of what it replaces; rows of free cells are not missed).
class llama_kv_cache_mixed::undo {
public:
    // seq_id:     the sequence that is read, -1: all
    // all_movable: others may move as well, and give their cells away
    void add(llama_kv_cache & kv, llama_seq_id seq_id, bool all_movable);

    // a sequence's state has one row; the snapshots of earlier states (n_rs_seq) are not written by a read
    void add(llama_memory_recurrent & mem, llama_seq_id seq_id);

    // the means of the pages that tokens of a sequence (-1: any) are in
    void add(const llama_kv_mixed_means & means, const llama_kv_cache & cold, llama_seq_id seq_id);

    // all of them as they were
    void restore() const;

private:
    struct rows {
        ggml_tensor * t;

        size_t offset;

        std::vector<uint8_t> data;
    };

    std::vector<rows> saved;

    std::vector<std::function<void()>> cells;

    void add(ggml_tensor * t, size_t offset, size_t size);
};
