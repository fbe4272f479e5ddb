# Flags that upstream's sources need with some compilers; for any build of them, patched or not.

# GCC bug 114098: _tile_loadconfig() reads 8 of its 64 bytes as far as the optimiser knows, so the rest is never written
# and ggml's AMX kernels stop the program.
if (CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64" AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    set(gcc ${CMAKE_CXX_COMPILER_VERSION})
    if (gcc VERSION_GREATER_EQUAL 11 AND gcc VERSION_LESS 11.5 OR
        gcc VERSION_GREATER_EQUAL 12 AND gcc VERSION_LESS 12.4 OR
        gcc VERSION_GREATER_EQUAL 13 AND gcc VERSION_LESS 13.3)
        add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:SHELL:-mno-amx-tile -mno-amx-int8 -mno-amx-bf16>")
        # The kernels for one kind of processor have flags of their own, behind those of all. (In another order: CMake leaves
        # out what it has had.)
        set(LLAMAMIX_NO_AMX "$<$<COMPILE_LANGUAGE:C,CXX>:SHELL:-mno-amx-bf16 -mno-amx-int8 -mno-amx-tile>")
    endif()
endif()
