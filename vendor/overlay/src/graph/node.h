#pragma once

#include "attention/attention.h"
#include "ops/op.h"

#include "ggml.h"

#include <atomic>
#include <cstdint>
#include <deque>

//
// the CPU's kernel as nodes of a compute graph
//

struct llama_kv_mixed_node_inputs {
    ggml_tensor * q;      // [n_embd_k, n_head, n_tokens]
    ggml_tensor * k_hot;  // [n_embd_k, n_head_kv, n_hot, n_stream]
    ggml_tensor * v_hot;  // [n_embd_v, n_head_kv, n_hot, n_stream]
    ggml_tensor * k_cold; // null: nothing is cold
    ggml_tensor * v_cold;
    ggml_tensor * k_mean; // [n_embd_k*n_head_kv, n_page, n_stream], see llama_kv_mixed_attn_args; null: none
    ggml_tensor * mask;   // [n_cold + n_hot, n_tokens/n_stream, 1, n_stream]
    ggml_tensor * sinks;  // null: none
};

// the attention nodes of one graph: lives as long as that does
class llama_kv_mixed_attn_nodes {
public:
    // [n_embd_v*n_head, n_tokens]
    // n_threads: the most that will compute the graph; further ones have nothing to do
    ggml_tensor * build(ggml_context * ctx, const llama_kv_mixed_node_inputs & inputs, const llama_kv_mixed_op & op, int n_threads);

    // before every computation of the graph
    void reset();

    // the threads that there is memory for: more of them need another graph
    int get_n_threads() const;

private:
    struct node {
        const llama_kv_mixed_isa * isa;
        llama_kv_mixed_attn_plan plan;

        int n_slot;                    // threads that there is scratch memory for

        llama_kv_mixed_attn_progress progress;
    };

    // its elements stay where they are, the graph points at them
    std::deque<node> nodes;

    static void compute(ggml_tensor * dst, int ith, int nth, void * userdata);
    static void merge  (ggml_tensor * dst, int ith, int nth, void * userdata);
};
