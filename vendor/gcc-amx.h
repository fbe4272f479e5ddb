// _tile_loadconfig() as newer GCCs have it, see compiler.cmake.

#pragma once

#include <immintrin.h>

#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\t%X0" : : "m"(*(const char (*)[64]) (config)))
