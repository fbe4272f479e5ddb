"""Models: loading, metadata, tokenizer, chat template, lifetime."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_model import write_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from llamamix import Context, ContextError, LibraryError, Model, ModelError, ParamsError, _ffi

#
# the library
#


def library_file(name: str) -> Path:
    """A library that is in use, found where the bindings look."""
    file = _ffi._file_name(name)
    return next(folder / file for folder in _ffi._lib_dirs() if (folder / file).is_file())


def test_a_library_that_can_not_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / _ffi._file_name("llama")
    monkeypatch.setenv("LLAMAMIX_LIB_PATH", str(tmp_path))
    with pytest.raises(LibraryError, match=f"is in none of {tmp_path}; build it, or set LLAMAMIX_LIB_PATH"):
        _ffi._Library().llama_backend_init()
    file.write_text("not a library")
    with pytest.raises(LibraryError, match="can not be loaded"):
        _ffi._Library().llama_backend_init()


def test_a_library_without_the_mixed_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / _ffi._file_name("llama")).write_bytes(library_file("ggml-base").read_bytes())
    monkeypatch.setenv("LLAMAMIX_LIB_PATH", str(tmp_path))
    with pytest.raises(LibraryError, match="without the mixed KV cache"):
        _ffi._Library().llama_backend_init()


def test_a_library_with_another_layout() -> None:
    class Other:
        @staticmethod
        def llama_kv_mixed_sizeof(name: bytes) -> int:
            size = _ffi.ffi.sizeof(f"struct {name.decode()}")
            return size + 8 if name == b"llama_context_params" else size

    size = _ffi.ffi.sizeof("struct llama_context_params")
    with pytest.raises(LibraryError, match=f"llama_context_params has {size + 8} bytes there and {size} here"):
        _ffi._check_layout(Other(), Path("libllama.so"))


def test_a_function_that_the_library_lacks() -> None:
    with pytest.raises(LibraryError, match=r"no function llama_no_such_thing\(\)"):
        _ffi.lib.llama_no_such_thing()


#
# what it is
#


def test_shape_is_what_was_written(tiny_model: Model) -> None:
    assert (tiny_model.n_layer, tiny_model.n_head, tiny_model.n_head_kv) == (2, 4, 2)
    assert (tiny_model.n_embd, tiny_model.n_vocab, tiny_model.n_ctx_train) == (128, 400, 8192)
    assert tiny_model.head_sizes() == (64, 64)
    assert tiny_model.n_swa == 0
    assert tiny_model.metadata["general.name"] == "tiny"
    assert tiny_model.metadata["llama.block_count"] == "2"
    assert tiny_model.desc.startswith("llama")

    attention = 2 * 128 * 4 * 64 + 2 * 128 * 2 * 64
    per_layer = attention + 3 * 128 * 256 + 2 * 128
    assert tiny_model.n_params == 2 * per_layer + 2 * 400 * 128 + 128
    assert tiny_model.size == 4 * tiny_model.n_params


def test_heads_of_different_sizes(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", arch="minicpm3", n_layer=1, n_head=3, head_size=96, head_size_v=32)
    with Model(path) as model, Context(model, n_ctx=256, n_threads=1, kv_mixed=False) as context:
        assert model.head_sizes() == (96, 32)
        assert (model.n_head, model.n_head_kv) == (3, 3)
        context.decode([5, 6, 7])
        assert 1 < context.logits.std() < 10


def test_smollm2(smollm2_path: Path) -> None:
    with Model(smollm2_path) as model:
        assert (model.n_layer, model.n_head, model.n_head_kv, model.head_sizes()) == (30, 9, 3, (64, 64))
        assert (model.n_ctx_train, model.n_vocab) == (8192, 49152)
        assert model.tokenize("Hello world") == [19556, 905]
        assert model.eos is not None and model.is_eog(model.eos)


#
# tokenizer
#

# the tokenizer writes a space as U+2581, so that character can not come back
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=40)


@given(texts)
@settings(max_examples=200, deadline=None)
def test_text_comes_back(tiny_model: Model, text: str) -> None:
    tokens = tiny_model.tokenize(text, add_special=False)
    assert tiny_model.detokenize(tokens) == text
    pieces = b"".join(tiny_model.token_to_piece(token) for token in tokens)
    assert pieces == (b" " + text.encode() if text else b"")  # a space begins every text


def test_words_are_tokens(tiny_model: Model) -> None:
    tokens = tiny_model.tokenize(" the", add_special=False)
    assert [tiny_model.token_to_piece(t) for t in tokens] == [b" ", b" the"]


def test_a_text_larger_than_the_first_buffer(tiny_model: Model) -> None:
    text = "\u00fc" * 1000  # two bytes each, a token each
    tokens = tiny_model.tokenize(text)
    assert len(tokens) == 2002
    assert tiny_model.detokenize(tokens * 5).count("\u00fc") == 5000


def test_special_tokens(tiny_model: Model) -> None:
    assert (tiny_model.bos, tiny_model.eos, tiny_model.eot, tiny_model.pad) == (1, 2, None, None)
    assert tiny_model.token_to_piece(tiny_model.nl) == b"\n"
    assert [t for t in range(tiny_model.n_vocab) if tiny_model.is_eog(t)] == [2]

    assert tiny_model.tokenize("", add_special=True) == [1]
    assert tiny_model.tokenize("in", add_special=True) == [1, *tiny_model.tokenize("in", add_special=False)]
    assert tiny_model.tokenize("</s>", add_special=False, parse_special=True) == [2]
    assert 2 not in tiny_model.tokenize("</s>", add_special=False)

    assert tiny_model.detokenize([1, 2]) == ""
    assert tiny_model.detokenize([1, 2], unparse_special=True) == "<s></s>"
    assert tiny_model.token_to_piece(2) == b""
    assert tiny_model.token_to_piece(2, special=True) == b"</s>"


def test_bytes_that_are_no_character(tiny_model: Model) -> None:
    byte = tiny_model.tokenize("\u00fc", add_special=False)[-1]
    assert tiny_model.token_to_piece(byte) == b"\xbc"
    assert tiny_model.detokenize([byte]) == "\ufffd"


@pytest.mark.parametrize("text", [b"bytes", None, 1, "half a pair: \ud800"])
def test_tokenize_refuses_what_is_no_text(tiny_model: Model, text: object) -> None:
    with pytest.raises(ParamsError, match="text"):
        tiny_model.tokenize(text)


@pytest.mark.parametrize(
    "tokens", [[400], [-1], [1.0], [True], ["a"], "text", [[1, 2]], [1, [2]], [2**70], None, [None]]
)
def test_detokenize_refuses_what_are_no_tokens(tiny_model: Model, tokens: object) -> None:
    with pytest.raises((ParamsError, TypeError)):
        tiny_model.detokenize(tokens)


@pytest.mark.parametrize("token", [400, -1, 2**40, 1.0, "a", None, True])
def test_a_token_that_is_none(tiny_model: Model, token: object) -> None:
    for use in (tiny_model.token_to_piece, tiny_model.is_eog):
        with pytest.raises(ParamsError):
            use(token)


def test_no_tokens(tiny_model: Model) -> None:
    assert tiny_model.detokenize([]) == ""
    assert tiny_model.detokenize(np.array([], np.int32)) == ""


#
# chat
#

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
CHATML = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"


def test_chat_template(tiny_model: Model) -> None:
    assert tiny_model.chat_template == "chatml"
    assert tiny_model.apply_chat_template(MESSAGES) == CHATML + "<|im_start|>assistant\n"
    assert tiny_model.apply_chat_template(MESSAGES, add_generation_prompt=False) == CHATML
    assert "[INST]" in tiny_model.apply_chat_template(MESSAGES, template="llama2")


def test_a_long_message(tiny_model: Model) -> None:
    text = tiny_model.apply_chat_template([{"role": "user", "content": "\u20ac" * 5000}])
    assert text.count("\u20ac") == 5000 and text.endswith("assistant\n")


def test_many_messages(tiny_model: Model) -> None:
    text = tiny_model.apply_chat_template([{"role": "user", "content": "x"}] * 300)
    assert text == "<|im_start|>user\nx<|im_end|>\n" * 300 + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "no messages"),
        (["Hi"], "message"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": None}], "content"),
    ],
)
def test_messages_that_can_not_be_used(tiny_model: Model, messages: list, named: str) -> None:
    with pytest.raises(ParamsError, match=named):
        tiny_model.apply_chat_template(messages)


def test_template_that_is_missing_or_unknown(tmp_path: Path, tiny_model: Model) -> None:
    with Model(write_tiny_model(tmp_path / "m.gguf", n_layer=1, chat_template=None)) as model:
        assert model.chat_template is None
        with pytest.raises(ModelError, match="no chat template"):
            model.apply_chat_template(MESSAGES)
        assert model.apply_chat_template(MESSAGES, template="chatml").startswith(CHATML)
    with pytest.raises(ModelError, match="does not know"):
        tiny_model.apply_chat_template(MESSAGES, template="no such template")


#
# files that are no model
#


def test_paths_that_can_not_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        Model(tmp_path / "missing.gguf")
    with pytest.raises(ModelError, match="is a directory"):
        Model(tmp_path)
    with pytest.raises(ParamsError, match="NUL"):
        Model(f"{tmp_path}/a\0b")
    with pytest.raises(ParamsError, match="path"):
        Model(7)
    for data in (b"", b"GG", b"This is not a model"):
        (tmp_path / "text.gguf").write_bytes(data)
        with pytest.raises(ModelError, match="not a GGUF file"):
            Model(tmp_path / "text.gguf")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.005, 0.01, 0.3, 0.999])
def test_a_truncated_model(tiny_model_path: Path, tmp_path: Path, share: float) -> None:
    data = tiny_model_path.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: max(4, int(share * len(data)))])
    with pytest.raises(ModelError) as caught:
        Model(path)
    message = str(caught.value)
    n = path.stat().st_size
    if share >= 0.01:  # the metadata is whole, tensor data is missing
        assert message == f"{path} is not complete: it has {n} bytes of {len(data)}; fetch or copy it again."
    else:
        assert message.startswith(f"{path} is not a GGUF file, or damaged (failed to read ")


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are text there")
def test_a_path_that_is_not_utf8(tiny_model_path: Path, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.gguf"
    with open(path, "wb") as file:
        file.write(tiny_model_path.read_bytes())
    for form in (path, os.fsdecode(path), Path(os.fsdecode(path))):
        with Model(form) as model:
            assert model.n_layer == 2


def test_the_vocabulary_alone(tiny_model_path: Path) -> None:
    with Model(tiny_model_path, vocab_only=True) as model:
        assert model.detokenize(model.tokenize("in the", add_special=False)) == "in the"
        with pytest.raises(ContextError, match="vocabulary only"):
            Context(model)


#
# lifetime
#


def test_a_closed_model(tiny_model_path: Path) -> None:
    with Model(tiny_model_path) as model:
        assert "closed" not in repr(model)
    model.close()
    assert "closed" in repr(model)
    for use in (
        lambda: model.n_layer,
        lambda: model.n_vocab,
        lambda: model.bos,
        lambda: model.desc,
        lambda: model.metadata,
        lambda: model.chat_template,
        lambda: model.tokenize("a"),
        lambda: model.detokenize([5]),
        lambda: model.token_to_piece(5),
        lambda: model.is_eog(5),
        lambda: model.apply_chat_template(MESSAGES),
        lambda: Context(model),
    ):
        with pytest.raises(ModelError, match="closed"):
            use()


def test_contexts_outlive_their_model(tiny_model_path: Path, make_context) -> None:
    model = Model(tiny_model_path)
    first, second = make_context(model), make_context(model)
    first.decode([5, 6, 7])
    expected = first.logits
    model.close()
    del model
    gc.collect()
    second.decode([5, 6, 7])
    np.testing.assert_array_equal(second.logits, expected)


def test_forgotten_objects_are_freed_in_order(tiny_model_path: Path) -> None:
    for _ in range(3):
        model = Model(tiny_model_path)
        context = Context(model, n_ctx=256, n_threads=1, kv_mixed=False)
        context.decode([5])
        del model
        gc.collect()
        del context
        gc.collect()


def test_objects_alive_at_exit(tiny_model_path: Path) -> None:
    code = (
        "import sys; from llamamix import Model, Context\n"
        "model = Model(sys.argv[1]); context = Context(model, n_ctx=256, n_threads=1, kv_mixed=False)\n"
        "context.decode([5]); keep = [model, context]; print('done')"
    )
    run = subprocess.run([sys.executable, "-c", code, tiny_model_path], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "done\n", "")


#
# log
#


def test_the_log_goes_to_logging(tiny_model_path: Path, caplog: pytest.LogCaptureFixture, capfd) -> None:
    caplog.set_level(logging.INFO, "llamamix")
    Model(tiny_model_path).close()
    lines = [record.getMessage() for record in caplog.records if record.name == "llamamix"]
    assert any("general.name" in line and "tiny" in line for line in lines)
    assert all("\n" not in line for line in lines)
    assert capfd.readouterr() == ("", "")


def test_errors_are_logged_as_errors(tiny_model_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "llamamix")
    (tmp_path / "cut.gguf").write_bytes(tiny_model_path.read_bytes()[:-1000])
    with pytest.raises(ModelError):
        Model(tmp_path / "cut.gguf")
    assert any("file bounds" in record.getMessage() for record in caplog.records if record.levelno == logging.ERROR)


def test_an_exception_while_logging_is_not_lost(tiny_model_path: Path, capfd: pytest.CaptureFixture) -> None:
    class Interrupting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise KeyboardInterrupt

    log, handler = logging.getLogger("llamamix"), Interrupting(logging.INFO)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with pytest.raises(KeyboardInterrupt):
            Model(tiny_model_path)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    assert capfd.readouterr() == ("", "")
    Model(tiny_model_path).close()
