// Scores to weights, with a running maximum and sum.

#pragma once

#include "attention/mask.h"

namespace {

// slope of a head's bias, as ggml's soft_max has it (ALiBi, Press et al. 2022)
float alibi_slope(const attn_args & a, int64_t head) {
    if (a.max_bias <= 0.0f) {
        return 1.0f;
    }
    int64_t n = 1;
    while (2*n <= a.n_head) {
        n *= 2;
    }
    const float m0 = powf(2.0f, -a.max_bias/n);
    const float m1 = powf(2.0f, -a.max_bias/2.0f/n);
    return head < n ? powf(m0, (float) (head + 1)) : powf(m1, (float) (2*(head - n) + 1));
}

// Scores are logarithms to base 2 from here on: times log2(e), so that a weight is 2^(score - largest score).

// How far a score may be above the one that a row's weights are relative to, before these and the row's output are scaled
// anew: weights up to 2^8 lose nothing in floats.
constexpr float MOST_ABOVE = 8.0f;

// n scores of a row, TILE of them in memory, as they count; returns the largest of each lane
V_INLINE vf finish_scores(float * S, int n, float add, const float * mask, float slope, float softcap) {
    for (int j = n; j < TILE; ++j) {
        S[j] = 0.0f; // their mask is -inf
    }

    vf most = v_set(-INFINITY);
KVM_UNROLL
    for (int j = 0; j < TILE; j += V_LEN) {
        vf x = v_load(S + j);
        if (softcap != 0.0f) {
            x = v_mul(v_set(softcap*LOG2_E), v_tanh(v_add(x, v_set(add))));
        }
        if (mask) {
            const vf y = v_load(mask + j);
            x = v_hide(v_fma(v_set(slope*LOG2_E), y, x), y); // whatever the score of a cell that is hidden
        }
        if (softcap != 0.0f || mask) {
            v_store(S + j, x);
        }
        most = v_max(most, x);
    }
    return most;
}

// A row's scores to weights in place; most: their largest; add: what is to be added to all of them; O, m, s: the row's output,
// the score that weights are relative to, and sums of weights so far, V_LEN of these
V_INLINE void to_weights(float * S, float most, float add, float most_above, float * O, int64_t n_embd, float & m, float * s) {
    most += add;
    if (most == -INFINITY) { // nothing counts: the weights are 0, not 2^(inf - inf)
        memset(S, 0, TILE*sizeof(float));
        return;
    }

    vf sum = v_load(s);
    if (most > m + most_above) {
        if (m != -INFINITY) {
            const vf c = v_exp2(v_set(m - most));
            for (int64_t i = 0; i < n_embd; i += V_LEN) {
                v_store(O + i, v_mul(v_load(O + i), c));
            }
            sum = v_mul(sum, c);
        }
        m = most;
    }

    const vf base = v_set(m - add);
KVM_UNROLL
    for (int j = 0; j < TILE; j += V_LEN) {
        const vf w = v_exp2(v_sub(v_load(S + j), base));
        v_store(S + j, w);
        sum = v_add(sum, w);
    }
    v_store(s, sum);
}

} // namespace
