"""Weights expanded to F32, and requantised: the very values, whole or not at all, and once."""

from __future__ import annotations

import logging
import signal
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from helpers.tiny_model import write_tiny_model

from llamamix import Context, Model, ModelError, ParamsError, weights
from llamamix._ffi import ffi, lib
from llamamix.weights import TYPES, expand, requantise, sha256_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMAMIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny.Q8_0.gguf", weight_type=Type.Q8_0)


def q8_0(data: np.ndarray) -> np.ndarray:
    """The values of rows of blocks: a scale in F16, then 32 whole numbers of 8 bits."""
    blocks = data.reshape(-1, 34)
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    return (scales * blocks[:, 2:].view(np.int8)).reshape(*data.shape[:-1], -1)


#
# expanded
#


def test_every_value(quantised: Path, cache: Path) -> None:
    path = expand(quantised)
    assert path == cache / f"tiny.F32-{sha256_of(quantised)[:12]}.gguf"
    source, made = gguf.GGUFReader(quantised), gguf.GGUFReader(path)
    assert [t.name for t in made.tensors] == [t.name for t in source.tensors]
    n_quantised = 0
    for before, after in zip(source.tensors, made.tensors, strict=True):
        assert after.tensor_type == gguf.GGMLQuantizationType.F32
        assert after.shape.tolist() == before.shape.tolist()
        is_quantised = before.tensor_type == gguf.GGMLQuantizationType.Q8_0
        assert (after.data == (q8_0(before.data) if is_quantised else before.data)).all()
        n_quantised += is_quantised
    assert n_quantised == 2 + 2 * 7
    # all that the file says but what its weights are
    for key, field in source.fields.items():
        if not key.startswith("GGUF."):
            assert made.get_field(key).contents() == field.contents()
            assert made.get_field(key).types == field.types
    assert made.get_field("general.file_type").contents() == 0
    assert made.get_field("llamamix.expanded_from").contents() == sha256_of(quantised)


def test_the_model_is_the_same(quantised: Path) -> None:
    """Within what is computed of quantised weights: activations rounded to 8 bits."""
    tokens = np.arange(64) + 300
    logits = []
    for path in (quantised, expand(quantised)):
        with Model(path) as model, Context(model, n_ctx=256, n_threads=1, kv_mixed=False) as context:
            assert model.tokenize("the end") == [1, 361, 385] or model.tokenize("the end")[0] == 1
            context.decode(tokens, logits="all")
            logits.append(context.logits)
    error = np.sqrt(((logits[1] - logits[0]) ** 2).mean() / (logits[1] ** 2).mean())
    assert 0 < error < 0.05  # one rounding to 8 bits is 0.4 % of a row's largest value, and there are 14 in a row


def test_it_is_made_once(quantised: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    path = expand(quantised, lambda what, done, total: steps.append((what.partition(" ")[0], done <= total)))
    assert dict(steps) == {"checking": True, "writing": True}
    before = path.stat().st_mtime_ns
    monkeypatch.setattr(weights, "_write", lambda *_args: pytest.fail("written again"))
    assert expand(quantised) == path and path.stat().st_mtime_ns == before
    assert expand(path) == path  # there is nothing to expand


def test_nothing_half_done_is_left(quantised: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = weights._values
    calls = [0]

    def interrupted(tensor: object) -> np.ndarray:
        calls[0] += 1
        if calls[0] > 5:
            raise KeyboardInterrupt
        return original(tensor)

    monkeypatch.setattr(weights, "_values", interrupted)
    with pytest.raises(KeyboardInterrupt):
        expand(quantised)
    assert list(cache.iterdir()) == []

    # what is not what it should be is not kept: a value that is read again as another one
    n_written = len(gguf.GGUFReader(quantised).tensors)
    calls[0] = 0

    def changed(tensor: object) -> np.ndarray:
        calls[0] += 1
        values = original(tensor)
        return values if calls[0] <= n_written + 3 else np.nextafter(values, np.float32(9))

    monkeypatch.setattr(weights, "_values", changed)
    with pytest.raises(ModelError, match="was not written as it should be"):
        expand(quantised)
    assert list(cache.iterdir()) == []

    monkeypatch.setattr(weights, "_values", original)
    assert expand(quantised).is_file()


def test_what_can_not_be_expanded(
    tmp_path: Path, quantised: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"missing\.gguf can not be read: No such file"):
        expand(tmp_path / "missing.gguf")
    (tmp_path / "no.gguf").write_bytes(b"GGUFx" * 100)
    with pytest.raises(ModelError, match=r"no\.gguf is not a GGUF file, or damaged"):
        expand(tmp_path / "no.gguf")

    original = gguf.quants.dequantize

    def unknown(data: np.ndarray, type_: gguf.GGMLQuantizationType) -> np.ndarray:
        if type_ == gguf.GGMLQuantizationType.Q8_0:
            raise NotImplementedError
        return original(data, type_)

    monkeypatch.setattr("gguf.quants.dequantize", unknown)
    with pytest.raises(ModelError, match="type Q8_0 can not be expanded to F32"):
        expand(quantised)
    monkeypatch.undo()
    monkeypatch.setenv("LLAMAMIX_CACHE", str(quantised))  # a file
    with pytest.raises(ModelError, match="can not be stored in"):
        expand(quantised)


#
# requantised
#


@pytest.fixture
def q4_1(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny.Q4_1.gguf", weight_type=Type.Q4_1)


def test_the_parameters_lie_where_the_library_has_them() -> None:
    """Its defaults, from the first to the last: llama_model_quantize_default_params() in llama-quant.cpp."""
    params = lib.llama_model_quantize_default_params()
    assert (params.nthread, params.ftype) == (0, gguf.LlamaFileType.MOSTLY_Q8_0)
    n_types = params.output_tensor_type  # GGML_TYPE_COUNT: none was chosen
    assert params.token_embedding_type == n_types > max(Type)
    flags = ("allow_requantize", "quantize_output_tensor", "only_copy", "pure", "keep_split", "dry_run")
    assert [name for name in flags if getattr(params, name)] == ["quantize_output_tensor"]
    pointers = (params.imatrix, params.kv_overrides, params.tt_overrides, params.prune_layers)
    assert all(pointer == ffi.NULL for pointer in pointers)
    assert params.max_buf_size == 8 << 30


@pytest.mark.parametrize("name", ["q4_0", "q5_1", "q8_0", "f16", "bf16"])
@pytest.mark.parametrize("before", [Type.F32, Type.Q4_1], ids=lambda type_: type_.name)
def test_requantised_values(tmp_path: Path, cache: Path, before: Type, name: str) -> None:
    """Those that gguf makes of the expanded weights, bit for bit."""
    path = write_tiny_model(tmp_path / f"tiny.{before.name}.gguf", weight_type=before)
    made_path = requantise(path, name)
    assert made_path == cache / f"tiny.{name.upper()}-{sha256_of(path)[:12]}.gguf"
    assert list(cache.iterdir()) == [made_path]  # and no F32 file
    source, made = gguf.GGUFReader(path), gguf.GGUFReader(made_path)
    tensors = {tensor.name: tensor for tensor in made.tensors}
    assert tensors.keys() == {tensor.name for tensor in source.tensors}
    n_matrices = 0
    for tensor in source.tensors:
        after = tensors[tensor.name]
        wanted = Type[name.upper()]
        if len(tensor.shape) == 1:
            wanted = tensor.tensor_type
        elif tensor.name == "output.weight" and wanted not in (Type.F16, Type.BF16):
            wanted = Type.Q8_0  # llama-quantize's Q6_K, whose blocks of 256 do not divide rows of 128
        assert (after.name, after.tensor_type) == (tensor.name, wanted)
        assert after.shape.tolist() == tensor.shape.tolist()
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        # as bytes: the reader has F16 as numbers, and what gguf quantises to as bytes
        expected = np.ascontiguousarray(gguf.quants.quantize(values, wanted)).view(np.uint8)
        assert (np.ascontiguousarray(after.data).view(np.uint8) == expected).all(), tensor.name
        n_matrices += len(tensor.shape) == 2
    assert n_matrices == 2 + 2 * 7
    # all that the file says but what its weights are
    for key, field in source.fields.items():
        if not key.startswith("GGUF.") and key != "general.quantization_version":
            assert made.get_field(key).contents() == field.contents()
            assert made.get_field(key).types == field.types


@pytest.mark.parametrize("name", TYPES)
def test_every_type(quantised: Path, name: str) -> None:
    """It is the one of that name in the library, too, which says it of a model."""
    size = {"s": "Small", "m": "Medium", "l": "Large"}
    stem, _, last = name.rpartition("_")
    said = "all F32" if name == "f32" else f"{stem.upper()} - {size[last]}" if last in size else name.upper()
    path = requantise(quantised, name.upper())  # llama-quantize's names, in either case
    assert path.name.startswith(f"tiny.{name.upper()}-")
    with Model(path) as model:
        assert model.desc.removeprefix("llama ?B ").startswith(said)
        assert model.n_params == sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(quantised).tensors)


def test_it_is_requantised_once(q4_1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = q4_1.read_bytes(), q4_1.stat().st_mtime_ns
    steps = []
    path = requantise(q4_1, "q4_0", lambda what, done, total: steps.append((what, done <= total)))
    assert dict(steps) == {f"checking {q4_1.name}": True, f"requantising {q4_1.name} to q4_0": True}
    assert (q4_1.read_bytes(), q4_1.stat().st_mtime_ns) == source
    before = path.stat().st_mtime_ns
    monkeypatch.setattr(weights, "_quantise", lambda *_args: pytest.fail("requantised again"))
    assert requantise(q4_1, "q4_0") == path and path.stat().st_mtime_ns == before
    assert requantise(path, "q4_0") == path  # it says that it is of that type
    f32 = requantise(q4_1, "f32")
    assert f32 == expand(q4_1) and requantise(f32, "f32") == f32
    with pytest.raises(pytest.fail.Exception):  # another one is another file
        requantise(q4_1, "q5_0")


def test_another_model_of_that_name(tmp_path: Path) -> None:
    paths = []
    for seed in (0, 1):
        source = write_tiny_model(tmp_path / "tiny.gguf", seed=seed)
        paths.append(requantise(source, "q4_0"))
    assert paths[0] != paths[1] and paths[0].read_bytes() != paths[1].read_bytes()


def test_what_the_library_says_goes_to_the_log(
    q4_1: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="llamamix"):
        requantise(q4_1, "q4_0")
    assert "converting to q4_0" in caplog.text and "quant size" in caplog.text
    assert capfd.readouterr() == ("", "")


def test_nothing_requantised_in_part_is_left(q4_1: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ctrl-C in the middle, which Python learns of when the library logs its next line."""
    lines = []

    class Interrupt(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            if sum("converting to" in line for line in lines) == 5:
                signal.raise_signal(signal.SIGINT)

    handler = Interrupt()
    logger = logging.getLogger("llamamix")
    logger.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO, logger="llamamix"), pytest.raises(KeyboardInterrupt):
            requantise(q4_1, "q4_0")
    finally:
        logger.removeHandler(handler)
    assert sum("converting to" in line for line in lines) >= 5
    assert list(cache.iterdir()) == []
    assert requantise(q4_1, "q4_0").is_file()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_without_space(q4_1: Path, cache: Path, share: float) -> None:
    """Files can not be longer than that: as on a disk that is full then."""
    resource = pytest.importorskip("resource")
    path = requantise(q4_1, "q4_0")
    size = path.stat().st_size
    path.unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), limits[1]))
    try:
        with pytest.raises(ModelError) as caught:
            requantise(q4_1, "q4_0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == (
        f"{path.name} can not be stored in {cache}: it can not be written to its end; there may be too little space."
    )
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("name", ["q4_0", "f32"])
def test_what_can_not_be_requantised(tmp_path: Path, q4_1: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "bad.gguf"
    with pytest.raises(ModelError, match=r"bad\.gguf can not be read: No such file"):
        requantise(bad, name)
    bad.write_text("no model")
    with pytest.raises(ModelError, match=r"bad\.gguf is not a GGUF file\.$"):
        requantise(bad, name)
    with pytest.raises(ModelError, match="is a directory, not a GGUF file"):
        requantise(tmp_path, name)
    monkeypatch.setenv("LLAMAMIX_CACHE", str(q4_1))  # a file
    with pytest.raises(ModelError, match="can not be stored in"):
        requantise(q4_1, name)


def test_damaged_files_are_not_requantised(tmp_path: Path, q4_1: Path, cache: Path) -> None:
    bad, data = tmp_path / "bad.gguf", q4_1.read_bytes()
    not_a_number = data[:-4096] + b"\xff" * 4096  # scales that are not a number
    for damaged, text in (
        (data[:-1000], r"is not complete: it has \d+ bytes of \d+; fetch or copy it again\.$"),
        (not_a_number, r"can not be requantised to q4_0: tensor 'blk\.1\.ffn_down\.weight' has invalid data\.$"),
        (data.replace(b"llama", b"blama"), r"can not be requantised to q4_0: unknown model architecture: 'blama'\.$"),
    ):
        bad.write_bytes(damaged)
        with pytest.raises(ModelError, match=text):
            requantise(bad, "q4_0")
        assert bad.read_bytes() == damaged
    assert not cache.exists() or list(cache.iterdir()) == []


@pytest.mark.parametrize("name", ["q4", "q4_0_4_4", "iq2_xs", "", "mostly_q4_0", "copy"])
def test_types_that_there_are_not(q4_1: Path, name: str) -> None:
    with pytest.raises(ParamsError) as caught:
        requantise(q4_1, name)
    assert str(caught.value) == f"weights must be of {', '.join(TYPES)}, not {name!r}."


#
# names
#


def test_names() -> None:
    names = {
        "SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct",
        "gemma-3-270m.Q4_K_M.gguf": "gemma-3-270m",
        "a.IQ4_XS.gguf": "a",
        "b.BF16.gguf": "b",
        "c.F32-0123456789ab.gguf": "c",
        "v1.5.gguf": "v1.5",
    }
    assert {name: weights._stem(name) for name in names} == names
