// JSON schemas to grammars by llama.cpp's own converter. It is not a part of libllama, so this is a library of its own,
// with the few files of llama.cpp's common/ that it needs; its functions are declared in llamamix/_decl/schema.h.

#include "common.h"
#include "json-schema-to-grammar.h"

#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#if defined(_WIN32)
#    define LLAMAMIX_SCHEMA_API extern "C" __declspec(dllexport)
#else
#    define LLAMAMIX_SCHEMA_API extern "C" __attribute__((visibility("default")))
#endif

// what the converter needs of common.cpp, which needs much else

std::string string_join(const std::vector<std::string> & values, const std::string & separator) {
    std::string res;
    for (size_t i = 0; i < values.size(); i++) {
        res += (i == 0 ? "" : separator) + values[i];
    }
    return res;
}

std::vector<std::string> string_split(const std::string & str, const std::string & delimiter) {
    std::vector<std::string> res;
    size_t start = 0;
    for (size_t end; (end = str.find(delimiter, start)) != std::string::npos; start = end + delimiter.size()) {
        res.push_back(str.substr(start, end - start));
    }
    res.push_back(str.substr(start));
    return res;
}

std::string string_repeat(const std::string & str, size_t n) {
    std::string res;
    for (size_t i = 0; i < n; i++) {
        res += str;
    }
    return res;
}

static char * copy_of(const std::string & text) {
    char * res = static_cast<char *>(malloc(text.size() + 1));
    if (res != nullptr) {
        memcpy(res, text.c_str(), text.size() + 1);
    }
    return res;
}

// The grammar of a JSON schema, as a text that llamamix_schema_free() takes back. NULL when there is none: error is the
// reason then, to be given back as well, or NULL for want of memory.
LLAMAMIX_SCHEMA_API char * llamamix_schema_to_grammar(const char * schema, char ** error) {
    *error = nullptr;
    try {
        return copy_of(json_schema_to_grammar(common_json::parse(schema), true));
    } catch (const std::exception & e) {
        *error = copy_of(e.what());
        return nullptr;
    }
}

LLAMAMIX_SCHEMA_API void llamamix_schema_free(char * text) {
    free(text);
}
