#pragma once

#include "device.cuh"

// the Walsh-Hadamard transform of a row, in blocks of n values: lane has values lane, lane + 32, ...
template <int N>
static __device__ __forceinline__ void kv_rotate(float (&x)[N], int n, int lane) {
    if (n == 0) {
        return;
    }
#pragma unroll
    for (int h = 1; h < 32; h *= 2) {
        if (h < n) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float y = __shfl_xor_sync(0xFFFFFFFF, x[i], h);
                x[i] = lane & h ? y - x[i] : x[i] + y;
            }
        }
    }
#pragma unroll
    for (int h = 1; h < N; h *= 2) {
        if (32*h < n) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                if ((i & h) == 0 && (i | h) < N) {
                    const float a = x[i], b = x[(i | h) < N ? i | h : i];
                    x[i] = a + b;
                    x[(i | h) < N ? i | h : i] = a - b;
                }
            }
        }
    }
    const float s = rsqrtf(float(n));
#pragma unroll
    for (int i = 0; i < N; ++i) {
        x[i] *= s;
    }
}
