#pragma once

#include <cstddef>
#include <string>

//
// presets: sets of parameters that have a name
//

struct llama_kv_mixed_preset_row {
    const char * name;
    const char * what; // what it is good for
    const char * spec; // the parameters that are not the defaults, "": none
};

// the i-th preset; null: there are no more
const llama_kv_mixed_preset_row * llama_kv_mixed_get_preset_row(size_t i);

// the one of that name; null: there is none
const llama_kv_mixed_preset_row * llama_kv_mixed_find_preset(const std::string & name);

// their names, separated by commas
std::string llama_kv_mixed_preset_names();
