"""A context: a KV cache, mixed by default, and the computation on it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ._ffi import error_lines, ffi, lib, log, sized
from ._fork import check_threads, note_threads
from .create import create_context
from .errors import ContextError, ContextFullError, ParamsError, check
from .generate import generate
from .held import common_prefix
from .memory import Memory
from .model import Model, as_tokens
from .params import N_THREADS_MAX, POS_MAX, ContextParams, KVMixedParams, SamplingParams, check_int, from_options
from .pooling import NONE, RANK
from .sampling import Sampler
from .state import load_state, save_state, state_body
from .stats import CacheStats, PerfData
from .text import TextStream
from .tokens import Tokens, check_order, output_mask, positions, sequence_ids

_REASONS = {1: "the KV cache is full", 2: "the abort callback ended it"}

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
        self._handle, self._pooling = create_context(model, self.params)
        pointer = self._handle.pointer

        self._n_vocab = model.n_vocab
        self._n_embd_out = model.n_embd_out
        self._has_multi_pos = model.has_multi_pos
        self._n_swa = model.n_swa
        self._has_states = model.is_recurrent or model.is_hybrid
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
            n_stream=self._pooling.n_stream,
            has_multi_pos=self._has_multi_pos,
        )

        #: tokens that the last chat() found in the KV cache; it computed the others
        self.n_kept = 0

        self._room_is_known = not model.is_recurrent and self._pooling.causal and self._pooling.has_memory
        self._pooling_type = int(lib.llama_pooling_type(pointer))
        self._n_threads_max = max(lib.llama_n_threads(pointer), lib.llama_n_threads_batch(pointer))
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
            check_int(pos, "pos", 0, POS_MAX - n)
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
            batch = Tokens(tokens, array, flat, n_seq, output)
            self._decode(ctx, batch, batch.spans())

    def _decode_sequence(self, ctx: Any, tokens: np.ndarray, pos: int | None, seq_id: int, output: np.ndarray) -> None:
        n = len(tokens)
        first = self._next_pos(ctx, seq_id) if pos is None else int(pos)
        pos_all = np.arange(first, first + n, dtype=np.int32)
        batch = Tokens(tokens, pos_all, np.full(n, seq_id, np.int32), np.ones(n, np.int32), output)
        self._decode(ctx, batch, {seq_id: (first, n)})

    def _decode_row(self, tokens: np.ndarray, seq_id: int, whole: bool = False) -> np.ndarray:
        """Decode tokens and take the last one's logits before another thread can decode.

        ``whole``: the tokens are to be all that the sequence holds; those that it begins with already are kept.
        """
        with self._handle as ctx:
            if whole:
                self.n_kept = self._keep_prefix(ctx, tokens, seq_id)
                tokens = tokens[self.n_kept :]
            self._decode_sequence(ctx, tokens, None, seq_id, _ends(len(tokens), [len(tokens) - 1]))
            pointer = lib.llama_get_logits(ctx)
            if pointer == ffi.NULL:
                raise ContextError("There are no logits to draw a token from.")
            return _copy_rows(pointer + (self._n_outputs - 1) * self._n_vocab, 1, self._n_vocab)[0]

    def _keep_prefix(self, ctx: Any, tokens: np.ndarray, seq_id: int) -> int:
        """Remove what a sequence does not have in common with tokens; how many are left, fewer than the tokens.

        Raises ContextFullError for more tokens than the context holds, and nothing is removed then.
        """
        n_all = len(tokens)
        if self._room_is_known:
            self._check_cells(seq_id, n_all)
        memory, held = lib.llama_get_memory(ctx), self.memory.held
        n_held = self._next_pos(ctx, seq_id)
        known = held.tokens(seq_id)
        if known is None or len(known) != n_held or not self._pooling.causal:
            known = tokens[:0]
        n = min(common_prefix(known, tokens), n_all - 1)
        if 0 < n == n_held:
            return n
        if n > 0:
            # the next token needs those of its windows, and of those n_swa - 1 before it
            has_windows = lib.llama_memory_seq_pos_min(memory, seq_id) <= max(0, n - self._n_swa)
            if has_windows and lib.llama_memory_seq_rm(memory, seq_id, n, -1):
                held.cut(seq_id, n)
                return n
            if self._has_states:
                why = "the states of recurrent layers have no way back"
            else:
                why = "the tokens in its sliding windows are gone"
            log.warning(
                "Sequence %d holds %d tokens, and the first %d are those of the conversation, but the cache can not go"
                " back to them: %s. All %d are computed.", seq_id, n_held, n, why, n_all,
            )  # fmt: skip
        if n_held > 0:
            lib.llama_memory_seq_rm(memory, seq_id, -1, -1)
        held.cut(seq_id, 0)
        return 0

    def _next_pos(self, ctx: Any, seq_id: int) -> int:
        return int(lib.llama_memory_seq_pos_max(lib.llama_get_memory(ctx), seq_id)) + 1

    def _decode(self, ctx: Any, batch: Tokens, spans: Mapping[int, tuple[int, int]]) -> None:
        n = len(batch)
        if self.params.embeddings:  # libllama keeps all of them then
            batch.output[:] = 1
        self._pooling.check(batch, self.n_batch, self.n_ubatch)
        lib.llama_synchronize(ctx)  # else the tokens of the call before count as part of this one in perf
        self._check_room(ctx, spans)

        self._has_outputs = False
        self._earlier.clear()
        try:
            for start in range(0, n, self.n_batch):
                part = batch if n <= self.n_batch else batch[start : start + self.n_batch]
                code, reason = self._call_decode(ctx, part)
                if code == 1 and start > 0:
                    self._undo(ctx, spans)
                check(code, f"{n} tokens can not be decoded", reason)
                self._n_outputs = part.n_outputs
                if start + self.n_batch < n and self._n_outputs > 0:
                    self._earlier.append((self._copy_logits(ctx), self._copy_embeddings(ctx)))
        finally:
            self._note_held(ctx, batch, spans)
        self._has_outputs = True

    def _note_held(self, ctx: Any, batch: Tokens, spans: Mapping[int, tuple[int, int]]) -> None:
        """Remember the tokens of a batch, as far as it was decoded."""
        for seq_id, (first, _) in spans.items():
            n_done = self._next_pos(ctx, seq_id) - first
            tokens, pos = batch.of(seq_id)
            if n_done > 0:
                self.memory.held.add(seq_id, pos[:n_done], tokens[:n_done])

    def _check_room(self, ctx: Any, spans: Mapping[int, tuple[int, int]]) -> None:
        """Refuse what certainly does not fit, before anything is computed."""
        if self._room_is_known:
            for seq_id, (first, n) in spans.items():
                self._check_cells(seq_id, self.memory.n_cells(ctx, seq_id, first, n))

    def _check_cells(self, seq_id: int, n_cells: int) -> None:
        if n_cells > self.n_ctx_seq:
            raise ContextFullError(
                f"Sequence {seq_id} would have {n_cells} tokens, and the context holds {self.n_ctx_seq}.", 1
            )

    def _call_decode(self, ctx: Any, part: Tokens) -> tuple[int, str]:
        note_threads(self._n_threads_max)
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
        if self._pooling_type != NONE:
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
            return _copy_rows(pointer, 1, self._n_cls_out if self._pooling_type == RANK else self._n_embd_out)[0]

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
        if not self.params.embeddings or self._pooling_type != NONE:
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
        check_int(max_tokens, "max_tokens", 1, POS_MAX)
        check_int(seq_id, "seq_id", 0, self.n_seq_max - 1)
        if isinstance(prompt, str):
            prompt = self.model.tokenize(prompt, add_special=self.memory.seq_pos_max(seq_id) < 0)
        tokens = as_tokens(prompt, self._n_vocab)
        stream = TextStream(stop)
        sampler = Sampler(self.model, sampling or SamplingParams())

        return self._generate(tokens, False, max_tokens, sampler, stream, seq_id)

    def chat(
        self,
        messages: Iterable[Mapping[str, Any]],
        max_tokens: int = 512,
        sampling: SamplingParams | None = None,
        stop: str | Iterable[str] = (),
        seq_id: int = 0,
        *,
        tools: Iterable[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        template: str | None = None,
    ) -> Iterator[str]:
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
        check_int(max_tokens, "max_tokens", 1, POS_MAX)
        check_int(seq_id, "seq_id", 0, self.n_seq_max - 1)
        text = self.model.apply_chat_template(messages, template=template, tools=tools, variables=variables)
        tokens = as_tokens(self.model.tokenize(text, parse_special=True), self._n_vocab)
        stream = TextStream(stop)
        sampler = Sampler(self.model, sampling or SamplingParams())
        return self._generate(tokens, True, max_tokens, sampler, stream, seq_id)

    def _generate(
        self, prompt: np.ndarray, whole: bool, max_tokens: int, sampler: Sampler, stream: TextStream, seq_id: int
    ) -> Iterator[str]:
        def start() -> np.ndarray:
            return self._decode_row(prompt, seq_id, whole)

        def decode(token: int) -> np.ndarray:
            return self._decode_row(np.array([token], np.int32), seq_id)

        return generate(self.model, start, decode, max_tokens, sampler, stream)

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
        c_stats = sized("struct llama_kv_mixed_stats *")
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
            self._has_outputs = False
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
