"""A GGUF model: its metadata, its tokenizer and its chat template."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ._ffi import error_lines, ffi, lib
from ._handle import Handle
from .errors import LlamamixError, ModelError, ParamsError
from .gguf_file import GgufFile, check_file, path_bytes
from .params import ModelParams, options_of
from .rpc import Servers

if TYPE_CHECKING:
    from typing_extensions import Self

    from .chat import ChatTemplate

_VOCAB_TYPE_NONE = 0
_ROPE_TYPES_MULTI = (8, 40)  # LLAMA_ROPE_TYPE_MROPE, LLAMA_ROPE_TYPE_IMROPE: several positions per token


def as_tokens(tokens: Any, n_vocab: int) -> np.ndarray:
    """Token ids as a contiguous int32 array of shape [n], n over 0. Raises ParamsError."""
    if isinstance(tokens, (str, bytes)):
        raise ParamsError("Tokens must be token ids, not text; tokenize it first.")
    if isinstance(tokens, Iterable) and not isinstance(tokens, (Sequence, np.ndarray)):
        tokens = list(tokens)
    try:
        array = np.asarray(tokens)
    except ValueError:
        raise ParamsError("Tokens must be a flat list of token ids.") from None
    if array.ndim != 1:
        raise ParamsError(f"Tokens must have one dimension, not {array.ndim}.")
    if array.size == 0:
        raise ParamsError("There are no tokens.")
    if array.dtype.kind not in "iu":
        raise ParamsError(f"Tokens must be whole numbers, not {array.dtype}.")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= n_vocab:
        bad = low if low < 0 else high
        raise ParamsError(f"Token {bad} is not in the vocabulary (0 to {n_vocab - 1}).")
    return np.ascontiguousarray(array, np.int32)


def _utf8(text: Any, what: str) -> bytes:
    if not isinstance(text, str):
        raise ParamsError(f"{what} must be a str, not {type(text).__name__}.")
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        raise ParamsError(f"{what} has half of a surrogate pair, which UTF-8 can not encode.") from None
    if len(data) >= 2**31:
        raise ParamsError(f"{what} is longer than 2 GiB.")
    return data


class Model:
    """A model loaded from a GGUF file: metadata, tokenizer, chat template, weights.

    close() (or the end of a ``with`` block) makes the object unusable at once: everything raises ModelError. The
    weights stay in memory until the last context made from it is closed too.

    Args:
        path: The file.
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

    Attributes:
        path (pathlib.Path): The file.
        params (ModelParams): What was given.

    Raises:
        ModelError: When the file can not be loaded, with the reason.
        ParamsError: For a parameter that can not be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | bytes,
        *,
        n_gpu_layers: int = -1,
        main_gpu: int = 0,
        split_mode: Literal["none", "layer", "row"] = "layer",
        load_mode: Literal["auto", "none", "mmap", "mlock", "mmap+mlock", "dio"] = "auto",
        check_tensors: bool = False,
        use_extra_bufts: bool = True,
        vocab_only: bool = False,
        rpc: str | Sequence[str] = (),
    ) -> None:
        self._handle: Handle | None = None
        self.params: ModelParams = ModelParams(
            n_gpu_layers=n_gpu_layers,
            main_gpu=main_gpu,
            split_mode=split_mode,
            load_mode=load_mode,
            check_tensors=check_tensors,
            use_extra_bufts=use_extra_bufts,
            vocab_only=vocab_only,
            rpc=rpc,
        )
        self.path: Path = _check_path(path)
        self._templates: dict[str, ChatTemplate] = {}  # compiled, by their source

        self._servers = Servers(self.params.rpc) if self.params.rpc else None

        c_params = self.params.to_c()
        if self._servers:
            devices = self._servers.c_devices()  # named here, so that it lives until the model is loaded
            c_params.devices = devices
        with error_lines() as errors:
            pointer = lib.llama_model_load_from_file(path_bytes(self.path), c_params)
            if pointer != ffi.NULL:
                self._handle = Handle(pointer, lib.llama_model_free, None, "model", ModelError)
                if self._servers:
                    self._servers.belong_to(self._handle)
        self._check_loaded()
        if self._handle is None:
            GgufFile(self.path)  # says it in plainer words where the file is damaged or not complete
            raise ModelError(f"{self.path} can not be loaded: {errors.reason() or 'libllama gives no reason'}.")

    def _check_loaded(self) -> None:
        try:
            self.check_servers(ModelError)
        except ModelError:
            self.close()
            raise

    def check_servers(self, error: type[LlamamixError]) -> None:
        """Raise ``error`` when a server that has layers of the model is gone."""
        if self._servers:
            self._servers.check(error)

    @classmethod
    def from_params(cls, path: str | os.PathLike[str] | bytes, params: ModelParams) -> Self:
        """A model loaded as ModelParams say.

        Args:
            path: The file.
            params: The constructor's keywords.

        Raises:
            ModelError: Like the constructor.
            ParamsError: Like the constructor.
        """
        return cls(path, **options_of(params))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Model {self.path.name}{'' if self._handle else ' (closed)'}>"

    def close(self) -> None:
        """Give the model up. Closing twice is fine."""
        self._handle = None  # contexts hold the handle too

    def handle(self) -> Handle:
        """What keeps the C object alive. Raises ModelError when closed, and in a process that was forked since."""
        if self._handle is None:
            raise ModelError("The model is closed.")
        self._handle.check_process()
        return self._handle

    #
    # what it is
    #

    def _get(self, function: str) -> int:
        handle = self.handle()
        return int(getattr(lib, function)(handle.pointer))

    @property
    def n_ctx_train(self) -> int:
        """Tokens of context that it was trained with."""
        return self._get("llama_model_n_ctx_train")

    @property
    def n_layer(self) -> int:
        """Number of layers."""
        return self._get("llama_model_n_layer")

    @property
    def n_head(self) -> int:
        """Query heads of the first layer."""
        return self._get("llama_model_n_head")

    @property
    def n_head_kv(self) -> int:
        """K/V heads of the first layer."""
        return self._get("llama_model_n_head_kv")

    @property
    def n_embd(self) -> int:
        """Width of the hidden state, in values."""
        return self._get("llama_model_n_embd")

    @property
    def n_embd_out(self) -> int:
        """Width of an output embedding, in values."""
        return self._get("llama_model_n_embd_out")

    @property
    def n_swa(self) -> int:
        """Tokens in the sliding window of layers that have one, 0: none have."""
        return self._get("llama_model_n_swa")

    @property
    def n_cls_out(self) -> int:
        """Scores that a reranking model gives."""
        return self._get("llama_model_n_cls_out")

    @property
    def n_params(self) -> int:
        """Number of weights."""
        return self._get("llama_model_n_params")

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return self._get("llama_model_size")

    @property
    def has_encoder(self) -> bool:
        """True when tokens go through an encoder first (T5); a Context can not be made then."""
        return bool(self._get("llama_model_has_encoder"))

    @property
    def is_recurrent(self) -> bool:
        """True when all layers are recurrent: what they keep of earlier tokens is a state, not a KV cache."""
        return bool(self._get("llama_model_is_recurrent"))

    @property
    def is_hybrid(self) -> bool:
        """True when some layers are recurrent and others attend."""
        return bool(self._get("llama_model_is_hybrid"))

    @property
    def has_multi_pos(self) -> bool:
        """True when a token has several positions (M-RoPE)."""
        return self._get("llama_model_rope_type") in _ROPE_TYPES_MULTI

    @property
    def desc(self) -> str:
        """Architecture, size and type, e.g. ``"llama 256M Q4_1"``."""
        handle = self.handle()
        return _read_string(lib.llama_model_desc, handle.pointer)

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """The GGUF file's metadata as text, by key; arrays are left out."""
        handle = self.handle()
        keys, values = lib.llama_model_meta_key_by_index, lib.llama_model_meta_val_str_by_index
        return {
            _read_string(keys, handle.pointer, i): _read_string(values, handle.pointer, i)
            for i in range(lib.llama_model_meta_count(handle.pointer))
        }

    def head_sizes(self) -> tuple[int, int]:
        """Elements of one K head and of one V head.

        Returns:
            ``(head_size_k, head_size_v)``, as the metadata have them.
        """
        arch = self.metadata.get("general.architecture", "")
        default = self.n_embd // self.n_head if self.n_head else 0
        k, v = (self.metadata.get(f"{arch}.attention.{name}") for name in ("key_length", "value_length"))
        return int(k or default), int(v or default)

    #
    # tokenizer
    #

    @property
    def n_vocab(self) -> int:
        """Tokens in the vocabulary."""
        handle = self.handle()
        return int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(handle.pointer)))

    def _vocab(self, handle: Handle) -> Any:
        vocab = lib.llama_model_get_vocab(handle.pointer)
        if lib.llama_vocab_type(vocab) == _VOCAB_TYPE_NONE:
            raise ModelError(f"{self.path.name} has no tokenizer.")
        return vocab

    def _special(self, name: str) -> int | None:
        handle = self.handle()
        token = getattr(lib, f"llama_vocab_{name}")(self._vocab(handle))
        return None if token < 0 else int(token)

    @property
    def bos(self) -> int | None:
        """Token that begins a text, None: there is none."""
        return self._special("bos")

    @property
    def eos(self) -> int | None:
        """Token that ends a text, None: there is none."""
        return self._special("eos")

    @property
    def eot(self) -> int | None:
        """Token that ends a turn of a chat, None: there is none."""
        return self._special("eot")

    @property
    def nl(self) -> int | None:
        """Token for a new line, None: there is none."""
        return self._special("nl")

    @property
    def pad(self) -> int | None:
        """Token that pads, None: there is none."""
        return self._special("pad")

    def is_eog(self, token: int) -> bool:
        """True when a token ends generation (end of text, end of turn, ...).

        Args:
            token: Its id.

        Raises:
            ParamsError: When it is not in the vocabulary.
        """
        (token,) = as_tokens([token], self.n_vocab)
        handle = self.handle()
        return bool(lib.llama_vocab_is_eog(lib.llama_model_get_vocab(handle.pointer), int(token)))

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: The text.
            add_special: Add the tokens that begin and end a text, where the model asks for them.
            parse_special: Read the names of special tokens in the text as those tokens.

        Returns:
            The ids, each 0 to ``n_vocab - 1``.

        Raises:
            ParamsError: For what is not text.
            ModelError: When the model has no tokenizer.
        """
        data = _utf8(text, "The text")
        handle = self.handle()
        vocab = self._vocab(handle)
        n_max = len(data) + 8  # a token is a byte or more
        while True:
            tokens = ffi.new("int32_t[]", n_max)
            n = lib.llama_tokenize(vocab, data, len(data), tokens, n_max, bool(add_special), bool(parse_special))
            if n >= 0:
                return ffi.unpack(tokens, n) if n else []
            if n == -(2**31):
                raise ParamsError("The text has more tokens than can be counted.")
            n_max = -n

    def detokenize(self, tokens: Any, remove_special: bool = False, unparse_special: bool = False) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            tokens: Token ids, a list or an integer array of shape [n].
            remove_special: Leave out the tokens that tokenize() adds.
            unparse_special: Write the names of special tokens; False: nothing for them.

        Raises:
            ParamsError: For a token that is not in the vocabulary.
            ModelError: When the model has no tokenizer.
        """
        if not isinstance(tokens, np.ndarray):
            tokens = list(tokens)
        if len(tokens) == 0:
            return ""
        array = as_tokens(tokens, self.n_vocab)
        handle = self.handle()
        vocab = self._vocab(handle)
        c_tokens = ffi.from_buffer("int32_t[]", array)
        n_max = 8 * len(array) + 16
        while True:
            text = ffi.new("char[]", n_max)
            n = lib.llama_detokenize(
                vocab, c_tokens, len(array), text, n_max, bool(remove_special), bool(unparse_special)
            )
            if n >= 0:
                return bytes(ffi.buffer(text, n)).decode("utf-8", "replace")
            n_max = -n

    def token_to_piece(self, token: int, special: bool = False) -> bytes:
        """The bytes that a token adds to a text.

        Args:
            token: Its id.
            special: Write the names of special tokens; False: nothing for them.

        Raises:
            ParamsError: For a token that is not in the vocabulary.
            ModelError: When the model has no tokenizer.
        """
        (token,) = as_tokens([token], self.n_vocab)
        handle = self.handle()
        vocab = self._vocab(handle)
        n_max = 64
        while True:
            piece = ffi.new("char[]", n_max)
            n = lib.llama_token_to_piece(vocab, int(token), piece, n_max, 0, bool(special))
            if n >= 0:
                return bytes(ffi.buffer(piece, n))
            n_max = -n

    #
    # chat
    #

    @property
    def chat_template(self) -> str | None:
        """The chat template in the file, None: there is none."""
        return self._template_source(None)

    def apply_chat_template(
        self,
        messages: Iterable[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        template: str | None = None,
        *,
        tools: Iterable[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Messages as one text for ``tokenize(..., parse_special=True)``, the same as llama-server's ``/apply-
        template``.

        Args:
            messages: Each ``{"role": ..., "content": ...}``. The content is a text, or a list of ``{"type": "text",
                "text": ...}``. An assistant's may have ``tool_calls`` and ``reasoning_content``, a tool's
                ``tool_call_id`` and ``name``, in OpenAI's form.
            add_generation_prompt: End with what starts the assistant's answer.
            template: A Jinja template, or the name of one that llama.cpp knows ("chatml", "llama2", ...), for which
                messages have a role and a content only; None: the model's own.
            tools: Each ``{"type": "function", "function": {"name", "description", "parameters"}}``.
            variables: What else a Jinja template is to know, such as ``{"enable_thinking": False}``.

        Raises:
            ModelError: When the model has no template, or one that can not be used.
            ParamsError: For messages or tools that are none, and with the template's own words for those that it
                refuses.
        """
        from .chat import CHATML, apply_named, is_name, read_tools

        functions = read_tools(tools)
        if template is None:
            template = (self._template_source("tool_use") if functions else None) or self.chat_template
            if template is None:
                raise ModelError(f"{self.path.name} has no chat template; name one, such as 'chatml'.")
        elif not isinstance(template, str):
            raise ParamsError(f"template must be a str or None, not {type(template).__name__}.")
        else:
            self.handle()

        if template == "chatml":
            template = CHATML
        if is_name(template):
            if functions or variables:
                raise ParamsError(f"The template {template} takes no tools and no variables; only Jinja templates do.")
            return apply_named(template, messages, add_generation_prompt)
        return self._compiled_template(template).render(
            messages, functions, add_generation_prompt=add_generation_prompt, variables=variables
        )

    def _template_source(self, name: str | None) -> str | None:
        handle = self.handle()
        c_name = ffi.NULL if name is None else name.encode()
        template = lib.llama_model_chat_template(handle.pointer, c_name)
        return None if template == ffi.NULL else str(ffi.string(template).decode("utf-8", "replace"))

    def _compiled_template(self, source: str) -> ChatTemplate:
        from .chat import ChatTemplate

        if source not in self._templates:
            handle = self.handle()
            vocab = self._vocab(handle)
            self._templates[source] = ChatTemplate(
                source,
                bos=self._special_text("bos"),
                eos=self._special_text("eos"),
                add_bos=bool(lib.llama_vocab_get_add_bos(vocab)),
                add_eos=bool(lib.llama_vocab_get_add_eos(vocab)),
            )
        return self._templates[source]

    def _special_text(self, name: str) -> str:
        token = self._special(name)
        return "" if token is None else self.token_to_piece(token, special=True).decode("utf-8", "replace")


def _read_string(function: Any, *args: Any) -> str:
    """The text that a C function writes into a buffer, its last two arguments, like snprintf()."""
    size = 256
    while True:
        buf = ffi.new("char[]", size)
        n = function(*args, buf, size)
        if n < size:
            return ffi.string(buf).decode("utf-8", "replace") if n > 0 else ""
        size = n + 1


def _check_path(given: Any) -> Path:
    try:
        path = Path(os.fsdecode(given))
    except (TypeError, ValueError):
        raise ParamsError(f"A model's path must be a str or a path, not {given!r}.") from None
    if "\0" in str(path):
        raise ParamsError("A model's path can not have a NUL character.")
    check_file(path)
    return path
