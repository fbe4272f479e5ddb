#include "llama-kv-mixed-hooks.h"

#include "ggml-backend.h"
#include "llama.h"

#include <string>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

// Backends that are plug-ins lie beside libllama, which is where upstream looks only when the program lies there too.
void llama_kv_mixed_load_backends() {
#if !defined(_WIN32)
    Dl_info info;
    if (ggml_backend_reg_count() > 0 || dladdr((const void *) llama_backend_init, &info) == 0 || info.dli_fname == nullptr) {
        return;
    }

    const std::string path = info.dli_fname;
    const size_t      end  = path.rfind('/');
    ggml_backend_load_all_from_path(end == std::string::npos ? "." : path.substr(0, end).c_str());
#endif
}
