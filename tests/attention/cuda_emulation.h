// Runs CUDA kernels on the CPU, for tests: one block after the other, its threads as coroutines that take turns where they wait
// for each other.
//
// In place of what src/cuda/device.cuh takes from the device. It shows what a kernel computes, and some of its faults: threads
// that wait at different places, shared memory that is read before it is written (it begins as NaNs), copies that are used
// before they are waited for (they are made only then), results that depend on the order of threads (EMULATION_REVERSE=1).
// Not seen are what depends on timing, the limits of a launch, and alignment.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct float2 { float x, y; };
struct uint2  { uint32_t x, y; };
struct uint4  { uint32_t x, y, z, w; };

inline float2 make_float2(float x, float y)       { return { x, y }; }
inline uint2  make_uint2 (uint32_t x, uint32_t y) { return { x, y }; }

//
// threads
//

inline struct { unsigned x, y, z; } threadIdx, blockIdx;

namespace emulation {

enum state { RUNS, AT_BLOCK, AT_WARP, DONE };

struct copy {
    char       * dst;
    const char * src;
    int          size;
    bool         valid;
};

struct thread {
    ucontext_t        context; // where it begins
    jmp_buf           place;   // where it goes on (without the system calls of swapcontext())
    bool              is_new;
    std::vector<char> stack;
    state             at;
    char              value[64]; // what it shows the others of its warp

    std::vector<std::vector<copy>> copies; // those not made, by commit
};

inline std::vector<thread> threads;
inline jmp_buf scheduler;
inline int current;
inline const std::function<void()> * kernel;

inline std::vector<char> shared;

inline void enter() {
    (*kernel)();
    threads[current].at = DONE;
    _longjmp(scheduler, 1);
}

inline void wait(state at) {
    threads[current].at = at;
    if (_setjmp(threads[current].place) == 0) {
        _longjmp(scheduler, 1);
    }
}

// until it waits
__attribute__((noinline)) inline void resume(thread & t) {
    if (_setjmp(scheduler) == 0) {
        if (t.is_new) {
            t.is_new = false;
            setcontext(&t.context);
        }
        _longjmp(t.place, 1);
    }
}

// every thread of a warp shows a value, and sees those of all 32
template <typename T, typename F>
inline auto exchange(const T & value, const F & f) {
    static_assert(sizeof(T) <= sizeof(thread::value));
    memcpy(threads[current].value, &value, sizeof(T));
    wait(AT_WARP);
    const int first = current/32*32;
    const auto get = [first](int lane) {
        T res;
        memcpy(&res, threads[first + lane].value, sizeof(T));
        return res;
    };
    const auto res = f(get);
    wait(AT_WARP);
    return res;
}

inline void run_block(int n) {
    std::fill(shared.begin(), shared.end(), (char) 0xFF);

    for (int i = 0; i < n; ++i) {
        auto & t = threads[i];
        getcontext(&t.context);
        t.context.uc_stack.ss_sp   = t.stack.data();
        t.context.uc_stack.ss_size = t.stack.size();
        t.context.uc_link          = nullptr;
        makecontext(&t.context, enter, 0);
        t.at     = RUNS;
        t.is_new = true;
        t.copies.assign(1, {});
    }

    static const bool reverse = getenv("EMULATION_REVERSE") != nullptr;

    for (int n_done = 0; n_done < n;) {
        bool any = false;

        for (int k = 0; k < n; ++k) {
            const int i = reverse ? n - 1 - k : k;
            if (threads[i].at == RUNS) {
                current = i;
                threadIdx.x = i;
                resume(threads[i]);
                any = true;
            }
        }

        // those go on that all have come to
        const auto release = [&](int first, int size, state at) {
            const auto begin = threads.begin() + first, end = begin + size;
            if (std::all_of(begin, end, [&](const thread & t) { return t.at == at || t.at == DONE; })) {
                std::for_each(begin, end, [&](thread & t) {
                    any = any || t.at == at;
                    t.at = t.at == at ? RUNS : t.at;
                });
            }
        };
        for (int w = 0; w < n; w += 32) {
            release(w, 32, AT_WARP);
        }
        release(0, n, AT_BLOCK);

        n_done = std::count_if(threads.begin(), threads.begin() + n, [](const thread & t) { return t.at == DONE; });

        if (!any && n_done < n) {
            fprintf(stderr, "threads wait for each other at different places\n");
            abort();
        }
    }
}

inline void launch(dim3 grid, int n_threads, size_t n_shared, const std::function<void()> & f) {
    if ((int) threads.size() < n_threads) {
        threads.resize(n_threads);
        for (auto & t : threads) {
            t.stack.resize(1 << 17);
        }
    }
    shared.resize(n_shared);
    kernel = &f;

    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = { x, y, z };
                run_block(n_threads);
            }
        }
    }
}

} // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::AT_BLOCK); }
inline void __syncwarp()    { emulation::wait(emulation::AT_WARP); }

template <typename T>
inline T __shfl_xor_sync(unsigned, T x, int mask) {
    return emulation::exchange(x, [&](const auto & get) { return get(emulation::current%32 ^ mask); });
}

inline bool __any_sync(unsigned, bool x) {
    return emulation::exchange(x, [](const auto & get) {
        bool res = false;
        for (int i = 0; i < 32; ++i) {
            res |= get(i);
        }
        return res;
    });
}

template <typename T>
inline T __shfl_sync(unsigned, T x, int lane) {
    return emulation::exchange(x, [&](const auto & get) { return get(lane); });
}

inline unsigned __ballot_sync(unsigned, bool x) {
    return emulation::exchange(x, [](const auto & get) {
        unsigned res = 0;
        for (int i = 0; i < 32; ++i) {
            res |= (unsigned) get(i) << i;
        }
        return res;
    });
}

inline int __ffs (int x)      { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

inline float rsqrtf(float x) { return 1/sqrtf(x); }

//
// device.cuh
//

#define KV_NOINLINE
#define KV_SHARED(name) char * name = emulation::shared.data()

inline void kv_wait() {}
inline void kv_start_next() {}

namespace emulation {

union pair {
    uint32_t word;
    _Float16 x[2];
};

template <typename F>
inline uint32_t each(const F & f) {
    pair res;
    res.x[0] = f(0);
    res.x[1] = f(1);
    return res.word;
}

} // namespace emulation

inline uint32_t h2_fma(uint32_t a, uint32_t b, uint32_t c) {
    const emulation::pair x = { a }, y = { b }, z = { c };
    // (the product is exact in F64, and so is the sum but for its last bits)
    return emulation::each([&](int i) { return (_Float16) ((double) x.x[i]*y.x[i] + z.x[i]); });
}

inline uint32_t h2_add(uint32_t a, uint32_t b) {
    const emulation::pair x = { a }, y = { b };
    return emulation::each([&](int i) { return (_Float16) ((float) x.x[i] + y.x[i]); });
}

inline uint32_t h2_sub(uint32_t a, uint32_t b) {
    const emulation::pair x = { a }, y = { b };
    return emulation::each([&](int i) { return (_Float16) ((float) x.x[i] - y.x[i]); });
}

inline uint32_t h2_mul(uint32_t a, uint32_t b) {
    const emulation::pair x = { a }, y = { b };
    return emulation::each([&](int i) { return (_Float16) ((float) x.x[i]*y.x[i]); });
}

inline uint32_t h2_make(float x, float y) {
    return emulation::each([&](int i) { return (_Float16) (i == 0 ? x : y); });
}

inline float half_to_float(uint16_t x) { return emulation::pair{ x }.x[0]; }

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = (uint64_t) b << 32 | a;
    uint32_t res = 0;
    for (int i = 0; i < 4; ++i) {
        const int s = selector >> 4*i & 15;
        if (s & 8) {
            fprintf(stderr, "a selector asks for the sign of a byte\n");
            abort();
        }
        res |= (uint32_t) (both >> 8*s & 0xFF) << 8*i;
    }
    return res;
}

template <uint32_t MASK, uint32_t BITS> inline uint32_t and_or (uint32_t x) { return (x & MASK) | BITS; }
template <uint32_t MASK, uint32_t BITS> inline uint32_t and_xor(uint32_t x) { return (x & MASK) ^ BITS; }

// as the PTX ISA lays out the fragments of mma.m16n8k16
inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    struct fragments {
        emulation::pair a[4], b[2];
    };
    const fragments mine = { { { a0 }, { a1 }, { a2 }, { a3 } }, { { b0 }, { b1 } } };

    emulation::exchange(mine, [&](const auto & get) {
        const int lane = emulation::current%32, g = lane/4, t = lane%4;
        fragments rows[4], cols[2][4];
        for (int k = 0; k < 4; ++k) {
            rows[k] = get(4*g + k);
            cols[0][k] = get(4*(2*t    ) + k);
            cols[1][k] = get(4*(2*t + 1) + k);
        }
        for (int i = 0; i < 4; ++i) {
            double sum = 0;
            for (int k = 0; k < 4; ++k) {
                for (int half = 0; half < 2; ++half) {
                    for (int e = 0; e < 2; ++e) {
                        sum += (double) rows[k].a[i/2 + 2*half].x[e]*cols[i%2][k].b[half].x[e];
                    }
                }
            }
            c[i] = (float) (c[i] + sum);
        }
        return 0;
    });
}

inline uint32_t transpose(uint32_t x) {
    return emulation::exchange(emulation::pair{ x }, [](const auto & get) {
        const int lane = emulation::current%32, g = lane/4, t = lane%4;
        // row g of the result is column g: values 2t and 2t + 1 of it are in rows 2t and 2t + 1
        return emulation::each([&](int i) { return get(4*(2*t + i) + g/2).x[g%2]; });
    });
}

template <int N>
inline void copy_async(char * dst, const char * src, bool valid) {
    emulation::threads[emulation::current].copies.back().push_back({ dst, src, N, valid });
}

inline void copy_commit() {
    emulation::threads[emulation::current].copies.emplace_back();
}

template <int N>
inline void copy_wait() {
    auto & copies = emulation::threads[emulation::current].copies;
    while (copies.size() > N + 1) { // (the last one is not committed)
        for (const auto & c : copies.front()) {
            if (c.valid) {
                memcpy(c.dst, c.src, c.size);
            } else {
                memset(c.dst, 0, c.size);
            }
        }
        copies.erase(copies.begin());
    }
}
