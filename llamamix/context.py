"""A context: a KV cache, mixed by default, and the computation on it."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ._ffi import lib, sized
from ._fork import check_threads
from .decoder import Decoder
from .errors import ContextError, ParamsError
from .generation import GeneratedToken, Generation, Source
from .model import Model, as_tokens
from .params import N_THREADS_MAX, POS_MAX, ContextParams, KVMixedParams, SamplingParams, check_int, options_of
from .sampling import Sampler
from .state import load_state, save_state, state_body
from .stats import CacheStats, PerfData, PromptProgress, read_stats
from .text import TextStream

if TYPE_CHECKING:
    from typing_extensions import Self


class Context(Decoder):
    """A KV cache of a model and what is computed with it.

    n_ctx            cells of the KV cache (one for a token), rounded up to a multiple of 256; 0: the context the model
                     was trained with
    n_batch          the most tokens that one call of llama_decode() gets (longer input is split)
    n_ubatch         the most tokens that one graph computes, None: 512, or n_batch where all of a batch must be in one
                     (pooled embeddings, models without a causal mask)
    n_seq_max        sequences; their ids are 0 to n_seq_max - 1
    n_threads        threads for single tokens, None: as many as this process may use
    n_threads_batch  threads for batches, None: n_threads
    flash_attn       auto, on or off
    type_k, type_v   ggml types of the cache's rows (of the hot rows when it is a mixed one)
    kv_unified       one buffer shared by all sequences; False: n_ctx is divided between them
    offload_kqv      keep the KV cache and its operations on the GPU
    op_offload       compute large operations on weights in host memory on the GPU
    swa_full         full-size cache for layers with sliding windows
    embeddings       keep the embeddings of all tokens
    pooling          unspecified (from the model), none, mean, cls, last or rank
    rope_freq_base   0: from the model
    rope_freq_scale  0: from the model
    kv_mixed         the mixed KV cache: True for its defaults (with embeddings: a plain one), KVMixedParams, a text
                     such as "hot=256,cold=q8_0", or False for a plain one. LLAMA_KV_MIXED has no say here.

    ``params`` has what was given as ContextParams. One thread uses a context at a time, others wait. close() (or the
    end of a ``with`` block) frees it.

    Raises ContextError when it can not be created, ParamsError for a parameter that can not be used.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int = 4096,
        n_batch: int = 2048,
        n_ubatch: int | None = None,
        n_seq_max: int = 1,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        flash_attn: Literal["auto", "on", "off"] = "auto",
        type_k: str = "f16",
        type_v: str = "f16",
        kv_unified: bool = False,
        offload_kqv: bool = True,
        op_offload: bool = True,
        swa_full: bool = True,
        embeddings: bool = False,
        pooling: Literal["unspecified", "none", "mean", "cls", "last", "rank"] = "unspecified",
        rope_freq_base: float = 0.0,
        rope_freq_scale: float = 0.0,
        kv_mixed: KVMixedParams | bool | str = True,
    ) -> None:
        params = ContextParams(
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            n_seq_max=n_seq_max,
            n_threads=n_threads,
            n_threads_batch=n_threads_batch,
            flash_attn=flash_attn,
            type_k=type_k,
            type_v=type_v,
            kv_unified=kv_unified,
            offload_kqv=offload_kqv,
            op_offload=op_offload,
            swa_full=swa_full,
            embeddings=embeddings,
            pooling=pooling,
            rope_freq_base=rope_freq_base,
            rope_freq_scale=rope_freq_scale,
            kv_mixed=kv_mixed,
        )
        super().__init__(model, params)

    @classmethod
    def from_params(cls, model: Model, params: ContextParams) -> Self:
        """A context as ContextParams say. Raises what the constructor raises."""
        return cls(model, **options_of(params))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = " (closed)" if self._handle.closed else ""
        return f"<Context n_ctx={self.n_ctx} kv_mixed={self.params.kv_mixed!r}{state}>"

    def _repr_html_(self) -> str:
        """What it is, with bars of the cells in use where its cache is a mixed one, for notebooks."""
        head = f"<pre>{html.escape(repr(self))}</pre>"
        with self._handle.glance() as ctx:
            stats = None if ctx is None else read_stats(ctx)
        return head if stats is None else head + stats._repr_html_()

    def close(self) -> None:
        """Free the context. Closing twice is fine."""
        self._handle.close()

    #
    # text
    #

    def generate(
        self,
        prompt: str | Iterable[int] | np.ndarray,
        max_tokens: int = 128,
        sampling: SamplingParams | Sampler | None = None,
        stop: str | Iterable[str] = (),
        seq_id: int = 0,
    ) -> Generation[str]:
        """Go on after a prompt, and yield the text piece by piece.

        prompt      a text, or token ids; it is added to what the sequence holds
        max_tokens  the most tokens to generate; a token that ends generation ends it before
        sampling    None: SamplingParams(); a Sampler goes on from where it is, and stays open
        stop        texts that end the generation; they are not yielded
        seq_id      the sequence

        The Generation is an iterator for ``for`` and ``async for``, can be cancelled, and tells why it ended. Whenever
        a piece is yielded the sequence holds the prompt and every token generated so far. Raises ContextFullError when
        the context is full, after all text was yielded, and what decode() raises; ParamsError for arguments that can
        not be used, before anything changes.
        """
        tokens = self._prompt_tokens(prompt, seq_id)
        source, stream = self._source(tokens, False, max_tokens, sampling, seq_id), TextStream(stop)
        return Generation(lambda state: source.pieces(state, stream))

    def generate_tokens(
        self,
        prompt: str | Iterable[int] | np.ndarray,
        max_tokens: int = 128,
        sampling: SamplingParams | Sampler | None = None,
        stop: str | Iterable[str] = (),
        seq_id: int = 0,
        *,
        top: int = 0,
    ) -> Generation[GeneratedToken]:
        """Go on after a prompt, and yield the tokens: id, bytes, text, logprob and the most likely ones.

        top  how many of the most likely tokens come with each

        The token that completes a stop text is the last one, with its whole text; one that ends generation is not
        yielded. Otherwise like generate().
        """
        check_int(top, "top", 0, self._n_vocab)
        tokens = self._prompt_tokens(prompt, seq_id)
        source, stream = self._source(tokens, False, max_tokens, sampling, seq_id), TextStream(stop)
        return Generation(lambda state: source.tokens(state, stream, top))

    def chat(
        self,
        messages: Iterable[Mapping[str, Any]],
        max_tokens: int = 512,
        sampling: SamplingParams | Sampler | None = None,
        stop: str | Iterable[str] = (),
        seq_id: int = 0,
        *,
        tools: Iterable[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        template: str | None = None,
    ) -> Generation[str]:
        """The assistant's answer to messages, piece by piece.

        messages   the whole conversation, as Model.apply_chat_template() takes it, like the last three
        tools      what the assistant may call; how it does is up to the model
        variables  what else the template is to know, such as ``{"enable_thinking": False}``
        template   None: the model's own

        What the sequence holds of the conversation already is not computed again (``n_kept`` tells how many tokens that
        is), everything else is removed from it. A cache that can not go back to where the two part, for its recurrent
        layers or its small cache of sliding windows, is emptied, with a warning in the log; one that need not go back
        is kept. Otherwise like generate(), and raises what Model.apply_chat_template() raises.
        """
        text = self.model.apply_chat_template(messages, template=template, tools=tools, variables=variables)
        tokens = as_tokens(self.model.tokenize(text, parse_special=True), self._n_vocab)
        source, stream = self._source(tokens, True, max_tokens, sampling, seq_id), TextStream(stop)
        return Generation(lambda state: source.pieces(state, stream))

    def _prompt_tokens(self, prompt: str | Iterable[int] | np.ndarray, seq_id: int) -> np.ndarray:
        check_int(seq_id, "seq_id", 0, self.n_seq_max - 1)
        if isinstance(prompt, str):
            prompt = self.model.tokenize(prompt, add_special=self.memory.seq_pos_max(seq_id) < 0)
        return as_tokens(prompt, self._n_vocab)

    def _source(
        self, prompt: np.ndarray, whole: bool, max_tokens: int, sampling: SamplingParams | Sampler | None, seq_id: int
    ) -> Source:
        check_int(max_tokens, "max_tokens", 1, POS_MAX)
        check_int(seq_id, "seq_id", 0, self.n_seq_max - 1)
        owns = not isinstance(sampling, Sampler)
        sampler = sampling if isinstance(sampling, Sampler) else Sampler(self.model, sampling)
        if sampler.n_vocab != self._n_vocab:
            raise ParamsError(f"The sampler is of another model, with {sampler.n_vocab} tokens, not {self._n_vocab}.")

        def start(is_cancelled: Callable[[], bool]) -> np.ndarray:
            return self._decode_row(prompt, seq_id, whole, is_cancelled)

        def decode(token: int) -> np.ndarray:
            return self._decode_row(np.array([token], np.int32), seq_id)

        return Source(self.model, start, decode, max_tokens, sampler, owns)

    #
    # state
    #

    @property
    def kv_mixed(self) -> KVMixedParams | None:
        """The mixed KV cache's parameters in force, None: the cache is a plain one."""
        c_params = sized("struct llama_kv_mixed_params *")
        with self._handle as ctx:
            code = lib.llama_kv_mixed_get_params(lib.llama_get_memory(ctx), c_params)
        return KVMixedParams.from_c(c_params) if code == 0 else None

    @property
    def stats(self) -> CacheStats | None:
        """What the mixed KV cache holds and has done, None: the cache is a plain one."""
        with self._handle as ctx:
            return read_stats(ctx)

    @property
    def perf(self) -> PerfData:
        """Tokens and times since the context was made, or since perf_reset()."""
        with self._handle as ctx:
            lib.llama_synchronize(ctx)
            return PerfData.from_c(lib.llama_perf_context(ctx))

    def perf_reset(self) -> None:
        """Start counting anew."""
        with self._handle as ctx:
            lib.llama_synchronize(ctx)
            lib.llama_perf_context_reset(ctx)

    def state_save(self, seq_id: int | None = None) -> bytes:
        """The KV cache's content as bytes, of one sequence or of all (None). Raises ContextError."""
        if seq_id is not None:
            check_int(seq_id, "seq_id", 0, self.n_seq_max - 1)
        with self._handle as ctx:
            return save_state(ctx, seq_id)

    def state_load(self, state: bytes, seq_id: int | None = None) -> None:
        """Bring back what state_save() gave, in place of all that the cache holds (None) or of one sequence.

        Raises ContextError for bytes that are no such state or are damaged, before anything changes, and for one that
        this context can not hold; what it replaces is gone then.
        """
        if seq_id is not None:
            check_int(seq_id, "seq_id", 0, self.n_seq_max - 1)
        body = state_body(state, whole=seq_id is None)
        with self._handle as ctx:
            self._drop_outputs()
            self.memory.note_loaded(seq_id)
            load_state(ctx, body, seq_id)

    #
    # control
    #

    def set_abort_callback(self, callback: Callable[[], bool] | None) -> None:
        """A function that decode() asks again and again while it computes; True ends it with DecodeAborted.

        None: no function. An exception that it raises ends the decode and comes out of it. It works for what is
        computed on the CPU.
        """
        if callback is not None and not callable(callback):
            raise ParamsError(f"The abort callback must be a function or None, not {callback!r}.")
        self._abort = callback

    def set_progress_callback(self, callback: Callable[[PromptProgress], None] | None) -> None:
        """Set a function that is told how far it is while 32 tokens or more are computed, and when they are done.

        The thread that computes calls it: some ten times a second on the CPU, after every n_batch tokens elsewhere.

        Args:
            callback: It must not use the context; an exception that it raises ends the decode and comes out of it.
                None: no function.

        Raises:
            ParamsError: For what is no function.
        """
        if callback is not None and not callable(callback):
            raise ParamsError(f"The progress callback must be a function or None, not {callback!r}.")
        self._progress = callback

    @property
    def n_threads(self) -> int:
        """Threads for single tokens."""
        with self._handle as ctx:
            return int(lib.llama_n_threads(ctx))

    @property
    def n_threads_batch(self) -> int:
        """Threads for batches."""
        with self._handle as ctx:
            return int(lib.llama_n_threads_batch(ctx))

    def set_n_threads(self, n_threads: int, n_threads_batch: int | None = None) -> None:
        """Threads for single tokens and for batches (None: as many).

        Raises ParamsError, and ContextError where several can not be used (a process that was forked).
        """
        n_threads_batch = n_threads if n_threads_batch is None else n_threads_batch
        check_int(n_threads, "n_threads", 1, N_THREADS_MAX)
        check_int(n_threads_batch, "n_threads_batch", 1, N_THREADS_MAX)
        check_threads(max(n_threads, n_threads_batch), ContextError)
        with self._handle as ctx:
            lib.llama_set_n_threads(ctx, int(n_threads), int(n_threads_batch))
            self._n_threads_max = max(n_threads, n_threads_batch)
