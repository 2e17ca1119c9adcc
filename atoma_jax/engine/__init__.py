"""The engine: host-side books (pages, prefix cache, sequences, scheduler) and the jitted step that they drive."""
