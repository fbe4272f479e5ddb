#pragma once

#include "llama-io.h"

#include <cstdint>
#include <vector>

// Readers and writers of a state whose rows stay on the device (LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) count a row's bytes in
// elements, which a type with blocks does not have: such rows travel with the bytes of the state instead.

// keeps the rows among the bytes that it passes on
class llama_kv_mixed_io_write : public llama_io_write_i {
public:
    explicit llama_kv_mixed_io_write(llama_io_write_i & io) : io(io) {}

    void write       (const void * src, size_t size) override;
    void write_tensor(ggml_tensor * tensor, size_t offset, size_t size) override;

    size_t n_bytes() override;

private:
    llama_io_write_i & io;
};

class llama_kv_mixed_io_read : public llama_io_read_i {
public:
    explicit llama_kv_mixed_io_read(llama_io_read_i & io) : io(io) {}

    void read       (void * dst, size_t size) override;
    void read_tensor(ggml_tensor * tensor, size_t offset, size_t size) override;

    size_t n_bytes() override;

    // store the rows, once everything was read: a state that fails leaves none
    void flush();

private:
    struct row_info {
        ggml_tensor * tensor;
        size_t offset;

        std::vector<uint8_t> data;
    };

    llama_io_read_i & io;

    std::vector<row_info> rows;
};
