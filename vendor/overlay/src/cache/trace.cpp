#include "cache/trace.h"

#include "llama-impl.h"

#include <algorithm>

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

    on.store(n_max > 0);
}

void llama_kv_mixed_trace::push(llama_kv_mixed_event event, const std::vector<llama_kv_mixed_layer_error> & errors) {
    bool to_log;
    {
        std::lock_guard<std::mutex> lock(mutex);

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
        log(event);
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

// the lines that the trace has always been read as
void llama_kv_mixed_trace::log(const llama_kv_mixed_event & event) const {
    switch (event.kind) {
        case LLAMA_KV_MIXED_EVENT_INIT:
            LLAMA_LOG_INFO("[MIXED_CACHE_DEBUG] initialized: hot=%u/%u (%.1f%%), cold=%u/%u (%.1f%%)\n",
                    event.hot_used,  event.hot_size,  100.0*event.hot_used /std::max(1u, event.hot_size),
                    event.cold_used, event.cold_size, 100.0*event.cold_used/std::max(1u, event.cold_size));
            break;
        case LLAMA_KV_MIXED_EVENT_TRIGGER:
            switch (event.trigger) {
                case LLAMA_KV_MIXED_TRIGGER_THRESHOLD:
                    LLAMA_LOG_INFO("[MIXED_CACHE_DEBUG] should_quantize: hot cache threshold exceeded\n");
                    break;
                case LLAMA_KV_MIXED_TRIGGER_ROOM:
                    LLAMA_LOG_INFO("[MIXED_CACHE_DEBUG] find_slot: hot cache has no room for the new tokens\n");
                    break;
                default:
                    break;
            }
            LLAMA_LOG_INFO("[MIXED_CACHE_DEBUG] trigger_quantization: starting quantization process\n");
            LLAMA_LOG_INFO("[MIXED_CACHE_DEBUG] trigger_quantization: moving tokens to cold cache\n");
            break;
        case LLAMA_KV_MIXED_EVENT_MIGRATE:
            LLAMA_LOG_INFO("[MIXED_CACHE] Moving %u tokens to cold cache (%s quantization)\n", event.n_tokens, label_cold.c_str());
            for (uint32_t i = 0; i < event.n_tokens; ++i) {
                LLAMA_LOG_INFO("[MIXED_CACHE] Quantizing token %u: %s -> %s\n", i, label_hot.c_str(), label_cold.c_str());
            }
            LLAMA_LOG_INFO("[MIXED_CACHE] Quantization batch completed: %u tokens processed\n", event.n_tokens);
            LLAMA_LOG_INFO("[MIXED_CACHE_DEBUG] trigger_quantization: quantization completed\n");
            break;
        case LLAMA_KV_MIXED_EVENT_FAIL:
            LLAMA_LOG_INFO("[MIXED_CACHE_DEBUG] trigger_quantization: quantization failed, %u tokens stay hot\n", event.n_tokens);
            break;
        case LLAMA_KV_MIXED_EVENT_REFUSE:
            LLAMA_LOG_INFO("[MIXED_CACHE_DEBUG] find_slot: hot and cold cache are full: hot=%u/%u, cold=%u/%u\n",
                    event.hot_used, event.hot_size, event.cold_used, event.cold_size);
            break;
        default:
            break;
    }
}
