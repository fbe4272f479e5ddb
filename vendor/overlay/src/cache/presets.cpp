#include "cache/presets.h"

// docs/fidelity.md has what each of them costs and keeps
static const llama_kv_mixed_preset_row presets[] = {
    { "default", "a third of the bytes of F16 at 8192 tokens",                                       "" },
    { "quality", "as close to F16 as a uniform Q8_0 cache, with two thirds of its bytes",            "cold_k=q5_0" },
    { "memory",  "the smallest: half as many tokens stay exact, worth it for short contexts and many sequences", "hot=256" },
};

const llama_kv_mixed_preset_row * llama_kv_mixed_get_preset_row(size_t i) {
    return i < sizeof(presets)/sizeof(presets[0]) ? presets + i : nullptr;
}

const llama_kv_mixed_preset_row * llama_kv_mixed_find_preset(const std::string & name) {
    for (const auto & preset : presets) {
        if (preset.name == name) {
            return &preset;
        }
    }
    return nullptr;
}

std::string llama_kv_mixed_preset_names() {
    std::string res;
    for (const auto & preset : presets) {
        res += (res.empty() ? "" : ", ") + std::string(preset.name);
    }
    return res;
}
