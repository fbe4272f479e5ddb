#pragma once

// what the functions of the C interface share

#include "llama-kv-mixed.h"

#include "cache/request.h"

#include "llama-impl.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
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

//
// structs that carry their size: the caller's may be those of another version, shorter or longer than ours
//

template <typename T>
static void check_size(const T * s) {
    static_assert(offsetof(T, struct_size) == 0);

    if (!s || s->struct_size <= sizeof(s->struct_size)) {
        throw std::invalid_argument("struct_size must be the size of the struct, in bytes");
    }
}

// a caller's struct, with the given values where it has none
template <typename T>
static T copy_in(const T * src, T res) {
    check_size(src);

    if (src->struct_size > sizeof(T)) {
        throw std::invalid_argument(format("the struct has %zu bytes, this library knows %zu of them: it is older than the program",
            src->struct_size, sizeof(T)));
    }

    memcpy(&res, src, src->struct_size);
    res.struct_size = sizeof(T);

    return res;
}

// fills a caller's struct as far as both know it
template <typename T>
static void copy_out(const T & src, T * dst) {
    check_size(dst);

    const size_t size = std::min(dst->struct_size, sizeof(T));
    memcpy(dst, &src, size);
    dst->struct_size = size;
}
