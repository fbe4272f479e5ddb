// the C interface of a cache that is driven by hand: its state as bytes

#include "api/cache.h"

#include "cache/state-io.h"

#include <cstring>

class io_write_bytes : public llama_io_write_i {
public:
    io_write_bytes(void * dst, size_t size) : dst((uint8_t *) dst), size(size) {}

    void write(const void * src, size_t n) override {
        memcpy(take(n), src, n);
    }

    void write_tensor(ggml_tensor * tensor, size_t offset, size_t n) override {
        ggml_backend_tensor_get(tensor, take(n), offset, n);
    }

    size_t n_bytes() override {
        return pos;
    }

private:
    uint8_t * dst;
    size_t size;
    size_t pos = 0;

    uint8_t * take(size_t n) {
        GGML_ASSERT(n <= size - pos);
        pos += n;
        return dst + pos - n;
    }
};

class io_read_bytes : public llama_io_read_i {
public:
    io_read_bytes(const void * src, size_t size) : src((const uint8_t *) src), size(size) {}

    void read(void * dst, size_t n) override {
        memcpy(dst, take(n), n);
    }

    void read_tensor(ggml_tensor * tensor, size_t offset, size_t n) override {
        ggml_backend_tensor_set(tensor, take(n), offset, n);
    }

    size_t n_bytes() override {
        return pos;
    }

private:
    const uint8_t * src;
    size_t size;
    size_t pos = 0;

    const uint8_t * take(size_t n) {
        check(n <= size - pos, "the state ends too early");
        pos += n;
        return src + pos - n;
    }
};

static void check_seq(const llama_kv_mixed_cache * cache, int32_t seq_id) {
    check(seq_id == -1 || llama_kv_mixed_cache_get_stream(cache, seq_id) >= 0, "the cache has no such sequence");
}

LLAMA_API int64_t llama_kv_mixed_cache_state_get(const llama_kv_mixed_cache * cache, int32_t seq_id, void * dst, size_t size) {
    return guarded<int64_t>(-1, [&] {
        check_seq(cache, seq_id);
        synchronize(cache);

        state_counter counter;
        cache->mem().state_write(counter, seq_id);

        if (dst) {
            check(size >= counter.n_bytes(), "the buffer is too small for the state");

            io_write_bytes io(dst, size);
            cache->mem().state_write(io, seq_id);
        }

        return (int64_t) counter.n_bytes();
    });
}

LLAMA_API int64_t llama_kv_mixed_cache_state_set(llama_kv_mixed_cache * cache, int32_t seq_id, const void * src, size_t size) {
    return guarded<int64_t>(-1, [&] {
        check_seq(cache, seq_id);
        synchronize(cache);

        cache->sinfo = {};

        io_read_bytes io(src, size);
        cache->mem().state_read(io, seq_id);

        return (int64_t) io.n_bytes();
    });
}
