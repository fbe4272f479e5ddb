"""Chat templates: messages and tools as the one text that a chat model was trained on."""

from __future__ import annotations

from .messages import read_tools
from .named import apply_named, is_name
from .template import CHATML, ChatTemplate

__all__ = ["CHATML", "ChatTemplate", "apply_named", "is_name", "read_tools"]
