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

    // Besides, from now on: lines on stderr, which programs can not turn off as they do with the log. Level 0: none, 1: one for
    // each migration, refusal and failure, 2: all that the log of a trace has. The first is about the given record.
    void start_stderr(int level, const llama_kv_mixed_event & init);

    // numbers the record, stamps it and keeps it, with its errors by layer if these are wanted; the oldest make way
    void push(llama_kv_mixed_event event, const std::vector<llama_kv_mixed_layer_error> & errors = {});

    uint32_t read(llama_kv_mixed_event       * events, uint32_t n_max, uint64_t * n_dropped);
    uint32_t read(llama_kv_mixed_layer_error * errors, uint32_t n_max);

private:
    const std::string label_hot;
    const std::string label_cold;

    std::atomic<bool> on { false };

    std::atomic<uint32_t> flags { 0 };

    int level_stderr = 0; // set before there is anything to trace

    std::mutex mutex; // of all that follows

    uint32_t n_max = 0;

    bool is_recording = false;

    std::deque<llama_kv_mixed_event>       events;
    std::deque<llama_kv_mixed_layer_error> errors;

    uint64_t n_events  = 0;
    uint64_t n_dropped = 0;

    // an event as lines: all that there are to it, or one
    std::vector<std::string> describe    (const llama_kv_mixed_event & event) const;
    std::string              describe_one(const llama_kv_mixed_event & event) const;

    void write_stderr(const llama_kv_mixed_event & event) const;
};
