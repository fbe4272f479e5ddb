#pragma once

#include "attention/attention.h"
#include "ops/op.h"

#include "ggml.h"

#include <atomic>
#include <cstdint>
#include <deque>
#include <vector>

//
// nodes of a client's graph, computed by the CPU's kernels with memory that is not the client's
//

// the nodes of one graph, which may be computed again and again: they are done one after another, and share their scratch memory
struct llama_kv_mixed_rpc_graph {
    explicit llama_kv_mixed_rpc_graph(int n_threads) : n_threads(n_threads) {}

    // give a node a function of this process
    // false: there is not so much scratch memory
    bool add_attn(ggml_tensor * node, const llama_kv_mixed_attn_args & args);
    bool add_move(ggml_tensor * node, const llama_kv_mixed_move_args & args);

private:
    struct entry {
        llama_kv_mixed_rpc_graph * graph;

        llama_kv_mixed_attn_plan plan;

        llama_kv_mixed_attn_progress progress;
        std::atomic<int>     done; // threads that found no more tasks
        std::atomic<int>     left; // threads that are through
    };

    // that there is scratch memory for; further ones have nothing to do
    const int n_threads;

    std::deque<entry> entries; // they stay where they are, nodes point at them

    std::vector<float> partial; // what tasks leave for the merge
    std::vector<float> scratch; // of all threads

    std::vector<int32_t> rows;  // of a page, for each thread

    static void attend    (ggml_tensor * dst, int ith, int nth, void * userdata);
    static void move      (ggml_tensor * dst, int ith, int nth, void * userdata);
    static void make_means(ggml_tensor * dst, int ith, int nth, void * userdata);
};
