"""`atoma-jax bench serve`: requests to any OpenAI-compatible server at chosen moments, and what became of them."""
