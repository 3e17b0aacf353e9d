"""Render URLs and text for people, logs and stores, without anything that grants access.

Every URL that is shown or stored passes through here: errors, logs, results, ledger, gallery,
events. Row keys do not: they use `references.identity`, whose rules must never change.
"""

from __future__ import annotations

import os
import re
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

# The lookbehind keeps the search linear: it starts once for each run of scheme characters.
_URL_START = re.compile(r"(?<![A-Za-z0-9+.-])[A-Za-z0-9+.-]+:(?:\\*/){2}")
_WORD = re.compile(r"\S+")
_JSON_ESCAPE = re.compile(r"\\+(?:u00|x)([0-9a-fA-F]{2})|\\+(/)")
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]"
)

# Parameters that sign or authorize, in any store or CDN: AWS, Google, Azure, Alibaba, Huawei,
# Tencent (q-…), Akamai (hdnts), Discord (hm).
_SECRET_PARAMETER = re.compile(
    r"x-[a-z0-9]+-.*|q-.*|hm|hdn(?:ts|ea)|sig|sign|jwt|key|pwd|pass|auth|.*[-_]auth|authorization|"
    r"code|md5|oh|otp|ticket|.*verifier|"
    r".*(?:token|signature|credential|secret|passw|hmac|session|api[-_]?key|access[-_]?(?:key|id)).*"
)
# Plain names, which belong to a signature only beside one of the above.
_BESIDE_SIGNATURE = re.compile(
    r"expires|policy|key-pair-id|hash-algorithm|ex|is|"
    r"se|sp|sv|sr|ss|st|sip|spr|srt|sdd|skoid|sktid|skt|ske|sks|skv"
)
# A URL without any of these has neither user, parameter nor fragment, nor one that is escaped.
_MAY_HAVE_SECRET = re.compile(r"[@?#=;\\]")
_USER_INFO = re.compile(r"//[^/?#]*@")
# A password in what is nearly a URL: `https:/user:password@host`, `//user:password@host`.
_LOOSE_PASSWORD = re.compile(
    r"(?<=[/\\])[^/\\?#\s:%]{0,200}(?::|%3A)[^/\\?#\s]{1,1000}?(?:@|\uff20|%40)", re.IGNORECASE
)
# What is before `=` or `:`, also in brackets or in JSON.
_NAME = re.compile(r"""([^;&?#,\[\]{}"'=:\s]+)["'\]]*\s*[=:]""")
# The token at the end of a callback URL, see `callbacks.tokens`.
_CALLBACK_TOKEN = re.compile(r"[0-9a-f]{16}\.[0-9a-f]{32}\.\d{1,6}\.[A-Za-z0-9_-]{43}")
_TOKEN_CHARACTERS = 95
_PUNCTUATION = "\"'()[]{}<>,.;:!"
_PARAMETER = re.compile(r"([?&;]|\\+u0026)([^=&?#;\\]{1,100})=[^&\\]*")
_PATH_PARAMETER = re.compile(r"(?<=[/;~])([^/;~=]+)=[^/;]*")


def has_password(url: str) -> bool:
    """Whether a URL holds a user name or password. The container of an Azure URL is neither."""
    scheme, separator, rest = url.partition("://")
    user, at, _ = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")
    is_container = scheme.lower() in ("abfs", "abfss", "az") and ":" not in user
    return bool(separator and at and not is_container)


def redact_url(url: str) -> str:
    """Return a URL without password and signature; anything else as it is.

    Further names of secret parameters are read from FLUX_KONTEXT_SECRET_PARAMETERS.
    """
    if "://" not in url or not _MAY_HAVE_SECRET.search(url):
        return url
    shown = url
    if has_password(url):
        scheme, _, rest = url.partition("://")
        shown = f"{scheme}://{rest[re.split('[/?#]', rest, maxsplit=1)[0].rindex('@') + 1 :]}"
    try:
        parts = urlsplit(shown)
    except ValueError:
        return "(a URL that cannot be read)" if set("?#@=;") & set(url) else url
    query = parse_qsl(parts.query, keep_blank_values=True, errors="surrogateescape")
    kept = [(name, value) for name, value in query if not _is_secret(name, value)]
    path = _PATH_PARAMETER.sub(
        lambda found: f"{found[1]}=…" if _is_secret(found[1]) else found[0],
        _USER_INFO.sub("//", parts.path),
    )
    if len(kept) < len(query):
        kept = [
            (name, value) for name, value in kept if not _BESIDE_SIGNATURE.fullmatch(name.lower())
        ]
    elif path == parts.path and not _is_secret(parts.fragment):
        return shown
    query_string = urlencode(kept, errors="surrogateescape")
    return urlunsplit((parts.scheme, parts.netloc, path, query_string, ""))


def is_plain_url(url: str) -> bool:
    """Whether a URL is on the web and cannot be signed: a query may be a signature."""
    return url.startswith(("https://", "http://")) and "?" not in url and make_showable(url) == url


def redact_text(text: str) -> str:
    """Return text with every URL in it redacted, also in JSON with escaped characters."""
    # The searches are slow: each is left out where it cannot find anything.
    if len(text) >= _TOKEN_CHARACTERS:
        text = _CALLBACK_TOKEN.sub("…", text)
    if (":/" in text or ":\\" in text) and _MAY_HAVE_SECRET.search(text):
        text = _WORD.sub(lambda found: _redact_word(found[0]), text)
    if "@" in text or "\uff20" in text or "%40" in text:
        text = _LOOSE_PASSWORD.sub("", text)
    return text


def make_showable(text: str) -> str:
    """Return redacted text whose control and invisible characters are escaped."""
    return _CONTROL.sub(lambda found: f"{found[0]!a}"[1:-1], redact_text(text))


def _redact_word(word: str) -> str:
    starts = [found.start() for found in _URL_START.finditer(word)]
    if not starts:
        # The rest of a URL that has a space.
        return _PARAMETER.sub(
            lambda found: f"{found[1]}{found[2]}=…" if _is_secret(found[2]) else found[0], word
        )
    ends = [*starts[1:], len(word)]
    urls = (word[start:end] for start, end in zip(starts, ends, strict=True))
    return word[: starts[0]] + "".join(map(_redact_found, urls))


def _redact_found(text: str) -> str:
    """Redact a URL that was found in text, with whatever follows it up to a space."""
    bare = text.rstrip(_PUNCTUATION)
    url = _JSON_ESCAPE.sub(lambda found: found[2] or chr(int(found[1], 16)), bare)
    redacted = redact_url(url)
    return text if redacted == url else redacted + text[len(bare) :]


def _is_secret(name: str, value: str = "") -> bool:
    """Whether a parameter, or one nested in its value, is part of a signature or a password."""
    more = os.environ.get("FLUX_KONTEXT_SECRET_PARAMETERS", "").lower().replace(",", " ").split()
    names = _NAME.findall(f"{name}={value}".lower())
    return bool(_USER_INFO.search(value)) or any(
        _SECRET_PARAMETER.fullmatch(name) or name in more for name in names
    )
