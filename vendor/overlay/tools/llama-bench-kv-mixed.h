#pragma once

#include "llama-kv-mixed.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

//
// the mixed KV cache in llama-bench: all that its patch calls
//

// the values of --kv-mixed, empty: it was not given, and the variable LLAMA_KV_MIXED says which cache there is
static std::vector<std::string> bench_kv_mixed_specs;

static void bench_kv_mixed_usage() {
    llama_kv_mixed_preset preset = {};
    preset.struct_size = sizeof(preset);

    std::string presets;
    for (uint32_t i = 0; llama_kv_mixed_get_preset(i, &preset) == 0; ++i) {
        presets += std::string(i > 0 ? ", " : "") + preset.name;
    }

    printf("  --kv-mixed <spec>                                 (default: the variable LLAMA_KV_MIXED, else off)\n");
    printf("                                                    on, off, a preset (%s), parameters (hot=N,cold=TYPE,..)\n", presets.c_str());
    printf("                                                    or both; several: off,default,quality and hot=512;hot=1024,cold=q8_0\n");
}

// Several specs in one text: they end at a semicolon, and at a comma that has a name after it (on, off, a preset), as only the
// first item of a spec is one.
static std::vector<std::string> bench_kv_mixed_split(const std::string & text) {
    std::vector<std::string> res(1);

    for (size_t i = 0; i <= text.size(); ) {
        const size_t end = std::min(text.find_first_of(",;", i), text.size());

        const std::string item = text.substr(i, end - i);

        if (i > 0) {
            if (text[i - 1] == ';' || item.find('=') == std::string::npos) {
                res.emplace_back();
            } else {
                res.back() += ",";
            }
        }
        res.back() += item;

        i = end + 1;
    }

    return res;
}

// one more value of the option, null: there is none; throws std::invalid_argument
static void bench_kv_mixed_add(const char * value) {
    if (!value) {
        throw std::invalid_argument("--kv-mixed needs a value");
    }

    for (const auto & spec : bench_kv_mixed_split(value)) {
        llama_kv_mixed_params params = {};
        params.struct_size = sizeof(params);

        if (llama_kv_mixed_params_parse(spec.c_str(), &params) < 0) {
            throw std::invalid_argument(std::string("--kv-mixed: ") + llama_kv_mixed_last_error());
        }

        bench_kv_mixed_specs.push_back(spec);
    }
}

// whether one of the caches is a mixed one
static bool bench_kv_mixed_in_use() {
    llama_kv_mixed_params params = {};
    params.struct_size = sizeof(params);

    if (bench_kv_mixed_specs.empty()) {
        return llama_kv_mixed_get_default(&params) == 1;
    }

    return std::any_of(bench_kv_mixed_specs.begin(), bench_kv_mixed_specs.end(), [&](const std::string & spec) {
        return llama_kv_mixed_params_parse(spec.c_str(), &params) == 0;
    });
}

// the width of a field in a table: of its name, or of the longest text that the caches may have
static int bench_kv_mixed_width(const std::string & field) {
    int res = field.length();

    if (field != "kv_mixed") {
        return res;
    }

    llama_kv_mixed_params params = {};
    params.struct_size = sizeof(params);

    const auto add = [&]() {
        for (int32_t * type : { &params.type_cold_k, &params.type_cold_v }) {
            *type = *type < 0 ? GGML_TYPE_IQ4_NL : *type;
        }
        res = std::max(res, llama_kv_mixed_params_format(&params, nullptr, 0));
    };

    if (bench_kv_mixed_specs.empty() && llama_kv_mixed_get_default(&params) == 1) {
        add();
    }
    for (const auto & spec : bench_kv_mixed_specs) {
        if (llama_kv_mixed_params_parse(spec.c_str(), &params) == 0) {
            add();
        }
    }

    return res;
}

// the tests with each of the caches; those of one model stay together, so that it is loaded once
template <typename T>
static std::vector<T> bench_kv_mixed_multiply(const std::vector<T> & insts) {
    if (bench_kv_mixed_specs.empty()) {
        return insts;
    }

    std::vector<T> res;

    for (size_t first = 0, end = 0; first < insts.size(); first = end) {
        while (end < insts.size() && insts[end].equal_mparams(insts[first])) {
            ++end;
        }

        for (const auto & spec : bench_kv_mixed_specs) {
            for (size_t i = first; i < end; ++i) {
                res.push_back(insts[i]);
                res.back().kv_mixed = spec;
            }
        }
    }

    return res;
}

// The contexts that follow are those of a test. Forgets the error of an earlier one; and the state that was kept of an earlier one
// (depth 0: there is none), when its cache was another one: tokens would be hot and cold as they were there.
static void bench_kv_mixed_select(const std::string & spec, int & depth) {
    static std::string spec_kept;

    if (spec != spec_kept) {
        depth     = 0;
        spec_kept = spec;
    }

    llama_kv_mixed_set_default(bench_kv_mixed_specs.empty() ? nullptr : spec.c_str());
}

// why a context can not be created, as far as its cache is concerned
static void bench_kv_mixed_print_error() {
    if (*llama_kv_mixed_last_error()) {
        fprintf(stderr, "error: %s\n", llama_kv_mixed_last_error());
    }
}

// the cache of a context, for its column
static std::string bench_kv_mixed_of(const llama_context * ctx) {
    llama_kv_mixed_params params = {};
    params.struct_size = sizeof(params);

    if (llama_kv_mixed_get_params(llama_get_memory(ctx), &params) != 0) {
        return "off";
    }
    params.n_cold = 0; // what the context needs

    char spec[256];
    llama_kv_mixed_params_format(&params, spec, sizeof(spec));

    return spec;
}

static std::vector<std::string> bench_kv_mixed_fields(std::vector<std::string> fields) {
    if (bench_kv_mixed_in_use()) {
        fields.push_back("kv_mixed");
    }
    return fields;
}

static std::vector<std::string> bench_kv_mixed_values(std::vector<std::string> values, const std::string & kv_mixed) {
    if (bench_kv_mixed_in_use()) {
        values.push_back(kv_mixed);
    }
    return values;
}
