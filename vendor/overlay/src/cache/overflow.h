#pragma once

#include "cache/mover.h"

#include "ggml-cpp.h"

#include <cstdint>
#include <map>
#include <vector>

//
// llama_kv_mixed_overflow
//
// hot rows of a state for which hot has no room: they are read into memory of their own, and go to cold from there
//

class llama_kv_mixed_overflow {
public:
    // pairs:  hot and cold tensors, as of the migrations
    // n_rows: the rows of each of them
    // throws std::runtime_error when there is no memory for them
    llama_kv_mixed_overflow(const std::vector<llama_kv_mixed_mover::pair> & pairs, uint32_t n_rows);

    // where the rows of a hot tensor are read to, [n_embd, n_rows]
    ggml_tensor * get(const ggml_tensor * hot) const { return rows.at(hot); }

    // all of them to these rows of the cold tensors; false: it failed
    bool move(const llama_kv_mixed_moves & moves, int n_threads);

private:
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;

    std::map<const ggml_tensor *, ggml_tensor *> rows;

    std::unique_ptr<llama_kv_mixed_mover> mover;
};
