#pragma once

#include "llama-kv-mixed.h"

#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <vector>

//
// llama_kv_mixed_trace
//
// a bounded ring of what a mixed cache did, filled by the thread that decodes and drained by any other
//

class llama_kv_mixed_trace {
public:
    llama_kv_mixed_trace(std::string label_hot, std::string label_cold);

    // nothing below is called, and nothing recorded, while this is false
    bool is_on() const {
        return on.load(std::memory_order_relaxed);
    }

    bool has(llama_kv_mixed_trace_flags flag) const {
        return is_on() && (flags & flag);
    }

    // n_max == 0 ends the trace, what it recorded is kept until the next one begins
    void start(uint32_t n_max, uint32_t flags);

    // numbers the record, stamps it and keeps it, with its errors by layer if these are wanted; the oldest make way
    void push(llama_kv_mixed_event event, const std::vector<llama_kv_mixed_layer_error> & errors = {});

    uint32_t read(llama_kv_mixed_event       * events, uint32_t n_max, uint64_t * n_dropped);
    uint32_t read(llama_kv_mixed_layer_error * errors, uint32_t n_max);

private:
    const std::string label_hot;
    const std::string label_cold;

    std::atomic<bool> on { false };

    std::atomic<uint32_t> flags { 0 };

    std::mutex mutex; // of all that follows

    uint32_t n_max = 0;

    std::deque<llama_kv_mixed_event>       events;
    std::deque<llama_kv_mixed_layer_error> errors;

    uint64_t n_events  = 0;
    uint64_t n_dropped = 0;

    void log(const llama_kv_mixed_event & event) const;
};
