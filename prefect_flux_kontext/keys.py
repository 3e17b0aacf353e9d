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
    from collections.abc import Mapping

    from prefect_flux_kontext.models import GenerationRequest

_VERSION = 1

# What signs a URL says who may read it and for how long, not what is there. The plain names are
# anybody's, and may well say what is there, unless the signature that they belong to is there too.
_ALWAYS = re.compile(r"x-(amz|goog)-.*")  # AWS and Google Cloud
_BESIDE = {
    # AWS, Google Cloud and CloudFront
    "signature": re.compile(
        r"signature|expires|awsaccesskeyid|googleaccessid|key-pair-id|policy|hash-algorithm"
    ),
    # Azure shared access signatures
    "sig": re.compile(r"sig|se|sp|sv|sr|ss|st|sip|spr|srt|sdd|skoid|sktid|skt|ske|sks|skv"),
}


def row_key(request: GenerationRequest, identities: Mapping[str, str] | None = None) -> str:
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


def url_identity(url: str) -> str:
    """A URL without its signature, password and fragment: it gives nobody access.

    What is not on the web stays as it is: there, neither `#` nor `?` nor `@` has that meaning.
    """
    if not url.lower().startswith(("http:", "https:")):
        return url
    parts = urlsplit(url)
    query = parse_qsl(parts.query, keep_blank_values=True, errors="surrogateescape")
    names = {name.lower() for name, _ in query}
    signs = [_ALWAYS, *(beside for name, beside in _BESIDE.items() if name in names)]
    kept = [
        (name, value)
        for name, value in query
        if not any(sign.fullmatch(name.lower()) for sign in signs)
    ]
    host = parts.netloc.rpartition("@")[2]
    told = urlencode(kept, errors="surrogateescape")
    return urlunsplit((parts.scheme, host, parts.path, told, ""))
