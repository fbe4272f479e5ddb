#pragma once

#include <cstdint>
#include <map>
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

    // the positions of attention sinks
    bool is_sink(int32_t pos) const {
        return pos >= 0 && (uint32_t) pos < n_sink;
    }

    // the most tokens that are pinned at the same time: half of hot, or the sinks of one sequence
    // at least one cell of hot is left to move, so hot and cold can both be filled to the last cell
    uint32_t n_pin_max() const;

    // Attention sinks are pinned: they do not leave hot. A token with several sequences counts as one of the lowest of
    // them. Pinned are up to n_sink tokens of a sequence, at the sinks' positions, and n_pin_max() of all together: the
    // first by position, then by sequences, then by cell.
    // Returns the candidates that are not pinned.
    std::vector<llama_kv_mixed_cand> without_pinned(std::vector<llama_kv_mixed_cand> cands) const;

    // the n oldest candidates, so that no sequence keeps an older candidate than one it gives away
    // the oldest are those furthest behind the end of their sequence: sequences of different length age alike
    static std::vector<uint32_t> select(std::vector<llama_kv_mixed_cand> cands, uint32_t n);
};

// a ubatch's tokens in one stream
struct llama_kv_mixed_share {
    uint32_t strm;
    uint32_t n;

    std::vector<int32_t> sinks; // those at sinks' positions: the lowest sequence of each
};

// The occupancy of one stream, and what a ubatch does to it.
// init_batch() runs the plan ahead of the cells to know that the whole batch fits before anything changes.
//
// How many tokens are pinned does not depend on which ones have moved: a token at a sink's position may move only when
// its sequence, or hot, has as many pinned tokens as it can have.
struct llama_kv_mixed_plan {
    uint32_t hot_used;
    uint32_t cold_used;
    uint32_t cold_size;

    std::map<int32_t, uint32_t> n_sinks; // hot tokens at sinks' positions, by the lowest of their sequences

    uint32_t n_pinned(const llama_kv_mixed_policy & policy) const;

    // the most tokens that fit in hot now, after as many migrations as it takes
    uint32_t room(const llama_kv_mixed_policy & policy) const;

    // migrate until n tokens fit
    // false: they do not fit, nothing changed
    bool make_room(const llama_kv_mixed_policy & policy, uint32_t n);

    // migrate until the tokens fit, place them, migrate once if that passed the threshold
    // false: they do not fit, nothing changed
    bool place(const llama_kv_mixed_policy & policy, const llama_kv_mixed_share & share);

private:
    // one migration, of which n_movable tokens can be part
    void migrate(const llama_kv_mixed_policy & policy, uint32_t n_movable);
};
