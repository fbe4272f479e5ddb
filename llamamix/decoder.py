"""What a context computes: tokens go in, and logits and embeddings come out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ._ffi import error_lines, ffi, lib, log, sized
from ._fork import note_threads
from ._handle import ExclusiveHandle
from .create import create_context
from .errors import ContextError, ContextFullError, check
from .formats import FORMATS
from .held import common_prefix
from .memory import Memory
from .model import Model, as_tokens
from .params import POS_MAX, ContextParams, check_int
from .pooling import NONE, RANK, Pooling
from .stats import PromptProgress, read_stats
from .tokens import Tokens, check_order, output_mask, positions, sequence_ids

_REASONS = {1: "the KV cache is full", 2: "the abort callback ended it"}

# a batch of so many tokens computes for long enough that Ctrl-C should not have to wait for it
_N_TOKENS_INTERRUPTIBLE = 32

_PROGRESS_INTERVAL = 0.1  # seconds


class Decoder:
    """A KV cache of a model, and how tokens are added to it. Raises what Context raises."""

    def __init__(self, model: Model, params: ContextParams) -> None:
        self.params: ContextParams = params
        self.model: Model = model
        self._handle: ExclusiveHandle
        self._pooling: Pooling
        self._handle, self._pooling = create_context(model, params)
        pointer = self._handle.pointer

        self._n_vocab = model.n_vocab
        self._n_embd_out = model.n_embd_out
        self._has_multi_pos = model.has_multi_pos
        self._n_swa = model.n_swa
        self._has_states = model.is_recurrent or model.is_hybrid
        self._n_cls_out = model.n_cls_out

        #: cells, of all sequences together
        self.n_ctx: int = int(lib.llama_n_ctx(pointer))
        #: the most tokens that one sequence can have
        self.n_ctx_seq: int = int(lib.llama_n_ctx_seq(pointer))
        #: the most tokens in one call of llama_decode()
        self.n_batch: int = int(lib.llama_n_batch(pointer))
        #: the most tokens in one graph
        self.n_ubatch: int = int(lib.llama_n_ubatch(pointer))
        #: sequences
        self.n_seq_max: int = int(lib.llama_n_seq_max(pointer))
        #: operations on the sequences in the KV cache
        self.memory: Memory = Memory(
            self._handle,
            n_seq_max=self.n_seq_max,
            n_stream=self._pooling.n_stream,
            has_multi_pos=self._has_multi_pos,
        )
        #: tokens that the last chat() found in the KV cache; it computed the others
        self.n_kept: int = 0

        self._room_is_known = not model.is_recurrent and self._pooling.causal and self._pooling.has_memory
        self._pooling_type = int(lib.llama_pooling_type(pointer))
        self._n_threads_max = max(lib.llama_n_threads(pointer), lib.llama_n_threads_batch(pointer))
        self._n_outputs = 0  # of the last llama_decode()
        self._earlier: list[tuple[np.ndarray | None, np.ndarray | None]] = []  # logits, embeddings before the last one
        self._copies: dict[int, np.ndarray] = {}  # logits (0) and embeddings (1) that were asked for
        self._has_outputs = False
        self._n_cold = 0  # tokens whose rows were quantised, and less exact than hot ones, in the last decode
        self._abort: Callable[[], bool] | None = None
        self._progress: Callable[[PromptProgress], None] | None = None

    def decode(
        self,
        tokens: Iterable[int] | np.ndarray,
        pos: int | None = None,
        seq_id: int = 0,
        logits: Literal["last", "all"] | Sequence[bool] | np.ndarray = "last",
    ) -> None:
        """Run tokens of one sequence through the model and add them to its KV cache.

        Input longer than ``n_batch`` is split. ``logits`` and ``embeddings`` are those of this call afterwards.

        Args:
            tokens: Token ids, a list or an integer array of shape [n], n over 0.
            pos: Position of the first; None: after the last one in the cache.
            seq_id: The sequence.
            logits: For which tokens to keep logits: "last", "all", or n truth values.

        Raises:
            ContextFullError: When they do not fit; nothing has changed then.
            DecodeAborted: When the abort callback said so; what was finished stays in the cache.
            ContextError: When libllama can not compute them.
            ParamsError: For arguments that can not be used; nothing has changed then.
        """
        ids = as_tokens(tokens, self._n_vocab)
        n = len(ids)
        check_int(seq_id, "seq_id", 0, self.n_seq_max - 1)
        if pos is not None:
            check_int(pos, "pos", 0, POS_MAX - n)
        output = output_mask(logits, n, _ends(n, [n - 1]))
        with self._handle as ctx:
            self._decode_sequence(ctx, ids, pos, seq_id, output)

    def decode_batch(
        self,
        tokens: Iterable[int] | np.ndarray,
        seq_ids: Sequence[int | Sequence[int]] | np.ndarray,
        pos: Sequence[int] | np.ndarray | None = None,
        logits: Literal["last", "all"] | Sequence[bool] | np.ndarray = "last",
    ) -> None:
        """Run tokens of several sequences through the model.

        Args:
            tokens: Token ids, a list or an integer array of shape [n], n over 0.
            seq_ids: n entries, each a sequence id or several: sequences that share the token.
            pos: n positions; None: each sequence goes on after the last one in the cache.
            logits: For which tokens to keep logits: "last" (of each sequence), "all", or n truth values.

        Raises:
            ContextFullError: Like decode().
            DecodeAborted: Like decode().
            ContextError: Like decode().
            ParamsError: Like decode().
        """
        ids = as_tokens(tokens, self._n_vocab)
        n = len(ids)
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
            batch = Tokens(ids, array, flat, n_seq, output)
            self._decode(ctx, batch, batch.spans())

    def _decode_sequence(
        self,
        ctx: Any,
        tokens: np.ndarray,
        pos: int | None,
        seq_id: int,
        output: np.ndarray,
        is_cancelled: Callable[[], bool] | None = None,
    ) -> None:
        n = len(tokens)
        first = self._next_pos(ctx, seq_id) if pos is None else int(pos)
        pos_all = np.arange(first, first + n, dtype=np.int32)
        batch = Tokens(tokens, pos_all, np.full(n, seq_id, np.int32), np.ones(n, np.int32), output)
        self._decode(ctx, batch, {seq_id: (first, n)}, is_cancelled)

    def _decode_row(
        self,
        tokens: np.ndarray,
        seq_id: int,
        whole: bool = False,
        is_cancelled: Callable[[], bool] | None = None,
    ) -> np.ndarray:
        """Decode tokens and take the last one's logits before another thread can decode.

        whole         the tokens are to be all that the sequence holds; those that it begins with already are kept
        is_cancelled  is asked while a long prompt is computed; when it says so, DecodeAborted is raised
        """
        with self._handle as ctx:
            if whole:
                self.n_kept = self._keep_prefix(ctx, tokens, seq_id)
                tokens = tokens[self.n_kept :]
            self._decode_sequence(ctx, tokens, None, seq_id, _ends(len(tokens), [len(tokens) - 1]), is_cancelled)
            pointer = lib.llama_get_logits(ctx)
            self.model.check_servers(ContextError)
            if pointer == ffi.NULL:
                raise ContextError("There are no logits to draw a token from.")
            row: np.ndarray = _copy_rows(pointer + (self._n_outputs - 1) * self._n_vocab, 1, self._n_vocab)[0]
            return row

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

    def _decode(
        self,
        ctx: Any,
        batch: Tokens,
        spans: Mapping[int, tuple[int, int]],
        is_cancelled: Callable[[], bool] | None = None,
    ) -> None:
        n = len(batch)
        if self.params.embeddings:  # libllama keeps all of them then
            batch.output[:] = 1
        self._pooling.check(batch, self.n_batch, self.n_ubatch)
        lib.llama_synchronize(ctx)  # else the tokens of the call before count as part of this one in perf
        self._check_room(ctx, spans)

        self._drop_outputs()
        report = self._reporter(ctx, n, spans) if n >= _N_TOKENS_INTERRUPTIBLE else None
        try:
            for start in range(0, n, self.n_batch):
                part = batch if n <= self.n_batch else batch[start : start + self.n_batch]
                code, reason = self._call_decode(ctx, part, is_cancelled, report)
                if code == 1 and start > 0:
                    self._undo(ctx, spans)
                self.model.check_servers(ContextError)
                check(code, f"{n} tokens can not be decoded", reason)
                if report is not None:
                    report(False)  # where nothing asks in between, as on a GPU
                self._n_outputs = part.n_outputs
                if start + self.n_batch < n and self._n_outputs > 0:
                    self._earlier.append((self._copy_logits(ctx), self._copy_embeddings(ctx)))
        finally:
            self._note_held(ctx, batch, spans)
        if report is not None:
            report(True)
        self._n_cold = self._count_cold(ctx) if self.params.embeddings else 0
        self._has_outputs = True

    def _count_cold(self, ctx: Any) -> int:
        """Tokens that are cold in a type that is not as exact as the hot one."""
        stats = sized("struct llama_kv_mixed_stats *")
        if lib.llama_kv_mixed_get_stats(lib.llama_get_memory(ctx), stats) != 0:
            return 0
        f32 = FORMATS["f32"].type
        types = (stats.type_cold_k, stats.type_hot_k), (stats.type_cold_v, stats.type_hot_v)
        return 0 if all(cold in (hot, f32) for cold, hot in types) else int(stats.cold_used)

    def _check_exact(self) -> None:
        """Refuse embeddings that are not those of a plain cache."""
        if self._n_cold > 0:
            raise ContextError(
                f"The embeddings are not those of a plain cache: {self._n_cold} tokens are quantised. Make the context"
                " with kv_mixed=False, a hot that holds them, or a cold type as exact as the hot one."
            )

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

    def _reporter(self, ctx: Any, n: int, spans: Mapping[int, tuple[int, int]]) -> Callable[[bool], None] | None:
        """What tells the progress callback how far n tokens are, at the end and every _PROGRESS_INTERVAL before."""
        callback = self._progress
        if callback is None:
            return None
        due, n_done, n_held = 0.0, 0, 0

        def report(at_end: bool) -> None:
            nonlocal due, n_done, n_held
            now = time.monotonic()
            if now < due and not at_end:
                return
            due = now + _PROGRESS_INTERVAL
            n_now = sum(max(0, self._next_pos(ctx, seq_id) - first) for seq_id, (first, _) in spans.items())
            if n_now > n_held:  # the tokens of a ubatch are in the cache when its computation begins
                n_done, n_held = n_held, n_now
            callback(PromptProgress(n if at_end else min(n_done, n), n, read_stats(ctx)))

        return report

    def _call_decode(
        self,
        ctx: Any,
        part: Tokens,
        is_cancelled: Callable[[], bool] | None,
        report: Callable[[bool], None] | None,
    ) -> tuple[int, str]:
        note_threads(self._n_threads_max)
        c_batch, keep = part.to_c()
        abort = self._abort
        if len(part) >= _N_TOKENS_INTERRUPTIBLE:
            if is_cancelled is not None:
                abort = _either(abort, is_cancelled)
            elif abort is None and threading.current_thread() is threading.main_thread():
                abort = _never  # Python looks for Ctrl-C whenever it is called
        if report is not None:
            abort = _reporting(report, abort)
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
        """Logits of the last decode, float32 of shape [n_outputs, n_vocab], in the order of the tokens.

        They are copied from the library when they are asked for first; the array is the same until the next decode, can
        not be written to, and stays what it is after that.

        Raises:
            ContextError: When there are none.
        """
        return self._outputs(0, self._n_vocab, self._copy_logits)

    @property
    def embeddings(self) -> np.ndarray:
        """Embeddings of the last decode's tokens, float32 of shape [n_outputs, n_embd_out], an array like ``logits``.

        Raises:
            ContextError: When there are none, when they are pooled (embeddings_seq() has them then), and when they were
                computed with tokens that a mixed cache has quantised, so that they are not those of a plain cache.
        """
        if self._pooling_type != NONE:
            raise ContextError("The embeddings are pooled; embeddings_seq() has them by sequence.")
        self._check_exact()
        return self._outputs(1, self._n_embd_out, self._copy_embeddings)

    def embeddings_seq(self, seq_id: int = 0) -> np.ndarray:
        """The pooled embedding of a sequence in the last decode.

        Args:
            seq_id: The sequence.

        Returns:
            A copy, float32 of shape [n_embd_out]; with the pooling "rank" scores of shape [n_cls_out].

        Raises:
            ContextError: When there is none, and when it was computed with tokens that a mixed cache has quantised.
        """
        check_int(seq_id, "seq_id", 0, self.n_seq_max - 1)
        with self._handle as ctx:
            pointer = lib.llama_get_embeddings_seq(ctx, seq_id) if self._has_outputs else ffi.NULL
            if pointer == ffi.NULL:
                raise ContextError(f"There is no pooled embedding of sequence {seq_id}.")
            self._check_exact()
            n = self._n_cls_out if self._pooling_type == RANK else self._n_embd_out
            row: np.ndarray = _copy_rows(pointer, 1, n)[0]
            return row

    def _outputs(self, which: int, n_columns: int, copy: Callable[[Any], np.ndarray | None]) -> np.ndarray:
        name = ("logits", "embeddings")[which]
        with self._handle as ctx:
            if not self._has_outputs:
                raise ContextError(f"There are no {name}: nothing was decoded.")
            if which in self._copies:
                return self._copies[which]
            kept = [part[which] for part in self._earlier]
            if self._n_outputs > 0:
                kept.append(copy(ctx))
            parts = [part for part in kept if part is not None]
            if len(parts) < len(kept):
                raise ContextError(f"There are no {name}: the context does not keep them.")
            if not parts:
                rows = np.empty((0, n_columns), np.float32)
            else:
                rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
            rows.setflags(write=False)
            self._copies[which] = rows
            return rows

    def _drop_outputs(self) -> None:
        self._has_outputs = False
        self._earlier.clear()
        self._copies.clear()

    def _copy_logits(self, ctx: Any) -> np.ndarray | None:
        pointer = lib.llama_get_logits(ctx)
        self.model.check_servers(ContextError)
        return None if pointer == ffi.NULL else _copy_rows(pointer, self._n_outputs, self._n_vocab)

    def _copy_embeddings(self, ctx: Any) -> np.ndarray | None:
        if not self.params.embeddings or self._pooling_type != NONE:
            return None
        pointer = lib.llama_get_embeddings(ctx)
        self.model.check_servers(ContextError)
        return None if pointer == ffi.NULL else _copy_rows(pointer, self._n_outputs, self._n_embd_out)


def _never() -> bool:
    return False


def _either(first: Callable[[], bool] | None, second: Callable[[], bool]) -> Callable[[], bool]:
    return second if first is None else lambda: first() or second()


def _reporting(report: Callable[[bool], None], abort: Callable[[], bool] | None) -> Callable[[], bool]:
    """An abort callback that tells how far it is."""

    def ask() -> bool:
        report(False)
        return abort is not None and abort()

    return ask


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
