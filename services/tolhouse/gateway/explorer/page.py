"""The explorer page: one HTML document with its style sheet and scripts inside, and its policy.

The document loads nothing else, so the page needs only one route and works offline.
"""

import base64
import hashlib
import re
from pathlib import Path

_FOLDER = Path(__file__).parent


def _included(match: re.Match[str]) -> str:
    return "".join((_FOLDER / name).read_text(encoding="utf-8") for name in match[1].split())


def _hashes(tag: str) -> str:
    """Return policy sources for all inline elements with this tag."""
    texts = re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", PAGE, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in texts)
    return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)


# {{a b}} in the template stands for the contents of the files a and b.
PAGE = re.sub(r"\{\{(.*?)\}\}", _included, (_FOLDER / "page.html").read_text(encoding="utf-8"))
# The browser runs these scripts only, and connects to this gateway only.
POLICY = (
    f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
