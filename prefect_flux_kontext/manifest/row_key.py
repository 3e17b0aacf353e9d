"""The row key: a hash of the inputs that determine a payment, and of nothing else.

Reordering a manifest, adding or renaming rows, or running it again later does not change the
keys, so a run pays only for new rows.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from prefect_flux_kontext.models import GenerationRequest
from prefect_flux_kontext.references.identity import url_identity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Part of the hash. A new version changes every key, so existing outputs would be paid for again.
_KEY_VERSION = 1

# `image_urls` counts by its identities, and `match` by its word: what it comes to may vary.
_NOT_IN_KEY = {"image_urls", "callback_url", "request_type", "matched_ratio", "match_note"}
_PARAMETERS = tuple(GenerationRequest.model_fields.keys() - {"prompt", "extra"} - _NOT_IN_KEY)
_encode_text = json.encoder.encode_basestring_ascii
_get_parameters = attrgetter(*_PARAMETERS)


def compute_row_key(
    request: GenerationRequest, identities: Mapping[str, str] | None = None, variant: int = 1
) -> str:
    """Compute the key of a row: 32 hexadecimal digits from references, prompt and parameters.

    Files and objects need an identity, since their text is not enough. The first variant has the
    key of a row without variants.
    """
    return compute_key(request, request.prompt, request.image_urls, identities, variant)


def compute_key(
    parameters: GenerationRequest,
    prompt: str,
    image_urls: Sequence[str],
    identities: Mapping[str, str] | None = None,
    variant: int = 1,
) -> str:
    """Compute the key of a row with the parameters of a request, and a prompt and references."""
    known = identities or {}
    references = [known.get(url) or url_identity(url) for url in image_urls]
    before, between, after = _encode_parameters(
        _get_parameters(parameters),
        _encode(parameters.extra) if parameters.extra else "{}",
        variant,
    )
    images = ",".join(map(_encode_text, references))
    text = f"{before}{_encode_text(prompt)}{between}{images}{after}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@lru_cache(1_000)
def _encode_parameters(values: tuple[Any, ...], extra: str, variant: int) -> tuple[str, str, str]:
    """Return the JSON that is hashed before the prompt, from it to the references, and after."""
    paid_for = dict(zip(_PARAMETERS, values, strict=True))
    paid_for |= {"variant": variant if variant > 1 else None, "version": _KEY_VERSION}
    paid_for |= {"extra": json.loads(extra), "prompt": "", "references": []}
    text = _encode({name: value for name, value in paid_for.items() if value is not None})
    # The last ones: `extra` may hold the same names, and comes first.
    start, _, after = text.rpartition('"references":[')
    before, _, between = start.rpartition('"prompt":"')
    return f'{before}"prompt":', f'{between[1:]}"references":[', after


def _encode(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
