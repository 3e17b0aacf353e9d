"""The row key: a hash of what is paid for, and of nothing else.

Reordering a manifest, adding rows, renaming them or running it tomorrow leaves the keys as
they are, so it pays only for what is new.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from prefect_flux_kontext.references.identity import url_identity

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prefect_flux_kontext.models import GenerationRequest

_VERSION = 1


def compute_row_key(
    request: GenerationRequest, identities: Mapping[str, str] | None = None
) -> str:
    """The key of a row: 32 hexadecimal digits from the references, the prompt and parameters.

    Args:
        request: What is paid for.
        identities: What references are known by that are more than their text: files, objects.
    """
    known = identities or {}
    paid_for = request.model_dump(
        mode="json", exclude={"image_urls", "callback_url", "request_type"}, exclude_none=True
    )
    paid_for["references"] = [known.get(url) or url_identity(url) for url in request.image_urls]
    paid_for["version"] = _VERSION
    text = json.dumps(paid_for, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
