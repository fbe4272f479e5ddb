#include "launch-impl.cuh"

template void kv_launch_attend<64>(ggml_backend_cuda_context &, kv_mixed_attend &, int);
template void kv_launch_join  <64>(ggml_backend_cuda_context &, const kv_mixed_join &, int, bool);
template int  kv_get_shared   <64>(const kv_mixed_attend &);
