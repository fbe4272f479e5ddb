#pragma once

#include "device.cuh"
#include "params.cuh"

//
// stored rows as pairs of F16, in the order in which the tensor cores take them
//
// Small whole numbers are put below the bits of 1024 in F16, where a unit is the last bit, and 1024 is subtracted: two at once,
// without a conversion. Blocks have 32 values and an even number of bytes, so that nothing larger than 16 bits is aligned.
//
// K: a thread takes 8 values of a block of one row, as the pairs (4t, 4t + 2), (4t + 1, 4t + 3) and 16 behind these, t < 4.
// V: a thread takes 4 values of a block of two rows, each with its neighbour below: 2g, 2g + 16, 2g + 1, 2g + 17, g < 8.
//

// pairs of whole numbers: the bits of MASK in each half of a word, less zero
template <uint32_t MASK>
static __device__ __forceinline__ h2 whole(uint32_t x, int zero) {
    return h2_sub(and_or<MASK, 0x64006400>(x), twice(0x6400 + zero));
}

// the same of numbers that are shifted up by 4 bits, zero: 0, 8
template <uint32_t MASK>
static __device__ __forceinline__ h2 whole_shifted(uint32_t x, int zero) {
    return h2_fma(and_or<MASK, 0x64006400>(x), twice(0x2C00), twice(zero == 0 ? 0xD400 : 0xD480)); // x/16 - (64 + zero)
}

// pairs of signed bytes, each the lower one of 16 bits
static __device__ __forceinline__ h2 whole_signed(uint32_t x) {
    return h2_sub(and_xor<0x00FF00FF, 0x64806480>(x), twice(0x6480));
}

static __device__ __forceinline__ h2 bf16_to_f16(uint32_t pair) {
    union { uint32_t u; float f; } a, b;
    a.u = pair << 16;
    b.u = pair & 0xFFFF0000;
    return h2_make(fminf(fmaxf(a.f, -65504.0f), 65504.0f), fminf(fmaxf(b.f, -65504.0f), 65504.0f));
}

// the values of IQ4_NL, 128 above: those that four nibbles name, as bytes
static __device__ __forceinline__ uint32_t lookup_iq4_nl(uint32_t nibbles) {
    const uint32_t low   = permute(0x3F2D1801, 0x766A5D4F, nibbles & 0x7777);
    const uint32_t high  = permute(0xA6998D81, 0xF1D9C5B5, nibbles & 0x7777);
    return permute(low, high, 0x3210 | (nibbles >> 1 & 0x4444));
}

// a word at an offset into a row that begins at a multiple of ALIGNED bytes
template <int ALIGNED>
static __device__ __forceinline__ uint32_t read_at(const char * row, int offset) {
    return ALIGNED % 4 == 0 && offset % 4 == 0 ? read32(row + offset) : read_word(row + offset);
}

// mean: 4 pairs that are added
template <int F, int ALIGNED>
static __device__ __forceinline__ void unpack_k(const char * row, int b, int t, const h2 (&mean)[4], h2 (&res)[4]) {
    const int block = b*kv_block_size(F);

    row += (kv_is_float(F) ? 8 : 4)*t;

    if constexpr (kv_is_float(F)) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t x = read_at<ALIGNED>(row, block + 32*i);
            const uint32_t y = read_at<ALIGNED>(row, block + 32*i + 4);
            res[2*i    ] = permute(x, y, 0x5410);
            res[2*i + 1] = permute(x, y, 0x7632);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            res[i] = F == KV_BF16 ? bf16_to_f16(res[i]) : res[i];
            res[i] = h2_add(res[i], mean[i]);
        }
        return;
    }

    const char * head = row - 4*t + block;

    const uint32_t w = read_at<ALIGNED>(row, block + kv_offset(F));

    if constexpr (F == KV_Q8_0) {
        const uint32_t w2 = read_at<ALIGNED>(row, block + kv_offset(F) + 16);
        res[0] = whole_signed(w);
        res[1] = whole_signed(w >> 8);
        res[2] = whole_signed(w2);
        res[3] = whole_signed(w2 >> 8);
    } else if constexpr (F == KV_IQ4_NL) {
        const uint32_t x = lookup_iq4_nl(w);
        const uint32_t y = lookup_iq4_nl(w >> 16);
        const uint32_t even = permute(x, y, 0x5140); // x0 y0 x1 y1
        const uint32_t odd  = permute(x, y, 0x7362); // x2 y2 x3 y3
        res[0] = h2_sub(permute(even, 0x64646464, 0x4140), twice(0x6480));
        res[2] = h2_sub(permute(even, 0x64646464, 0x4342), twice(0x6480));
        res[1] = h2_sub(permute(odd, 0x64646464, 0x4140), twice(0x6480));
        res[3] = h2_sub(permute(odd, 0x64646464, 0x4342), twice(0x6480));
    } else if constexpr (F == KV_Q5_0 || F == KV_Q5_1) {
        const uint32_t h = read_word(head + kv_offset(F) - 4) >> 4*t;
        res[0] = whole<0x001F001F>((w       & 0x000F000F) | (h       & 1) << 4 | (h       & 4) << 18, F == KV_Q5_0 ? 16 : 0);
        res[1] = whole<0x001F001F>((w >>  8 & 0x000F000F) | (h       & 2) << 3 | (h       & 8) << 17, F == KV_Q5_0 ? 16 : 0);
        res[2] = whole<0x001F001F>((w >>  4 & 0x000F000F) | (h >> 16 & 1) << 4 | (h >> 16 & 4) << 18, F == KV_Q5_0 ? 16 : 0);
        res[3] = whole<0x001F001F>((w >> 12 & 0x000F000F) | (h >> 16 & 2) << 3 | (h >> 16 & 8) << 17, F == KV_Q5_0 ? 16 : 0);
    } else {
        const uint32_t w8 = w >> 8;
        res[0] = whole        <0x000F000F>(w, F == KV_Q4_0 ? 8 : 0);
        res[1] = whole        <0x000F000F>(w8, F == KV_Q4_0 ? 8 : 0);
        res[2] = whole_shifted<0x00F000F0>(w, F == KV_Q4_0 ? 8 : 0);
        res[3] = whole_shifted<0x00F000F0>(w8, F == KV_Q4_0 ? 8 : 0);
    }

    const h2 d = twice(read16(head));
    const h2 m = kv_has_min(F) ? twice(read16(head + 2)) : 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        res[i] = kv_has_min(F) ? h2_add(h2_fma(res[i], d, m), mean[i]) : h2_fma(res[i], d, mean[i]);
    }
}

template <int F>
static __device__ __forceinline__ void unpack_v(const char * row0, const char * row1, int b, int g, h2 (&res)[4]) {
    const char * block0 = row0 + b*kv_block_size(F);
    const char * block1 = row1 + b*kv_block_size(F);

    if constexpr (kv_is_float(F)) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t x = read32(block0 + 32*i + 4*g);
            const uint32_t y = read32(block1 + 32*i + 4*g);
            res[i    ] = permute(x, y, 0x5410);
            res[i + 2] = permute(x, y, 0x7632);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            res[i] = F == KV_BF16 ? bf16_to_f16(res[i]) : res[i];
        }
        return;
    }

    const auto both = [&](int offset) { return read16(block0 + offset) | read16(block1 + offset) << 16; };

    const uint32_t w = both(kv_offset(F) + 2*g);

    if constexpr (F == KV_Q8_0) {
        const uint32_t w2 = both(kv_offset(F) + 16 + 2*g);
        res[0] = whole_signed(w);
        res[2] = whole_signed(w >> 8);
        res[1] = whole_signed(w2);
        res[3] = whole_signed(w2 >> 8);
    } else if constexpr (F == KV_IQ4_NL) {
        const uint32_t x = lookup_iq4_nl(w);
        const uint32_t y = lookup_iq4_nl(w >> 16);
        const uint32_t lower = permute(x, y, 0x5140); // x0 y0 x1 y1
        const uint32_t upper = permute(x, y, 0x7362); // x2 y2 x3 y3
        res[0] = h2_sub(permute(lower, 0x64646464, 0x4140), twice(0x6480));
        res[1] = h2_sub(permute(lower, 0x64646464, 0x4342), twice(0x6480));
        res[2] = h2_sub(permute(upper, 0x64646464, 0x4140), twice(0x6480));
        res[3] = h2_sub(permute(upper, 0x64646464, 0x4342), twice(0x6480));
    } else if constexpr (F == KV_Q5_0 || F == KV_Q5_1) {
        const uint32_t low  = both(kv_offset(F) - 4) >> 2*g;
        const uint32_t high = both(kv_offset(F) - 2) >> 2*g;
        res[0] = whole<0x001F001F>((w       & 0x000F000F) | (low       & 0x00010001) << 4, F == KV_Q5_0 ? 16 : 0);
        res[1] = whole<0x001F001F>((w >>  4 & 0x000F000F) | (high      & 0x00010001) << 4, F == KV_Q5_0 ? 16 : 0);
        res[2] = whole<0x001F001F>((w >>  8 & 0x000F000F) | (low  >> 1 & 0x00010001) << 4, F == KV_Q5_0 ? 16 : 0);
        res[3] = whole<0x001F001F>((w >> 12 & 0x000F000F) | (high >> 1 & 0x00010001) << 4, F == KV_Q5_0 ? 16 : 0);
    } else {
        const uint32_t w8 = w >> 8;
        res[0] = whole        <0x000F000F>(w, F == KV_Q4_0 ? 8 : 0);
        res[1] = whole_shifted<0x00F000F0>(w, F == KV_Q4_0 ? 8 : 0);
        res[2] = whole        <0x000F000F>(w8, F == KV_Q4_0 ? 8 : 0);
        res[3] = whole_shifted<0x00F000F0>(w8, F == KV_Q4_0 ? 8 : 0);
    }

    const h2 d = both(0);
    const h2 m = kv_has_min(F) ? both(2) : 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        res[i] = kv_has_min(F) ? h2_fma(res[i], d, m) : h2_mul(res[i], d);
    }
}

// the same where the format may be known only now
template <int F, int ALIGNED>
static __device__ __forceinline__ void unpack_k(int format, const char * row, int b, int t, const h2 (&mean)[4], h2 (&res)[4]) {
    if constexpr (F >= 0) {
        unpack_k<F, ALIGNED>(row, b, t, mean, res);
    } else {
        switch (format) {
            case KV_F16:    unpack_k<KV_F16, ALIGNED>(row, b, t, mean, res); break;
            case KV_BF16:   unpack_k<KV_BF16, ALIGNED>(row, b, t, mean, res); break;
            case KV_Q4_0:   unpack_k<KV_Q4_0, ALIGNED>(row, b, t, mean, res); break;
            case KV_Q4_1:   unpack_k<KV_Q4_1, ALIGNED>(row, b, t, mean, res); break;
            case KV_Q5_0:   unpack_k<KV_Q5_0, ALIGNED>(row, b, t, mean, res); break;
            case KV_Q5_1:   unpack_k<KV_Q5_1, ALIGNED>(row, b, t, mean, res); break;
            case KV_Q8_0:   unpack_k<KV_Q8_0, ALIGNED>(row, b, t, mean, res); break;
            case KV_IQ4_NL: unpack_k<KV_IQ4_NL, ALIGNED>(row, b, t, mean, res); break;
        }
    }
}

template <int F>
static __device__ __forceinline__ void unpack_v(int format, const char * row0, const char * row1, int b, int g, h2 (&res)[4]) {
    if constexpr (F >= 0) {
        unpack_v<F>(row0, row1, b, g, res);
    } else {
        switch (format) {
            case KV_F16:    unpack_v<KV_F16>(row0, row1, b, g, res); break;
            case KV_BF16:   unpack_v<KV_BF16>(row0, row1, b, g, res); break;
            case KV_Q4_0:   unpack_v<KV_Q4_0>(row0, row1, b, g, res); break;
            case KV_Q4_1:   unpack_v<KV_Q4_1>(row0, row1, b, g, res); break;
            case KV_Q5_0:   unpack_v<KV_Q5_0>(row0, row1, b, g, res); break;
            case KV_Q5_1:   unpack_v<KV_Q5_1>(row0, row1, b, g, res); break;
            case KV_Q8_0:   unpack_v<KV_Q8_0>(row0, row1, b, g, res); break;
            case KV_IQ4_NL: unpack_v<KV_IQ4_NL>(row0, row1, b, g, res); break;
        }
    }
}
