"""Drawing the next token from logits with llama.cpp's samplers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ._ffi import ffi, lib
from ._handle import ExclusiveHandle
from .errors import ContextError, ParamsError
from .grammar import json_schema_to_grammar
from .model import Model, as_tokens
from .params import SamplingParams
from .samplers import Link, links_of

if TYPE_CHECKING:
    from typing_extensions import Self

_GRAMMAR_DEPTH_MAX = 1000

_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # struct llama_token_data


class Sampler:
    """A chain of samplers with the state of one generation: recent tokens, position in the grammar, random numbers.

    One thread uses a sampler at a time, others wait. close() (or the end of a ``with`` block) frees it.

    Args:
        model: Whose tokens are drawn.
        chain: SamplingParams, or [links][llamamix.samplers] of which the last one takes a token; None:
            ``SamplingParams()``.
        grammar: With links: a GBNF text with a rule named root, which all that is drawn follows; None: none.

    Attributes:
        links (tuple[Link, ...]): The chain.
        n_vocab (int): Tokens in the model's vocabulary.

    Raises:
        ModelError: When there is a grammar, and the model has no tokenizer.
        ParamsError: For a grammar that can not be parsed, a biased token that is not in the vocabulary, or a chain
            whose last link takes no token.
    """

    def __init__(
        self, model: Model, chain: SamplingParams | Iterable[Link] | None = None, *, grammar: str | None = None
    ) -> None:
        if chain is None or isinstance(chain, SamplingParams):
            params = chain or SamplingParams()
            if grammar is not None:
                raise ParamsError("grammar goes with links; SamplingParams have one of their own.")
            links = links_of(params)
            grammar = params.grammar
            if params.json_schema is not None:
                grammar = json_schema_to_grammar(params.json_schema)
        else:
            links = _check_links(chain)
        self.links: tuple[Link, ...] = tuple(links)
        self.n_vocab: int = model.n_vocab
        self._model_handle = model.handle()  # the grammar reads the vocabulary
        self._ids = np.arange(self.n_vocab, dtype=np.int32)
        self._grammar = self._make_grammar(model, grammar) if grammar is not None else None
        self._chain = self._make_chain()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        grammar = ", with a grammar" if self._grammar else ""
        return f"<Sampler {', '.join(map(repr, self.links))}{grammar}{' (closed)' if self._chain.closed else ''}>"

    def close(self) -> None:
        """Free the sampler. Closing twice is fine."""
        for handle in (self._grammar, self._chain):
            if handle is not None:
                handle.close()

    def sample(self, logits: np.ndarray) -> int:
        """Draw a token from logits, and remember it.

        Args:
            logits: float32 of shape [n_vocab], such as ``context.logits[-1]``.

        Returns:
            The token's id.

        Raises:
            ContextError: When there is none to draw: the grammar or the biases rule out every token, or the logits are
                not numbers.
            ParamsError: For logits of another shape.
        """
        logits = np.asarray(logits)
        if logits.shape != (self.n_vocab,):
            raise ParamsError(f"logits must be of shape [{self.n_vocab}], not {list(logits.shape)}.")
        data = np.empty(self.n_vocab, _TOKEN_DATA)
        data["id"] = self._ids
        data["logit"] = logits
        data["p"] = 0

        candidates = ffi.new("struct llama_token_data_array *")
        candidates.data = ffi.cast("struct llama_token_data *", ffi.from_buffer(data))
        candidates.size = self.n_vocab
        candidates.selected = -1
        candidates.sorted = False

        if np.isnan(logits).any():
            raise ContextError("The model's logits are not numbers.")
        with self._chain as chain:
            if self._grammar is not None:
                with self._grammar as grammar:
                    lib.llama_sampler_apply(grammar, candidates)
                # going on would end the process: the grammar aborts on a token that it does not allow
                if not np.isfinite(data["logit"]).any():
                    raise ContextError("The grammar allows none of the tokens.")
            lib.llama_sampler_apply(chain, candidates)

            selected = candidates.selected
            if not 0 <= selected < candidates.size or not np.isfinite(candidates.data[selected].logit):
                raise ContextError("No token is left to draw.")
            token = int(candidates.data[selected].id)

            lib.llama_sampler_accept(chain, token)
            if self._grammar is not None:
                with self._grammar as grammar:
                    lib.llama_sampler_accept(grammar, token)
        return token

    def accept(self, tokens: int | Iterable[int]) -> None:
        """Remember tokens that came from elsewhere, such as a prompt's, for penalties; a grammar does not see them.

        Args:
            tokens: A token id, or several in their order.

        Raises:
            ParamsError: For tokens that are not in the vocabulary, and none is remembered then.
        """
        single = isinstance(tokens, (int, np.integer)) and not isinstance(tokens, bool)
        ids = as_tokens([tokens] if single else tokens, self.n_vocab)
        with self._chain as chain:
            for token in ids.tolist():
                lib.llama_sampler_accept(chain, token)

    def reset(self) -> None:
        """Begin anew: no recent tokens, the beginning of the grammar, and random numbers from the seed on."""
        with self._chain as chain:
            lib.llama_sampler_reset(chain)
            if self._grammar is not None:
                with self._grammar as grammar:
                    lib.llama_sampler_reset(grammar)

    def _make_grammar(self, model: Model, grammar: str) -> ExclusiveHandle:
        vocab = lib.llama_model_get_vocab(self._model_handle.pointer)
        if model.eos is None and model.eot is None:  # also refuses a model with no tokenizer
            raise ParamsError("A grammar needs a model whose vocabulary has an end-of-generation token.")
        if not isinstance(grammar, str) or "\0" in grammar:
            raise ParamsError("grammar must be a GBNF text, or None.")
        text = np.frombuffer(grammar.encode("utf-8", "replace"), np.uint8)
        depth = np.cumsum((text == ord("(")).astype(np.int64) - (text == ord(")"))).max(initial=0)
        if depth > _GRAMMAR_DEPTH_MAX:  # the parser recurses, and has the stack of this thread for it
            raise ParamsError(f"grammar nests {depth} groups, more than {_GRAMMAR_DEPTH_MAX}.")
        pointer = lib.llama_sampler_init_grammar(vocab, text.tobytes(), b"root") if grammar.strip() else ffi.NULL
        if pointer == ffi.NULL:
            raise ParamsError("grammar can not be parsed as GBNF with a rule named root.")
        return ExclusiveHandle(pointer, lib.llama_sampler_free, self._model_handle, "sampler", ContextError)

    def _make_chain(self) -> ExclusiveHandle:
        vocab = lib.llama_model_get_vocab(self._model_handle.pointer)
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        handle = ExclusiveHandle(chain, lib.llama_sampler_free, self._model_handle, "sampler", ContextError)
        for link in self.links:
            lib.llama_sampler_chain_add(chain, link.make(vocab, self.n_vocab))
        return handle


def _check_links(chain: Any) -> list[Link]:
    if not isinstance(chain, Iterable) or isinstance(chain, (str, bytes)):
        raise ParamsError(f"A chain must be SamplingParams or links, not {chain!r}.")
    links = list(chain)
    for link in links:
        if not isinstance(link, Link):
            raise ParamsError(f"A chain must consist of links such as TopK(40), not {link!r}.")
    if not links or not links[-1].takes:
        raise ParamsError("The last link of a chain must take a token: Greedy, Draw or Mirostat.")
    return links
