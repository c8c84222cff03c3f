"""Speed of collection and training, compared with other libraries in one run."""
