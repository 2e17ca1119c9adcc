"""An OpenAI-compatible HTTP server over `AsyncLLM`. Needs the extra `server`; only `atoma-jax serve` imports it."""
