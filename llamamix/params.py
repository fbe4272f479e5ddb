"""Parameters of models, contexts, the mixed KV cache and sampling: frozen dataclasses that refuse what can not work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from ._ffi import last_error, lib, sized
from .errors import ParamsError
from .formats import FORMATS, format_name
from .rpc import parse_endpoints

_COUNT_MAX = 10**9 - 1  # nine digits, the most that the text form of the mixed parameters has
N_THREADS_MAX = 512  # GGML_MAX_N_THREADS
POS_MAX = 2**31 - 1  # of llama_pos, and above all positions
_N_UBATCH = 512  # libllama's default
N_SEQ_MAX = 256  # LLAMA_MAX_SEQ
N_LAYER_MAX = 512  # LLAMA_MAX_LAYERS

#: Cells of a page, for which cold rows of K have a mean.
PAGE = 128

#: llama_kv_mixed_attn_type
ATTN_TYPES = {"auto": 0, "fused": 1, "compose": 2}

FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}
POOLING = {"unspecified": -1, "none": 0, "mean": 1, "cls": 2, "last": 3, "rank": 4}
SPLIT_MODE = {"none": 0, "layer": 1, "row": 2}
LOAD_MODE = {"auto": -1, "none": 0, "mmap": 1, "mlock": 2, "mmap+mlock": 3, "dio": 4}

_REAL = (int, float, np.integer, np.floating)

RANDOM_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED


#
# checks
#


def check_int(value: Any, name: str, low: int, high: int) -> int:
    """A whole number within bounds. Raises ParamsError."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ParamsError(f"{name} must be a whole number, not {value!r}.")
    if not low <= value <= high:
        raise ParamsError(f"{name} must be from {low} to {high}, not {value}.")
    return int(value)


def _check_int(params: Any, name: str, low: int, high: int) -> None:
    check_int(getattr(params, name), name, low, high)


def check_float(value: Any, name: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number within bounds. Raises ParamsError."""
    if isinstance(value, bool) or not isinstance(value, _REAL) or not math.isfinite(value):
        raise ParamsError(f"{name} must be a finite number, not {value!r}.")
    if not low <= value <= high:
        raise ParamsError(f"{name} must be from {low:g} to {high:g}, not {value:g}.")
    return float(value)


def _check_float(params: Any, name: str, low: float = -math.inf, high: float = math.inf) -> None:
    check_float(getattr(params, name), name, low, high)


def _check_bool(params: Any, name: str) -> None:
    if not isinstance(getattr(params, name), bool):
        raise ParamsError(f"{name} must be True or False, not {getattr(params, name)!r}.")


def _check_name(params: Any, name: str, names: Mapping[str, Any]) -> None:
    value = getattr(params, name)
    if not isinstance(value, str) or value not in names:
        raise ParamsError(f"{name} must be one of {', '.join(names)}, not {value!r}.")


def _reject_unknown(cls: type, options: Mapping[str, Any]) -> None:
    known = [f.name for f in fields(cls)]
    for name in options:
        if name not in known:
            raise ParamsError(f"{name} is not an option of {cls.__name__}; it has {', '.join(known)}.")


def from_options(cls: type, options: Mapping[str, Any]) -> Any:
    """An instance of a parameter class; a name that it does not have raises ParamsError."""
    _reject_unknown(cls, options)
    return cls(**options)


def options_of(params: Any) -> dict[str, Any]:
    """The fields of a parameter class as keyword arguments."""
    return {field.name: getattr(params, field.name) for field in fields(params)}


#
# mixed KV cache
#


_TYPE_AUTO = -1
_HOT_AUTO = 0  # in the C struct
_N_HOT_SEQ = 512  # what hot="auto" gives a sequence


def _resolve(cold: str) -> str:
    return "iq4_nl" if cold == "auto" else cold


@dataclass(frozen=True, slots=True)
class KVMixedParams:
    """How a mixed KV cache is shaped. [Presets][llamamix.PRESETS] have names for some of these.

    Args:
        hot: Cells per stream that hold the newest tokens in the context's ``type_k`` and ``type_v`` (F16); "auto": 512 for
            each of the sequences that share a stream, but no more than an eighth of its tokens, and no less than 512.
        cold: Format of the older tokens, a name of [FORMATS][llamamix.formats.FORMATS]; "auto": iq4_nl, or q4_0 where
            the device that holds them does not have that.
        cold_k: The same for K alone; None: ``cold``.
        cold_v: The same for V alone; None: ``cold``.
        group: The most tokens that one migration moves (never more than a quarter of ``hot``).
        threshold: Migrate when hot use passes this share of ``hot``, over 0 and at most 1.
        sink: The first positions of every sequence, which stay hot; of all sequences no more than half of ``hot``.
        cold_size: Cold cells per stream; 0: what the context needs beyond ``hot``.
        mean: Where K is quantised, its cold rows are stored less the mean of their page of 128 cells; False: as they
            are.
        attn: "fused": our own kernel, for a cache in a CPU's memory, here or on an RPC server, and where a device has
            one; "compose": stock ggml operations; "auto": fused where that is possible.
        v_skip: Where the fused kernel decodes on a CPU: the share of a query's weights that cold cells may have together
            whose V is left unread, from 0 to below 1; 0: all is read.

    Raises:
        ParamsError: For a value that can not be used.
    """

    hot: int | Literal["auto"] = "auto"
    cold: str = "auto"
    cold_k: str | None = None
    cold_v: str | None = None
    group: int = 128
    threshold: float = 0.8
    sink: int = 4
    cold_size: int = 0
    mean: bool = True
    attn: Literal["auto", "fused", "compose"] = "auto"
    v_skip: float = 0.0

    def __post_init__(self) -> None:
        if self.hot != "auto":
            _check_int(self, "hot", 1, _COUNT_MAX)
        _check_int(self, "group", 1, _COUNT_MAX)
        _check_int(self, "sink", 0, _COUNT_MAX)
        _check_int(self, "cold_size", 0, _COUNT_MAX)
        if self.sink >= self.n_hot:
            raise ParamsError(f"sink must be less than hot ({self.n_hot}), not {self.sink}.")
        for name in ("threshold", "v_skip"):
            _check_float(self, name)
            # what the library keeps is a float, so that is the value here too
            object.__setattr__(self, name, float(str(np.float32(getattr(self, name)))))
        if not 0 < self.threshold <= 1:
            raise ParamsError(f"threshold must be over 0 and at most 1, not {self.threshold:g}.")
        if not 0 <= self.v_skip < 1:
            raise ParamsError(f"v_skip must be from 0 to below 1, not {self.v_skip:g}.")
        _check_bool(self, "mean")
        _check_name(self, "attn", ATTN_TYPES)
        for name, possible in (("cold", ("auto",)), ("cold_k", ("auto", None)), ("cold_v", ("auto", None))):
            if getattr(self, name) not in possible:
                _check_name(self, name, FORMATS)

    @property
    def n_hot(self) -> int:
        """Hot cells of a stream that one sequence has for itself."""
        return _N_HOT_SEQ if self.hot == "auto" else self.hot

    @property
    def type_cold_k(self) -> str:
        """Format of cold rows of K; of "auto" that in the CPU's memory."""
        return _resolve(self.cold_k or self.cold)

    @property
    def type_cold_v(self) -> str:
        """Format of cold rows of V; of "auto" that in the CPU's memory."""
        return _resolve(self.cold_v or self.cold)

    @property
    def has_means(self) -> bool:
        """Whether cold rows of K are stored less the means of pages of 128 cells."""
        return self.mean and FORMATS[self.type_cold_k].n_block > 1

    def cells(self, n_ctx_seq: int) -> tuple[int, int]:
        """Hot and cold cells of a stream.

        Args:
            n_ctx_seq: Tokens of context that the stream is to hold.

        Returns:
            ``(n_hot, n_cold)``.
        """
        n_hot = min(self.n_hot, n_ctx_seq)
        return n_hot, self.cold_size or n_ctx_seq - n_hot

    @classmethod
    def parse(cls, spec: str) -> KVMixedParams | Any:
        """Read a text such as ``"hot=512,cold=q4_0"`` by the grammar of LLAMA_KV_MIXED.

        Args:
            spec: It may begin with the name of a preset, whose parameters the rest changes: ``"quality,hot=1024"``.
                ``"1"`` and ``"on"`` are the defaults.

        Returns:
            None for ``"0"``, ``"off"`` and ``""``, which ask for a plain cache.

        Raises:
            ParamsError: For a text that is none, with the library's sentence.
        """
        if not isinstance(spec, str) or "\0" in spec:
            raise ParamsError(
                f"The mixed KV cache's parameters must be a text such as 'hot=512,cold=q4_0', not {spec!r}."
            )
        c_params = sized("struct llama_kv_mixed_params *")
        result = lib.llama_kv_mixed_params_parse(spec.encode("utf-8", "replace"), c_params)
        if result < 0:
            raise ParamsError(f"kv_mixed can not be {spec!r}: {last_error()}.")
        return cls.from_c(c_params) if result == 0 else None

    def spec(self) -> str:
        """The text that parse() reads back to the same cache."""
        k, v = self.cold_k or self.cold, self.cold_v or self.cold
        cold = f"cold={k}" if k == v else f"cold_k={k},cold_v={v}"
        size = f",cold_size={self.cold_size}" if self.cold_size else ""
        mean = "" if self.mean else ",mean=off"
        attn = f",attn={self.attn}" if self.attn != "auto" else ""
        skip = f",v_skip={self.v_skip}" if self.v_skip else ""
        return (
            f"hot={self.hot},{cold},group={self.group},threshold={self.threshold},sink={self.sink}"
            f"{size}{mean}{attn}{skip}"
        )

    @classmethod
    def from_c(cls, c_params: Any) -> KVMixedParams:
        """From a ``struct llama_kv_mixed_params *``."""
        types = c_params.type_cold_k, c_params.type_cold_v
        k, v = ("auto" if type == _TYPE_AUTO else format_name(type) for type in types)
        return cls(
            hot="auto" if c_params.n_hot == _HOT_AUTO else c_params.n_hot,
            **({"cold": k} if k == v else {"cold_k": k, "cold_v": v}),
            group=c_params.n_group,
            threshold=c_params.threshold,
            sink=c_params.n_sink,
            cold_size=c_params.n_cold,
            mean=c_params.mean != 0,
            attn=list(ATTN_TYPES)[c_params.attn],
            v_skip=c_params.v_skip,
        )

    def to_c(self) -> Any:
        """As a ``struct llama_kv_mixed_params *``."""
        c_params = sized("struct llama_kv_mixed_params *")
        c_params.n_hot = _HOT_AUTO if self.hot == "auto" else self.hot
        c_params.n_cold = self.cold_size
        c_params.n_group = self.group
        c_params.n_sink = self.sink
        c_params.threshold = self.threshold
        k, v = self.cold_k or self.cold, self.cold_v or self.cold
        c_params.type_cold_k = _TYPE_AUTO if k == "auto" else FORMATS[k].type
        c_params.type_cold_v = _TYPE_AUTO if v == "auto" else FORMATS[v].type
        c_params.mean = self.mean
        c_params.attn = ATTN_TYPES[self.attn]
        c_params.v_skip = self.v_skip
        return c_params


def resolve_kv_mixed(value: KVMixedParams | bool | str | None) -> KVMixedParams | None:
    """What ``kv_mixed`` asks for: True the defaults, a text by its grammar, False or None a plain cache, as None."""
    if value is True:
        return KVMixedParams()
    if value is False or value is None:
        return None
    if isinstance(value, str):
        params: KVMixedParams | None = KVMixedParams.parse(value)
        return params
    if isinstance(value, KVMixedParams):
        return value
    raise ParamsError(f"kv_mixed must be a KVMixedParams, a text, True, False or None, not {value!r}.")


#
# model and context
#


@dataclass(frozen=True, slots=True)
class ModelParams:
    """How a model is loaded: the keywords of [Model][llamamix.Model] as an object, for Model.from_params().

    Args:
        n_gpu_layers: Layers to keep in GPU memory, -1: all.
        main_gpu: The GPU that holds the model when ``split_mode`` is "none".
        split_mode: How it is divided among several GPUs: "none", by "layer" or by "row".
        load_mode: How the file is read: "none" (into memory), "mmap", "mlock", "mmap+mlock", "dio" (direct I/O), or
            "auto".
        check_tensors: Look for values that are not numbers while loading.
        use_extra_bufts: Repack weights for the CPU where that is faster.
        vocab_only: Load the tokenizer and the metadata, no weights.
        rpc: ggml-rpc servers that have layers, as ``"HOST:PORT"`` each or with commas between them. Only in a network
            that you trust: the protocol has no authentication and no encryption.

    Raises:
        ParamsError: For a value that can not be used.
    """

    n_gpu_layers: int = -1
    main_gpu: int = 0
    split_mode: Literal["none", "layer", "row"] = "layer"
    load_mode: Literal["auto", "none", "mmap", "mlock", "mmap+mlock", "dio"] = "auto"
    check_tensors: bool = False
    use_extra_bufts: bool = True
    vocab_only: bool = False
    rpc: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rpc", parse_endpoints(self.rpc) if self.rpc else ())
        _check_int(self, "n_gpu_layers", -1, 2**31 - 1)
        _check_int(self, "main_gpu", 0, 255)
        _check_name(self, "split_mode", SPLIT_MODE)
        _check_name(self, "load_mode", LOAD_MODE)
        for name in ("check_tensors", "use_extra_bufts", "vocab_only"):
            _check_bool(self, name)

    def to_c(self) -> Any:
        """As a ``struct llama_model_params``."""
        c_params = lib.llama_model_default_params()
        c_params.n_gpu_layers = self.n_gpu_layers
        c_params.main_gpu = self.main_gpu
        c_params.split_mode = SPLIT_MODE[self.split_mode]
        c_params.load_mode = LOAD_MODE[self.load_mode]
        c_params.check_tensors = self.check_tensors
        c_params.use_extra_bufts = self.use_extra_bufts
        c_params.vocab_only = self.vocab_only
        return c_params


@dataclass(frozen=True, slots=True)
class ContextParams:
    """How a context is made: the keywords of [Context][llamamix.Context] as an object, for Context.from_params().

    Args:
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

    Raises:
        ParamsError: For a value that can not be used.
    """

    n_ctx: int = 4096
    n_batch: int = 2048
    n_ubatch: int | None = None
    n_seq_max: int = 1
    n_threads: int | None = None
    n_threads_batch: int | None = None
    flash_attn: Literal["auto", "on", "off"] = "auto"
    type_k: str = "f16"
    type_v: str = "f16"
    kv_unified: bool = False
    offload_kqv: bool = True
    op_offload: bool = True
    swa_full: bool = True
    embeddings: bool = False
    pooling: Literal["unspecified", "none", "mean", "cls", "last", "rank"] = "unspecified"
    rope_freq_base: float = 0.0
    rope_freq_scale: float = 0.0
    kv_mixed: KVMixedParams | bool | str | None = True

    def __post_init__(self) -> None:
        _check_int(self, "n_ctx", 0, 2**31 - 256)
        _check_int(self, "n_batch", 1, 2**31 - 1)
        _check_int(self, "n_seq_max", 1, N_SEQ_MAX)
        for name, most in (("n_ubatch", 2**31 - 1), ("n_threads", N_THREADS_MAX), ("n_threads_batch", N_THREADS_MAX)):
            if getattr(self, name) is not None:
                _check_int(self, name, 1, most)
        _check_name(self, "flash_attn", FLASH_ATTN)
        _check_name(self, "type_k", FORMATS)
        _check_name(self, "type_v", FORMATS)
        _check_name(self, "pooling", POOLING)
        for name in ("kv_unified", "offload_kqv", "op_offload", "swa_full", "embeddings"):
            _check_bool(self, name)
        _check_float(self, "rope_freq_base", 0.0)
        _check_float(self, "rope_freq_scale", 0.0)
        if not isinstance(self.kv_mixed, (KVMixedParams, bool, str, type(None))):
            resolve_kv_mixed(self.kv_mixed)

    def to_c(self, n_threads: int) -> Any:
        """As a ``struct llama_context_params``, with ``n_threads`` where the parameters leave it open."""
        c_params = lib.llama_context_default_params()
        c_params.n_ctx = self.n_ctx
        c_params.n_batch = self.n_batch
        c_params.n_ubatch = self.n_ubatch or _N_UBATCH
        c_params.n_seq_max = self.n_seq_max
        c_params.n_threads = self.n_threads or n_threads
        c_params.n_threads_batch = self.n_threads_batch or c_params.n_threads
        c_params.flash_attn_type = FLASH_ATTN[self.flash_attn]
        c_params.type_k = FORMATS[self.type_k].type
        c_params.type_v = FORMATS[self.type_v].type
        c_params.kv_unified = self.kv_unified
        c_params.offload_kqv = self.offload_kqv
        c_params.op_offload = self.op_offload
        c_params.swa_full = self.swa_full
        c_params.embeddings = self.embeddings
        c_params.pooling_type = POOLING[self.pooling]
        c_params.rope_freq_base = self.rope_freq_base
        c_params.rope_freq_scale = self.rope_freq_scale
        c_params.no_perf = False
        return c_params


#
# sampling
#


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn from the logits; the defaults are llama.cpp's.

    The samplers come in this order: logit_bias, penalties, top_k, typical_p, top_p, min_p, temperature. Chains of
    others, and in another order, are made of [links][llamamix.samplers].

    Args:
        temperature: Divides the logits; 0: always the most likely token.
        top_k: Keep the k most likely; 0: all.
        top_p: Keep the most likely whose probabilities sum up to p ([Holtzman et al.
            2019](https://arxiv.org/abs/1904.09751)); 1: all.
        min_p: Drop those less likely than p times the most likely ([Nguyen et al.
            2024](https://arxiv.org/abs/2407.01082)); 0: none.
        typical_p: Locally typical sampling ([Meister et al. 2022](https://arxiv.org/abs/2202.00666)); 1: off.
        repeat_penalty: Divides the logits of recent tokens that are positive, multiplies those that are negative
            ([Keskar et al. 2019](https://arxiv.org/abs/1909.05858)); 1: off.
        frequency_penalty: Subtracted from a logit for every recent occurrence of its token.
        presence_penalty: Subtracted from a logit when its token occurred at all.
        repeat_last_n: How many tokens are recent; 0: penalties off.
        seed: 0 to 2**32 - 2; None: a different one each time.
        grammar: GBNF text with a rule named root, which the text must follow; None: none.
        logit_bias: Token id → number that is added to its logit (-inf bans it).
        json_schema: JSON schema, an object or JSON text, which the text must follow; None: none. Not with a grammar.

    Raises:
        ParamsError: For a value that can not be used.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repeat_last_n: int = 64
    seed: int | None = None
    grammar: str | None = None
    logit_bias: Mapping[int, float] | None = None
    json_schema: Mapping[str, Any] | str | None = None

    def __post_init__(self) -> None:
        _check_float(self, "temperature", 0.0)
        _check_int(self, "top_k", 0, 2**31 - 1)
        for name in ("top_p", "min_p", "typical_p"):
            _check_float(self, name, 0.0, 1.0)
        _check_float(self, "repeat_penalty")
        if self.repeat_penalty <= 0:
            raise ParamsError(f"repeat_penalty must be over 0, not {self.repeat_penalty:g}.")
        _check_float(self, "frequency_penalty")
        _check_float(self, "presence_penalty")
        _check_int(self, "repeat_last_n", 0, 2**20)
        if self.seed is not None:
            _check_int(self, "seed", 0, RANDOM_SEED - 1)
        if self.grammar is not None and (
            not isinstance(self.grammar, str) or not self.grammar.strip() or "\0" in self.grammar
        ):
            raise ParamsError("grammar must be a GBNF text, or None.")
        if self.logit_bias is not None:
            check_logit_bias(self.logit_bias)
        if self.json_schema is not None:
            if not isinstance(self.json_schema, (Mapping, str)):
                raise ParamsError(f"json_schema must be an object or JSON text, not {self.json_schema!r}.")
            if self.grammar is not None:
                raise ParamsError("grammar and json_schema can not be given together.")


def check_logit_bias(logit_bias: Any) -> None:
    """A mapping of token ids to numbers, or -inf. Raises ParamsError."""
    if not isinstance(logit_bias, Mapping):
        raise ParamsError(f"logit_bias must map token ids to numbers, not be {logit_bias!r}.")
    for token, bias in logit_bias.items():
        whole = isinstance(token, (int, np.integer)) and not isinstance(token, bool)
        if not whole or not isinstance(bias, _REAL) or math.isnan(bias) or bias == math.inf:
            raise ParamsError(f"logit_bias must map token ids to numbers, not {token!r} to {bias!r}.")
