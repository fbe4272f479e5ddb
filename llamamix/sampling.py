"""Drawing the next token from logits with llama.cpp's samplers."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._ffi import ffi, lib
from ._handle import Handle
from .errors import ContextError, ParamsError
from .model import Model, as_tokens
from .params import RANDOM_SEED, SamplingParams

_GRAMMAR_DEPTH_MAX = 1000

_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # struct llama_token_data


class Sampler:
    """A chain of samplers with the state of one generation (recent tokens, position in the grammar, random numbers).

    Raises ParamsError for a grammar that can not be parsed or a biased token that is not in the vocabulary.
    """

    def __init__(self, model: Model, params: SamplingParams) -> None:
        self._model_handle = model.handle()  # the grammar reads the vocabulary
        self._n_vocab = model.n_vocab
        self._ids = np.arange(self._n_vocab, dtype=np.int32)
        self._grammar = self._make_grammar(model, params.grammar) if params.grammar else None
        self._chain = self._make_chain(params)

    def close(self) -> None:
        for handle in (self._grammar, self._chain):
            if handle is not None:
                handle.close()

    def sample(self, logits: np.ndarray) -> int:
        """The token drawn from logits, float32 of shape [n_vocab], and remembered.

        Raises ContextError when there is none to draw: the grammar or the biases rule out every token, or the logits
        are not numbers.
        """
        data = np.empty(self._n_vocab, _TOKEN_DATA)
        data["id"] = self._ids
        data["logit"] = logits
        data["p"] = 0

        candidates = ffi.new("struct llama_token_data_array *")
        candidates.data = ffi.cast("struct llama_token_data *", ffi.from_buffer(data))
        candidates.size = self._n_vocab
        candidates.selected = -1
        candidates.sorted = False

        if np.isnan(logits).any():
            raise ContextError("The model's logits are not numbers.")
        if self._grammar is not None:
            lib.llama_sampler_apply(self._grammar.pointer, candidates)
            # going on would end the process: the grammar aborts on a token that it does not allow
            if not np.isfinite(data["logit"]).any():
                raise ContextError("The grammar allows none of the tokens.")
        lib.llama_sampler_apply(self._chain.pointer, candidates)

        selected = candidates.selected
        if not 0 <= selected < candidates.size or not np.isfinite(candidates.data[selected].logit):
            raise ContextError("No token is left to draw.")
        token = int(candidates.data[selected].id)

        for handle in (self._grammar, self._chain):
            if handle is not None:
                lib.llama_sampler_accept(handle.pointer, token)
        return token

    def _make_grammar(self, model: Model, grammar: str) -> Handle:
        vocab = lib.llama_model_get_vocab(self._model_handle.pointer)
        if model.eos is None and model.eot is None:  # also refuses a model with no tokenizer
            raise ParamsError("A grammar needs a model whose vocabulary has an end-of-generation token.")
        text = np.frombuffer(grammar.encode("utf-8", "replace"), np.uint8)
        depth = np.cumsum((text == ord("(")).astype(np.int64) - (text == ord(")"))).max()
        if depth > _GRAMMAR_DEPTH_MAX:  # the parser recurses, and has the stack of this thread for it
            raise ParamsError(f"grammar nests {depth} groups, more than {_GRAMMAR_DEPTH_MAX}.")
        pointer = lib.llama_sampler_init_grammar(vocab, text.tobytes(), b"root")
        if pointer == ffi.NULL:
            raise ParamsError("grammar can not be parsed as GBNF with a rule named root.")
        return Handle(pointer, lib.llama_sampler_free, self._model_handle, "grammar", ContextError)

    def _make_chain(self, params: SamplingParams) -> Handle:
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        handle = Handle(chain, lib.llama_sampler_free, None, "sampler", ContextError)

        def add(sampler: Any) -> None:
            lib.llama_sampler_chain_add(chain, sampler)

        if params.logit_bias:
            tokens = as_tokens(list(params.logit_bias), self._n_vocab)
            biases = ffi.new("struct llama_logit_bias[]", len(tokens))
            for item, token, bias in zip(biases, tokens, params.logit_bias.values(), strict=True):
                item.token, item.bias = int(token), float(bias)
            add(lib.llama_sampler_init_logit_bias(self._n_vocab, len(tokens), biases))
        add(
            lib.llama_sampler_init_penalties(
                self._n_vocab,
                params.repeat_last_n,
                params.repeat_penalty,
                params.frequency_penalty,
                params.presence_penalty,
            )
        )
        if params.temperature == 0:
            add(lib.llama_sampler_init_greedy())
        else:
            add(lib.llama_sampler_init_top_k(params.top_k))
            add(lib.llama_sampler_init_typical(params.typical_p, 1))
            add(lib.llama_sampler_init_top_p(params.top_p, 1))
            add(lib.llama_sampler_init_min_p(params.min_p, 1))
            add(lib.llama_sampler_init_temp(params.temperature))
            add(lib.llama_sampler_init_dist(RANDOM_SEED if params.seed is None else params.seed))
        return handle
