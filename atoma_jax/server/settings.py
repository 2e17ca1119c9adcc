"""Settings of the HTTP server: the section `[server]` of a TOML file, and the flags of `atoma-jax serve`.

Beside `EngineConfig`, whose checks it shares. Imports nothing of the extra, so that flags are checked without it.
"""

from dataclasses import dataclass, field
from typing import Literal

from atoma_jax.errors import ConfigError

DEFAULT_QUEUE = 1024  # sequences that may wait where the engine's own setting says nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where the server listens, who may use it, and what it bears."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    uds: str | None = None  # a Unix socket instead of host and port
    api_key: tuple[str, ...] = field(default=(), repr=False)  # any of them is let in; none: everybody is
    api_key_scope: Literal["api", "all"] = (
        "api"  # what keys guard: /v1 and what changes the server; or all but the probes
    )
    served_model_name: tuple[str, ...] = ()  # what requests may call the model; none: as the server was told to load it
    chat_template: str | None = None  # a file with a Jinja template, instead of the model's own
    enable_auto_tool_choice: bool = False  # requests with tools may leave it to the model whether to call one
    tool_call_parser: Literal["hermes", "llama3_json"] | None = None  # how the model writes calls
    enable_prompt_tokens_details: bool = True  # cached tokens in `usage`
    log_requests: bool = True  # a line of JSON for each
    log_stats: bool = True  # a line of JSON every ten seconds in which steps ran
    ui: bool = True  # the page at /
    profile_dir: str | None = None  # where /start_profile writes; None: it is refused
    otlp_traces_endpoint: str | None = None  # a collector's address for OpenTelemetry spans; None: none are made
    max_body_bytes: int = 8 << 20
    max_header_bytes: int = 32 << 10  # request line and headers together
    max_messages: int = 2048  # of one conversation
    max_choices: int = 256  # prompts × n of one request
    header_timeout: float = 20.0  # seconds until a connection must have sent its headers
    keep_alive_timeout: float = 75.0  # seconds that an idle connection stays open: longer than proxies keep theirs, 60
    body_timeout: float = 30.0  # seconds for a request's body
    send_timeout: float = 30.0  # seconds that a client may leave its stream unread
    queue_timeout: float = 300.0  # seconds until a step must have held the request: 503
    request_timeout: float = 3600.0  # seconds for all of a request: 504
    drain_timeout: float = 25.0  # seconds for what runs after SIGTERM; Kubernetes kills after 30
    stall_timeout: float = 120.0  # seconds of one step after which /health says that the engine hangs

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError("port", self.port, "must be between 0 and 65535")
        if self.uds is not None and (self.host, self.port) != ("127.0.0.1", 8000):
            raise ConfigError("uds", self.uds, "contradicts host and port: give one of them")
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            raise ConfigError("enable_auto_tool_choice", True, "needs tool_call_parser: hermes or llama3_json")
        for name in ("max_body_bytes", "max_messages", "max_choices"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1")
        if not 1024 <= self.max_header_bytes <= 1 << 20:
            raise ConfigError("max_header_bytes", self.max_header_bytes, "must be between 1024 and 1048576")
        for name in self.__slots__:
            if name.endswith("_timeout") and not 0 < getattr(self, name) <= 1e6:
                raise ConfigError(name, getattr(self, name), "must be above 0 and at most 1000000 seconds")
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            problem = "must be an address over HTTP, such as http://127.0.0.1:4318/v1/traces"
            raise ConfigError("otlp_traces_endpoint", endpoint, problem)
        for key in self.api_key:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError("api_key", "(hidden)", "must be of visible ASCII characters, without spaces")
        if self.api_key_scope == "all" and not self.api_key:
            raise ConfigError("api_key_scope", "all", "needs api_key: --api-key or ATOMA_JAX_API_KEY")
        for name in self.served_model_name:
            if not name.strip() or not name.isprintable() or len(name) > 256:
                raise ConfigError("served_model_name", name, "must have 1 to 256 printable characters")
