"""The page at `/`: what is sent, what binds the browser, and that its files stay among themselves."""

import re
from importlib import resources

import pytest

from atoma_jax.server import page
from tests.server.conftest import Serve, Served

FILES = {file.name: file.read_text("utf-8") for file in (resources.files("atoma_jax.server") / "static").iterdir()}
SCRIPTS = [name for name in FILES if name.endswith(".js")]


def test_it_needs_no_key_and_binds_the_browser(serve: Serve) -> None:
    server = serve(api_key=("secret",))
    response = server.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert response.headers["x-content-type-options"] == "nosniff"
    for name in FILES:
        assert server.get(f"/ui/{name}").status_code == 200, name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("page.css", "text/css"),
        ("main.js", "text/javascript"),
        ("icon.svg", "image/svg+xml"),
        ("index.html", "text/html"),
    ],
)
def test_a_file_is_sent_once(server: Served, name: str, kind: str) -> None:
    first = server.get(f"/ui/{name}")
    assert first.headers["content-type"].startswith(kind)
    assert first.text == FILES[name]
    again = server.get(f"/ui/{name}", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["../page.py", "..%2fpage.py", "%2e%2e/app.py", "absent.js", "", ".", "page.css/x"])
def test_nothing_else_is_sent(server: Served, name: str) -> None:
    assert server.get(f"/ui/{name}").status_code == 404


def test_a_server_without_it(serve: Serve) -> None:
    server = serve(ui=False)
    assert [server.get(path).status_code for path in ("/", "/ui/main.js", "/docs")] == [404, 404, 200]


def test_every_file_has_a_type_and_is_used() -> None:
    assert {name[name.rfind(".") :] for name in FILES} == set(page._KINDS)
    text = "\n".join(FILES.values())
    used = {name for name in FILES if re.search(rf"(?:ui/|\./){re.escape(name)}", text)}
    assert used == set(FILES) - {"index.html"}


def test_every_module_that_is_imported_is_announced() -> None:
    """So that a browser fetches all of them at once."""
    imported = {name for script in SCRIPTS for name in re.findall(r'from "\./(\w+\.js)"', FILES[script])}
    announced = set(re.findall(r'modulepreload" href="ui/(\w+\.js)"', FILES["index.html"]))
    assert imported == announced == set(SCRIPTS) - {"main.js"}


def test_no_other_host_is_named() -> None:
    hosts = {address for text in FILES.values() for address in re.findall(r"(?:https?:)?//[a-z][\w.-]*\.\w+", text)}
    assert hosts == {"http://www.w3.org"}  # the name of SVG, which nobody asks


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_text_can_become_markup_or_code(name: str) -> None:
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|setHTML|srcdoc"
    assert not re.search(ways, FILES[name])


def test_every_element_that_a_script_asks_for_is_there() -> None:
    asked = {name for script in SCRIPTS for name in re.findall(r'byId\("([\w-]+)"\)', FILES[script])}
    there = re.findall(r'\bid="([\w-]+)"', FILES["index.html"])
    assert asked <= set(there)
    assert len(there) == len(set(there))
