#pragma once

#include "llama-kv-mixed.h"

#ifdef __cplusplus
extern "C" {
#endif

#include "llama-kv-mixed-test.decl.h"

#ifdef __cplusplus
}
#endif
