#pragma once

#include <cstdint>
#include <vector>

//
// llama_kv_mixed_policy
//
// which tokens leave the hot cache, how many, and when: pure functions of positions and sizes
//

// a hot cell that may move, as the policy sees it
struct llama_kv_mixed_cand {
    uint32_t cell; // index in the hot cache
    int32_t  pos;
    int32_t  age;  // distance to the newest hot token of its sequence, the largest over the cell's sequences

    std::vector<int32_t> seqs; // the cell's sequence ids, ascending
};

struct llama_kv_mixed_policy {
    uint32_t n_hot;
    uint32_t n_group;
    uint32_t n_sink;
    float    threshold;

    // tokens that one migration moves at most: min(25 % of hot, n_group), and at least one
    uint32_t n_move_max() const;

    // true when the hot use has passed the threshold
    bool is_over(uint32_t n_used) const;

    // attention sinks never leave hot
    bool is_pinned(int32_t pos) const {
        return pos >= 0 && (uint32_t) pos < n_sink;
    }

    // the n oldest candidates, so that no sequence keeps an older candidate than one it gives away
    // the oldest are those furthest behind the end of their sequence: sequences of different length age alike
    static std::vector<uint32_t> select(std::vector<llama_kv_mixed_cand> cands, uint32_t n);
};

// the occupancy of one stream, and what a ubatch does to it
// init_batch() runs the plan ahead of the cells to know that the whole batch fits before anything changes
struct llama_kv_mixed_plan {
    uint32_t hot_used;
    uint32_t hot_pinned; // of hot_used
    uint32_t cold_used;
    uint32_t cold_size;

    // the most tokens that fit in hot now, after as many migrations as it takes
    uint32_t room(const llama_kv_mixed_policy & policy) const;

    // migrate until n tokens fit
    // false: they do not fit, nothing changed
    bool make_room(const llama_kv_mixed_policy & policy, uint32_t n);

    // migrate until n tokens fit, place them, migrate once if that passed the threshold
    // false: they do not fit, nothing changed
    bool place(const llama_kv_mixed_policy & policy, uint32_t n, uint32_t n_pinned);

private:
    // one migration that must not touch the n_flight newest unpinned tokens, returns the tokens moved
    uint32_t migrate(const llama_kv_mixed_policy & policy, uint32_t n_flight);
};
