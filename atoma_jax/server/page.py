"""The page at `/`: its files, shipped with the package, and the headers that bind a browser to them.

The policy lets the page load nothing but these files, talk to nobody but this server, and make no markup out of text
(Trusted Types), whatever a model writes.
"""

import hashlib
from functools import cache
from importlib import resources

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

FOLDER = "/ui/"
_KINDS = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Cache-Control": "no-cache",  # asked for again, and answered 304
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page(request: Request) -> Response:
    """The page itself."""
    return _answer(request, "index.html")


@router.get(FOLDER + "{name}")
async def page_file(name: str, request: Request) -> Response:
    """A file that the page loads."""
    return _answer(request, name)


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    """Content and tag by name: the only names there are, so that none leads out of the folder."""
    folder = resources.files("atoma_jax.server") / "static"
    contents = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    return {name: (content, f'"{hashlib.sha256(content).hexdigest()[:16]}"') for name, content in contents.items()}


def _answer(request: Request, name: str) -> Response:
    found = _files().get(name)
    kind = _KINDS.get(name[name.rfind(".") :])
    if found is None or kind is None:
        raise HTTPException(404)
    content, tag = found
    headers = {**_HEADERS, "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=kind, headers=headers)
