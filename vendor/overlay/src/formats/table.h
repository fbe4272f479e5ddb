// The formats of rows, for the instruction set that the including file is compiled for: one line each.

#pragma once

#include "formats/float.h"
#include "formats/iq4_nl.h"
#include "formats/q4_q5.h"
#include "formats/q8_0.h"

namespace {

constexpr llama_kv_mixed_format formats[] = {
    format_f32,
    format_f16,
    format_bf16,
    format_q8_0,
    format_q4_0,
    format_q4_1,
    format_iq4_nl,
    format_q5_0,
    format_q5_1,
};

} // namespace
