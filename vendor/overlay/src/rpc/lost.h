#pragma once

#include <cstdint>

//
// RPC servers that are gone: upstream's client ends the process then, ours goes on without them
//
// A lost connection stays lost: what it is asked to compute fails, what it is asked for is zeros. Who wants to know compares the
// number of losses with what it was.
//

// the name of llama_kv_mixed_rpc_n_lost() among the backend's functions
#define LLAMA_KV_MIXED_RPC_N_LOST "llama_kv_mixed_rpc_n_lost"

// a connection to a server was lost, or could not be made
void llama_kv_mixed_rpc_add_lost(const char * endpoint);

// how often that was so in this process
uint32_t llama_kv_mixed_rpc_n_lost(const char * endpoint);
