#include "cache/trace.h"

#include "llama-impl.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>

// layer records of one migration are kept or dropped together, more or less: a ring for this many layers
static const size_t N_LAYERS_RING = 64;

llama_kv_mixed_trace::llama_kv_mixed_trace(std::string label_hot, std::string label_cold) :
    label_hot(std::move(label_hot)), label_cold(std::move(label_cold)) {
}

void llama_kv_mixed_trace::start(uint32_t n_max, uint32_t flags) {
    std::lock_guard<std::mutex> lock(mutex);

    if (n_max > 0) {
        events.clear();
        errors.clear();

        n_events  = 0;
        n_dropped = 0;

        this->n_max = n_max;
        this->flags = flags;
    }

    is_recording = n_max > 0;
    if (!is_recording) {
        this->flags = 0;
    }

    on.store(is_recording || level_stderr > 0);
}

void llama_kv_mixed_trace::start_stderr(int level, const llama_kv_mixed_event & init) {
    if (level > 0) {
        level_stderr = level;
        on.store(true);
        write_stderr(init);
    }
}

void llama_kv_mixed_trace::push(llama_kv_mixed_event event, const std::vector<llama_kv_mixed_layer_error> & errors) {
    bool to_log = false;

    if (std::lock_guard<std::mutex> lock(mutex); is_recording) {
        to_log = flags & LLAMA_KV_MIXED_TRACE_LOG;

        event.id   = n_events++;
        event.t_us = ggml_time_us();

        if (events.size() >= n_max) {
            events.pop_front();
            n_dropped++;
        }

        events.push_back(event);

        // under the same lock: who has read the event finds them
        if (flags & LLAMA_KV_MIXED_TRACE_LAYERS) {
            for (auto error : errors) {
                if (this->errors.size() >= n_max*N_LAYERS_RING) {
                    this->errors.pop_front();
                }

                error.id = event.id;
                this->errors.push_back(error);
            }
        }
    }

    // outside of the lock: the callback may well read the trace
    if (to_log) {
        for (const auto & line : describe(event)) {
            LLAMA_LOG_INFO("%s\n", line.c_str());
        }
    }

    if (level_stderr > 0) {
        write_stderr(event);
    }
}

template <typename T>
static uint32_t drain(std::deque<T> & src, T * dst, uint32_t n_max) {
    const uint32_t n = std::min<size_t>(n_max, src.size());

    std::copy(src.begin(), src.begin() + n, dst);
    src.erase(src.begin(), src.begin() + n);

    return n;
}

uint32_t llama_kv_mixed_trace::read(llama_kv_mixed_event * events, uint32_t n_max, uint64_t * n_dropped) {
    std::lock_guard<std::mutex> lock(mutex);

    if (n_dropped) {
        *n_dropped = this->n_dropped;
    }

    return drain(this->events, events, n_max);
}

uint32_t llama_kv_mixed_trace::read(llama_kv_mixed_layer_error * errors, uint32_t n_max) {
    std::lock_guard<std::mutex> lock(mutex);

    return drain(this->errors, errors, n_max);
}

static std::string use_text(const char * name, uint32_t n_used, uint32_t size) {
    return format("%s=%u/%u (%.1f%%)", name, n_used, size, 100.0*n_used/std::max(1u, size));
}

static std::string use_text(const llama_kv_mixed_event & event) {
    return use_text("hot", event.hot_used, event.hot_size) + ", " + use_text("cold", event.cold_used, event.cold_size);
}

// the lines that the trace has always been read as
std::vector<std::string> llama_kv_mixed_trace::describe(const llama_kv_mixed_event & event) const {
    std::vector<std::string> res;

    switch (event.kind) {
        case LLAMA_KV_MIXED_EVENT_INIT:
            res.push_back("[MIXED_CACHE_DEBUG] initialized: " + use_text(event));
            break;
        case LLAMA_KV_MIXED_EVENT_TRIGGER:
            switch (event.trigger) {
                case LLAMA_KV_MIXED_TRIGGER_THRESHOLD:
                    res.push_back("[MIXED_CACHE_DEBUG] should_quantize: hot cache threshold exceeded");
                    break;
                case LLAMA_KV_MIXED_TRIGGER_ROOM:
                    res.push_back("[MIXED_CACHE_DEBUG] find_slot: hot cache has no room for the new tokens");
                    break;
                default:
                    break;
            }
            res.push_back("[MIXED_CACHE_DEBUG] trigger_quantization: starting quantization process");
            res.push_back("[MIXED_CACHE_DEBUG] trigger_quantization: moving tokens to cold cache");
            break;
        case LLAMA_KV_MIXED_EVENT_MIGRATE:
            res.push_back(format("[MIXED_CACHE] Moving %u tokens to cold cache (%s quantization)", event.n_tokens, label_cold.c_str()));
            for (uint32_t i = 0; i < event.n_tokens; ++i) {
                res.push_back(format("[MIXED_CACHE] Quantizing token %u: %s -> %s", i, label_hot.c_str(), label_cold.c_str()));
            }
            res.push_back(format("[MIXED_CACHE] Quantization batch completed: %u tokens processed", event.n_tokens));
            res.push_back("[MIXED_CACHE_DEBUG] trigger_quantization: quantization completed");
            break;
        case LLAMA_KV_MIXED_EVENT_FAIL:
            res.push_back(format("[MIXED_CACHE_DEBUG] trigger_quantization: quantization failed, %u tokens stay hot", event.n_tokens));
            break;
        case LLAMA_KV_MIXED_EVENT_REFUSE:
            res.push_back(format("[MIXED_CACHE_DEBUG] find_slot: hot and cold cache are full: hot=%u/%u, cold=%u/%u",
                    event.hot_used, event.hot_size, event.cold_used, event.cold_size));
            break;
        default:
            break;
    }

    return res;
}

std::string llama_kv_mixed_trace::describe_one(const llama_kv_mixed_event & event) const {
    static const char * const triggers[] = { "threshold", "room", "manual" }; // by llama_kv_mixed_trigger

    switch (event.kind) {
        case LLAMA_KV_MIXED_EVENT_TRIGGER:
            return "";
        case LLAMA_KV_MIXED_EVENT_MIGRATE:
            return format("[MIXED_CACHE] Moving %u tokens to cold cache (%s quantization): %s, positions %d to %d, %" PRId64 " us, ",
                event.n_tokens, label_cold.c_str(), triggers[event.trigger], event.pos_min, event.pos_max, event.dur_us) + use_text(event);
        default:
            {
                const auto lines = describe(event);
                return lines.empty() ? "" : lines.front();
            }
    }
}

void llama_kv_mixed_trace::write_stderr(const llama_kv_mixed_event & event) const {
    std::string text;

    if (level_stderr > 1) {
        for (const auto & line : describe(event)) {
            text += line + "\n";
        }
    } else if (const auto line = describe_one(event); !line.empty()) {
        text = line + "\n";
    }

    fputs(text.c_str(), stderr);
}
