// The library beside libllama that makes grammars of JSON schemas (vendor/overlay/schema).

char * llamamix_schema_to_grammar(const char * schema, char ** error);
void   llamamix_schema_free      (char * text);
