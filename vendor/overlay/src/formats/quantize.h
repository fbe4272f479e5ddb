// Hot rows to cold ones, rotated on the way, for the instruction set that the including file is compiled for.

#pragma once

#include "formats/rows.h"

namespace {

// values of a row that are worked on together: a multiple of all blocks that are rotated
constexpr int64_t N_PART = LLAMA_KV_MIXED_MAX_ROT;

void quantize_row(const llama_kv_mixed_format & from, const void * src, const llama_kv_mixed_format & to, void * dst, int64_t n, int64_t n_rot, const void * mean) {
    float x[N_PART];

    for (int64_t i = 0; i < n; i += N_PART) {
        const int64_t n_part = n - i < N_PART ? n - i : N_PART;

        from.load((const uint8_t *) src + ggml_row_size(from.type, i), n_part, x);
        if (n_rot > 0) {
            rotate(x, n_part, n_rot);
        }
        for (int64_t j = 0; mean && j < n_part; j += V_LEN) {
            v_store(x + j, v_sub(v_load(x + j), v_load_f16((const uint8_t *) mean + 2*(i + j))));
        }
        to.quantize(x, n_part, (uint8_t *) dst + ggml_row_size(to.type, i));
    }
}

// The sum is rotated instead of each row. Values that are not finite, or too large for F16, have a mean of 0: what is wrong with
// one row must not get into the others.
void mean_rows(const llama_kv_mixed_format & from, const void * src, size_t nb, const int32_t * rows, int64_t n_rows, int64_t n, int64_t n_rot, void * mean) {
    float x  [N_PART];
    float sum[N_PART];

    for (int64_t i = 0; i < n; i += N_PART) {
        const int64_t n_part = n - i < N_PART ? n - i : N_PART;

        memset(sum, 0, n_part*sizeof(float));
        for (int64_t r = 0; r < n_rows; ++r) {
            from.load((const uint8_t *) src + rows[r]*nb + ggml_row_size(from.type, i), n_part, x);
            for (int64_t j = 0; j < n_part; j += V_LEN) {
                v_store(sum + j, v_add(v_load(sum + j), v_load(x + j)));
            }
        }
        if (n_rot > 0) {
            rotate(sum, n_part, n_rot);
        }
        for (int64_t j = 0; j < n_part; ++j) {
            const float y = sum[j]/n_rows;
            store_scale((uint8_t *) mean + 2*(i + j), y >= -65504.0f && y <= 65504.0f ? y : 0.0f);
        }
    }
}

} // namespace
