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

// n scores to weights in place, TILE of them; add: what is to be added to the scores; O, m, s: the row's output, largest score and sums of weights so far, V_LEN of
// these; returns the largest of the weights
V_INLINE float softmax_row(float * S, int n, float add, const float * mask, float slope, float softcap, float * O, int64_t n_embd, float & m, float * s) {
    for (int j = n; j < TILE; ++j) {
        S[j] = 0.0f; // their mask is -inf
    }

    constexpr int N_VEC = TILE/V_LEN;
    vf x[N_VEC];

    // what is added to all scores can be added to their maximum instead
    const bool  add_first = softcap != 0.0f && add != 0.0f;
    const float add_last  = add_first ? 0.0f : add;

KVM_UNROLL
    for (int i = 0; i < N_VEC; ++i) {
        x[i] = v_load(S + i*V_LEN);
        if (add_first) {
            x[i] = v_add(x[i], v_set(add));
        }
        if (softcap != 0.0f) {
            x[i] = v_mul(v_set(softcap), v_tanh(x[i]));
        }
        if (mask) {
            const vf y = v_load(mask + i*V_LEN);
            x[i] = v_hide(v_fma(v_set(slope), y, x[i]), y); // whatever the score of a cell that is hidden
        }
    }

    vf most = x[0];
KVM_UNROLL
    for (int i = 1; i < N_VEC; ++i) {
        most = v_max(most, x[i]);
    }

    const float m_tile = v_hmax(most) + add_last;
    if (m_tile == -INFINITY) { // nothing counts: the weights are 0, not e^(inf - inf)
        memset(S, 0, TILE*sizeof(float));
        return 0.0f;
    }

    vf sum = v_load(s);
    if (m_tile > m) {
        if (m != -INFINITY) {
            const vf c = v_exp(v_set(m - m_tile));
            for (int64_t i = 0; i < n_embd; i += V_LEN) {
                v_store(O + i, v_mul(v_load(O + i), c));
            }
            sum = v_mul(sum, c);
        }
        m = m_tile;
    }

    const vf base = v_set(m - add_last);
KVM_UNROLL
    for (int i = 0; i < N_VEC; ++i) {
        const vf w = v_exp(v_sub(x[i], base));
        v_store(S + i*V_LEN, w);
        sum = v_add(sum, w);
    }
    v_store(s, sum);

    // the largest weight e^(m_tile - m), up to a factor of 2
    return pow2_above((m_tile - m)*1.44269504f);
}

} // namespace
