#pragma once

#include <cstddef>
#include <cstdint>

//
// what a client and a server of ours say to each other beyond upstream's protocol
//
// A server of ours puts a mark into a byte of its HELLO that is 0 in upstream's. A client that finds it there may ask with a
// command of our own whether the server computes a node; nobody else is sent that command, or a node of ours.
//

// in rpc_msg_hello_rsp::padding
#define LLAMA_KV_MIXED_RPC_MARK 0x4D

// rpc_msg_get_alloc_size_req, answered by a sentence in LLAMA_KV_MIXED_RPC_REASON_SIZE bytes: why the server does not compute the
// node, empty: it does. Far from upstream's commands, and a value that enum rpc_cmd can have.
#define LLAMA_KV_MIXED_RPC_CMD_REASON 31

#define LLAMA_KV_MIXED_RPC_REASON_SIZE 256
