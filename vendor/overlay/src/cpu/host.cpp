#include "cpu/host.h"

#include "ggml-backend.h"

bool llama_kv_mixed_is_on_host(const ggml_tensor * t) {
    if (!t->buffer || !ggml_backend_buffer_is_host(t->buffer)) {
        return false;
    }
    const auto dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(t->buffer));
    return !dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
}
