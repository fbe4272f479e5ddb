"""Models of a Hugging Face hub, named ``hf:ORG/REPO[:FILE or QUANT]``, by huggingface_hub and in its cache.

The hub is $HF_ENDPOINT, a token $HF_TOKEN, the cache $HF_HOME, as everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .errors import PullError

_PREFIX = "hf:"
_DEFAULT = "Q4_K_M"  # as llama.cpp's -hf
_PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)", re.IGNORECASE)
_NO_MODELS = ("mmproj", "imatrix")  # what else has GGUF's ending
_N_SHOWN = 8  # files in a message
_TIMEOUT = 30  # seconds, for the list of a repository's files


class _Name(NamedTuple):
    repo: str
    wanted: str  # a file, a quantisation, or nothing


def is_hub_name(name: str) -> bool:
    """Whether a model is named as one of a hub."""
    return name.startswith(_PREFIX)


def fetch(name: str) -> Path:
    """The path of a model's file, or of its first, in huggingface_hub's cache; fetched when it is not there.

    Without a file or a quantisation in the name it is the one in Q4_K_M, else the first. Without a network, what the
    cache has is taken. Raises PullError.
    """
    repo, wanted = _parse(name)
    hub = _library()
    files, is_there = _list(hub, name, repo)
    paths = [_download(hub, name, repo, file, is_there) for file in choose(files, wanted, name)]
    return paths[0]


def choose(files: Sequence[str], wanted: str, name: str) -> list[str]:
    """The GGUF file of a repository that is wanted, or all of its parts in their order. Raises PullError.

    wanted  a file, a quantisation ("Q4_K_M", in small letters too), or "" for the default
    name    what the model is called
    """
    models = [f for f in sorted(files) if f.lower().endswith(".gguf") and not _is_other(f)]
    if not models:
        raise PullError(f"{name}: the repository has no GGUF file.")
    if not wanted:
        found = _of_type(models, _DEFAULT) or models
    elif wanted.lower().endswith(".gguf"):
        found = [f for f in models if f == wanted]
    else:
        found = _of_type(models, wanted)
    if not found:
        more = f" and {len(models) - _N_SHOWN} more" if len(models) > _N_SHOWN else ""
        raise PullError(f"{name}: the repository has no {wanted}; it has {', '.join(models[:_N_SHOWN])}{more}.")
    first = min(found, key=lambda f: (len(_PART.sub("", f)), f)) if wanted else found[0]
    return [f for f in models if _PART.sub("", f) == _PART.sub("", first)] if _PART.search(first) else [first]


def _of_type(models: Sequence[str], quant: str) -> list[str]:
    end = re.compile(rf"(^|[-._/]){re.escape(quant)}\.gguf$", re.IGNORECASE)
    return [f for f in models if end.search(_PART.sub("", f))]


def _is_other(file: str) -> bool:
    return any(word in file.rpartition("/")[2].lower() for word in _NO_MODELS)


def _parse(name: str) -> _Name:
    repo, _, wanted = name.removeprefix(_PREFIX).partition(":")
    if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", repo):
        raise PullError(f"{name} names no repository; it is hf:ORG/REPO, hf:ORG/REPO:QUANT or hf:ORG/REPO:FILE.gguf.")
    return _Name(repo, wanted)


def _library() -> Any:
    hub: Any
    try:
        import huggingface_hub as hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils.logging
    except ImportError:
        raise PullError("Models of a hub need huggingface_hub; pip install 'llamamix[hf]' adds it.") from None
    hub.utils.logging.set_verbosity_error()  # what it warns of is in the error, or was overcome
    return hub


def _list(hub: Any, name: str, repo: str) -> tuple[list[str], bool]:
    """The files of a repository, and whether the hub could be reached; where not, those that the cache has."""
    try:
        found = hub.HfApi().model_info(repo, timeout=_TIMEOUT).siblings
        return [sibling.rfilename for sibling in found], True
    except Exception as error:  # what it raises without a network depends on its version
        if isinstance(error, hub.errors.RepositoryNotFoundError):
            raise _error(hub, name, repo, error) from None
        try:
            folder = Path(hub.snapshot_download(repo, local_files_only=True))
        except Exception:
            raise _error(hub, name, repo, error) from None
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()], False


def _download(hub: Any, name: str, repo: str, file: str, is_there: bool) -> Path:
    try:
        return Path(hub.hf_hub_download(repo, file, local_files_only=not is_there))
    except Exception as error:
        raise _error(hub, name, repo, error) from None


def _error(hub: Any, name: str, repo: str, error: Exception) -> PullError:
    where = hub.constants.ENDPOINT
    if isinstance(error, hub.errors.GatedRepoError):
        return PullError(f"{name}: {where}/{repo} asks you to accept its terms there, and for $HF_TOKEN.")
    if isinstance(error, hub.errors.RepositoryNotFoundError):
        return PullError(f"{name}: there is no {where}/{repo}, or it is private and $HF_TOKEN has no access.")
    response = getattr(error, "response", None)
    if response is not None:
        return PullError(f"{name}: {where} answers with an error ({response.status_code}).")
    if isinstance(error, OSError) and error.errno is not None:
        return PullError(f"{name} can not be stored: {error.strerror}.")
    return _no_network(name, where)


def _no_network(name: str, where: str) -> PullError:
    return PullError(f"{name} is not in the cache, and there is no network: {where} can not be reached.")
