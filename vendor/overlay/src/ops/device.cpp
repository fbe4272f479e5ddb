#include "ops/device.h"

#include "llama-impl.h"

#include <vector>

ggml_tensor * llama_kv_mixed_build_op(
        ggml_context * ctx, const llama_kv_mixed_op & op, ggml_type type, std::initializer_list<int64_t> ne, std::initializer_list<ggml_tensor *> src) {
    std::vector<int64_t>       dims(ne);
    std::vector<ggml_tensor *> args(src);
    dims.resize(4, 1);

    const auto compute = [](ggml_tensor *, int, int, void *) {
        GGML_ABORT("a node for a device has come to the CPU");
    };

    ggml_tensor * res = ggml_custom_4d(ctx, type, dims[0], dims[1], dims[2], dims[3], args.data(), args.size(), compute, 1, nullptr);

    llama_kv_mixed_op_write(res, op);

    return res;
}

std::string llama_kv_mixed_op_reason(ggml_backend_dev_t dev, const ggml_tensor * node) {
    typedef const char * (*reason_fn)(ggml_backend_dev_t dev, const ggml_tensor * node);

    const auto get_reason = (reason_fn) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), LLAMA_KV_MIXED_OP_REASON);
    if (!get_reason) {
        return format("%s has no kernels for it", ggml_backend_dev_name(dev));
    }

    const char * reason = get_reason(dev, node);

    return reason ? format("%s: %s", ggml_backend_dev_name(dev), reason) : "";
}
