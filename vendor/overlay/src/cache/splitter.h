#pragma once

#include "cache/policy.h"

#include <cstddef>
#include <cstdint>
#include <vector>

struct llama_cparams;
struct llama_hparams;

//
// llama_kv_mixed_splitter
//
// how large the next ubatch of a batch may be: carries the plan of what hot and cold hold after the ubatches so far
//

class llama_kv_mixed_splitter {
public:
    // plans:  of all streams, before the batch
    // n_left: the batch's tokens in each of them
    llama_kv_mixed_splitter(const llama_kv_mixed_policy & policy, std::vector<llama_kv_mixed_plan> plans, std::vector<uint32_t> n_left);

    // a ubatch was split off
    void place(const std::vector<llama_kv_mixed_share> & shares);

    // ubatches so far
    size_t n_placed() const { return n_ubatches; }

    // tokens that are left
    uint32_t n_left() const;

    // the most tokens that the next ubatch may have, up to n; n as well when what is left does not fit anyway
    uint32_t limit(uint32_t n) const;

private:
    llama_kv_mixed_policy policy;

    std::vector<llama_kv_mixed_plan> plans;
    std::vector<uint32_t>            left;

    size_t n_ubatches = 0;

    bool fits = true;
};

// why the tokens that a sequence has in a batch must be in one ubatch, as a part of a sentence; null: they need not be
const char * llama_kv_mixed_whole_reason(const llama_cparams & cparams, const llama_hparams & hparams);
