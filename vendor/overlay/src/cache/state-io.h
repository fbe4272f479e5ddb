#pragma once

// the bytes of a saved state: their order, readers and writers, checksums

#include "llama-io.h"

#include "ggml-backend.h"

#include <atomic>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <typeinfo>
#include <vector>

//
// format
//
//   header
//   hot, cold: the layers' types and row sizes, how cold rows are rotated and whether they are less means; for each stream where
//     the next search for free cells begins, its cells, and the means of the pages in cold that these are in, layer by layer
//   checksum of all that
//   hot, cold: for each stream its rows, K layer by layer, then V
//   checksum of the rows
//   beside sliding windows or recurrent layers: their part as upstream writes it, and its checksum
//
// Cells come first and are checked as a whole: nothing changes before it is known that the state can be taken. Upstream's
// format leaves pending shifts out, although its K rows are those from before the shift.
//

// a plain cache's state begins with its number of streams, which no magic can be taken for
struct llama_kv_mixed_state_header {
    uint32_t magic     = 0x78696d6b; // "kmix"
    uint32_t version   = 5;
    uint32_t n_stream  = 1;          // 1 for a single sequence
    uint32_t whole     = 0;          // 1: all sequences
    uint32_t on_device = 0;          // the copy of the rows that was left on the device, 0: they are in the state
};

// for tests: the bytes that checksums were made of so far
inline std::atomic<uint64_t> state_bytes_summed { 0 };

// counts bytes and looks at none
class state_counter : public llama_io_write_i {
public:
    void write(const void * /*src*/, size_t size) override {
        n += size;
    }

    void write_tensor(ggml_tensor * /*tensor*/, size_t /*offset*/, size_t size) override {
        n += size;
    }

    size_t n_bytes() override {
        return n;
    }

private:
    size_t n = 0;
};

// Whether a writer does that. Upstream has one of its own for the size of a state, which no header declares: it is known
// by its name (were that another one some day, sizes would be right all the same, and a test would notice).
inline bool state_counts_only(const llama_io_write_i & io) {
    return dynamic_cast<const state_counter *>(&io) || strstr(typeid(io).name(), "llama_io_write_dummy");
}

// A change within one 8-byte word always shows, any other one but for once in 2^64. In what pieces the bytes come does not
// matter: upstream reads some of them in other pieces than it wrote.
class state_checksum {
public:
    void add(const void * data, size_t size) {
        state_bytes_summed += size;

        const auto * p = (const uint8_t *) data;

        while (size > 0 && n_rest > 0) {
            add_rest(*p++);
            size--;
        }

        for (; size >= 8; size -= 8, p += 8) {
            uint64_t w;
            memcpy(&w, p, 8);
            h = mix(h, w);
        }

        for (; size > 0; --size) {
            add_rest(*p++);
        }
    }

    uint64_t get() const {
        return n_rest == 0 ? h : mix(h, rest);
    }

private:
    uint64_t h = 0x78696d6b;

    // a word that is not complete yet
    uint64_t rest   = 0;
    uint32_t n_rest = 0;

    void add_rest(uint8_t x) {
        rest |= (uint64_t) x << 8*n_rest;
        if (++n_rest == 8) {
            h = mix(h, rest);
            rest   = 0;
            n_rest = 0;
        }
    }

    static uint64_t mix(uint64_t h, uint64_t w) {
        h  = (h ^ w)*0x9e3779b97f4a7c15ull;
        h ^= h >> 32;
        return h;
    }
};

// what follows each other in the state, and its checksum

class state_writer {
public:
    state_writer(llama_io_write_i & io) : io(io), counts_only(state_counts_only(io)) {}

    template <typename T>
    void put(const T & x) {
        put(&x, sizeof(x));
    }

    void put(const void * data, size_t size) {
        if (!counts_only) {
            sum.add(data, size);
        }
        io.write(data, size);
    }

    // as a tensor, which some writers want to know
    void put(ggml_tensor * tensor, size_t offset, size_t size) {
        if (!counts_only && ggml_backend_buffer_is_host(tensor->buffer)) {
            sum.add((const uint8_t *) tensor->data + offset, size);
        } else if (!counts_only) {
            buf.resize(size);
            ggml_backend_tensor_get(tensor, buf.data(), offset, size);
            sum.add(buf.data(), size);
        }
        io.write_tensor(tensor, offset, size);
    }

    void end() {
        const uint64_t h = sum.get();
        io.write(&h, sizeof(h));
        sum = {};
    }

    llama_io_write_i & io;

    // nobody looks at the bytes: what they are need not be known
    const bool counts_only;

private:
    state_checksum sum;

    std::vector<uint8_t> buf;
};

class state_reader {
public:
    state_reader(llama_io_read_i & io) : io(io) {}

    template <typename T>
    T get() {
        T x = {}; // (upstream's reader of files leaves what lies beyond their end as it is)
        get(&x, sizeof(x));
        return x;
    }

    void get(void * data, size_t size) {
        io.read(data, size);
        sum.add(data, size);
    }

    void end() {
        uint64_t h = 0;
        io.read(&h, sizeof(h));
        if (h != sum.get()) {
            throw std::runtime_error("the state is damaged: its checksum is another one");
        }
        sum = {};
    }

    llama_io_read_i & io;

private:
    state_checksum sum;
};

// The bytes of another part of the memory, which knows nothing of checksums. Rows that are left on the device are not summed.

class state_part_writer : public llama_io_write_i {
public:
    state_part_writer(llama_io_write_i & io, bool on_device) : out(io), on_device(on_device) {}

    void write(const void * src, size_t size) override {
        out.put(src, size);
    }

    void write_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        if (on_device) {
            out.io.write_tensor(tensor, offset, size);
        } else {
            out.put(tensor, offset, size);
        }
    }

    size_t n_bytes() override {
        return out.io.n_bytes();
    }

    state_writer out;

private:
    const bool on_device;
};

class state_part_reader : public llama_io_read_i {
public:
    state_part_reader(llama_io_read_i & io, bool on_device) : in(io), on_device(on_device) {}

    void read(void * dst, size_t size) override {
        in.get(dst, size);
    }

    void read_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        if (on_device) {
            in.io.read_tensor(tensor, offset, size);
            return;
        }

        buf.resize(size);
        in.get(buf.data(), size);
        ggml_backend_tensor_set(tensor, buf.data(), offset, size);
    }

    size_t n_bytes() override {
        return in.io.n_bytes();
    }

    state_reader in;

private:
    const bool on_device;

    std::vector<uint8_t> buf;
};

// calls f(first, n) for runs of adjacent cells
template <typename F>
void for_each_run(const std::vector<uint32_t> & idxs, F f) {
    for (size_t i = 0; i < idxs.size();) {
        size_t n = 1;
        while (i + n < idxs.size() && idxs[i + n] == idxs[i] + n) {
            n++;
        }

        f(idxs[i], n);

        i += n;
    }
}
