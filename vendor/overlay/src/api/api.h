#pragma once

// what the functions of the C interface share

#include "llama-kv-mixed.h"

#include "cache/params.h"

#include "llama-impl.h"

#include <new>
#include <stdexcept>

// runs f; on an exception: keeps its sentence, and returns the given value
template <typename T, typename F>
static T guarded(T failed, F f) {
    llama_kv_mixed_error().clear();

    try {
        return f();
    } catch (const std::bad_alloc &) {
        llama_kv_mixed_error() = "out of memory";
    } catch (const std::exception & err) {
        llama_kv_mixed_error() = err.what();
    }

    return failed;
}

static inline void check(bool ok, const char * what) {
    if (!ok) {
        throw std::invalid_argument(what);
    }
}

template <typename T>
static void check_size(const T * s) {
    if (!s || s->struct_size != sizeof(T)) {
        throw std::invalid_argument(format("the struct has %zu bytes here, the caller's has %zu", sizeof(T), s ? s->struct_size : 0));
    }
}
