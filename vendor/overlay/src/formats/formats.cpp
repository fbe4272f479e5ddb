#include "formats/formats.h"

#include <cstring>

const llama_kv_mixed_format * llama_kv_mixed_get_format(size_t i, const llama_kv_mixed_isa & isa) {
    return i < isa.n_formats ? isa.formats + i : nullptr;
}

const llama_kv_mixed_format * llama_kv_mixed_find_format(int32_t type, const llama_kv_mixed_isa & isa) {
    for (size_t i = 0; const auto * format = llama_kv_mixed_get_format(i, isa); ++i) {
        if (format->type == type) {
            return format;
        }
    }
    return nullptr;
}

const llama_kv_mixed_format * llama_kv_mixed_find_format(const std::string & name) {
    for (size_t i = 0; const auto * format = llama_kv_mixed_get_format(i); ++i) {
        if (format->name == name) {
            return format;
        }
    }
    return nullptr;
}

std::string llama_kv_mixed_format_names() {
    std::string res;
    for (size_t i = 0; const auto * format = llama_kv_mixed_get_format(i); ++i) {
        res += (res.empty() ? "" : ", ") + std::string(format->name);
    }
    return res;
}

bool llama_kv_mixed_can_quantize(const llama_kv_mixed_format & from, const llama_kv_mixed_format & to, int64_t n, int64_t n_rot) {
    const bool is_rot = n_rot >= LLAMA_KV_MIXED_BLOCK && n_rot <= LLAMA_KV_MIXED_MAX_ROT && (n_rot & (n_rot - 1)) == 0 && n % n_rot == 0;

    return from.load && to.quantize && n > 0 && n % LLAMA_KV_MIXED_BLOCK == 0 && (n_rot == 0 || is_rot);
}

void llama_kv_mixed_expand_row(const llama_kv_mixed_format & format, const void * src, int64_t n, float * dst) {
    if (format.type == GGML_TYPE_F32) {
        memcpy(dst, src, n*sizeof(float));
    } else {
        ggml_get_type_traits(format.type)->to_float(src, dst, n);
    }
}

// the fast Walsh-Hadamard transform in blocks of n values, orthonormal and its own inverse
static void rotate(float * x, int64_t size, int64_t n) {
    for (int64_t h = 1; h < n; h *= 2) {
        for (int64_t i = 0; i < size; ++i) {
            if ((i & h) == 0) {
                const float a = x[i]    *0.70710678f;
                const float b = x[i + h]*0.70710678f;

                x[i]     = a + b;
                x[i + h] = a - b;
            }
        }
    }
}

void llama_kv_mixed_restore_row(const llama_kv_mixed_format & format, const void * src, const void * mean, int64_t n, int64_t n_rot, float * dst) {
    llama_kv_mixed_expand_row(format, src, n, dst);

    for (int64_t i = 0; mean && i < n; ++i) {
        dst[i] += ggml_fp16_to_fp32(((const ggml_fp16_t *) mean)[i]);
    }

    rotate(dst, n, n_rot);
}
