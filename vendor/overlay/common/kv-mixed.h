#pragma once

#include "ggml.h"

#include <string>

//
// the mixed KV cache in the programs that share llama.cpp's common library: all that the patches of common/ and tools/cli call
//

struct common_arg;
class  common_json;

// --kv-mixed
common_arg common_kv_mixed_arg();

// A line of libllama's log. Those about the mixed cache are shown where the program's own are, while those of libllama need a
// higher verbosity. False: it is not one of them.
bool common_kv_mixed_log(ggml_log_level level, const char * text);

// a line about the cache for a banner, after a newline; nothing where the server's properties name no mixed cache
std::string common_kv_mixed_banner(const common_json & props);
