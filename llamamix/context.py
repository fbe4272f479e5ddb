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
    """A KV cache of a model, mixed by default, and what is computed with it.

    One thread uses a context at a time, others wait. close() (or the end of a ``with`` block) frees it; after that
    everything raises ContextError.

    Args:
        model: The model, which must not be closed.
        n_ctx: Cells of the KV cache, one for a token, rounded up to a multiple of 256; 0: the context that the model
            was trained with.
        n_batch: The most tokens that one call of llama_decode() gets; longer input is split.
        n_ubatch: The most tokens that one graph computes; None: 512, or ``n_batch`` where all of a batch must be in one
            (pooled embeddings, models without a causal mask).
        n_seq_max: Sequences, 1 to 256; their ids are 0 to ``n_seq_max - 1``.
        n_threads: Threads for single tokens; None: as many as this process may use.
        n_threads_batch: Threads for batches; None: ``n_threads``.
        flash_attn: "on", "off", or "auto": where it is possible.
        type_k: ggml type of the cache's rows of K, see [FORMATS][llamamix.formats.FORMATS]. In a mixed cache that of
            the hot rows: "f16", "bf16" or "f32"; a quantised one is that of the cold rows then, unless ``kv_mixed``
            names another, and hot ones are F16.
        type_v: The same of V. A quantised one needs flash attention.
        kv_unified: True: one buffer that all sequences share; False: ``n_ctx`` is divided between them.
        offload_kqv: Keep the KV cache, and the operations on it, on the GPU.
        op_offload: Compute large operations on weights in the host's memory on the GPU.
        swa_full: A cache of full size for layers with sliding windows; False: as many cells as the windows need.
        embeddings: Keep the embeddings of all tokens.
        pooling: How the embeddings of a sequence become one: "none", "mean", "cls" (the first token's), "last", "rank"
            (a score), or "unspecified": as the model says.
        rope_freq_base: Base of RoPE's frequencies; 0: the model's.
        rope_freq_scale: Scale of RoPE's frequencies; 0: the model's.
        kv_mixed: The mixed KV cache: True for its defaults (with embeddings: a plain one), KVMixedParams, a text such
            as ``"hot=256,cold=q8_0"`` or ``"quality"``, or False or None for a plain one. LLAMA_KV_MIXED has no say here.

    Attributes:
        params (ContextParams): What was given.
        model (Model): The model.
        memory (Memory): Operations on the sequences in the KV cache.
        n_ctx (int): Cells, of all sequences together.
        n_ctx_seq (int): The most tokens that one sequence can have.
        n_batch (int): The most tokens in one call of llama_decode().
        n_ubatch (int): The most tokens in one graph.
        n_seq_max (int): Sequences.
        n_kept (int): Tokens that the last chat() found in the KV cache; it computed the others.

    Raises:
        ContextError: When it can not be created: there is no memory, or a mixed KV cache is not possible for this
            model.
        ParamsError: For a parameter that can not be used.
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
        kv_mixed: KVMixedParams | bool | str | None = True,
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
        """A context as ContextParams say.

        Args:
            model: The model.
            params: The constructor's keywords.

        Raises:
            ContextError: Like the constructor.
            ParamsError: Like the constructor.
        """
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

        The Generation is an iterator for ``for`` and ``async for``, can be cancelled, and tells why it ended. Nothing
        is computed before its first step. Whenever a piece is yielded the sequence holds the prompt and every token
        generated so far.

        Args:
            prompt: A text, or token ids, a list or an integer array of shape [n]; it is added to what the sequence
                holds.
            max_tokens: The most tokens to generate, 1 or more; a token that ends generation ends it before.
            sampling: How tokens are drawn; None: ``SamplingParams()``. A Sampler goes on from where it is, and stays
                open.
            stop: A text or several that end the generation; they are not yielded.
            seq_id: The sequence.

        Returns:
            An iterator over pieces of text, each of one or more whole characters.

        Raises:
            ParamsError: For arguments that can not be used, before anything changes.
            ContextFullError: While it is iterated: when the context is full, after all text was yielded, or when the
                prompt does not fit.
            ContextError: While it is iterated: what decode() and Sampler.sample() raise.
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

        The token that completes a stop text is the last one, with its whole text; one that ends generation is not
        yielded. Otherwise like generate().

        Args:
            prompt: A text, or token ids, a list or an integer array of shape [n]; it is added to what the sequence
                holds.
            max_tokens: The most tokens to generate, 1 or more.
            sampling: How tokens are drawn; None: ``SamplingParams()``. A Sampler goes on from where it is, and stays
                open.
            stop: A text or several that end the generation.
            seq_id: The sequence.
            top: How many of the most likely tokens come with each.

        Returns:
            An iterator over tokens.

        Raises:
            ParamsError: For arguments that can not be used, before anything changes.
            ContextFullError: While it is iterated, like generate().
            ContextError: While it is iterated, like generate().
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

        What the sequence holds of the conversation already is not computed again (``n_kept`` tells how many tokens that
        is), everything else is removed from it. A cache that can not go back to where the two part, for its recurrent
        layers or its small cache of sliding windows, is emptied, with a warning in the log; one that need not go back
        is kept. Otherwise like generate().

        Args:
            messages: The whole conversation, as [Model.apply_chat_template][llamamix.Model.apply_chat_template] takes
                it.
            max_tokens: The most tokens to generate, 1 or more.
            sampling: How tokens are drawn; None: ``SamplingParams()``. A Sampler goes on from where it is, and stays
                open.
            stop: A text or several that end the generation; they are not yielded.
            seq_id: The sequence.
            tools: What the assistant may call, in OpenAI's form; how it does is up to the model.
            variables: What else the template is to know, such as ``{"enable_thinking": False}``.
            template: A Jinja template, or the name of one that llama.cpp knows; None: the model's own.

        Returns:
            An iterator over pieces of text.

        Raises:
            ModelError: When the model has no chat template, or one that can not be used.
            ParamsError: For messages that can not be used or that the template refuses, and for other arguments.
            ContextFullError: While it is iterated, like generate(); a conversation that is too long removes nothing.
            ContextError: While it is iterated, like generate().
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
        """The mixed KV cache's parameters in force; None: the cache is a plain one."""
        c_params = sized("struct llama_kv_mixed_params *")
        with self._handle as ctx:
            code = lib.llama_kv_mixed_get_params(lib.llama_get_memory(ctx), c_params)
        return KVMixedParams.from_c(c_params) if code == 0 else None

    @property
    def stats(self) -> CacheStats | None:
        """What the mixed KV cache holds and has done, as of now; None: the cache is a plain one."""
        with self._handle as ctx:
            return read_stats(ctx)

    @property
    def perf(self) -> PerfData:
        """Tokens computed and the time that took, since the context was made or perf_reset() was called."""
        with self._handle as ctx:
            lib.llama_synchronize(ctx)
            return PerfData.from_c(lib.llama_perf_context(ctx))

    def perf_reset(self) -> None:
        """Start counting ``perf`` anew."""
        with self._handle as ctx:
            lib.llama_synchronize(ctx)
            lib.llama_perf_context_reset(ctx)

    def state_save(self, seq_id: int | None = None) -> bytes:
        """The KV cache's content as bytes, to be kept in memory or in a file.

        Behind a header with a checksum they have libllama's format, which belongs to the version of the library.

        Args:
            seq_id: One sequence; None: all.

        Returns:
            About as many bytes as the rows of the tokens that are held.

        Raises:
            ParamsError: For a sequence that there is not.
            ContextError: When it can not be saved, with libllama's reason.
        """
        if seq_id is not None:
            check_int(seq_id, "seq_id", 0, self.n_seq_max - 1)
        with self._handle as ctx:
            state = save_state(ctx, seq_id)
            self.model.check_servers(ContextError)
            return state

    def state_load(self, state: bytes, seq_id: int | None = None) -> None:
        """Bring back what state_save() gave, in place of what the cache holds.

        Args:
            state: The bytes.
            seq_id: The sequence that takes the state of one sequence; None: the state is that of all.

        Raises:
            ParamsError: For what are no bytes, and for a sequence that there is not.
            ContextError: For bytes that are no such state or are damaged, before anything changes; for a state that
                this context can not hold. A mixed cache is as it was then, a plain one has lost what was to be
                replaced.
        """
        if seq_id is not None:
            check_int(seq_id, "seq_id", 0, self.n_seq_max - 1)
        body = state_body(state, whole=seq_id is None)
        with self._handle as ctx:
            self._drop_outputs()
            self.memory.note_loaded(seq_id)
            load_state(ctx, body, seq_id)
            self.model.check_servers(ContextError)

    #
    # control
    #

    def set_abort_callback(self, callback: Callable[[], bool] | None) -> None:
        """Set a function that decode() asks again and again while it computes.

        It works for what is computed on the CPU.

        Args:
            callback: True ends the decode with DecodeAborted; an exception that it raises ends the decode and comes out
                of it. None: no function.

        Raises:
            ParamsError: For what is no function.
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
        """Change the number of threads.

        Args:
            n_threads: For single tokens, 1 to 512.
            n_threads_batch: For batches; None: as many.

        Raises:
            ParamsError: For a number that can not be used.
            ContextError: Where several can not be used (a process that was forked).
        """
        n_threads_batch = n_threads if n_threads_batch is None else n_threads_batch
        check_int(n_threads, "n_threads", 1, N_THREADS_MAX)
        check_int(n_threads_batch, "n_threads_batch", 1, N_THREADS_MAX)
        check_threads(max(n_threads, n_threads_batch), ContextError)
        with self._handle as ctx:
            lib.llama_set_n_threads(ctx, int(n_threads), int(n_threads_batch))
            self._n_threads_max = max(n_threads, n_threads_batch)
