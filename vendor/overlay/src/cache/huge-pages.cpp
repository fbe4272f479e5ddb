#include "cache/huge-pages.h"

#include "ggml-backend.h"

#if defined(__linux__)
#include <cstdint>
#include <sys/mman.h>
#include <unistd.h>
#endif

void llama_kv_mixed_use_huge_pages(ggml_backend_buffer * buffer) {
#if defined(__linux__)
    if (ggml_backend_buffer_get_type(buffer) != ggml_backend_cpu_buffer_type()) {
        return;
    }

    const uintptr_t page  = sysconf(_SC_PAGESIZE);
    const uintptr_t data  = (uintptr_t) ggml_backend_buffer_get_base(buffer);
    const uintptr_t begin = (data + page - 1)/page*page;
    const uintptr_t end   = (data + ggml_backend_buffer_get_size(buffer))/page*page;

    if (begin >= end || madvise((void *) begin, end - begin, MADV_HUGEPAGE) != 0) {
        return;
    }
    // pages that are there stay small, those that come anew are large
    if (madvise((void *) begin, end - begin, MADV_DONTNEED) == 0) {
        ggml_backend_buffer_clear(buffer, 0);
    }
#else
    (void) buffer;
#endif
}
