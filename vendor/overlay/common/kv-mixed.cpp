#include "kv-mixed.h"

#include "arg.h"
#include "json.h"
#include "log.h"

#include "llama-kv-mixed.h"

#include <cstring>
#include <stdexcept>

static std::string get_presets() {
    std::string res;

    llama_kv_mixed_preset preset = {};
    preset.struct_size = sizeof(preset);

    for (uint32_t i = 0; llama_kv_mixed_get_preset(i, &preset) == 0; ++i) {
        res += std::string("- ") + preset.name + ": " + preset.what + "\n";
    }

    return res;
}

common_arg common_kv_mixed_arg() {
    return common_arg(
        {"--kv-mixed"}, "SPEC",
        "KV cache with the newest tokens in F16 (hot) and older ones quantised (cold): on, off, a preset, parameters, or a preset "
        "and parameters after it (quality,hot=1024)\n"
        "presets:\n" + get_presets() +
        "parameters: hot=N, cold=TYPE, cold_k=TYPE, cold_v=TYPE, cold_size=N, group=N, threshold=SHARE, sink=N, mean=on|off, "
        "attn=auto|fused|compose, v_skip=SHARE\n"
        "a quantised -ctk or -ctv is the cold type, unless SPEC names one\n"
        "(default: what the variable LLAMA_KV_MIXED says, else off)",
        [](common_params &, const std::string & value) {
            if (llama_kv_mixed_set_default(value.c_str()) != 0) {
                throw std::invalid_argument(llama_kv_mixed_last_error());
            }
        }
    ).set_env("LLAMA_ARG_KV_MIXED");
}

bool common_kv_mixed_log(ggml_log_level level, const char * text) {
    static const char prefix[] = "llama_kv_mixed: ";

    if (level != GGML_LOG_LEVEL_INFO || strncmp(text, prefix, sizeof(prefix) - 1) != 0) {
        return false;
    }

    if (common_log_get_verbosity_thold() >= LOG_LEVEL_INFO) {
        common_log_add(common_log_main(), level, "%s", text);

        // the last line of most programs, which do not wait for it
        if (strstr(text, " ends: ")) {
            common_log_flush(common_log_main());
        }
    }

    return true;
}

std::string common_kv_mixed_banner(const common_json & props) {
    if (!props.contains("kv_mixed")) {
        return "";
    }

    return "\nKV cache   : mixed, " + props.at("kv_mixed").value("spec", "");
}
