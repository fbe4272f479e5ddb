#pragma once

#include "llama.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "llama-kv-mixed.decl.h"

#ifdef __cplusplus
}
#endif
