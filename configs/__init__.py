"""Configuration data shipped with atoma-jax: models, serving presets, mesh shapes. TOML files only, no code."""
