"""From what a user calls a model to a file or folder: names known here, and how they are fetched, checked and kept."""
