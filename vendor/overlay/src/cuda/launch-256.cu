#include "launch-impl.cuh"

template void kv_launch_attend<256>(ggml_backend_cuda_context &, kv_mixed_attend &, int);
template void kv_launch_join  <256>(ggml_backend_cuda_context &, const kv_mixed_join &, int, bool);
template int  kv_get_shared   <256>(const kv_mixed_attend &);
