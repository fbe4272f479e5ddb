#pragma once

struct ggml_backend_buffer;

// Memory of a new cache in pages of 2 MiB, where Linux has them for who asks (/sys/kernel/mm/transparent_hugepage/enabled:
// madvise): attention reads all of it for every token, and a page of 4 KiB ends after a few rows. Only where the buffer is the
// processor's, and in pages of its own; what it holds is zeros afterwards.
void llama_kv_mixed_use_huge_pages(ggml_backend_buffer * buffer);
