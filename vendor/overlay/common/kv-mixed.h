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

// The verbosity at which a line of libllama is shown: common_log_get_verbosity(), but for lines about the mixed cache, which
// are shown where the program's own are.
int common_kv_mixed_log_verbosity(ggml_log_level level, const char * text);

// a line about the cache for a banner, after a newline; nothing where the server's properties name no mixed cache
std::string common_kv_mixed_banner(const common_json & props);
