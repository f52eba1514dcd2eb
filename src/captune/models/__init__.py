"""CLIPModel, the text tower it holds, and how it lies on disk."""

from captune.models.clip import CLIPModel
from captune.models.stored import weights_digest

__all__ = ["CLIPModel", "weights_digest"]
