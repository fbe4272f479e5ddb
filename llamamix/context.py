"""A context: a KV cache, mixed by default, and the computation on it."""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ._ffi import error_lines, ffi, lib
from ._handle import ExclusiveHandle
from .batch import Batch, check_order, output_mask, positions, sequence_ids
from .errors import ContextError, ContextFullError, ParamsError, check
from .memory import Memory
from .model import Model, as_tokens
from .params import (
    KV_TYPES,
    N_THREADS_MAX,
    ContextParams,
    KVMixedParams,
    SamplingParams,
    check_int,
    from_options,
    resolve_kv_mixed,
)
from .sampling import Sampler
from .stats import CacheStats, PerfData
from .text import TextStream

_POOLING_NONE, _POOLING_RANK = 0, 4
_POS_MAX = 2**31 - 1

# a saved state: magic, what it is of (-1: all sequences, 0: one), CRC-32 and size of what follows
_STATE_HEADER = struct.Struct("<8siIQ")
_STATE_MAGIC = b"LLAMAMIX"

_REASONS = {1: "the KV cache is full", 2: "the abort callback ended it"}

# architectures whose graph has V in a shape that can only be stored transposed
_ARCHS_V_TRANSPOSED = ("plm",)

# a batch of so many tokens computes for long enough that Ctrl-C should not have to wait for it
_N_TOKENS_INTERRUPTIBLE = 32


class Context:
    """A KV cache of a model and what is computed with it; ``params`` are the fields of ContextParams.

    One thread uses a context at a time, others wait. close() (or the end of a ``with`` block) frees it.

    Raises ContextError when it can not be created, ParamsError for a parameter that can not be used.
    """

    def __init__(self, model: Model, **params: Any) -> None:
        self.params: ContextParams = from_options(ContextParams, params)
        self.model = model
        model_handle = model.handle()
        kv_mixed = resolve_kv_mixed(self.params.kv_mixed)
        _check_supported(model, self.params)

        with error_lines() as errors:
            pointer = lib.llama_kv_mixed_init_from_model(
                model_handle.pointer,
                self.params.to_c(_n_cpus()),
                kv_mixed.to_c() if kv_mixed else ffi.NULL,
            )
            if pointer != ffi.NULL:
                self._handle = ExclusiveHandle(pointer, lib.llama_free, model_handle, "context", ContextError)
        if pointer == ffi.NULL:
            reason = errors.reason() or ffi.string(lib.llama_kv_mixed_last_error()).decode("utf-8", "replace")
            raise ContextError(f"The context can not be created: {reason}.")

        self._n_vocab = model.n_vocab
        self._n_embd_out = model.n_embd_out
        self._has_multi_pos = model.has_multi_pos
        self._is_recurrent = model.is_recurrent
        self._n_cls_out = model.n_cls_out

        #: cells, of all sequences together
        self.n_ctx = int(lib.llama_n_ctx(pointer))
        #: the most tokens that one sequence can have
        self.n_ctx_seq = int(lib.llama_n_ctx_seq(pointer))
        #: the most tokens in one call of llama_decode()
        self.n_batch = int(lib.llama_n_batch(pointer))
        #: the most tokens in one graph
        self.n_ubatch = int(lib.llama_n_ubatch(pointer))
        #: sequences
        self.n_seq_max = int(lib.llama_n_seq_max(pointer))
        #: operations on the sequences in the KV cache
        self.memory = Memory(
            self._handle,
            n_seq_max=self.n_seq_max,
            n_stream=1 if self.params.kv_unified else self.n_seq_max,
            has_multi_pos=self._has_multi_pos,
        )

        self._pooling = int(lib.llama_pooling_type(pointer))
        # without a causal mask, or a cache, every token must be in the same graph
        self._one_graph = not lib.llama_get_causal_attn(pointer) or lib.llama_get_memory(pointer) == ffi.NULL

        self._n_outputs = 0  # of the last llama_decode()
        self._earlier: list[tuple[np.ndarray | None, np.ndarray | None]] = []  # logits, embeddings before the last one
        self._has_outputs = False
        self._abort: Callable[[], bool] | None = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = " (closed)" if self._handle.closed else ""
        return f"<Context n_ctx={self.n_ctx} kv_mixed={self.params.kv_mixed!r}{state}>"

    def close(self) -> None:
        """Free the context. Closing twice is fine."""
        self._handle.close()

    #
    # decode
    #

    def decode(self, tokens: Any, pos: int | None = None, seq_id: int = 0, logits: Any = "last") -> None:
        """Run tokens of one sequence through the model and add them to its KV cache.

        tokens  token ids, a list or an integer array of shape [n]
        pos     position of the first, None: after the last one in the cache
        logits  for which tokens to keep logits: "last", "all", or n truth values

        Input longer than n_batch is split. Raises ContextFullError when it does not fit; nothing has changed then.
        Raises DecodeAborted when the abort callback said so, ParamsError for arguments that can not be used.
        """
        tokens = as_tokens(tokens, self._n_vocab)
        n = len(tokens)
        check_int(seq_id, "seq_id", 0, self.n_seq_max - 1)
        if pos is not None:
            check_int(pos, "pos", 0, _POS_MAX - n)
        output = output_mask(logits, n, _ends(n, [n - 1]))
        with self._handle as ctx:
            self._decode_sequence(ctx, tokens, pos, seq_id, output)

    def decode_batch(self, tokens: Any, seq_ids: Any, pos: Any = None, logits: Any = "last") -> None:
        """Run tokens of several sequences through the model.

        tokens   token ids, a list or an integer array of shape [n]
        seq_ids  n entries, each a sequence id or several (a token that they share)
        pos      n positions, None: each sequence goes on after the last one in the cache
        logits   for which tokens to keep logits: "last" (of each sequence), "all", or n truth values

        Raises what decode() raises.
        """
        tokens = as_tokens(tokens, self._n_vocab)
        n = len(tokens)
        flat, n_seq = sequence_ids(seq_ids, n, self.n_seq_max)
        token_of = np.repeat(np.arange(n), n_seq)
        output = output_mask(logits, n, _ends(n, [token_of[flat == s].max() for s in np.unique(flat)]))
        with self._handle as ctx:
            if pos is None:
                following = {int(s): self._next_pos(ctx, int(s)) for s in np.unique(flat)}
                array = np.empty(n, np.int32)
                starts = np.concatenate(([0], np.cumsum(n_seq)))
                for i in range(n):
                    mine = [int(s) for s in flat[starts[i] : starts[i + 1]]]
                    array[i] = following[mine[0]]
                    following.update({s: int(array[i]) + 1 for s in mine})
            else:
                array = positions(pos, n)
            check_order(array, flat, n_seq, may_jump=self._has_multi_pos)
            batch = Batch(tokens, array, flat, n_seq, output)
            self._decode(ctx, batch, batch.spans())

    def _decode_sequence(self, ctx: Any, tokens: np.ndarray, pos: int | None, seq_id: int, output: np.ndarray) -> None:
        n = len(tokens)
        first = self._next_pos(ctx, seq_id) if pos is None else int(pos)
        pos_all = np.arange(first, first + n, dtype=np.int32)
        batch = Batch(tokens, pos_all, np.full(n, seq_id, np.int32), np.ones(n, np.int32), output)
        self._decode(ctx, batch, {seq_id: (first, first + n)})

    def _decode_row(self, tokens: np.ndarray, seq_id: int) -> np.ndarray:
        """Decode tokens and take the last one's logits before another thread can decode."""
        with self._handle as ctx:
            self._decode_sequence(ctx, tokens, None, seq_id, _ends(len(tokens), [len(tokens) - 1]))
            pointer = lib.llama_get_logits(ctx)
            if pointer == ffi.NULL:
                raise ContextError("There are no logits to draw a token from.")
            return _copy_rows(pointer + (self._n_outputs - 1) * self._n_vocab, 1, self._n_vocab)[0]

    def _next_pos(self, ctx: Any, seq_id: int) -> int:
        return int(lib.llama_memory_seq_pos_max(lib.llama_get_memory(ctx), seq_id)) + 1

    def _decode(self, ctx: Any, batch: Batch, spans: Mapping[int, tuple[int, int]]) -> None:
        n = len(batch)
        if self.params.embeddings:  # libllama keeps all of them then
            batch.output[:] = 1
        if self._one_graph and n > self.n_ubatch:
            raise ParamsError(f"{n} tokens must be one graph for this model, and n_ubatch is {self.n_ubatch}.")
        if self._pooling != _POOLING_NONE and self.params.embeddings and n > self.n_batch:
            raise ParamsError(f"{n} tokens must be one batch to pool their embeddings, and n_batch is {self.n_batch}.")
        lib.llama_synchronize(ctx)  # else the tokens of the call before count as part of this one in perf
        self._check_room(ctx, spans)

        self._has_outputs = False
        self._earlier.clear()
        for start in range(0, n, self.n_batch):
            part = batch if n <= self.n_batch else batch[start : start + self.n_batch]
            code, reason = self._call_decode(ctx, part)
            if code == 1 and start > 0:
                self._undo(ctx, spans)
            check(code, f"{n} tokens can not be decoded", reason)
            self._n_outputs = part.n_outputs
            if start + self.n_batch < n and self._n_outputs > 0:
                self._earlier.append((self._copy_logits(ctx), self._copy_embeddings(ctx)))
        self._has_outputs = True

    def _check_room(self, ctx: Any, spans: Mapping[int, tuple[int, int]]) -> None:
        """Refuse what certainly does not fit, before anything is computed."""
        if self._is_recurrent or self._one_graph:
            return
        for seq_id, (first, end) in spans.items():
            n_cells = self.memory.n_cells(ctx, seq_id, first, end)
            if n_cells > self.n_ctx_seq:
                raise ContextFullError(
                    f"Sequence {seq_id} would have {n_cells} tokens, and the context holds {self.n_ctx_seq}.", 1
                )

    def _call_decode(self, ctx: Any, part: Batch) -> tuple[int, str]:
        c_batch, keep = part.to_c()
        abort = self._abort
        if (
            abort is None
            and len(part) >= _N_TOKENS_INTERRUPTIBLE
            and threading.current_thread() is threading.main_thread()
        ):
            abort = _never  # Python looks for Ctrl-C whenever it is called
        raised: list[BaseException] = []
        callback = _abort_callback(abort, raised) if abort is not None else ffi.NULL
        try:
            lib.llama_set_abort_callback(ctx, callback, ffi.NULL)
            with error_lines() as errors:
                code = lib.llama_decode(ctx, c_batch)
        finally:
            lib.llama_set_abort_callback(ctx, ffi.NULL, ffi.NULL)  # the callback lives no longer than this call
        del keep
        if raised:
            raise raised[0]
        return code, errors.reason() or _REASONS.get(code, "")

    def _undo(self, ctx: Any, spans: Mapping[int, tuple[int, int]]) -> None:
        memory = lib.llama_get_memory(ctx)
        for seq_id, (first, _) in spans.items():
            if not lib.llama_memory_seq_rm(memory, seq_id, first, -1):
                raise ContextError(
                    f"The KV cache is full, and the tokens of sequence {seq_id} that did fit can not be removed again.",
                    1,
                )

    #
    # outputs
    #

    @property
    def logits(self) -> np.ndarray:
        """Logits of the last decode, a copy, float32 of shape [n_outputs, n_vocab], in the order of the tokens.

        Raises ContextError when there are none.
        """
        return self._outputs(0, self._n_vocab, self._copy_logits)

    @property
    def embeddings(self) -> np.ndarray:
        """Embeddings of the last decode's tokens, a copy, float32 of shape [n_outputs, n_embd_out].

        Raises ContextError when there are none, or when they are pooled (see embeddings_seq).
        """
        if self._pooling != _POOLING_NONE:
            raise ContextError("The embeddings are pooled; embeddings_seq() has them by sequence.")
        return self._outputs(1, self._n_embd_out, self._copy_embeddings)

    def embeddings_seq(self, seq_id: int = 0) -> np.ndarray:
        """The pooled embedding of a sequence in the last decode, a copy, float32 of shape [n_embd_out].

        Scores of shape [n_cls_out] for pooling "rank". Raises ContextError when there is none.
        """
        check_int(seq_id, "seq_id", 0, self.n_seq_max - 1)
        with self._handle as ctx:
            pointer = lib.llama_get_embeddings_seq(ctx, seq_id) if self._has_outputs else ffi.NULL
            if pointer == ffi.NULL:
                raise ContextError(f"There is no pooled embedding of sequence {seq_id}.")
            return _copy_rows(pointer, 1, self._n_cls_out if self._pooling == _POOLING_RANK else self._n_embd_out)[0]

    def _outputs(self, which: int, n_columns: int, copy: Callable[[Any], np.ndarray | None]) -> np.ndarray:
        name = ("logits", "embeddings")[which]
        with self._handle as ctx:
            if not self._has_outputs:
                raise ContextError(f"There are no {name}: nothing was decoded.")
            kept = [part[which] for part in self._earlier]
            if self._n_outputs > 0:
                kept.append(copy(ctx))
            parts = [part for part in kept if part is not None]
            if len(parts) < len(kept):
                raise ContextError(f"There are no {name}: the context does not keep them.")
            return np.concatenate(parts) if parts else np.empty((0, n_columns), np.float32)

    def _copy_logits(self, ctx: Any) -> np.ndarray | None:
        pointer = lib.llama_get_logits(ctx)
        return None if pointer == ffi.NULL else _copy_rows(pointer, self._n_outputs, self._n_vocab)

    def _copy_embeddings(self, ctx: Any) -> np.ndarray | None:
        if not self.params.embeddings or self._pooling != _POOLING_NONE:
            return None
        pointer = lib.llama_get_embeddings(ctx)
        return None if pointer == ffi.NULL else _copy_rows(pointer, self._n_outputs, self._n_embd_out)

    #
    # text
    #

    def generate(
        self,
        prompt: str | Any,
        max_tokens: int = 128,
        sampling: SamplingParams | None = None,
        stop: str | Iterable[str] = (),
        seq_id: int = 0,
    ) -> Iterator[str]:
        """Go on after a prompt, and yield the text piece by piece.

        prompt      a text, or token ids; it is added to what the sequence holds
        max_tokens  the most tokens to generate; a token that ends generation ends it before
        sampling    None: SamplingParams()
        stop        texts that end the generation; they are not yielded

        Whenever a piece is yielded the sequence holds the prompt and every token generated so far. Raises
        ContextFullError when the context is full, after all text was yielded, and what decode() raises.
        """
        check_int(max_tokens, "max_tokens", 1, _POS_MAX)
        check_int(seq_id, "seq_id", 0, self.n_seq_max - 1)
        if isinstance(prompt, str):
            prompt = self.model.tokenize(prompt, add_special=self.memory.seq_pos_max(seq_id) < 0)
        tokens = as_tokens(prompt, self._n_vocab)
        stream = TextStream(stop)
        sampler = Sampler(self.model, sampling or SamplingParams())
        return self._generate(tokens, max_tokens, sampler, stream, seq_id)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        max_tokens: int = 512,
        sampling: SamplingParams | None = None,
        stop: str | Iterable[str] = (),
        seq_id: int = 0,
    ) -> Iterator[str]:
        """The assistant's answer to messages, each ``{"role": ..., "content": ...}``, piece by piece.

        The sequence is emptied first: the messages are the whole conversation. Otherwise like generate().
        """
        text = self.model.apply_chat_template(messages)
        tokens = self.model.tokenize(text, parse_special=True)
        pieces = self.generate(tokens, max_tokens, sampling, stop, seq_id)
        self.memory.seq_rm(seq_id)
        return pieces

    def _generate(
        self, tokens: np.ndarray, max_tokens: int, sampler: Sampler, stream: TextStream, seq_id: int
    ) -> Iterator[str]:
        try:
            logits = self._decode_row(tokens, seq_id)
            for _ in range(max_tokens):
                token = sampler.sample(logits)
                if self.model.is_eog(token):
                    break
                text = stream.feed(self.model.token_to_piece(token))
                try:
                    logits = self._decode_row(np.array([token], np.int32), seq_id)
                except ContextFullError:
                    text += stream.finish()
                    if text:
                        yield text
                    raise
                if text:
                    yield text
                if stream.stopped:
                    break
            if text := stream.finish():
                yield text
        finally:
            sampler.close()

    #
    # state
    #

    @property
    def kv_mixed(self) -> KVMixedParams | None:
        """The mixed KV cache's parameters in force, None: the cache is a plain one."""
        c_params = ffi.new("struct llama_kv_mixed_params *")
        c_params.struct_size = ffi.sizeof(c_params[0])
        with self._handle as ctx:
            code = lib.llama_kv_mixed_get_params(lib.llama_get_memory(ctx), c_params)
        return KVMixedParams.from_c(c_params) if code == 0 else None

    @property
    def stats(self) -> CacheStats | None:
        """What the mixed KV cache holds and has done, None: the cache is a plain one."""
        c_stats = ffi.new("struct llama_kv_mixed_stats *")
        c_stats.struct_size = ffi.sizeof(c_stats[0])
        with self._handle as ctx:
            code = lib.llama_kv_mixed_get_stats(lib.llama_get_memory(ctx), c_stats)
        return CacheStats.from_c(c_stats) if code == 0 else None

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
        with self._handle as ctx, error_lines() as errors:
            if seq_id is None:
                size = lib.llama_state_get_size(ctx)
            else:
                size = lib.llama_state_seq_get_size(ctx, seq_id)
            state = bytearray(_STATE_HEADER.size + size)
            body = memoryview(state)[_STATE_HEADER.size :]
            with ffi.from_buffer("uint8_t[]", body) as target:
                if seq_id is None:
                    written = lib.llama_state_get_data(ctx, target, size)
                else:
                    written = lib.llama_state_seq_get_data(ctx, target, size, seq_id)
            if size == 0 or written != size:
                raise ContextError(f"The state can not be saved: {errors.reason() or 'libllama gives no reason'}.")
            whose = -1 if seq_id is None else 0
            _STATE_HEADER.pack_into(state, 0, _STATE_MAGIC, whose, zlib.crc32(body), size)
            return bytes(state)

    def state_load(self, state: bytes, seq_id: int | None = None) -> None:
        """Bring back what state_save() gave, in place of all that the cache holds (None) or of one sequence.

        Raises ContextError for bytes that are no such state or are damaged, before anything changes, and for one that
        this context can not hold; what it replaces is gone then.
        """
        if seq_id is not None:
            check_int(seq_id, "seq_id", 0, self.n_seq_max - 1)
        body = _check_state(state, whole=seq_id is None)
        with self._handle as ctx, error_lines() as errors:
            self._has_outputs = False
            # released before an exception: its traceback may be kept, and freed in any order
            with ffi.from_buffer("uint8_t[]", body) as source:
                if seq_id is None:
                    read = lib.llama_state_set_data(ctx, source, len(body))
                else:
                    read = lib.llama_state_seq_set_data(ctx, source, len(body), seq_id)
            self.memory.note_loaded(seq_id)
            if read != len(body):
                raise ContextError(f"The state can not be loaded: {errors.reason() or 'it is of another context'}.")

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
        """Threads for single tokens and for batches (None: as many)."""
        n_threads_batch = n_threads if n_threads_batch is None else n_threads_batch
        check_int(n_threads, "n_threads", 1, N_THREADS_MAX)
        check_int(n_threads_batch, "n_threads_batch", 1, N_THREADS_MAX)
        with self._handle as ctx:
            lib.llama_set_n_threads(ctx, int(n_threads), int(n_threads_batch))


def _never() -> bool:
    return False


def _abort_callback(abort: Callable[[], bool], raised: list[BaseException]) -> Any:
    def on_error(_type: Any, error: BaseException, _traceback: Any) -> None:
        raised.append(error)

    # error: what C gets when the function raises
    return ffi.callback("bool(void *)", lambda _data: bool(abort()), error=True, onerror=on_error)


def _ends(n: int, last: Iterable[int]) -> np.ndarray:
    mask = np.zeros(n, np.int8)
    mask[list(last)] = 1
    return mask


def _copy_rows(pointer: Any, n_rows: int, n_columns: int) -> np.ndarray:
    data = ffi.buffer(pointer, 4 * n_rows * n_columns)
    return np.frombuffer(data, np.float32).reshape(n_rows, n_columns).copy()


def _n_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_supported(model: Model, params: ContextParams) -> None:
    """Refuse what libllama would abort the process for."""
    if model.params.vocab_only:
        raise ContextError("The model was loaded with its vocabulary only.")
    if model.has_encoder:
        raise ContextError("Models with an encoder are not supported.")
    arch = model.metadata.get("general.architecture")
    if arch in _ARCHS_V_TRANSPOSED and (params.flash_attn != "off" or resolve_kv_mixed(params.kv_mixed) is not None):
        raise ContextError(f"A model of architecture {arch} needs flash_attn='off' and kv_mixed=False.")
    for size, name in zip(model.head_sizes(), ("type_k", "type_v"), strict=True):
        ggml_type = getattr(params, name)
        block = lib.ggml_blck_size(KV_TYPES[ggml_type])
        if size % block != 0:
            raise ContextError(
                f"{name}={ggml_type} stores blocks of {block} elements, which do not divide a head of {size}."
            )


def _check_state(state: Any, whole: bool) -> memoryview:
    try:
        view = memoryview(state).cast("B")
    except TypeError:
        raise ParamsError(f"A state must be bytes, not {type(state).__name__}.") from None
    if len(view) < _STATE_HEADER.size:
        raise ContextError("These bytes are no saved state.")
    magic, whose, crc, size = _STATE_HEADER.unpack_from(view)
    body = view[_STATE_HEADER.size :]
    if magic != _STATE_MAGIC:
        raise ContextError("These bytes are no saved state.")
    if whose not in (-1, 0) or len(body) != size or zlib.crc32(body) != crc:
        raise ContextError("The saved state is damaged.")
    if whole != (whose == -1):
        held = "all sequences" if whose == -1 else "one sequence"
        raise ContextError(f"The saved state is that of {held}.")
    return body
