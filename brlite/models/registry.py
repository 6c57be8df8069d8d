"""The supported families of models, and the choice of the family of a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from brlite.errors import ModelError
from brlite.files.quoting import excerpt
from brlite.models.families.baichuan import BAICHUAN
from brlite.models.families.chatglm import CHATGLM
from brlite.models.families.family import Family
from brlite.models.families.llama import LLAMA
from brlite.models.families.mistral import MISTRAL
from brlite.models.families.phi3 import PHI3
from brlite.models.families.qwen2 import QWEN2
from brlite.models.families.qwen3 import QWEN3
from brlite.models.families.smollm3 import SMOLLM3

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, BAICHUAN, CHATGLM, SMOLLM3, PHI3)


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face config: by its architecture (with any head), or by `model_type` if it names none.

    Whole names are compared. Raises `ModelError` with the known ones.
    """
    architectures = config.get("architectures") or ()
    if not isinstance(architectures, list | tuple):
        raise ModelError(f"model config: architectures must be a list of strings, got {excerpt(architectures)}")
    name = architectures[0] if architectures else config.get("model_type")
    for family in FAMILIES:
        if name in ((family.architecture, *family.aliases) if architectures else (family.model_type,)):
            return family
        if architectures and name is not None and name in (family.base_architecture, family.scorer_architecture):
            return family.without_head()
    if name is None:
        raise ModelError("model config: architectures is missing")
    known = ", ".join(family.architecture for family in FAMILIES)
    raise ModelError(f"model config: architecture {excerpt(name)} is not supported; known are {known}")
