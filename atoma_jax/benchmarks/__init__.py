"""What `atoma-jax bench` measures: throughput, latency and start-up of this engine. Prints nothing."""
