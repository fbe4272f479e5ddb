#include "cpu/host.h"

bool llama_kv_mixed_is_on_host(const ggml_tensor * t) {
    return t->buffer && ggml_backend_buffer_is_host(t->buffer) && ggml_backend_dev_type(llama_kv_mixed_get_dev(t)) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

ggml_backend_dev_t llama_kv_mixed_get_dev(const ggml_tensor * t) {
    // the CPU's own buffer types name no device
    const ggml_backend_dev_t dev = t->buffer ? ggml_backend_buft_get_device(ggml_backend_buffer_get_type(t->buffer)) : nullptr;

    return dev ? dev : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}
