"""The row key: a hash of the inputs that determine a payment, and of nothing else.

Reordering a manifest, adding or renaming rows, or running it again later does not change the
keys, so a run pays only for new rows.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from prefect_flux_kontext.references.identity import url_identity

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prefect_flux_kontext.models import GenerationRequest

# Part of the hash. A new version changes every key, so existing outputs would be paid for again.
_KEY_VERSION = 1

# `image_urls` counts by its identities, and `match` by its word: what it comes to may vary.
_NOT_IN_KEY = {"image_urls", "callback_url", "request_type", "matched_ratio", "match_note"}


def compute_row_key(
    request: GenerationRequest, identities: Mapping[str, str] | None = None, variant: int = 1
) -> str:
    """Compute the key of a row: 32 hexadecimal digits from references, prompt and parameters.

    Files and objects need an identity, since their text is not enough. The first variant has the
    key of a row without variants.
    """
    known = identities or {}
    paid_for = request.model_dump(mode="json", exclude=_NOT_IN_KEY, exclude_none=True)
    paid_for["references"] = [known.get(url) or url_identity(url) for url in request.image_urls]
    paid_for["version"] = _KEY_VERSION
    if variant > 1:
        paid_for["variant"] = variant
    text = json.dumps(paid_for, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
