"""The row key: a hash of what is paid for, and of nothing else.

Reordering a manifest, adding rows, renaming them or running it tomorrow leaves the keys as
they are, so it pays only for what is new.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

if TYPE_CHECKING:
    from prefect_flux_kontext.models import GenerationRequest

_VERSION = 1

# What signs a URL says who may read it and for how long, not what is there: AWS, Google Cloud,
# Azure shared access signatures and CloudFront.
_SIGNATURE = re.compile(
    r"x-amz-.*|x-goog-.*|awsaccesskeyid|googleaccessid|signature|expires|key-pair-id|policy"
    r"|sig|se|sp|sv|sr|st|spr|skoid|sktid|skt|ske|sks|skv",
    re.IGNORECASE,
)


def row_key(request: GenerationRequest) -> str:
    """The key of a row: 32 hexadecimal digits from the references, the prompt and parameters."""
    paid_for = request.model_dump(
        mode="json", exclude={"image_urls", "callback_url", "request_type"}, exclude_none=True
    )
    paid_for["references"] = [url_identity(url) for url in request.image_urls]
    paid_for["version"] = _VERSION
    text = json.dumps(paid_for, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def url_identity(url: str) -> str:
    """A URL without its signature and fragment."""
    parts = urlsplit(url)
    query = [
        (name, value)
        for name, value in parse_qsl(parts.query, keep_blank_values=True)
        if not _SIGNATURE.fullmatch(name)
    ]
    return urlunsplit((parts.scheme, parts.netloc, parts.path, urlencode(query), ""))
