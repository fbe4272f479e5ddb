#include "llama-kv-mixed-io.h"

#include "ggml-backend.h"

//
// llama_kv_mixed_io_write
//

void llama_kv_mixed_io_write::write(const void * src, size_t size) {
    io.write(src, size);
}

void llama_kv_mixed_io_write::write_tensor(ggml_tensor * tensor, size_t offset, size_t size) {
    std::vector<uint8_t> data(size);

    ggml_backend_tensor_get(tensor, data.data(), offset, size);
    io.write(data.data(), size);
}

size_t llama_kv_mixed_io_write::n_bytes() {
    return io.n_bytes();
}

//
// llama_kv_mixed_io_read
//

void llama_kv_mixed_io_read::read(void * dst, size_t size) {
    io.read(dst, size);
}

void llama_kv_mixed_io_read::read_tensor(ggml_tensor * tensor, size_t offset, size_t size) {
    rows.push_back({ tensor, offset, std::vector<uint8_t>(size) });
    io.read(rows.back().data.data(), size);
}

size_t llama_kv_mixed_io_read::n_bytes() {
    return io.n_bytes();
}

void llama_kv_mixed_io_read::flush() {
    for (const auto & row : rows) {
        ggml_backend_tensor_set(row.tensor, row.data.data(), row.offset, row.data.size());
    }
    rows.clear();
}
