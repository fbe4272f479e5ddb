// The scale of a block of values that leaves the least squared error.

#pragma once

#include "formats/rows.h"

namespace {

// Sixteen scales are tried. Each brings the largest value of the block to a number at or near an end of the grid, the numbers
// that a value can be stored as; all values go to the nearest one. For these the best scale is that of least squares, which
// is rounded to F16. The first of the sixteen is ggml's, others are those that do best together on values with a normal and a
// Laplace distribution: what they leave is 0.1 % above the squared error that can be had at all, ggml's is 12 % above it.
// Sums are taken value by value, for all scales side by side: every instruction set gives the same bits.
constexpr int N_SCALES = 16;

// The scale, a number that F16 has. Its error is not above that with ggml's scale: another one must be better by more than F32
// may be wrong. A gain (see below) is off by 2^-18 of the sum of squares at most, being twice a sum of 32 rounded products, and
// by another 2^-19 without its last four bits, so that two of them may seem to differ by up to 2^-16 of it.
// grid: a struct with
//   ends:      where the largest value goes
//   nearest(): the number nearest to each of some values over their scale
template <class grid>
V_INLINE float search_scale(const float * x, const block_f32 & b) {
    constexpr int N_VEC = N_SCALES/V_LEN;

    const float max = largest(x, b);
    if (fabsf(max) < 1e-15f) { // its scale would be 0 in F16
        return 0.0f;
    }

    alignas(64) float factor[N_SCALES]; // inverse scales
    alignas(64) float d     [N_SCALES];
    alignas(64) float gain  [N_SCALES]; // by how much the squared error is below that of zeros

    for (int c = 0; c < N_SCALES; c += V_LEN) {
        v_store(factor + c, v_div(v_load(grid::ends + c), v_set(max)));
    }
    factor[0] = 1.0f/(max/grid::ends[0]); // with ggml's roundings

    vf sum_qx[N_VEC];
    vf sum_qq[N_VEC];
KVM_UNROLL
    for (int c = 0; c < N_VEC; ++c) {
        sum_qx[c] = sum_qq[c] = v_zero();
    }
    for (int i = 0; i < BLOCK; ++i) {
        const vf y = v_set(x[i]);
KVM_UNROLL
        for (int c = 0; c < N_VEC; ++c) {
            const vf q = grid::nearest(v_mul(y, v_load(factor + c*V_LEN)));
            sum_qx[c] = v_add(sum_qx[c], v_mul(q, y));
            sum_qq[c] = v_fma(q, q, sum_qq[c]); // whole numbers
        }
    }
KVM_UNROLL
    for (int c = 0; c < N_VEC; ++c) {
        const vf y = v_round_f16(v_div(sum_qx[c], sum_qq[c]));
        v_store(d + c*V_LEN, y);
        v_store(gain + c*V_LEN, v_mul(y, v_sub(v_add(sum_qx[c], sum_qx[c]), v_mul(y, sum_qq[c]))));
    }

    // the number of a scale takes the place of the last four bits of its gain: the largest one is found without branches
    gain[0] *= 1.0f + 0x1p-16f;
    int32_t most = 0;
    for (int c = 0; c < N_SCALES; ++c) {
        const int32_t y = (load_i32(gain + c) & ~15) | c;
        most = y > most ? y : most;
    }
    return d[most & 15];
}

} // namespace
