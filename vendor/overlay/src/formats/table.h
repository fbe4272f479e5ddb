// The formats of rows, for the instruction set that the including file is compiled for: one line each.

#pragma once

#include "formats/float.h"
#include "formats/iq4_nl.h"
#include "formats/q4_0.h"
#include "formats/q8_0.h"

namespace {

// rows that ggml quantises and expands
constexpr llama_kv_mixed_format make_ggml_format(const char * name, ggml_type type) {
    return { name, type, nullptr, nullptr, nullptr, nullptr, nullptr, 0, nullptr };
}

constexpr llama_kv_mixed_format formats[] = {
    format_f32,
    format_f16,
    format_bf16,
    format_q8_0,
    format_q4_0,
    make_ggml_format("q4_1",   GGML_TYPE_Q4_1),
    format_iq4_nl,
    make_ggml_format("q5_0",   GGML_TYPE_Q5_0),
    make_ggml_format("q5_1",   GGML_TYPE_Q5_1),
};

} // namespace
