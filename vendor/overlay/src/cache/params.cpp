#include "cache/params.h"

#include "cache/presets.h"
#include "formats/formats.h"

#include "llama-impl.h"

#include <algorithm>
#include <cctype>
#include <locale>
#include <set>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

// what hot=auto gives a sequence
static const uint32_t N_HOT_SEQ = 512;

//
// spec
//

static std::string trim(const std::string & s) {
    const auto b = s.find_first_not_of(" \t");
    const auto e = s.find_last_not_of(" \t");
    return b == std::string::npos ? "" : s.substr(b, e - b + 1);
}

static int32_t parse_type(const std::string & key, const std::string & value) {
    std::string name = value;
    std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });

    if (name == "auto") {
        return LLAMA_KV_MIXED_TYPE_AUTO;
    }

    if (const auto * type = llama_kv_mixed_find_format(name)) {
        return type->type;
    }

    throw std::invalid_argument(format("%s=%s is not a KV cache type (auto, %s)", key.c_str(), value.c_str(), llama_kv_mixed_format_names().c_str()));
}

static uint32_t parse_count(const std::string & key, const std::string & value) {
    // nine digits can not overflow, and no cache is that large
    if (value.empty() || value.size() > 9 || value.find_first_not_of("0123456789") != std::string::npos) {
        throw std::invalid_argument(format("%s=%s is not a whole number", key.c_str(), value.c_str()));
    }

    return (uint32_t) std::stoul(value);
}

static uint32_t parse_hot(const std::string & key, const std::string & value) {
    if (value == "auto") {
        return LLAMA_KV_MIXED_HOT_AUTO;
    }

    const uint32_t res = parse_count(key, value);
    if (res == 0) {
        throw std::invalid_argument("hot must be at least 1 cell");
    }

    return res;
}

static const char * const attn_names[] = { "auto", "fused", "compose" }; // by llama_kv_mixed_attn_type

static int32_t parse_attn(const std::string & key, const std::string & value) {
    for (int32_t i = 0; i < 3; ++i) {
        if (value == attn_names[i]) {
            return i;
        }
    }

    throw std::invalid_argument(format("%s=%s is not auto, fused or compose", key.c_str(), value.c_str()));
}

static int32_t parse_bool(const std::string & key, const std::string & value) {
    if (value == "on" || value == "1") {
        return 1;
    }
    if (value == "off" || value == "0") {
        return 0;
    }

    throw std::invalid_argument(format("%s=%s is not on or off", key.c_str(), value.c_str()));
}

static float parse_share(const std::string & key, const std::string & value) {
    std::istringstream is(value);
    is.imbue(std::locale::classic());

    float res = 0.0f;
    if (!(is >> res) || !is.eof()) {
        throw std::invalid_argument(format("%s=%s is not a number", key.c_str(), value.c_str()));
    }

    return res;
}

// the items of a text, in their order: key and value
using spec_items = std::vector<std::pair<std::string, std::string>>;

static void apply(const spec_items & items, llama_kv_mixed_params & res) {
    std::set<std::string> seen;

    for (const auto & [key, value] : items) {
        if (!seen.insert(key).second) {
            throw std::invalid_argument(format("%s is given twice", key.c_str()));
        }

        if      (key == "hot")       { res.n_hot   = parse_hot  (key, value); }
        else if (key == "cold_size") { res.n_cold  = parse_count(key, value); }
        else if (key == "group")     { res.n_group = parse_count(key, value); }
        else if (key == "sink")      { res.n_sink  = parse_count(key, value); }
        else if (key == "threshold") { res.threshold   = parse_share(key, value); }
        else if (key == "cold_k")    { res.type_cold_k = parse_type (key, value); }
        else if (key == "cold_v")    { res.type_cold_v = parse_type (key, value); }
        else if (key == "mean")      { res.mean        = parse_bool (key, value); }
        else if (key == "attn")      { res.attn        = parse_attn (key, value); }
        else if (key == "v_skip")    { res.v_skip      = parse_share(key, value); }
        else if (key == "cold") {
            // cold_k and cold_v are more specific, wherever they stand
            const int32_t type = parse_type(key, value);
            if (!seen.count("cold_k")) { res.type_cold_k = type; }
            if (!seen.count("cold_v")) { res.type_cold_v = type; }
        } else {
            throw std::invalid_argument(format(
                "unknown key '%s' (hot, cold, cold_k, cold_v, cold_size, group, threshold, sink, mean, attn, v_skip)", key.c_str()));
        }
    }
}

static spec_items split(const std::string & spec) {
    spec_items res;

    std::istringstream is(spec);
    for (std::string item; std::getline(is, item, ',');) {
        const auto eq = item.find('=');

        const std::string key   = trim(item.substr(0, eq));
        const std::string value = eq == std::string::npos ? "" : trim(item.substr(eq + 1));

        if (eq == std::string::npos || key.empty() || value.empty()) {
            throw std::invalid_argument(format("'%s' is not key=value, nor a preset (%s) at the begin",
                trim(item).c_str(), llama_kv_mixed_preset_names().c_str()));
        }

        res.emplace_back(key, value);
    }

    return res;
}

std::optional<llama_kv_mixed_params> llama_kv_mixed_parse_spec(const std::string & spec) {
    const std::string text = trim(spec);

    if (text.empty() || text == "0" || text == "off") {
        return {};
    }

    const auto comma = text.find(',');

    const std::string first = trim(text.substr(0, comma));
    const std::string rest  = comma == std::string::npos ? "" : text.substr(comma + 1);

    const auto * preset = llama_kv_mixed_find_preset(first == "1" || first == "on" ? "default" : first);

    llama_kv_mixed_params res = llama_kv_mixed_default_params();

    if (preset) {
        apply(split(preset->spec), res);
    }

    apply(split(preset ? rest : text), res);

    llama_kv_mixed_validate(res);

    return res;
}

static std::string type_text(int32_t type) {
    return type == LLAMA_KV_MIXED_TYPE_AUTO ? "auto" : ggml_type_name((ggml_type) type);
}

static std::string share_text(float value) {
    // the shortest that is read back to the same number
    for (int n = 1; ; ++n) {
        std::ostringstream os;
        os.imbue(std::locale::classic());
        os.precision(n);
        os << value;

        std::istringstream is(os.str());
        is.imbue(std::locale::classic());

        float again = 0.0f;
        if ((is >> again && again == value) || n == 9) {
            return os.str();
        }
    }
}

std::string llama_kv_mixed_format_spec(const llama_kv_mixed_params & params) {
    const auto def = llama_kv_mixed_default_params();

    std::string res = "hot=" + (params.n_hot == LLAMA_KV_MIXED_HOT_AUTO ? "auto" : std::to_string(params.n_hot));

    if (params.type_cold_k == params.type_cold_v) {
        res += ",cold=" + type_text(params.type_cold_k);
    } else {
        res += ",cold_k=" + type_text(params.type_cold_k) + ",cold_v=" + type_text(params.type_cold_v);
    }

    if (params.n_group   != def.n_group)   { res += ",group="     + std::to_string(params.n_group); }
    if (params.threshold != def.threshold) { res += ",threshold=" + share_text(params.threshold); }
    if (params.n_sink    != def.n_sink)    { res += ",sink="      + std::to_string(params.n_sink); }
    if (params.n_cold    != def.n_cold)    { res += ",cold_size=" + std::to_string(params.n_cold); }
    if (params.mean      != def.mean)      { res += params.mean ? ",mean=on" : ",mean=off"; }
    if (params.attn      != def.attn)      { res += std::string(",attn=") + attn_names[params.attn]; }
    if (params.v_skip    != def.v_skip)    { res += ",v_skip="    + share_text(params.v_skip); }

    return res;
}

uint32_t llama_kv_mixed_hot_auto(uint32_t n_ctx_seq, uint32_t n_seq_stream, uint32_t n_whole) {
    const uint64_t n_most = std::max(N_HOT_SEQ, n_ctx_seq/8/256*256);

    // beside them are the sinks
    const uint64_t n_least = n_whole > 0 ? GGML_PAD(n_whole + 1, 256) : 0;

    return std::min<uint64_t>({ n_ctx_seq, n_most, std::max<uint64_t>(n_least, (uint64_t) N_HOT_SEQ*n_seq_stream) });
}

llama_kv_mixed_params llama_kv_mixed_with_auto(llama_kv_mixed_params params, ggml_type type) {
    for (int32_t * cur : { &params.type_cold_k, &params.type_cold_v }) {
        *cur = *cur == LLAMA_KV_MIXED_TYPE_AUTO ? (int32_t) type : *cur;
    }
    return params;
}

void llama_kv_mixed_validate(const llama_kv_mixed_params & params) {
    if (params.n_group == 0) {
        throw std::invalid_argument("group must be at least 1 token");
    }
    const uint32_t n_hot = params.n_hot == LLAMA_KV_MIXED_HOT_AUTO ? N_HOT_SEQ : params.n_hot;
    if (params.n_sink >= n_hot) {
        throw std::invalid_argument(format("sink=%u leaves no room in hot=%u", params.n_sink, n_hot));
    }
    if (!(params.threshold > 0.0f && params.threshold <= 1.0f)) {
        throw std::invalid_argument(format("threshold=%g is outside (0, 1]", params.threshold));
    }
    if (params.attn < LLAMA_KV_MIXED_ATTN_AUTO || params.attn > LLAMA_KV_MIXED_ATTN_COMPOSE) {
        throw std::invalid_argument(format("attn=%d is no llama_kv_mixed_attn_type", params.attn));
    }
    if (params.mean != 0 && params.mean != 1) {
        throw std::invalid_argument(format("mean=%d is not 0 or 1", params.mean));
    }
    if (!(params.v_skip >= 0.0f && params.v_skip < 1.0f)) {
        throw std::invalid_argument(format("v_skip=%g is outside [0, 1)", params.v_skip));
    }
    for (const int32_t type : { params.type_cold_k, params.type_cold_v }) {
        if (type != LLAMA_KV_MIXED_TYPE_AUTO && !llama_kv_mixed_find_format(type)) {
            throw std::invalid_argument(format("the cold type %d is not a KV cache type", type));
        }
    }
}
