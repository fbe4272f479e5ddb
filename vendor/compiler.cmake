# What upstream's sources need with some compilers; for any build of them, patched or not.

# GCC bug 114098: _tile_loadconfig() reads 8 of its 64 bytes as far as the optimiser knows, so the rest is never written
# and ggml's AMX kernels stop the program. They are compiled with another _tile_loadconfig().
function (llamamix_mend_amx header)
    get_target_property(dir ggml-base SOURCE_DIR)
    set_source_files_properties("${dir}/ggml-cpu/amx/mmq.cpp" TARGET_DIRECTORY ggml-base
        PROPERTIES COMPILE_OPTIONS "-include;${header}")
endfunction()

if (CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64" AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND PROJECT_IS_TOP_LEVEL)
    set(gcc ${CMAKE_CXX_COMPILER_VERSION})
    if (gcc VERSION_GREATER_EQUAL 11 AND gcc VERSION_LESS 11.5 OR
        gcc VERSION_GREATER_EQUAL 12 AND gcc VERSION_LESS 12.4 OR
        gcc VERSION_GREATER_EQUAL 13 AND gcc VERSION_LESS 13.3)
        # at the end, when ggml is there
        cmake_language(EVAL CODE "cmake_language(DEFER CALL llamamix_mend_amx \"${CMAKE_CURRENT_LIST_DIR}/gcc-amx.h\")")
    endif()
endif()
