#pragma once

#include "ggml-cpp.h"

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

//
// llama_kv_mixed_mover
//
// copies rows of one set of tensors into another on the device that holds them, rotated on the way where that is wanted:
// in one step where the CPU's kernels can quantise them, else with ggml's own get_rows and set_rows. It needs no
// llama_context, and knows nothing of cells.
//

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
    };

    // n_max: the most rows that one move copies, memory for them is set aside here
    // throws std::runtime_error when a device can not do it
    llama_kv_mixed_mover(const std::vector<pair> & pairs, uint32_t n_max);

    // row src[i] -> row dst[i], in all pairs
    // returns when the copy is complete; false: it failed, and no row but dst was written
    bool move(const std::vector<int32_t> & src, const std::vector<int64_t> & dst, int n_threads);

    // for tests: the next n moves fail, after they have copied their rows
    void fail(uint32_t n) { n_fail = n; }

private:
    uint32_t n_fail = 0;

    // the pairs that live on one device
    struct device {
        std::vector<pair> pairs;       // by ggml
        std::vector<pair> pairs_fused; // by the kernels

        ggml_backend_ptr backend;
        ggml_gallocr_ptr galloc;

        std::function<void(int)> set_n_threads;

        // meta data of the graph, rebuilt per move: it is cheap, and the number of rows varies
        std::vector<uint8_t> buf_meta;
    };

    struct graph {
        ggml_context_ptr ctx;

        ggml_cgraph * gf;

        ggml_tensor * src; // I32 [n]
        ggml_tensor * dst; // I64 [n]

        // the matrices, and where they come from
        std::map<const float *, ggml_tensor *> rots;
    };

    static graph build(device & dev, uint32_t n);

    // all of a device's pairs_fused, as a node of its graph
    static void quantize(ggml_tensor * dst, int ith, int nth, void * userdata);

    std::vector<device> devs;
};
