// Hot rows to cold ones, rotated on the way, for the instruction set that the including file is compiled for.

#pragma once

#include "formats/rows.h"

namespace {

void quantize_row(const llama_kv_mixed_format & from, const void * src, const llama_kv_mixed_format & to, void * dst, int64_t n, int64_t n_rot) {
    constexpr int64_t n_buf = LLAMA_KV_MIXED_MAX_ROT; // a multiple of all blocks that are rotated

    float x[n_buf];

    for (int64_t i = 0; i < n; i += n_buf) {
        const int64_t n_part = n - i < n_buf ? n - i : n_buf;

        from.load((const uint8_t *) src + ggml_row_size(from.type, i), n_part, x);
        if (n_rot > 0) {
            rotate(x, n_part, n_rot);
        }
        to.quantize(x, n_part, (uint8_t *) dst + ggml_row_size(to.type, i));
    }
}

} // namespace
