// All that is compiled for an instruction set. Nothing from the standard library is instantiated here: the linker could take
// such code for the whole program, and it would run where it can not.

#pragma once

#include "attention/task.h"
#include "cpu/isa.h"
#include "formats/quantize.h"
#include "formats/table.h"

namespace {

// products: in BF16, where the processor has instructions for them
template <const llama_kv_mixed_products * products = nullptr>
constexpr llama_kv_mixed_isa make_isa(const char * name) {
    return { name, formats, sizeof(formats)/sizeof(formats[0]), quantize_row, mean_rows, attn_task_of<products>, attn_merge };
}

} // namespace
