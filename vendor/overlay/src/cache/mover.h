#pragma once

#include "ggml-cpp.h"

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

//
// llama_kv_mixed_mover
//
// copies rows of one set of tensors into another on the device that holds them, rotated on the way and less a mean where that
// is wanted: in one step where the CPU's kernels can quantise them, else with ggml's own operations. It needs no
// llama_context, and knows nothing of cells.
//

// which rows a move copies
struct llama_kv_mixed_moves {
    std::vector<int32_t> src; // rows of the tensors that rows come from
    std::vector<int64_t> dst; // rows of those that they go to, as many

    std::vector<int32_t> page;     // rows of the means, as many
    std::vector<int64_t> page_new; // those that the rows that go there make, ascending; the others are used as they are

    size_t size() const { return src.size(); }

    // further ones, which go to other pages
    void append(const llama_kv_mixed_moves & others);
};

class llama_kv_mixed_mover {
public:
    // rows of src go to rows of dst, both [n_embd, n_rows], of any KV cache type
    struct pair {
        ggml_tensor * src;
        ggml_tensor * dst;

        // rows are multiplied with this Walsh-Hadamard matrix in blocks of n_rot values; 0: they are not
        // [n_rot, n_rot], lives as long as the mover
        int64_t       n_rot;
        const float * rot;

        // F16 [n_embd, n_page]: means that rows are stored less of; null: they are not
        ggml_tensor * mean;
    };

    // the inputs that nodes for a device (ops/device.h) take
    struct op_inputs {
        ggml_tensor * row_from; // I32 [n]
        ggml_tensor * row_to;   // I64 [n]
        ggml_tensor * page;     // I32 [n], null: there are no means
        ggml_tensor * page_new; // I64 [n_new], null: there are no new ones
    };

    // those that move a pair's rows
    static std::vector<ggml_tensor *> build_ops(ggml_context * ctx, const pair & p, const op_inputs & in);

    // n_max: the most rows that one move copies, memory for them is set aside here
    // throws std::runtime_error when a device can not do it
    llama_kv_mixed_mover(const std::vector<pair> & pairs, uint32_t n_max);

    // In all pairs; false: it failed, and nothing but rows dst and means page_new was written.
    // sched: what rows may be on their way from, null: they are where they belong. A device of it that has kernels for moves
    // (ops/device.h) copies behind what it was given before, and may not have done so yet when this returns; others are waited
    // for.
    bool move(const llama_kv_mixed_moves & moves, int n_threads, ggml_backend_sched_t sched);

    // for tests: the next n moves fail, after they have copied their rows
    void fail(uint32_t n) { n_fail = n; }

private:
    uint32_t n_fail = 0;

    // what a move is told, as long as it may be read
    struct order {
        llama_kv_mixed_moves   moves;
        ggml_backend_event_ptr done; // null: it is
    };

    // the pairs that live on one device
    struct device {
        std::vector<pair> pairs;       // by ggml
        std::vector<pair> pairs_fused; // by the CPU's kernels
        std::vector<pair> pairs_op;    // by the device's own

        // whether its own kernels do all of a move, which then need not be waited for
        bool can_queue() const { return pairs.empty() && pairs_fused.empty(); }

        ggml_backend_ptr backend; // without a scheduler
        ggml_gallocr_ptr galloc;

        std::function<void(int)> set_n_threads;

        // the last ones: so many may be on their way
        std::array<order, 8> orders;
        size_t               n_orders = 0;

        // meta data of the graph, rebuilt per move: it is cheap, and the number of rows varies
        std::vector<uint8_t> buf_meta;
    };

    struct graph {
        ggml_context_ptr ctx;

        ggml_cgraph * gf;

        ggml_tensor * src;      // I32 [n]
        ggml_tensor * dst;      // I64 [n]
        ggml_tensor * page;     // I32 [n], null: no pair has means
        ggml_tensor * page_new; // I64 [n_new], null: there are none
        ggml_tensor * share;    // F32 [n, n_new]: how much of a row is in a mean

        // the matrices, and where they come from
        std::map<const float *, ggml_tensor *> rots;
    };

    // n rows, n_new means
    static graph build(device & dev, uint32_t n, uint32_t n_new);

    // all of a device's pairs_fused, as nodes of its graph: new means, then the rows
    static void make_means(ggml_tensor * dst, int ith, int nth, void * userdata);
    static void quantize  (ggml_tensor * dst, int ith, int nth, void * userdata);

    std::vector<device> devs;
};
